"""Labels: shifted and marked in one pass, and counted in another."""

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import cdiv

_MARKED = tl.constexpr(1024)  # labels, by a program
_COUNTED = tl.constexpr(2048)  # at a time, by one program that goes through all labels
_MARKING: Constants = (("num_warps", 4),)
_COUNTING: Constants = (("num_warps", 8),)


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


def count_tokens(labels: Tensor, ignored: int) -> Tensor:  # (n,) -> () int32
    """Return how many labels are not ignored."""
    out = torch.empty((), dtype=torch.int32, device=labels.device)
    values = (labels, out, labels.numel(), ignored)
    _count_tokens.start(labels, (1,), values, _COUNTING)
    return out


@kernel
def _count_tokens(labels, out, size, ignored):  # type: ignore[no-untyped-def]
    found = tl.zeros((_COUNTED,), tl.int32)
    for start in range(0, size, _COUNTED):
        index = start + tl.arange(0, _COUNTED)
        label = tl.load(labels + index, mask=index < size, other=ignored)
        found += (label != ignored).to(tl.int32)
    tl.store(out, tl.sum(found, 0))
