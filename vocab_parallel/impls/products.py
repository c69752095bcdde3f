"""Matrix products with float32 accumulation and a float32 result, on any device.

cuBLAS multiplies float16 and bfloat16 into float32 directly. A CPU has no such product, so
there the two operands, which are a tile's and therefore small, are widened first; that is also
more accurate than a low-precision product, and on most CPUs faster.
"""

import torch
from torch import Tensor


def widened(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile's operand in the dtype in which this device can multiply it into ``dtype``."""
    return operand if operand.is_cuda else operand.to(dtype)


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b into ``out``."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``accumulator``."""
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)


def well_scaled(grads: Tensor, operand: Tensor, *, peak: float) -> tuple[Tensor, Tensor | None]:
    """Bring gradients to at most ``peak`` where they enter a product of float16 on a GPU.

    The small numbers of float16 end at 6e-8: a probability over a token count would underflow.
    The returned unit multiplies the product's result; None where nothing was scaled.
    """
    if operand.dtype != torch.float16 or not operand.is_cuda:
        return grads, None
    unit = grads.abs().amax().clamp(min=torch.finfo(grads.dtype).tiny) / peak
    return grads / unit, unit
