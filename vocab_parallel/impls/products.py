"""Matrix products with float32 accumulation, written or added where their result belongs.

cuBLAS multiplies float16 and bfloat16 into float32 directly. A CPU has no such product, so
there the two operands, which are a tile's and therefore small, are widened first; that is also
more accurate than a low-precision product, and on most CPUs faster.
"""

import torch
from torch import Tensor


def widened(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile's operand in the dtype in which this device can multiply it into ``dtype``."""
    return operand if operand.is_cuda else operand.to(dtype)


def put_product(destination: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Write a @ b to ``destination``, or add it to what is there, in one product.

    Accumulates in float32 or wider and rounds once, to the destination's dtype.
    """
    if a.dtype == destination.dtype:
        if add:
            destination.addmm_(a, b)
        else:
            torch.mm(a, b, out=destination)
    elif not a.is_cuda:  # a and b are wider
        found = a @ b
        destination.copy_(found.add_(destination) if add else found)
    elif add:
        torch.addmm(destination, a, b, out_dtype=destination.dtype, out=destination)
    else:
        torch.mm(a, b, out_dtype=destination.dtype, out=destination)


def well_scaled(grads: Tensor, operand: Tensor, *, peak: float) -> tuple[Tensor, Tensor | None]:
    """Bring gradients to at most ``peak`` where they enter a product of float16 on a GPU.

    The small numbers of float16 end at 6e-8: a probability over a token count would underflow.
    The returned unit multiplies the product's result; None where nothing was scaled.
    """
    if operand.dtype != torch.float16 or not operand.is_cuda:
        return grads, None
    unit = grads.abs().amax().clamp(min=torch.finfo(grads.dtype).tiny) / peak
    return grads / unit, unit
