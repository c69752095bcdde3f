"""Each token's loss from its statistics, their sum, and what the statistics receive of either.

`vocab_parallel/token_loss.py` has the formulas.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import cdiv

_TOKENS = tl.constexpr(512)  # of a program
_AT_ONCE = tl.constexpr(2048)  # of one program that goes through all tokens
Divisor = Tensor | int | Literal["counted"] | None


class LossNumbers(NamedTuple):
    """What the loss of a token is made with."""

    smoothing: float
    smoothing_share: float  # smoothing / vocabulary
    z_loss: float
    ignored: int
    out_of_range: int

    def constants(self, warps: int) -> Constants:
        """Return those of each of the kernels."""
        return ("HAS_SUM", self.smoothing != 0.0), ("num_warps", warps)


def token_loss(
    statistics: Tensor,  # (k, n) float32: lse, target, and sum where there is label smoothing
    labels: Tensor,  # (n,) int32
    weight: Tensor | None,  # (n,) float32
    numbers: LossNumbers,
) -> Tensor:  # (n,) float32
    """Return each token's loss."""
    out = torch.empty_like(statistics[0])
    values = (statistics, statistics.stride(0), labels, weight, out, out.numel(), *numbers)
    _token_loss.start(out, (cdiv(out.numel(), _TOKENS.value),), values, numbers.constants(4))
    return out


def total_loss(
    statistics: Tensor,  # (k, n)
    labels: Tensor,  # (n,)
    weight: Tensor | None,  # (n,)
    divisor: Divisor,
    numbers: LossNumbers,
) -> Tensor:  # () float32
    """Return the sum of the tokens' losses over the divisor, in one program."""
    out = statistics.new_empty(())
    values = (
        statistics, statistics.stride(0), labels, weight, *_divisor_values(divisor), out,
        labels.numel(), *numbers,
    )  # fmt: skip
    _total_loss.start(out, (1,), values, numbers.constants(8))
    return out


def token_loss_grad(
    statistics: Tensor,  # (k, n)
    labels: Tensor,  # (n,)
    weight: Tensor | None,  # (n,)
    upstream: Tensor,  # (n,) float32, any stride; or (), of each token
    divisor: Divisor,
    numbers: LossNumbers,
) -> Tensor:  # (k, n) float32
    """Return what each statistic receives where the losses receive upstream over the divisor."""
    out = torch.empty(statistics.shape, dtype=torch.float32, device=statistics.device)
    if len(out) > 2 + (numbers.smoothing != 0.0):
        out.zero_()  # statistics that this loss does not read
    values = (
        statistics, labels, weight, upstream, upstream.stride(0) if upstream.dim() else 0,
        *_divisor_values(divisor), out, out.shape[1], *numbers,
    )  # fmt: skip
    grid = (cdiv(out.shape[1], _TOKENS.value),)
    _token_loss_grad.start(out, grid, values, numbers.constants(4))
    return out


def _divisor_values(divisor: Divisor) -> tuple[Tensor | None, float | None]:
    if isinstance(divisor, Tensor):
        return divisor, None
    if divisor == "counted":
        return None, None
    return None, 1.0 if divisor is None else float(divisor)


@triton.jit
def _loss_of(  # type: ignore[no-untyped-def]
    index, inside, statistics, stride, labels, weight, smoothing, smoothing_share, z_loss, ignored,
    out_of_range, HAS_SUM: tl.constexpr,
):  # fmt: skip
    """The losses of some tokens, 0 outside."""
    label = tl.load(labels + index, mask=inside, other=ignored)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    target = tl.load(statistics + stride + index, mask=inside, other=0.0)
    loss = lse - (1.0 - smoothing) * target + z_loss * lse * lse
    if HAS_SUM:
        loss -= smoothing_share * tl.load(statistics + 2 * stride + index, mask=inside, other=0.0)
    if weight is not None:
        loss *= tl.load(weight + index, mask=inside, other=0.0)
    loss = tl.where(label == ignored, 0.0, loss)
    return tl.where(label == out_of_range, float("nan"), loss)


@triton.jit
def _at_least_one(divisor, by, labels, size, ignored):  # type: ignore[no-untyped-def]
    """The divisor: no tokens at all have the mean 0, fewer are nobody's.

    Each program counts the tokens itself where nobody did: a launch takes longer.
    """
    if divisor is not None:
        count = tl.load(divisor).to(tl.float32)
    elif by is not None:
        count = by
    else:
        counts = tl.zeros((_AT_ONCE,), tl.int32)
        for start in range(0, size, _AT_ONCE):
            index = start + tl.arange(0, _AT_ONCE)
            label = tl.load(labels + index, mask=index < size, other=ignored)
            counts += (label != ignored).to(tl.int32)
        count = tl.sum(counts, 0).to(tl.float32)
    return tl.where(count < 0.0, float("nan"), tl.where(count < 1.0, 1.0, count))


@kernel
def _token_loss(  # type: ignore[no-untyped-def]
    statistics, stride, labels, weight, out, size, smoothing, smoothing_share, z_loss,
    ignored, out_of_range, HAS_SUM: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * _TOKENS + tl.arange(0, _TOKENS)
    inside = index < size
    loss = _loss_of(
        index, inside, statistics, stride, labels, weight, smoothing, smoothing_share, z_loss,
        ignored, out_of_range, HAS_SUM,
    )  # fmt: skip
    tl.store(out + index, loss, mask=inside)


@kernel
def _total_loss(  # type: ignore[no-untyped-def]
    statistics, stride, labels, weight, divisor, by, out, size, smoothing, smoothing_share, z_loss,
    ignored, out_of_range, HAS_SUM: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((_AT_ONCE,), tl.float32)
    for start in range(0, size, _AT_ONCE):
        index = start + tl.arange(0, _AT_ONCE)
        total += _loss_of(
            index, index < size, statistics, stride, labels, weight, smoothing, smoothing_share,
            z_loss, ignored, out_of_range, HAS_SUM,
        )  # fmt: skip
    tl.store(out, tl.sum(total, 0) / _at_least_one(divisor, by, labels, size, ignored))


@kernel
def _token_loss_grad(  # type: ignore[no-untyped-def]
    statistics, labels, weight, upstream, upstream_stride, divisor, by, out, size, smoothing,
    smoothing_share, z_loss, ignored, out_of_range, HAS_SUM: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * _TOKENS + tl.arange(0, _TOKENS)
    inside = index < size
    label = tl.load(labels + index, mask=inside, other=0)
    unit = tl.load(upstream + index * upstream_stride, mask=inside, other=0.0)
    unit = unit / _at_least_one(divisor, by, labels, size, ignored)
    if weight is not None:
        unit *= tl.load(weight + index, mask=inside, other=0.0)
    unit = tl.where((label == ignored) | (label == out_of_range), 0.0, unit)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    tl.store(out + index, unit * (1.0 + 2.0 * z_loss * lse), mask=inside)
    tl.store(out + size + index, -(1.0 - smoothing) * unit, mask=inside)
    if HAS_SUM:
        tl.store(out + 2 * size + index, -smoothing_share * unit, mask=inside)
