"""Documents that share a sequence: labels, positions, and equality with separate sequences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

from launch.arguments import TrainArguments
from launch.attention import refuse_to_look_across
from launch.check import compare_with_one_process
from launch.data.batches import IGNORED, Batch
from launch.data.tokenizers import Document
from launch.model import Stage, build_stage
from launch.sharded_body import named_gradients
from launch.training_pipeline import build_pipeline, model_of
from launch.weights import RandomWeights
from stage_groups import build_stage_groups
from tests.batches import batches_of_documents
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.test_causal_families import tiny_model
from vocab_parallel import sum_over_columns

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def test_labels_and_positions() -> None:
    """Documents of 3, 6 and 7 tokens in rows of 8; the last but three tokens do not count."""
    documents = [Document([1, 2, 3]), Document([4, 5, 6, 7, 8, 9], [True] * 3 + [False] * 3)]
    documents += [Document([]), Document([10, 11, 12, 13, 14, 15, 16])]
    found = batches_of_documents(documents, steps=1, batch=2, sequence=8, packed=True)
    batch = found[0]
    assert batch.position_ids is not None
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6]]
    n = IGNORED
    assert batch.labels.tolist() == [[n, 2, 3, n, 5, 6, n, n], [n, n, 11, 12, 13, 14, 15, 16]]
    first, second = batch.chunk(2)
    assert torch.equal(torch.cat([first.labels, second.labels]), batch.labels)
    assert second.for_stages()["position_ids"].tolist() == batch.position_ids[1:].tolist()


def loss_of(stages: list[Stage], batch: Batch, count: int) -> Tensor:
    """Return the sum over the labels, divided: stage by stage, as a pipeline calls them."""
    hidden = batch.ids
    for stage in stages:
        hidden = stage.hidden_states(hidden, batch.position_ids)
    logits = F.linear(hidden[:, :-1], stages[-1].lm_head.weight)
    labels = batch.labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma", "gemma3_text", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_equals_separate(family: str, implementation: str, dtype: torch.dtype) -> None:
    """Loss and every gradient, of a model cut into two stages; windows shorter than a document."""
    config = AutoConfig.for_model(
        family, **SIZES, sliding_window=4, use_cache=False, tie_word_embeddings=False,
        attn_implementation=implementation,
    )  # fmt: skip
    device = torch.device("cpu")
    stages = [
        build_stage(config, RandomWeights(0, 0.02), index, 2, None, device=device, dtype=dtype)
        for index in range(2)
    ]
    lengths = [3, 9, 1, 5, 6]  # 24 tokens in two rows of 12
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]
    packed = batches_of_documents(
        map(Document, documents), steps=1, batch=2, sequence=12, packed=True
    )[0]
    count = int((packed.labels[:, 1:] != IGNORED).sum())
    assert count == sum(n - 1 for n in lengths)
    loss = loss_of(stages, packed, count)
    loss.backward()
    found = [named_gradients(stage) for stage in stages]
    for stage in stages:
        stage.zero_grad()
    separate = torch.zeros((), dtype=dtype)
    for document in documents:
        ids = torch.tensor([document])
        if len(document) > 1:
            separate = separate + loss_of(stages, Batch(ids, ids), count)
    separate.backward()
    # Eager attention's softmax and Gemma's norms are float32, whatever the weights are.
    wide = implementation == "sdpa" and not family.startswith("gemma")
    exact = dtype == torch.float64 and wide
    allowed = 1e-10 if exact else 1e-6
    assert relative_error(loss, separate) < allowed
    for stage, gradients in zip(stages, found, strict=True):
        expected = named_gradients(stage)
        assert gradients.keys() == expected.keys()
        for name, wanted in expected.items():
            assert relative_error(gradients[name], wanted) < 10 * allowed, name
        assert relative_error(joined(gradients), joined(expected)) < allowed
    # The mask matters: one stream of the same tokens is another loss.
    stream = Batch(packed.ids, packed.labels)
    assert relative_error(loss_of(stages, stream, count), separate) > 1e-5


@pytest.mark.parametrize(
    ("family", "apart"),
    [
        ("llama", True), ("qwen3_moe", True), ("cohere2", True), ("llama4_text", True),
        ("gemma3n_text", True), ("qwen3_5_text", False), ("minimax", False), ("gpt_oss", False),
    ],
)  # fmt: skip
def test_who_keeps_documents_apart(family: str, apart: bool) -> None:
    """Recurrent layers, and families that drop the positions on the way to their masks, do not."""
    stage = Stage(tiny_model(family).train().model, None)
    if apart:
        refuse_to_look_across([stage])
    else:
        with pytest.raises(ValueError, match=r"looks across the documents .* --packed no trains"):
            refuse_to_look_across([stage])
    assert stage.training


def check_schedules() -> None:
    """Packed microbatches with masked labels, on two stages a rank or one, against one process."""
    groups, device = build_stage_groups(2, 1, device_type="cpu"), torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    documents = (
        Document(torch.randint(97, (n,), generator=generator).tolist(), [True, False] * (n // 2))
        for n in (4, 2, 6, 20) * 10
    )
    batches = batches_of_documents(documents, steps=1, batch=8, sequence=16, packed=True)
    for schedule in (
        "1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble",
        "DualPipeV",
    ):  # fmt: skip
        arguments = TrainArguments(
            pipeline=2, vocab=1, microbatches=4, accumulate=2, batch=8, sequence=16, steps=1,
            vocabulary=97, hidden=32, schedule=schedule,
        )  # fmt: skip
        pipeline = build_pipeline(arguments, *model_of(arguments), groups, device)
        loss = pipeline.accumulate(batches[0], 2)
        sum_over_columns(pipeline.stages, groups)
        told: list[Any] = [None, None]
        own = None if loss is None else float(loss)
        torch.distributed.all_gather_object(told, (own, named_gradients(pipeline.stages)))
        gradients = told[0][1] | told[1][1]
        losses = [one for one, _ in told if one is not None]
        comparison = compare_with_one_process(arguments, batches, losses, gradients, device)
        assert comparison.passed, (schedule, comparison)
        assert len(comparison.gradients) > 40


def test_schedules() -> None:
    run_ranks(check_schedules, 2)
