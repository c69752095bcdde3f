"""What launch reads of a model's logits and loss: values, what is refused, and end to end."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from launch import evaluation
from launch.arguments import EvaluateArguments, TrainArguments
from launch.check import compare_with_one_process
from launch.logit_settings import logit_settings
from launch.model import build_stage
from launch.sharded_body import named_gradients
from launch.training_pipeline import build_pipeline, model_of
from launch.weights import RandomWeights
from stage_groups import build_stage_groups
from tests.batches import batches_of_ids
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.test_causal_families import batch, tiny_model
from tests.test_layers import SIZES


def config_of(family: str, **more: Any) -> Any:
    return AutoConfig.for_model(family, **SIZES, **more)


@pytest.mark.parametrize(
    ("family", "given", "softcap", "temperature"),
    [
        ("llama", {"logit_scale": 3.0, "output_logits_cap": 2.0}, None, 1.0),  # it reads neither
        ("gemma2", {"final_logit_softcapping": 30.0}, 30.0, 1.0),
        ("gemma2", {"final_logit_softcapping": 49.0}, 49.0, 1.0),  # 1 / 49 * 49 is below 1
        ("gemma2", {"final_logit_softcapping": None}, None, 1.0),
        ("cohere", {"logit_scale": 0.0625}, None, 16.0),
        ("granite", {"logits_scaling": 8.0}, None, 8.0),
        ("hyperclovax", {"logits_scaling": 8.0}, None, 0.125),
        ("minicpm3", {"dim_model_base": 8}, None, 4.0),  # of its hidden states
    ],
)
def test_settings(
    family: str, given: dict[str, Any], softcap: float | None, temperature: float
) -> None:
    """Every family of which a model is made is in test_causal_families."""
    random = torch.get_rng_state()
    found = logit_settings(config_of(family, **given))
    assert found["softcap"] == (softcap and pytest.approx(softcap))
    assert found["temperature"] == temperature
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("cohere", {"logit_scale": 0.0}, "positive number or capped, got CohereForCausalLM: Zero"),
        ("granite", {"logits_scaling": -1.0}, "its logits have softcap=None, temperature=-1.0"),
        ("cohere", {"logit_scale": math.nan}, "its logits have softcap=None, temperature=nan"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "got Gemma2ForCausalLM: ZeroDivisionError"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "its logits have softcap=-1.0"),
        ("qwen3_moe", {"output_router_logits": True}, "adds the router's: set it to False"),
        ("phimoe", {"lm_head_bias": True}, "a classifier without a bias, got that of PhimoeFor"),
        ("gpt2", {}, "cannot be cut into stages"),
    ],
)
def test_refused_configurations(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_settings(config_of(family, **given))


def cross_entropy(logits: Any, labels: torch.Tensor, **more: Any) -> Any:
    return F.cross_entropy(logits.view(-1, SIZES["vocab_size"]), labels.view(-1), **more)


# By what is said of each: losses of a classifier, of hidden states and of shifted labels.
LOSSES: dict[str, Callable[..., Any]] = {
    "calls logsumexp on them": lambda head, hidden, labels: (
        cross_entropy(head(hidden), labels) + head(hidden).logsumexp(-1).square().mean()
    ),
    "calls __getitem__ on them": lambda head, hidden, labels: F.cross_entropy(
        head(hidden)[..., :90].view(-1, 90), labels.view(-1)
    ),
    "not one cross-entropy alone": lambda head, hidden, labels: cross_entropy(
        head(hidden), labels
    ).add_(0.5),
    "one cross-entropy alone": lambda head, hidden, labels: (
        (cross_entropy(head(hidden), labels) + cross_entropy(head(hidden), labels)) / 2
    ),
    "labels are not shifted": lambda head, hidden, labels: cross_entropy(
        head(hidden), labels.roll(1)
    ),
    "reduction='sum'": lambda head, hidden, labels: cross_entropy(
        head(hidden), labels, reduction="sum"
    ),
    "'label_smoothing'": lambda head, hidden, labels: cross_entropy(
        head(hidden), labels, label_smoothing=0.1
    ),
    "softcap=2.0, temperature=4.0": lambda head, hidden, labels: cross_entropy(
        torch.tanh(head(hidden) / 2.0) / 2.0, labels
    ),
    "other hidden states than its body's": lambda head, hidden, labels: cross_entropy(
        head(hidden.add_(1.0)), labels
    ),
}


@pytest.mark.parametrize("message", LOSSES)
def test_refused_losses(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose loss is more, or other, than that of a scale or a softcap."""

    def forward(self: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        return SimpleNamespace(loss=LOSSES[message](self.lm_head, hidden, shifted))

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match=f"got LlamaForCausalLM: .*{message}"):
        logit_settings(config_of("llama"))


def check_launch(folders: list[str]) -> None:
    """Two stages, the check in one process and the evaluation, against the model's own loss."""
    groups, device = build_stage_groups(2, 1, device_type="cpu"), torch.device("cpu")
    ids = batch()["input_ids"]
    batches = batches_of_ids(ids[None])
    for folder in folders:
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss_of_whole = whole(ids, labels=ids).loss
        loss_of_whole.backward()
        expected = float(loss_of_whole.detach())
        arguments = TrainArguments(
            pipeline=2, vocab=1, microbatches=2, batch=2, sequence=8, steps=1, model=folder
        )
        pipeline = build_pipeline(arguments, *model_of(arguments), groups, device)
        found = pipeline.accumulate(batches[0], 1)
        assert (found is None) == (not pipeline.has_last)
        loss = None if found is None else float(found)
        exact = named_gradients(whole)
        for name, gradient in named_gradients(pipeline.stages).items():
            assert relative_error(gradient, exact[name]) < 1e-4, name
        if loss is not None:
            assert abs(loss / expected - 1) < 1e-5
            assert compare_with_one_process(arguments, batches, [loss], exact, device).passed
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "load_batches_on_all", lambda *_, **__: batches)
            scores = evaluation.evaluate(EvaluateArguments(folder), device)
        assert abs(scores.perplexity / math.exp(expected) - 1) < 1e-5


def test_launch(tmp_path: Path) -> None:
    """Granite and Cohere end to end: their scales, and Granite's of the embedding once."""
    scales = {"embedding_multiplier": 2.5, "residual_multiplier": 0.7}
    for family, more in (("granite", scales), ("cohere", {})):
        tiny_model(family, tie_word_embeddings=False, **more).save_pretrained(tmp_path / family)
    run_ranks(check_launch, 2, folders=[str(tmp_path / "granite"), str(tmp_path / "cohere")])


def test_models_that_cannot_be_cut() -> None:
    """Values that no parameter has, or work before the first layer: refused, not left out."""
    source, device = RandomWeights(0, 0.2), torch.device("cpu")
    for family, num_stages, message in (
        ("apertus", 1, r"has a buffer model\.layers\.0\.mlp\.act_fn\.beta"),
        ("nanochat", 2, "normalises its embeddings before the first layer"),
        ("nanochat", 1, None),
    ):
        config = tiny_model(family, tie_word_embeddings=False).config
        given = (config, source, 0, num_stages, None)
        if message is None:
            build_stage(*given, device=device, dtype=torch.float32)
        else:
            with pytest.raises(ValueError, match=message):
                build_stage(*given, device=device, dtype=torch.float32)
