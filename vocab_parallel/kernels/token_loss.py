"""Each token's loss from its statistics, their sum, and what the statistics receive of either.

`vocab_parallel/token_loss.py` has the formulas.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import cdiv

_TOKENS = 512  # that a program works on
_TOKENS_EACH: Constants = (("BLOCK", _TOKENS), ("num_warps", 4))
# One program that goes through all tokens.
_AT_ONCE: Constants = (("BLOCK", 2048), ("num_warps", 8))


class LossNumbers(NamedTuple):
    """What the loss of a token is made with."""

    smoothing: float
    smoothing_share: float  # smoothing / vocabulary
    z_loss: float
    ignored: int
    out_of_range: int


def token_loss(
    statistics: Tensor,  # (k, n) float32: lse, target, and sum where there is label smoothing
    labels: Tensor,  # (n,) int32
    weight: Tensor | None,  # (n,) float32
    numbers: LossNumbers,
) -> Tensor:  # (n,) float32
    """Return each token's loss."""
    out = torch.empty_like(statistics[0])
    values = (statistics, statistics.stride(0), labels, weight, out, out.numel(), *numbers)
    grid = (cdiv(out.numel(), _TOKENS),)
    constants = (*_loss_constants(weight is not None, numbers.smoothing), *_TOKENS_EACH)
    _token_loss.start(out, grid, values, constants)
    return out


def total_loss(
    statistics: Tensor,  # (k, n)
    labels: Tensor,  # (n,)
    weight: Tensor | None,  # (n,)
    divisor: Tensor | int | None,
    numbers: LossNumbers,
) -> Tensor:  # () float32
    """Return the sum of the tokens' losses over the divisor, in one program."""
    out = statistics.new_empty(())
    values = (
        statistics, statistics.stride(0), labels, weight, *_divisor_values(divisor), out,
        labels.numel(), *numbers,
    )  # fmt: skip
    constants = (*_loss_constants(weight is not None, numbers.smoothing), *_divides(divisor))
    _total_loss.start(out, (1,), values, (*constants, *_AT_ONCE))
    return out


def token_loss_grad(
    statistics: Tensor,  # (k, n)
    labels: Tensor,  # (n,)
    weight: Tensor | None,  # (n,)
    upstream: Tensor,  # (n,) float32, any stride; or (), of each token
    divisor: Tensor | int | None,
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
    constants = (
        *_loss_constants(weight is not None, numbers.smoothing), *_divides(divisor), *_TOKENS_EACH,
    )  # fmt: skip
    _token_loss_grad.start(out, (cdiv(out.shape[1], _TOKENS),), values, constants)
    return out


def _loss_constants(has_weight: bool, smoothing: float) -> Constants:
    return (("HAS_WEIGHT", has_weight), ("HAS_SUM", smoothing != 0.0))


def _divisor_values(divisor: Tensor | int | None) -> tuple[Tensor | None, float]:
    if isinstance(divisor, Tensor):
        return divisor, 0.0
    return None, 1.0 if divisor is None else float(divisor)


def _divides(divisor: Tensor | int | None) -> Constants:
    return (("HAS_DIVISOR", isinstance(divisor, Tensor)),)


@triton.jit
def _loss_of(  # type: ignore[no-untyped-def]
    index, inside, statistics, stride, labels, weight, smoothing, smoothing_share, z_loss, ignored,
    out_of_range, HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr,
):  # fmt: skip
    """The losses of some tokens, 0 outside."""
    label = tl.load(labels + index, mask=inside, other=ignored)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    target = tl.load(statistics + stride + index, mask=inside, other=0.0)
    loss = lse - (1.0 - smoothing) * target + z_loss * lse * lse
    if HAS_SUM:
        loss -= smoothing_share * tl.load(statistics + 2 * stride + index, mask=inside, other=0.0)
    if HAS_WEIGHT:
        loss *= tl.load(weight + index, mask=inside, other=0.0)
    loss = tl.where(label == ignored, 0.0, loss)
    return tl.where(label == out_of_range, float("nan"), loss)


@triton.jit
def _at_least_one(divisor, by, HAS_DIVISOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The divisor: no tokens at all have the mean 0, fewer are nobody's."""
    if HAS_DIVISOR:
        by = tl.load(divisor).to(tl.float32)
    return tl.where(by < 0.0, float("nan"), tl.where(by < 1.0, 1.0, by))


@kernel
def _token_loss(  # type: ignore[no-untyped-def]
    statistics, stride, labels, weight, out, size, smoothing, smoothing_share, z_loss,
    ignored, out_of_range,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    loss = _loss_of(
        index, inside, statistics, stride, labels, weight, smoothing, smoothing_share, z_loss,
        ignored, out_of_range, HAS_WEIGHT, HAS_SUM,
    )  # fmt: skip
    tl.store(out + index, loss, mask=inside)


@kernel
def _total_loss(  # type: ignore[no-untyped-def]
    statistics, stride, labels, weight, divisor, by, out, size, smoothing, smoothing_share, z_loss,
    ignored, out_of_range,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += _loss_of(
            index, index < size, statistics, stride, labels, weight, smoothing, smoothing_share,
            z_loss, ignored, out_of_range, HAS_WEIGHT, HAS_SUM,
        )  # fmt: skip
    tl.store(out, tl.sum(total, 0) / _at_least_one(divisor, by, HAS_DIVISOR))


@kernel
def _token_loss_grad(  # type: ignore[no-untyped-def]
    statistics, labels, weight, upstream, upstream_stride, divisor, by, out, size, smoothing,
    smoothing_share, z_loss, ignored, out_of_range,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    label = tl.load(labels + index, mask=inside, other=0)
    unit = tl.load(upstream + index * upstream_stride, mask=inside, other=0.0)
    unit = unit / _at_least_one(divisor, by, HAS_DIVISOR)
    if HAS_WEIGHT:
        unit *= tl.load(weight + index, mask=inside, other=0.0)
    unit = tl.where((label == ignored) | (label == out_of_range), 0.0, unit)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    tl.store(out + index, unit * (1.0 + 2.0 * z_loss * lse), mask=inside)
    tl.store(out + size + index, -(1.0 - smoothing) * unit, mask=inside)
    if HAS_SUM:
        tl.store(out + 2 * size + index, -smoothing_share * unit, mask=inside)
