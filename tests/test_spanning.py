"""A pipeline whose every rank carries rows of the classifier, against one process in float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from stage_groups import StageGroups, build_stage_groups
from stage_groups.build import build_column_group
from tests.oracle import oracle, relative_error
from tests.ranks import rank_device, run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import VocabParallelClassifier
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.pipeline.spanning import SpanGroups, SpanningLoss
from vocab_parallel.pipeline.spanning_schedule import SpanningSchedule

HIDDEN, LENGTH, RANKS = 6, 5, 4
SINGLE = ("1F1B",)
V_SHAPED = ("ZBVZeroBubble",)


class Stage(nn.Module):
    def __init__(self, whole: nn.ModuleDict, index: int, rows: nn.Module | None) -> None:
        super().__init__()
        self.embedding = whole["embedding"] if index == 0 else None
        self.layer = whole[f"layer{index}"]
        self.rows = rows  # of one of the rank's stages; the loss reads them

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.embedding is None else self.embedding(inputs)
        return torch.tanh(self.layer(hidden))


def toy(num_stages: int, vocabulary: int, bias: bool) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {f"layer{i}": nn.Linear(HIDDEN, HIDDEN) for i in range(num_stages)}
    head = nn.Linear(HIDDEN, vocabulary, bias=bias)
    embedding = nn.Embedding(vocabulary, HIDDEN)
    return nn.ModuleDict({"embedding": embedding, **layers, "head": head}).double()


def one_process(
    num_stages: int, tokens: Tensor, labels: Tensor, microbatches: int, case: dict[str, Any]
) -> tuple[list[Tensor], nn.ModuleDict]:
    vocabulary, bias = case["vocabulary"], case.get("bias", False)
    whole, losses = toy(num_stages, vocabulary, bias), []
    for own, target in zip(tokens.chunk(microbatches), labels.chunk(microbatches), strict=True):
        hidden = whole["embedding"](own)
        for index in range(num_stages):
            hidden = torch.tanh(whole[f"layer{index}"](hidden))
        options = {"shift": 1, **case.get("options", {})}
        options.pop("backward", None)
        head: Any = whole["head"]
        loss, _ = oracle(hidden, head.weight, target, head.bias, **options)
        (loss / microbatches).backward()
        losses.append(loss.detach())
    return losses, whole


def column(groups: StageGroups) -> SpanGroups:
    return SpanGroups(*(VocabGroup.of(build_column_group(groups)) for _ in range(3)))


def check_case(groups: StageGroups, span: SpanGroups, case: dict[str, Any]) -> list[Tensor]:
    """Two steps; return what the second left, to be compared bit by bit."""
    name, microbatches = case["schedule"], case["microbatches"]
    num_stages = RANKS * (1 if name in SINGLE else 2)
    style: Any = "v" if name in V_SHAPED else "loop"
    generator = torch.Generator().manual_seed(1)
    vocabulary = case["vocabulary"]
    tokens = torch.randint(vocabulary, (2 * microbatches, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    if microbatches > 2:
        labels[2:4] = -100  # a microbatch of padding alone
    expected_losses, expected = one_process(num_stages, tokens, labels, microbatches, case)

    device = rank_device()
    tokens, labels = tokens.to(device), labels.to(device)
    whole = toy(num_stages, vocabulary, case.get("bias", False)).to(device)
    rows = VocabParallelClassifier.from_linear(
        whole["head"], span.statistics.group, rows=case.get("rows")
    )
    indices = groups.stages(num_stages, style)
    modules = [Stage(whole, i, rows if i == indices[0] else None) for i in indices]
    stages = [
        PipelineStage(module, i, num_stages, device, group=groups.pipeline_group)
        for module, i in zip(modules, indices, strict=True)
    ]
    last = 0 if name in V_SHAPED else RANKS - 1
    loss = SpanningLoss(
        rows, span, last, **case.get("options", {}), impl_options=case.get("impl", {})
    )
    schedule = SpanningSchedule(stages, microbatches, loss, name)
    left: list[Tensor] = []
    for turn in range(2):
        for module in modules:
            module.zero_grad()
        losses: list[Tensor] = []
        with CollectiveRecorder() as recorded:
            schedule.step(
                *([tokens] if 0 in indices else []),
                target=labels,
                losses=losses if num_stages - 1 in indices else None,
                return_outputs=False,
            )
        if turn:  # the first step also tells the shape
            names = [call.name for call in recorded.calls]
            for kind in ("broadcast", "all_gather", "reduce"):
                assert names.count(kind) == microbatches, (case, names)
        found = {f"loss{i}": value.detach() for i, value in enumerate(losses)}
        for i, value in enumerate(losses):
            assert relative_error(value.cpu(), expected_losses[i], 1.0) < 1e-12, case
        for module, i in zip(modules, indices, strict=True):
            for key, parameter in module.named_parameters():
                if key.startswith("rows."):
                    want = expected["head"].get_parameter(key[5:]).grad[rows.start : rows.stop]
                else:
                    want = expected.get_parameter(key.replace("layer", f"layer{i}")).grad
                assert relative_error(parameter.grad.cpu(), want, 1e-3) < 1e-10, (case, i, key)
                found[f"{i}.{key}"] = parameter.grad.clone()
        again = list(found.values())
        if left:
            assert all(torch.equal(a, b) for a, b in zip(left, again, strict=True)), case
        left = again
    return left


CASES: list[dict[str, Any]] = [
    *({"schedule": "1F1B", "microbatches": m, "vocabulary": 23} for m in (1, 2, 4, 8)),
    {"schedule": "Interleaved1F1B", "microbatches": 8, "vocabulary": 23},
    {"schedule": "InterleavedZeroBubble", "microbatches": 8, "vocabulary": 24},
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 23},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 9},  # a rank without rows
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 23, "rows": [0, 17, 1, 5]},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "bias": True,
     "options": {"softcap": 2.0, "temperature": 0.7, "z_loss": 0.01}},
    {"schedule": "ZBVZeroBubble", "microbatches": 8, "vocabulary": 23, "bias": True,
     "options": {"softcap": 2.0}, "impl": {"chunk_rows": 2, "chunk_tokens": 3}},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "options": {"backward": "recompute"}},
    {"schedule": "1F1B", "microbatches": 4, "vocabulary": 23, "options": {"backward": "probs"}},
]  # fmt: skip


def check_all() -> None:
    groups = build_stage_groups(RANKS, 1, device_type=rank_device().type)
    span = column(groups)
    for case in CASES:
        check_case(groups, span, case)
    check_refusals(span)


def check_refusals(span: SpanGroups) -> None:
    rows = VocabParallelClassifier(HIDDEN, 9, group=span.statistics.group)
    for options, message in (
        ({"label_smoothing": 0.1}, "does not take label_smoothing=0.1"),
        ({"backward": "gradients"}, "does not take backward='gradients'"),
        ({"hidden_layout": "sharded"}, "does not take hidden_layout='sharded'"),
        ({"z_loss": -1.0}, "z_loss must be a number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SpanningLoss(rows, span, 0, **options)
    dist.barrier()


def test_every_rank_carries_the_vocabulary() -> None:
    run_ranks(check_all, RANKS, timeout=110)


def test_a_loss_that_is_scaled_is_refused() -> None:
    rows = VocabParallelClassifier(16, 50, group=None)
    alone = VocabGroup()
    loss = SpanningLoss(rows, SpanGroups(alone, alone, alone), 0, shift=0)
    leaf = torch.randn(1, 9, 16, requires_grad=True)
    value = loss.deferred(leaf, 0)
    loss.broadcast(0, leaf)
    loss.statistics(0, torch.randint(50, (1, 9)))
    loss.exchange(0)
    with pytest.raises(ValueError, match=r"received 2\.0"):
        (2.0 * value).backward()


def test_share_of_a_confident_token() -> None:
    """The targets' part is added in float32: no rounded probability minus one."""
    torch.manual_seed(0)
    c = torch.randn(50, 16)
    targets = torch.randint(50, (1, 9))
    e = (6.0 * c[targets] / c[targets].norm(dim=-1, keepdim=True)).bfloat16()
    rows = VocabParallelClassifier(16, 50, group=None, dtype=torch.bfloat16)
    with torch.no_grad():
        rows.weight.copy_(c)
    alone = VocabGroup()
    loss = SpanningLoss(rows, SpanGroups(alone, alone, alone), 0, shift=0)
    leaf = e.clone().requires_grad_()
    value = loss.deferred(leaf, 0)
    loss.broadcast(0, leaf)
    loss.statistics(0, targets)
    loss.exchange(0)
    value.backward()
    loss.gradients(0)
    wide = [t.detach().double().requires_grad_() for t in (e, rows.weight)]
    F.cross_entropy((wide[0] @ wide[1].T)[0], targets[0]).backward()
    half = [t.detach().clone().requires_grad_() for t in (e, rows.weight)]
    F.cross_entropy(F.linear(*half)[0].float(), targets[0]).backward()
    for ours, peer, want in zip((leaf, rows.weight), half, wide, strict=True):
        assert relative_error(ours.grad, want.grad) <= 1.1 * relative_error(peer.grad, want.grad)
