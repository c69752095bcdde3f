"""Labels: shifted and marked in one pass."""

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import cdiv

_MARKED = tl.constexpr(1024)  # labels, by a program
_MARKING: Constants = (("num_warps", 4),)


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
    values = (
        labels,
        out,
        labels.numel(),
        labels.shape[-1],
        shift,
        ignore_index,
        2**31 - 1 if vocab_size is None else vocab_size,
        ignored,
        out_of_range,
    )
    _mark_and_shift.start(labels, (cdiv(labels.numel(), _MARKED.value),), values, _MARKING)
    return out


@kernel
def _mark_and_shift(  # type: ignore[no-untyped-def]
    labels, out, size, length, shift, ignore_index, vocab_size, ignored, out_of_range
):
    index = tl.program_id(0).to(tl.int64) * _MARKED + tl.arange(0, _MARKED)
    inside = index < size
    has_label = index % length + shift < length
    label = tl.load(labels + index + shift, mask=inside & has_label, other=0).to(tl.int64)
    marked = tl.where((label < 0) | (label >= vocab_size), out_of_range, label)
    marked = tl.where((label == ignore_index) | ~has_label, ignored, marked)
    tl.store(out + index, marked.to(tl.int32), mask=inside)
