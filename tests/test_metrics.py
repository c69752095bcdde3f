"""Accuracy and entropy beside the loss, against float64 and on real ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.cases import Case, draw, tiles_of
from tests.oracle import metrics_oracle, relative_error
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import (
    CCEPipelineLoss,
    LossMetrics,
    VocabParallelOptions,
    linear_cross_entropy,
    multi_token_cross_entropy,
)

ROWS, PADDED = (9, 0, 14), 4
CASES: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0, "temperature": 0.7, "hidden_layout": "sharded", "shift": 1},
    {"label_smoothing": 0.1, "hidden_layout": "sequence", "shift": 2},
    {"z_loss": 0.01, "return_lse": True, "tile": (5, 4)},
    {"reduction": "none", "hidden_layout": "sequence"},
    {"backward": "probs", "ignore_index": 3},
    {"backward": "probs", "hidden_layout": "sharded", "tile": (7,)},
    {"backward": "probs", "reduction": "sum", "label_smoothing": 0.2},
    {"backward": "recompute", "num_valid_tokens": 7},
    {"impl": "reference", "softcap": 2.0, "label_smoothing": 0.1},
    {"ignored": 1.0},
]


class Step:
    """One call on this rank of a vocab group, with or without metrics."""

    def __init__(self, given: dict[str, Any], bias: bool) -> None:
        self.options = dict(given)
        ignored, self.tile = self.options.pop("ignored", 0.3), self.options.pop("tile", ())
        case = Case(ROWS, length=6, padding=PADDED, ignored=ignored, bias=bias, options=given)
        self.rank, self.degree = dist.get_rank(), dist.get_world_size()
        self.whole = draw(case, self.degree)
        self.size = sum(ROWS) - PADDED
        self.layout = given.get("hidden_layout", "replicated")
        # Among others, targets that are the largest.
        e, targets = self.whole.e, self.whole.targets
        logits = e @ self.whole.c.T + (self.whole.bias if bias else 0.0)
        best = logits[..., : self.size].argmax(-1)
        shift = given.get("shift", 0)
        hits = torch.arange(targets.shape[-1] - shift) % 2 == 0
        moved = targets[..., shift:]
        moved[:] = torch.where(hits & (moved != self.ignore_index), best[..., : len(hits)], moved)

    @property
    def ignore_index(self) -> int:
        return int(self.options.get("ignore_index", -100))

    def run(self, **more: Any) -> tuple[Any, list[Tensor], list[Any]]:
        """Return results, gradients, and the collectives with what each communicates."""
        start = sum(ROWS[: self.rank])
        rows = slice(start, start + ROWS[self.rank])
        e = self.whole.e[self.rank if self.layout == "sharded" else 0]
        if self.layout == "sequence":
            e = e.chunk(self.degree, -2)[self.rank]
        targets = self.whole.targets[self.rank if self.layout == "sharded" else 0]
        leaves = [e.clone().requires_grad_(), self.whole.c[rows].clone().requires_grad_()]
        bias = None if self.whole.bias is None else self.whole.bias[rows].clone().requires_grad_()
        options = VocabParallelOptions(rows.start, rows.stop, vocab_size=self.size)
        with tiles_of(*self.tile), CollectiveRecorder() as recorded:
            found: Any = linear_cross_entropy(
                *leaves, targets, bias, vocab_parallel_options=options, validate=False,
                **self.options, **more,
            )  # fmt: skip
            results = found if isinstance(found, tuple) else (found,)
            sum(each.sum() for each in results if isinstance(each, Tensor)).backward()
        grads = [t.grad for t in (*leaves, bias) if t is not None and t.grad is not None]
        return results, grads, recorded.calls

    def expected(self) -> tuple[Tensor, ...]:
        known = ("softcap", "temperature", "shift", "ignore_index")
        options = {name: value for name, value in self.options.items() if name in known}
        whole = self.whole
        return metrics_oracle(
            whole.e, whole.c, whole.targets, whole.bias, vocab_size=self.size, **options
        )


def check_metrics() -> None:
    """In every layout and plan: right, equal on all ranks, and all else is bit for bit the same."""
    for turn, given in enumerate(CASES):
        step = Step(given, bias=turn % 2 == 0)
        plain, plain_grads, plain_calls = step.run()
        results, grads, calls = step.run(return_metrics=True)
        metrics = results[-1]
        assert isinstance(metrics, LossMetrics), given
        assert not any(each.requires_grad or each.dim() for each in metrics), given
        want = step.expected()
        for name, found, exact in zip(LossMetrics._fields, metrics, want, strict=True):
            assert relative_error(found, exact) < 1e-12, (given, name, found, exact)
        assert given.get("ignored") or 0.3 < float(want[0]) < 0.9
        same: list[Any] = [None] * step.degree
        dist.all_gather_object(same, [each.item() for each in metrics])
        assert all(each == same[0] for each in same), given

        assert len(plain) == len(results) - 1
        for found, without in zip([*results[:-1], *grads], [*plain, *plain_grads], strict=True):
            assert torch.equal(found, without), given
        assert [call.name for call in calls] == [call.name for call in plain_calls], given
        more = sum(call.size for call in calls) - sum(call.size for call in plain_calls)
        assert more == 2 * step.whole.targets.numel() * 8, "two statistics a token, in float64"


def check_disagreement() -> None:
    options = VocabParallelOptions.from_vocab(20)
    e, c = torch.zeros(4, 3), torch.zeros(options.stop - options.start, 3)
    with pytest.raises(ValueError, match=r"must agree.*return_metrics"):
        linear_cross_entropy(
            e, c, torch.zeros(4, dtype=torch.int64), vocab_parallel_options=options,
            return_metrics=dist.get_rank() == 0,
        )  # fmt: skip


def check_ranks() -> None:
    check_metrics()
    check_disagreement()


def test_on_ranks() -> None:
    run_ranks(check_ranks, 3)


def test_ties_and_masks() -> None:
    """Two rows that are equal are both the arg-max; a NaN is no hit; a masked target is none."""
    e, c = torch.randn(6, 8), torch.randn(11, 8)
    e[:4] = c[7] = c[2] = 3.0 * torch.ones(8)
    targets = torch.tensor([7, 2, 3, 7, 5, 5])
    bias = torch.zeros(11)
    bias[5] = -torch.inf
    e[3, 0] = torch.nan
    for impl in ("chunked", "reference"):
        for options in ({}, {"memory_budget": 300}) if impl == "chunked" else ({},):
            _, metrics = linear_cross_entropy(
                e, c, targets, bias, impl=impl, return_metrics=True, **options
            )
            assert metrics.accuracy == torch.tensor(2 / 6), (impl, options)
            assert metrics.num_tokens == 6
    _, metrics = linear_cross_entropy(torch.zeros(5, 8), c, targets[:5], return_metrics=True)
    assert metrics.accuracy == 1.0, "logits that are all equal"
    assert relative_error(metrics.entropy, torch.tensor(11.0).log()) < 1e-6
    _, metrics = linear_cross_entropy(e[:2], c[:1], targets[:2] * 0, return_metrics=True)
    assert (metrics.accuracy, metrics.entropy) == (1.0, 0.0), "a vocabulary of one"


def test_sums_over_calls() -> None:
    """Metrics of parts, added by their sums, are those of the whole; asked for once a step."""
    e, c = torch.randn(4, 7, 8), torch.randn(11, 8)
    targets = torch.randint(11, (4, 7))
    targets[0, :3] = targets[2] = -100
    want = metrics_oracle(e, c, targets, shift=1)
    loss = CCEPipelineLoss(nn.Parameter(c), return_metrics=True)
    for _ in range(2):
        for own, labels in zip(e, targets, strict=True):
            assert loss(own, labels).dim() == 0
        for found, exact in zip(loss.metrics(), want, strict=True):
            assert relative_error(found, exact) < 1e-6
    with pytest.raises(ValueError, match="there was none"):
        loss.metrics()
    with pytest.raises(ValueError, match="with return_metrics=True"):
        CCEPipelineLoss(nn.Parameter(c)).metrics()


def test_refusals() -> None:
    e, c, targets = torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="has no return_metrics"):
        multi_token_cross_entropy(e, c, targets, shift=(1, 2), return_metrics=True)
    with pytest.raises(ValueError, match="of one prediction of each position"):
        CCEPipelineLoss(nn.Parameter(c), shift=(1, 2), return_metrics=True)
    with pytest.raises(ValueError, match="must be True or False"):
        linear_cross_entropy(e[0], c, targets, return_metrics=3)  # type: ignore[call-overload]
