"""Multiply a large tensor by a number that only the device knows, and not at all where it is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.grid import cdiv

BLOCK = 4096


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply a contiguous tensor in place by a one-element tensor.

    A program that finds the factor 1 reads nothing else: a loss that is itself the root of a
    backward costs no pass over its gradients, without asking the device.
    """
    assert tensor.is_contiguous()
    with torch.cuda.device_of(tensor):
        _scale[(cdiv(tensor.numel(), BLOCK),)](
            tensor, factor, tensor.numel(), BLOCK=BLOCK, num_warps=8
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
