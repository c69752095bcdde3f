"""Each token's loss from its statistics, and back: one pass over [k, n] each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.grid import cdiv

BLOCK = 512


def token_loss(
    statistics: Tensor,  # (k, n) float32: lse, target, and sum where there is label smoothing
    labels: Tensor,  # (n,) int32
    weight: Tensor | None,  # (n,) float32
    *,
    smoothing: float,
    smoothing_share: float,  # smoothing / vocabulary
    z_loss: float,
    ignored: int,
    out_of_range: int,
) -> Tensor:  # (n,) float32
    """Return each token's loss; `vocab_parallel/token_loss.py` has the formula."""
    out = torch.empty_like(statistics[0])
    with torch.cuda.device_of(out):
        _token_loss[(cdiv(out.numel(), BLOCK),)](
            statistics,
            statistics.stride(0),
            labels,
            weight,
            out,
            out.numel(),
            smoothing,
            smoothing_share,
            z_loss,
            ignored,
            out_of_range,
            HAS_WEIGHT=weight is not None,
            HAS_SUM=smoothing != 0.0,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out


def token_loss_grad(
    statistics: Tensor,  # (k, n)
    labels: Tensor,  # (n,)
    weight: Tensor | None,  # (n,)
    upstream: Tensor,  # (n,) float32, any stride
    *,
    smoothing: float,
    smoothing_share: float,
    z_loss: float,
    ignored: int,
    out_of_range: int,
) -> Tensor:  # (k, n) float32
    """Return what each statistic receives."""
    out = torch.empty(statistics.shape, dtype=torch.float32, device=statistics.device)
    if len(out) > 2 + (smoothing != 0.0):
        out.zero_()  # statistics that this loss does not read
    with torch.cuda.device_of(out):
        _token_loss_grad[(cdiv(out.shape[1], BLOCK),)](
            statistics,
            labels,
            weight,
            upstream,
            upstream.stride(0),
            out,
            out.shape[1],
            smoothing,
            smoothing_share,
            z_loss,
            ignored,
            out_of_range,
            HAS_WEIGHT=weight is not None,
            HAS_SUM=smoothing != 0.0,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def _token_loss(  # type: ignore[no-untyped-def]
    statistics, stride, labels, weight, out, size, smoothing, smoothing_share, z_loss,
    ignored, out_of_range,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    label = tl.load(labels + index, mask=inside, other=0)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    target = tl.load(statistics + stride + index, mask=inside, other=0.0)
    loss = lse - (1.0 - smoothing) * target + z_loss * lse * lse
    if HAS_SUM:
        loss -= smoothing_share * tl.load(statistics + 2 * stride + index, mask=inside, other=0.0)
    if HAS_WEIGHT:
        loss *= tl.load(weight + index, mask=inside, other=0.0)
    loss = tl.where(label == ignored, 0.0, loss)
    loss = tl.where(label == out_of_range, float("nan"), loss)
    tl.store(out + index, loss, mask=inside)


@triton.jit
def _token_loss_grad(  # type: ignore[no-untyped-def]
    statistics, labels, weight, upstream, upstream_stride, out, size, smoothing, smoothing_share,
    z_loss, ignored, out_of_range,
    HAS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    label = tl.load(labels + index, mask=inside, other=0)
    unit = tl.load(upstream + index * upstream_stride, mask=inside, other=0.0)
    if HAS_WEIGHT:
        unit *= tl.load(weight + index, mask=inside, other=0.0)
    unit = tl.where((label == ignored) | (label == out_of_range), 0.0, unit)
    lse = tl.load(statistics + index, mask=inside, other=0.0)
    lse = tl.where(label == ignored, 0.0, lse)
    tl.store(out + index, unit * (1.0 + 2.0 * z_loss * lse), mask=inside)
    tl.store(out + size + index, -(1.0 - smoothing) * unit, mask=inside)
    if HAS_SUM:
        tl.store(out + 2 * size + index, -smoothing_share * unit, mask=inside)
