"""One pass over the labels: shifted, and marked where they are no tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.grid import cdiv

BLOCK = 1024


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
        _mark_and_shift[(cdiv(labels.numel(), BLOCK),)](
            labels,
            out,
            labels.numel(),
            labels.shape[-1],
            shift,
            ignore_index,
            2**31 - 1 if vocab_size is None else vocab_size,
            ignored,
            out_of_range,
            BLOCK=BLOCK,
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
