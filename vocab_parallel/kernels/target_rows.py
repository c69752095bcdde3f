"""What tokens' targets receive, which is left out of the products with kept exponentials.

Each row of a matrix gets what the tokens give whose target it is: tokens are sorted by their
target, and one program adds up those of one row, however many, in float32. No two write to the same
place, and the result is the same each time. And each token gets its target's row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.logit import cdiv

# Of a program that adds up a row, and of one that gives tokens their rows.
_TOKENS, _WIDTH = 16, 256
_ROWS, _COLUMNS = 4, 512


def add_to_target_rows(
    matrix: Tensor,  # (R, m) any floating dtype; added to
    values: Tensor,  # (n, m)
    weight: Tensor,  # (n,) float32
    targets: Tensor,  # (n,) int32; no row where it is outside of [0, R)
) -> None:
    """Add each token's values, times its weight, to the row that is its target."""
    assert matrix.stride(1) == values.stride(1) == weight.stride(0) == 1
    num_tokens, width = values.shape
    ordered, order = targets.sort(stable=True)
    block = min(_WIDTH, triton.next_power_of_2(width))
    with torch.cuda.device_of(matrix):
        _add_to_target_rows[(num_tokens, cdiv(width, block))](
            matrix,
            matrix.stride(0),
            values,
            values.stride(0),
            weight,
            ordered,
            order,
            num_tokens,
            len(matrix),
            width,
            TOKENS=_TOKENS,
            WIDTH=block,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _add_to_target_rows(  # type: ignore[no-untyped-def]
    matrix, matrix_stride, values, values_stride, weight, ordered, order,
    num_tokens, num_rows, width,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    row = tl.load(ordered + first)
    before = tl.load(ordered + first - 1, mask=first > 0, other=-1)
    if (row >= 0) & (row < num_rows) & (row != before):
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = columns < width
        total = tl.zeros((WIDTH,), tl.float32)
        start, going = first, 1
        while going > 0:
            place = start + tl.arange(0, TOKENS)
            here = place < num_tokens
            here = here & (tl.load(ordered + place, mask=here, other=-1) == row)
            token = tl.load(order + place, mask=here, other=0)
            by = tl.load(weight + token, mask=here, other=0.0)
            value = tl.load(
                values + token[:, None] * values_stride + columns[None, :],
                mask=here[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(value.to(tl.float32) * by[:, None], 0)
            going = tl.min(here.to(tl.int32))  # all of them were this row's: more may be
            start += TOKENS
        at = matrix + row.to(tl.int64) * matrix_stride + columns
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(matrix.dtype.element_ty), mask=inside)


def add_target_rows(
    sums: Tensor,  # (n, m) float32
    scale: Tensor,  # (n,) float32
    rows: Tensor,  # (R, m)
    weight: Tensor,  # (n,) float32
    targets: Tensor,  # (n,) int32; no row where it is outside of [0, R)
    out: Tensor,  # (n, m) any floating dtype; may be the sums
) -> None:
    """Write each token's sums times its scale, and its target's row times its weight, added up."""
    assert sums.stride(1) == rows.stride(1) == out.stride(1) == 1
    assert scale.stride(0) == weight.stride(0) == 1
    num_tokens, width = sums.shape
    with torch.cuda.device_of(sums):
        _add_target_rows[(cdiv(width, _COLUMNS) * cdiv(num_tokens, _ROWS),)](
            sums,
            sums.stride(0),
            scale,
            rows,
            rows.stride(0),
            weight,
            targets,
            out,
            out.stride(0),
            num_tokens,
            len(rows),
            width,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["num_rows"])
def _add_target_rows(  # type: ignore[no-untyped-def]
    sums, sums_stride, scale, rows, rows_stride, weight, targets, out, out_stride,
    num_tokens, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(width, COLUMNS)
    tokens = program // across * ROWS + tl.arange(0, ROWS)
    columns = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = tokens < num_tokens
    inside = here[:, None] & (columns < width)
    target = tl.load(targets + tokens, mask=here, other=-1).to(tl.int32)
    owned = here & (target >= 0) & (target < num_rows)
    by = tl.load(scale + tokens, mask=here, other=0.0)[:, None]
    # The weight of a token without a row here may be anything.
    own = tl.load(weight + tokens, mask=owned, other=0.0)[:, None]
    token = tokens.to(tl.int64)[:, None]
    value = tl.load(sums + token * sums_stride + columns, mask=inside, other=0.0).to(tl.float32)
    row = target.to(tl.int64)[:, None] * rows_stride + columns
    at_target = tl.load(rows + row, mask=inside & owned[:, None], other=0.0).to(tl.float32)
    value = value * by + at_target * own
    tl.store(out + token * out_stride + columns, value.to(out.dtype.element_ty), mask=inside)
