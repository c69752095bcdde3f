"""One case of the loss on the ranks of a vocab group, compared with the oracle."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests.oracle import oracle, relative_error
from tests.ranks import rank_device
from vocab_parallel import VocabParallelOptions, arguments, linear_cross_entropy, plan
from vocab_parallel.backends import torch as torch_backend

# Below these norms an error is compared with the floor: a loss of 0 is the difference of two
# logits of ordinary size, and rounds as they do.
LOSS_FLOOR, GRAD_FLOOR = 1.0, 0.1
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Operands, drawn from a seed, and the options of one call.

    Attributes:
        batch, length, hidden: the shape of the hidden states: of one rank's in the "sharded"
            layout, else of the whole.
        rows: how many rows each rank holds.
        padding: how many of the last rows are no tokens.
        ignored: the share of labels that are ignored.
        owned: labels come from these ranks' rows alone, from all where it is None.
    """

    rows: tuple[int, ...]
    batch: int = 2
    length: int = 6
    hidden: int = 8
    padding: int = 0
    ignored: float = 0.2
    owned: tuple[int, ...] | None = None
    seed: int = 0
    dtype: str = "float64"
    row_dtype: str = ""  # of the classifier, where it has its own
    label_dtype: str = "int64"
    bias: bool = False
    weights: bool = False
    scale: float = 1.0
    noncontiguous: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        default = Case(self.rows)
        return str(
            {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
            | {"rows": self.rows}
        )


@contextmanager
def spans_of(tokens: int | None, longest: int = 10) -> Iterator[None]:
    """Let calls of more tokens than ``longest`` go in spans of so many, or no call."""
    before = plan._LONG_CALL, plan._SPAN_TOKENS
    plan._LONG_CALL = longest if tokens else 2**60
    plan._SPAN_TOKENS = tokens or before[1]
    arguments.forget()
    try:
        yield
    finally:
        plan._LONG_CALL, plan._SPAN_TOKENS = before
        arguments.forget()


@contextmanager
def tiles_of(tokens: int | None = None, rows: int | None = None) -> Iterator[None]:
    """Let this process work in tiles of at most so many tokens and rows, whatever the budget.

    Where a side is given, a plan made meanwhile must ask for its tile. Where rows are given, no
    tile is longer for lying in the classifier's gradient.
    """
    by_budget = plan.tile_shape
    borrows = torch_backend._GradientTiles.borrows
    asked: list[plan.TileShape] = []

    def cut(num_tokens: int, num_rows: int, *budget: Any) -> plan.TileShape:
        asked.append(by_budget(num_tokens, num_rows, *budget))
        sides = tokens or asked[-1].tokens, rows or asked[-1].rows
        return plan.TileShape(min(sides[0], num_tokens), min(sides[1], num_rows))

    def forget() -> None:
        arguments.forget()
        plan.chosen.cache_clear()

    def may_borrow(*given: Any) -> bool:
        return not rows and borrows(*given)

    forget()
    try:
        with (
            patch.object(plan, "tile_shape", cut),
            patch.object(torch_backend._GradientTiles, "borrows", may_borrow),
        ):
            yield
    finally:
        forget()
    assert asked or not (tokens or rows), "nobody asked for a tile"


@dataclass(frozen=True)
class Operands:
    """The whole of a case, equal on every rank."""

    e: Tensor  # (columns, batch, length, D); one column but in the "sharded" layout
    c: Tensor
    targets: Tensor
    bias: Tensor | None
    weights: Tensor | None
    upstream: Tensor  # a gradient for each token of (columns, batch, length)


def draw(case: Case, degree: int) -> Operands:
    """Draw the whole of a case; every rank draws the same."""
    generator = torch.Generator().manual_seed(case.seed)
    columns = degree if case.options.get("hidden_layout") == "sharded" else 1
    shape = (columns, case.batch, case.length)
    dtype = getattr(torch, case.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(case.rows)
    ends = torch.tensor(case.rows).cumsum(0).tolist()
    vocabulary = total - case.padding
    allowed = [
        row
        for rank, end in enumerate(ends)
        if case.owned is None or rank in case.owned
        for row in range(end - case.rows[rank], end)
        if row < vocabulary
    ] or list(range(vocabulary))
    picks = torch.randint(len(allowed), shape, generator=generator)
    targets = torch.tensor(allowed)[picks].to(getattr(torch, case.label_dtype))
    dropped = torch.rand(shape, generator=generator) < case.ignored
    targets[dropped] = case.options.get("ignore_index", -100)
    return Operands(
        e=normal(*shape, case.hidden) * case.scale,
        c=normal(total, case.hidden).to(getattr(torch, case.row_dtype or case.dtype)),
        targets=targets,
        bias=normal(total) if case.bias else None,
        weights=torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        if case.weights
        else None,
        upstream=torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def differences(case: Case, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Run the case on every rank; return the relative errors of this rank's results."""
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    whole = draw(case, degree)
    expected = _expected(case, whole)
    actual = _actual(case, whole, group)

    start, stop = _row_range(case, rank)
    reduction = case.options.get("reduction", "mean")
    shift = case.options.get("shift", 0)
    errors = {}
    if reduction == "none":
        own = _own_results(expected["loss"], case, rank, degree, shift)
        errors["loss"] = relative_error(actual["loss"], own, LOSS_FLOOR)
    else:
        errors["loss"] = relative_error(actual["loss"], expected["loss"], LOSS_FLOOR)
    if "lse" in actual:
        own = _own_results(expected["lse"], case, rank, degree, shift)
        errors["lse"] = relative_error(actual["lse"], own, LOSS_FLOOR)
    scale = case.options.get("hidden_grad_scale", 1.0)
    hidden_grad = scale * _own_hidden(expected["e"], case, rank, degree)
    errors["e"] = relative_error(actual["e"], hidden_grad, GRAD_FLOOR)
    errors["c"] = relative_error(actual["c"], expected["c"][start:stop], GRAD_FLOOR)
    if case.bias:
        errors["bias"] = relative_error(actual["bias"], expected["bias"][start:stop], GRAD_FLOOR)
    return errors


def check_case(case: Case, group: dist.ProcessGroup | None = None) -> None:
    """Assert on every rank that the case is right; fails on all ranks where it fails on one."""
    errors: dict[str, float] | None = None
    fault = ""
    try:
        errors = differences(case, group)
        # The error of a logit is relative to it, that of its exponential is the logit's own.
        tolerance = TOLERANCE[getattr(torch, case.dtype)] * max(1.0, case.scale / 10)
        if case.batch * case.length * case.hidden < 4:
            tolerance *= 10.0  # a single number may be what is left where large ones cancel
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        fault = f"{case}: {wrong}" if wrong else ""
    except Exception as error:
        fault = f"{case}: {error!r}"
    faults: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    assert not any(faults), [f"rank {rank}: {text}" for rank, text in enumerate(faults) if text]


def _row_range(case: Case, rank: int) -> tuple[int, int]:
    start = sum(case.rows[:rank])
    return start, start + case.rows[rank]


def _expected(case: Case, whole: Operands) -> dict[str, Tensor]:
    e, c = (tensor.double().clone().requires_grad_() for tensor in (whole.e, whole.c))
    bias = None if whole.bias is None else whole.bias.double().clone().requires_grad_()
    skipped = (
        "hidden_layout",
        "return_lse",
        "hidden_grad_scale",
        "impl",
        "filter_eps",
        "logits_dtype",
        "backward",
        "memory_budget",
    )
    options = {k: v for k, v in case.options.items() if k not in skipped}
    loss, lse = oracle(
        e,
        c,
        whole.targets,
        bias,
        token_weight=whole.weights,
        vocab_size=c.shape[0] - case.padding,
        **options,
    )
    upstream = whole.upstream[..., : case.length - options.get("shift", 0)]
    objective = (loss * upstream).sum() if options.get("reduction") == "none" else loss
    if case.options.get("return_lse"):
        objective = objective + (lse * upstream).sum()
    if objective.requires_grad:
        objective.backward()
    found = {"loss": loss.detach(), "lse": lse.detach(), "e": _grad(e), "c": _grad(c)}
    return found if bias is None else {**found, "bias": _grad(bias)}


def _actual(case: Case, whole: Operands, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    rank, degree = dist.get_rank(group), dist.get_world_size(group)
    device = rank_device()
    start, stop = _row_range(case, rank)

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device).clone()
        if case.noncontiguous:
            tensor = tensor.movedim(-1, 0).contiguous().movedim(0, -1)
        return tensor.requires_grad_()

    e = leaf(_own_hidden(whole.e, case, rank, degree))
    c = leaf(whole.c[start:stop])
    bias = None if whole.bias is None else leaf(whole.bias[start:stop])
    result = linear_cross_entropy(
        e,
        c,
        _own_labels(whole.targets, case, rank).to(device),
        bias,
        vocab_parallel_options=VocabParallelOptions(
            start, stop, group, vocab_size=sum(case.rows) - case.padding
        ),
        token_weight=None
        if whole.weights is None
        else _own_labels(whole.weights, case, rank).to(device),
        **case.options,
    )
    loss, lse = result if case.options.get("return_lse") else (result, None)
    shift = case.options.get("shift", 0)
    upstream = whole.upstream[..., : case.length - shift]
    own = _own_results(upstream, case, rank, degree, shift).to(device)
    roots, grads = [loss], [None]
    if case.options.get("reduction") == "none":
        grads = [own.to(loss.dtype)]
    if lse is not None:
        roots.append(lse)
        grads.append(own.to(lse.dtype))
    torch.autograd.backward(roots, grads)
    found = {"loss": loss.detach(), "e": _grad(e), "c": _grad(c)}
    if lse is not None:
        found["lse"] = lse.detach()
    if bias is not None:
        found["bias"] = _grad(bias)
    return {name: tensor.cpu() for name, tensor in found.items()}


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _own_hidden(e: Tensor, case: Case, rank: int, degree: int) -> Tensor:
    layout = case.options.get("hidden_layout", "replicated")
    if layout == "sharded":
        return e[rank]
    return e[0].chunk(degree, -2)[rank] if layout == "sequence" else e[0]


def _own_labels(per_label: Tensor, case: Case, rank: int) -> Tensor:
    return per_label[rank if case.options.get("hidden_layout") == "sharded" else 0]


def _own_results(per_token: Tensor, case: Case, rank: int, degree: int, shift: int) -> Tensor:
    """Cut a result (columns, batch, length - shift) to what this rank returns."""
    layout = case.options.get("hidden_layout", "replicated")
    if layout == "sequence":
        padded = torch.nn.functional.pad(per_token[0], (0, shift))
        return padded.chunk(degree, -1)[rank]
    return per_token[rank if layout == "sharded" else 0]
