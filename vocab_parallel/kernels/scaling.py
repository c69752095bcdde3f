"""Each token's numbers times a number of the token."""

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, aligned_kernel
from vocab_parallel.kernels.logit import cdiv

# What a program works on at a time: tokens by their numbers.
_ROWS, _WIDTH = 4, 512
_SIZES: Constants = (("ROWS", _ROWS), ("WIDTH", _WIDTH), ("num_warps", 4))


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
    values = (
        matrix, matrix.stride(0), scale, targets, own, out, out.stride(0), num_tokens, width,
    )  # fmt: skip
    constants = (("HAS_TARGETS", at_targets is not None), *_SIZES)
    grid = (cdiv(width, _WIDTH) * cdiv(num_tokens, _ROWS),)
    _scale_tokens.start(matrix, grid, values, constants)
    return out


@aligned_kernel()
def _scale_tokens(  # type: ignore[no-untyped-def]
    matrix, matrix_stride, scale, targets, own, out, out_stride, num_tokens, width,
    HAS_TARGETS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(width, WIDTH)
    tokens = program // across * ROWS + tl.arange(0, ROWS)
    columns = program % across * WIDTH + tl.arange(0, WIDTH)
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
