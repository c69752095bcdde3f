"""What tokens' targets receive, which is left out of the products with kept exponentials.

Each row of a matrix gets what the tokens give whose target it is. Tokens are ordered by their
target, and cut into pieces: a piece has one target and lies in one block of the order. A program
adds up a piece in float32. It adds the sum to the row where that piece is all of the row's tokens;
else it writes the sum apart, and a second kernel adds up the pieces' sums in their order. So many
tokens of one target are shared by programs, no two write to the same place, and the result is the
same each time.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, aligned_kernel, kernel
from vocab_parallel.kernels.logit import cdiv

# Of a block of the order; of them a program loads so many at a time, and so many columns.
_BLOCK, _TOKENS, _WIDTH = tl.constexpr(32), tl.constexpr(2), 1024
# Sums of pieces that a program joins at a time, and columns.
_PIECES, _JOINED = tl.constexpr(16), 128
# More tokens than this are sorted by torch: to compare each with each costs 8 us for 8192 of them,
# but grows with the square.
_MOST_COMPARED = 16_384
# Tokens that a program finds the places of, and others it compares them with at a time.
_OWN, _OTHERS = tl.constexpr(16), tl.constexpr(256)
_UNROLL = tl.constexpr(4)
_ORDERING: Constants = (("num_warps", 4),)


class TargetOrder(NamedTuple):
    """Tokens in the order of their targets; those of one target in their own."""

    targets: Tensor  # (n,) int32, ascending
    tokens: Tensor  # (n,) int32 or int64


def order_by_target(targets: Tensor) -> TargetOrder:
    """Order tokens by their targets (n,) int32, without a wait for the device."""
    num_tokens = len(targets)
    if num_tokens > _MOST_COMPARED:
        return TargetOrder(*targets.sort(stable=True))
    order = TargetOrder(torch.empty_like(targets), torch.empty_like(targets))
    grid = (cdiv(num_tokens, _OWN.value),)
    _order_by_target.start(targets, grid, (targets, *order, num_tokens), _ORDERING)
    return order


@kernel
def _order_by_target(targets, ordered, order, num_tokens):  # type: ignore[no-untyped-def]
    """A token's place is the number of those before it: each is compared with each."""
    first = tl.program_id(0) * _OWN
    token = (first + tl.arange(0, _OWN))[:, None]
    own = tl.load(targets + token, mask=token < num_tokens, other=0)
    lane = tl.arange(0, _OTHERS)[None, :]
    before = tl.zeros((_OWN, _OTHERS), tl.int32)
    among = first // _OTHERS * _OTHERS  # the others of this block are before some and behind some
    for start in tl.range(0, among, _OTHERS, loop_unroll_factor=_UNROLL):
        before += (tl.load(targets + start + lane) <= own).to(tl.int32)
    other = among + lane
    target = tl.load(targets + other, mask=other < num_tokens, other=2**31 - 1)
    before += ((target < own) | ((target == own) & (other < token))).to(tl.int32)
    for start in tl.range(among + _OTHERS, num_tokens, _OTHERS, loop_unroll_factor=_UNROLL):
        other = start + lane
        target = tl.load(targets + other, mask=other < num_tokens, other=2**31 - 1)
        before += (target < own).to(tl.int32)
    place = tl.sum(before, 1, keep_dims=True)
    tl.store(ordered + place, own, mask=token < num_tokens)
    tl.store(order + place, token, mask=token < num_tokens)


def add_to_target_rows(
    matrix: Tensor,  # (R, m) any floating dtype; added to
    values: Tensor,  # (n, m)
    weight: Tensor,  # (n,) float32
    targets: Tensor,  # (n,) int32; no row where it is outside of [0, R)
) -> None:
    """Add each token's values, times its weight, to the row that is its target."""
    assert matrix.stride(1) == values.stride(1) == weight.stride(0) == 1
    num_tokens, width = values.shape
    order = order_by_target(targets)
    blocks = cdiv(num_tokens, _BLOCK.value)
    # Of each block a piece that begins it, and one that ends it.
    pieces = values.new_empty((blocks, 2, width), dtype=torch.float32)
    columns, joined, adding, joining = _constants(width)
    to, sizes = (matrix, matrix.stride(0)), (num_tokens, matrix.shape[0], width)
    of_values = values, values.stride(0), weight, *order
    grid = (num_tokens, cdiv(width, columns))
    _add_pieces.start(matrix, grid, (*to, *of_values, pieces, *sizes), adding)
    grid = (blocks, cdiv(width, joined))
    _join_pieces.start(matrix, grid, (*to, order.targets, pieces, *sizes), joining)


@functools.cache
def _constants(width: int) -> tuple[int, int, Constants, Constants]:
    """Return how many columns a program of each kernel has, and what the two are made with."""
    columns = min(_WIDTH, int(triton.next_power_of_2(width)))
    adding = (("WIDTH", columns), ("num_warps", max(1, min(columns // 256, 8))))
    joined = min(_JOINED, columns)
    return columns, joined, adding, (("WIDTH", joined), ("num_warps", 4))


@aligned_kernel("num_rows")
def _add_pieces(  # type: ignore[no-untyped-def]
    matrix, matrix_stride, values, values_stride, weight, ordered, order, pieces,
    num_tokens, num_rows, width, WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    row = tl.load(ordered + first)
    begins = tl.load(ordered + first - 1, mask=first > 0, other=-1) != row
    if (row >= 0) & (row < num_rows) & (begins | (first % _BLOCK == 0)):
        stop = tl.minimum(first // _BLOCK * _BLOCK + _BLOCK, num_tokens)
        ends = tl.load(ordered + stop, mask=stop < num_tokens, other=-1) != row
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = columns < width
        total = tl.zeros((WIDTH,), tl.float32)
        start = first
        while start < stop:
            place = start + tl.arange(0, _TOKENS)
            here = place < stop
            here = here & (tl.load(ordered + place, mask=here, other=-1) == row)
            token = tl.load(order + place, mask=here, other=0).to(tl.int64)
            by = tl.load(weight + token, mask=here, other=0.0)
            value = tl.load(
                values + token[:, None] * values_stride + columns[None, :],
                mask=here[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(value.to(tl.float32) * by[:, None], 0)
            # All of them were this row's: more may be.
            start = tl.where(tl.min(here.to(tl.int32)) > 0, start + _TOKENS, stop)
        if begins & ends:
            at = matrix + row.to(tl.int64) * matrix_stride + columns
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            tl.store(at, total.to(matrix.dtype.element_ty), mask=inside)
        else:
            piece = first // _BLOCK * 2 + (first % _BLOCK != 0).to(tl.int32)
            tl.store(pieces + piece.to(tl.int64) * width + columns, total, mask=inside)


@aligned_kernel("num_rows")
def _join_pieces(  # type: ignore[no-untyped-def]
    matrix, matrix_stride, ordered, pieces, num_tokens, num_rows, width, WIDTH: tl.constexpr
):
    """Add up the pieces of a row that begins in this block and goes on in the next one."""
    block = tl.program_id(0)
    first, stop = block * _BLOCK, block * _BLOCK + _BLOCK
    row = tl.load(ordered + stop, mask=stop < num_tokens, other=-1)
    at_first = tl.load(ordered + first) == row
    before = tl.load(ordered + first - 1, mask=first > 0, other=-1) == row
    goes_on = tl.load(ordered + stop - 1, mask=stop < num_tokens, other=-2) == row
    if (row >= 0) & (row < num_rows) & goes_on & ~before:
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = columns < width
        at = matrix + row.to(tl.int64) * matrix_stride + columns
        begun = block * 2 + (~at_first).to(tl.int32)
        total = tl.load(pieces + begun.to(tl.int64) * width + columns, mask=inside, other=0.0)
        start = stop
        while start < num_tokens:
            place = start + tl.arange(0, _PIECES) * _BLOCK
            here = place < num_tokens
            here = here & (tl.load(ordered + place, mask=here, other=-1) == row)
            piece = pieces + (place // _BLOCK * 2).to(tl.int64)[:, None] * width
            mask = here[:, None] & inside[None, :]
            total += tl.sum(tl.load(piece + columns[None, :], mask=mask, other=0.0), 0)
            start = tl.where(tl.min(here.to(tl.int32)) > 0, start + _PIECES * _BLOCK, num_tokens)
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(matrix.dtype.element_ty), mask=inside)
