"""Each token's numbers times a number of the token, and what its target adds."""

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, aligned_kernel
from vocab_parallel.kernels.logit import cdiv, load_target

# What a program works on at a time: tokens by their numbers.
_TOKENS, _WIDTH = tl.constexpr(4), tl.constexpr(512)
_COMPILING: Constants = (("num_warps", 4),)


def scale_tokens(
    values: Tensor,  # (n, m)
    scale: Tensor,  # (n,) float32
    out: Tensor,  # (n, m) any floating dtype; may be the values
    *,
    targets: Tensor | None = None,  # (n,) int32
    own: Tensor | None = None,  # (n,) float32
    rows: Tensor | None = None,  # (R, m)
) -> Tensor:
    """Write each token's values times its scale to ``out``, and return it.

    Args:
        targets: columns, or rows where there are some; none where it is outside of them.
        own: what is written at the target's column instead; or by what the target's row is
            multiplied, which is added.
    """
    assert values.stride(1) == out.stride(1) == scale.stride(0) == 1
    num_tokens, width = values.shape
    num_rows, rows_stride = (0, 0) if rows is None else (rows.shape[0], rows.stride(0))
    arguments = (
        values, values.stride(0), scale, targets, own, rows, rows_stride, num_rows, out,
        out.stride(0), num_tokens, width,
    )  # fmt: skip
    grid = (cdiv(width, _WIDTH.value) * cdiv(num_tokens, _TOKENS.value),)
    _scale_tokens.start(values, grid, arguments, _COMPILING)
    return out


@aligned_kernel("num_rows")
def _scale_tokens(  # type: ignore[no-untyped-def]
    values, values_stride, scale, targets, own, rows, rows_stride, num_rows, out, out_stride,
    num_tokens, width,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(width, _WIDTH)
    tokens = program // across * _TOKENS + tl.arange(0, _TOKENS)
    columns = (program % across * _WIDTH + tl.arange(0, _WIDTH))[None, :]
    here = tokens < num_tokens
    inside = here[:, None] & (columns < width)
    by = tl.load(scale + tokens, mask=here, other=0.0)[:, None]
    token = tokens.to(tl.int64)[:, None]
    value = tl.load(values + token * values_stride + columns, mask=inside, other=0.0)
    value = value.to(tl.float32) * by
    if targets is not None:
        target = load_target(targets, tokens, num_tokens)
        if rows is None:
            entry = tl.load(own + tokens, mask=here, other=0.0)[:, None]
            value = tl.where(columns == target[:, None], entry, value)
        else:
            owned = here & (target >= 0) & (target < num_rows)
            # That of a token without a row here may be anything.
            entry = tl.load(own + tokens, mask=owned, other=0.0)[:, None]
            row = target.to(tl.int64)[:, None] * rows_stride + columns
            at_target = tl.load(rows + row, mask=inside & owned[:, None], other=0.0)
            value += at_target.to(tl.float32) * entry
    tl.store(out + token * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)
