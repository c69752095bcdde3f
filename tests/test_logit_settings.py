"""Settings of the logits by name: what they come to, what is refused, and in launch end to end."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch import evaluation
from launch.arguments import EvaluateArguments, TrainArguments
from launch.check import compare_with_one_process
from launch.model import build_stage
from launch.sharded_body import named_gradients
from launch.training_pipeline import build_pipeline, model_of
from launch.weights import RandomWeights
from stage_groups import build_stage_groups
from tests.batches import batches_of_ids
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.test_causal_families import NEUTRAL, batch, tiny_model
from vocab_parallel.logit_settings import logit_settings, refuse_other_losses


@pytest.mark.parametrize(
    ("given", "softcap", "temperature"),
    [
        ({}, None, 1.0),
        ({"final_logit_softcapping": 30}, 30.0, 1.0),
        ({"model_type": "cohere", "logit_scale": 0.0625}, None, 16.0),
        ({"model_type": "granite", "logits_scaling": 8.0}, None, 8.0),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, None, 0.125),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, None, 1.0),
        ({"attn_logit_softcapping": 50.0, "moe_router_logit_softcapping": 3.0}, None, 1.0),
        ({"logit_scale": None, "lm_head_multiplier": 1, "scale_logits": False}, None, 1.0),
        ({"model_type": "gemma4", "text_config": {"final_logit_softcapping": 2}}, 2.0, 1.0),
    ],
)
def test_settings(given: dict[str, Any], softcap: float | None, temperature: float) -> None:
    expected = {"softcap": softcap, "temperature": temperature}
    assert logit_settings(given) == logit_settings(SimpleNamespace(**given)) == expected
    assert logit_settings(None) == NEUTRAL


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale must be a positive number, got 0.0"),
        ({"logits_scaling": -1}, "logits_scaling must be a positive number, got -1"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number"),
        ({"logit_scale": float("nan")}, "must be a positive number, got nan"),
        ({"logits_scaling": True}, "must be a positive number, got True"),
        ({"lm_head_scale": 2.0}, "are known, got lm_head_scale=2.0 in the configuration of"),
        ({"output_logits_cap": 1.0}, "got output_logits_cap=1.0"),
        ({"mup_width_multiplier": 8.0}, "got mup_width_multiplier=8.0"),
        ({"logit_scale": 2.0, "final_logit_softcapping": 3.0}, "one setting of the logits at most"),
        ({"unpadded_vocab_size": 90, "vocab_size": 97}, "every row of its classifier"),
        ({"model_type": "llava", "text_config": {"logits_scaling": 2}}, "logits_scaling=2 of"),
        ({"model_type": "gemma4", "logit_scale": 2, "text_config": {}}, "known to apply, got log"),
        ({"is_encoder_decoder": True, "model_type": "t5"}, "decoder alone, got t5"),
        ({"model_type": "musicgen_decoder"}, "several codebooks"),
        ({"output_router_logits": True}, "without auxiliary terms, got output_router_logits=True"),
        ({"text_config": {"output_router_logits": True}}, "set it to False"),
        ({"z_loss_coefficient": 0.1}, "got z_loss_coefficient=0.1"),
    ],
)
def test_refused_configurations(given: dict[str, Any], message: str) -> None:
    def read(config: Any) -> None:
        refuse_other_losses(config)
        logit_settings(config)

    for config in (given, SimpleNamespace(**given)):
        with pytest.raises(ValueError, match=message):
            read(config)


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
