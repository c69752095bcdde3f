"""Decoder layers without masks, compiled and recomputed: what reaches the kernels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import utils as dynamo
from transformers import AutoConfig, masking_utils

from launch.data.batches import Batch
from launch.layers import prepare_layers, warm_up
from launch.model import Stage, build_stage
from launch.sharded_body import named_gradients
from launch.weights import RandomWeights
from tests.oracle import relative_error

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
    "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip


def stage_of(family: str, **more: Any) -> Stage:
    config = AutoConfig.for_model(family, **SIZES, **more)
    return build_stage(config, RandomWeights(0, 0.2), 0, 1, None, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma", "olmo2", "phi3", "qwen2"])
def test_no_mask_and_no_question(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at position ids on the host; sdpa is causal, or has one mask of documents."""
    stage = stage_of(family)
    given: list[dict[str, Any]] = []
    plain = F.scaled_dot_product_attention

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        given.append(options)
        return plain(*arguments, **options)

    def asked(*_: Any) -> None:
        raise AssertionError("the host would wait")

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", asked)
    ids = torch.randint(1, 97, (2, 8))
    stage(ids)
    assert len(given) == 4
    assert all(one["is_causal"] and one["attn_mask"] is None for one in given)
    given.clear()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]])
    stage(ids, positions)
    mask = given[0]["attn_mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (2, 1, 8, 8)
    rows = ["11100000", "11100000", "11100000", "00011111", "00011111"]
    for query, row in enumerate(rows):
        wanted = [int(row[key]) and key <= query for key in range(8)]
        assert mask[0, 0, query].tolist() == list(map(bool, wanted))
    assert mask[1, 0, 7].tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4}),
        ("qwen3", {"attn_implementation": "eager"}),
    ],
)
def test_who_keeps_masks(family: str, more: dict[str, Any]) -> None:
    """Windows, and attention other than sdpa: transformers makes what they need."""
    stage = stage_of(family, **more)
    assert not stage.makes_masks
    assert stage.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled(recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for all layers, made by the warm-up; the gradients are the plain layers'."""
    plain, stage = stage_of("qwen3"), stage_of("qwen3")
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *given, **more: compiler(*given, backend="aot_eager", **more)
    )
    torch._dynamo.reset()
    dynamo.counters.clear()
    prepare_layers(stage.model, compiled=True, recomputed=recomputed)
    ids = torch.randint(97, (2, 8))
    warm_up([stage], Batch(ids, ids))
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    assert not named_gradients(stage)
    for one in (plain, stage):
        one(ids).square().sum().backward()
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.counters["graph_break"]
    found, expected = named_gradients(stage), named_gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-6, name


def test_recomputed_layers_keep_their_input_alone() -> None:
    ids = torch.randint(97, (2, 8))
    kept = []
    for recomputed in (False, True):
        stage, saved = stage_of("qwen3"), [0]
        prepare_layers(stage.model, compiled=False, recomputed=recomputed)

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved[0] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stage(ids)
        kept.append(saved[0])
    assert kept[1] < kept[0] / 4
