"""Small passes around the loss of each token: labels, losses and their gradient, scales.

Labels are shifted and marked in one pass, each token's loss is made from its statistics in one and
differentiated in another, and gradients are multiplied by what the loss receives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.logit import cdiv

# What a program works on at a time.
_LABELS, _TOKENS, _NUMBERS = 1024, 512, 4096
_ROWS, _WIDTH = 4, 512


def mark_and_shift(
    labels: Tensor,  # (..., T)
    *,
    ignore_index: int,
    vocab_size: int | None,
    shift: int,
    ignored: int,
    out_of_range: int,
) -> Tensor:  # (..., T) int32
    """Return labels moved ``shift`` places to the left, with marks for what is no token."""
    labels = labels.contiguous()
    out = torch.empty(labels.shape, dtype=torch.int32, device=labels.device)
    with torch.cuda.device_of(labels):
        _mark_and_shift[(cdiv(labels.numel(), _LABELS),)](
            labels,
            out,
            labels.numel(),
            labels.shape[-1],
            shift,
            ignore_index,
            2**31 - 1 if vocab_size is None else vocab_size,
            ignored,
            out_of_range,
            BLOCK=_LABELS,
            num_warps=4,
        )
    return out


@triton.jit
def _mark_and_shift(  # type: ignore[no-untyped-def]
    labels, out, size, length, shift, ignore_index, vocab_size, ignored, out_of_range,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    has_label = index % length + shift < length
    label = tl.load(labels + index + shift, mask=inside & has_label, other=0).to(tl.int64)
    marked = tl.where((label < 0) | (label >= vocab_size), out_of_range, label)
    marked = tl.where((label == ignore_index) | ~has_label, ignored, marked)
    tl.store(out + index, marked.to(tl.int32), mask=inside)


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
    """Return each token's loss; `sharded/token_loss.py` has the formula."""
    out = torch.empty_like(statistics[0])
    with torch.cuda.device_of(out):
        _token_loss[(cdiv(out.numel(), _TOKENS),)](
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
            BLOCK=_TOKENS,
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
        _token_loss_grad[(cdiv(out.shape[1], _TOKENS),)](
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
            BLOCK=_TOKENS,
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


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply a contiguous tensor in place by a one-element tensor.

    A program that finds the factor 1 reads nothing else: a loss that is itself the root of a
    backward costs no pass over its gradients, without asking the device.
    """
    assert tensor.is_contiguous()
    with torch.cuda.device_of(tensor):
        _scale[(cdiv(tensor.numel(), _NUMBERS),)](
            tensor, factor, tensor.numel(), BLOCK=_NUMBERS, num_warps=8
        )
    return tensor


@triton.jit
def _scale(tensor, factor, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        value = tl.load(tensor + index, mask=inside).to(tl.float32)
        tl.store(tensor + index, (value * by).to(tensor.dtype.element_ty), mask=inside)


def scale_tokens(
    matrix: Tensor,  # (n, m)
    scale: Tensor,  # (n,) float32
    out: Tensor,  # (n, m) any floating dtype; may be the matrix
    at_targets: tuple[Tensor, Tensor] | None = None,  # (n,) int32 and (n,) float32
) -> Tensor:
    """Write each token's numbers times its scale to ``out``, and return it.

    Args:
        at_targets: columns, and what is written there instead; none where it is no column.
    """
    assert matrix.stride(1) == out.stride(1) == scale.stride(0) == 1
    num_tokens, width = matrix.shape
    targets, own = at_targets or (None, None)
    with torch.cuda.device_of(matrix):
        _scale_tokens[(cdiv(width, _WIDTH), cdiv(num_tokens, _ROWS))](
            matrix,
            matrix.stride(0),
            scale,
            targets,
            own,
            out,
            out.stride(0),
            num_tokens,
            width,
            HAS_TARGETS=at_targets is not None,
            ROWS=_ROWS,
            WIDTH=_WIDTH,
            num_warps=4,
        )
    return out


@triton.jit
def _scale_tokens(  # type: ignore[no-untyped-def]
    matrix, matrix_stride, scale, targets, own, out, out_stride, num_tokens, width,
    HAS_TARGETS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    here = tokens < num_tokens
    inside = here[:, None] & (columns < width)[None, :]
    by = tl.load(scale + tokens, mask=here, other=0.0)
    at = tokens.to(tl.int64)[:, None]
    value = tl.load(matrix + at * matrix_stride + columns[None, :], mask=inside).to(tl.float32)
    value = value * by[:, None]
    if HAS_TARGETS:
        target = tl.load(targets + tokens, mask=here, other=-1).to(tl.int32)
        entry = tl.load(own + tokens, mask=here, other=0.0)
        value = tl.where(columns[None, :] == target[:, None], entry[:, None], value)
    tl.store(out + at * out_stride + columns[None, :], value.to(out.dtype.element_ty), mask=inside)
