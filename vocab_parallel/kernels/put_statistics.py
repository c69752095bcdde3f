"""Runs a kernel over all tiles of a product, and joins what its tiles found of each token."""

import functools
from typing import Any

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels import product
from vocab_parallel.kernels.launch import Constants, Kernel, kernel
from vocab_parallel.kernels.logit import (
    Transform,
    cdiv,
    logit_constants,
    logit_values,
    other_place,
    parts_of,
    statistic_places,
)

# What a program joins at a time: blocks of rows by tokens.
_BLOCKS, _TOKENS = 32, 32


def put_statistics(
    made: Kernel,  # `_product_statistics`, or another with its arguments
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    targets: Tensor,  # (n,)
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
    kept: Tensor | None,  # (n, r), r a multiple of 256 or R; written
    transform: Transform,
    *,
    more_values: tuple[Any, ...] = (),  # that this kernel alone has
    more_constants: Constants = (),
) -> None:
    """Let a kernel write each token's statistics of every block of rows, and join the blocks'."""
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    blocks = cdiv(num_rows, product.ROWS)
    parts = statistics.new_empty((len(names) - 1, blocks, num_tokens))
    tiles = cdiv(num_tokens, product.TOKENS) * blocks
    programs = product.num_programs(hidden.device, tiles)
    operands = (
        product.describe(hidden, product.TOKENS, product.DEPTH),
        product.describe(classifier, product.ROWS, product.DEPTH),
        None if kept is None else product.describe(kept, product.TOKENS, product.ROWS // 2),
        0 if kept is None else kept.shape[1],
        bias,
        targets,
        parts,
        statistics[1],
        num_tokens,
        num_rows,
    )
    constants = _constants(
        bias is not None, parts_of(transform), names, kept is not None, depth, programs
    )
    for first, last in product.launches(tiles, programs):
        values = (*operands, first, last, *logit_values(transform), *more_values)
        made.start(hidden, (programs,), values, constants + more_constants)
    join_blocks(parts, num_rows, targets, statistics, names)


@functools.cache
def _constants(
    has_bias: bool,
    parts: tuple[bool, bool],
    names: tuple[str, ...],
    keeps: bool,
    depth: int,
    programs: int,
) -> Constants:
    return (
        *logit_constants(has_bias, parts, names).items(),
        *other_place(names).items(),
        ("KEEPS", keeps),
        *product.tile_constants(depth, programs).items(),
    )


def join_blocks(
    parts: Tensor,  # (k - 1, blocks, n) float32: lse, then sum, mean and other where wanted
    num_rows: int,
    targets: Tensor,  # (n,)
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
) -> None:
    """Write the statistics of all blocks of rows together.

    The target's logit is there already; where the target is none of the rows it becomes 0.
    """
    assert statistics.stride(1) == 1
    _, blocks, num_tokens = parts.shape
    values = (parts, targets, statistics, statistics.stride(0), blocks, num_tokens, num_rows)
    _join_blocks.start(parts, (cdiv(num_tokens, _TOKENS),), values, _join_constants(names))


@functools.cache
def _join_constants(names: tuple[str, ...]) -> Constants:
    places = {**statistic_places(names), **other_place(names)}
    return (*places.items(), ("BLOCKS", _BLOCKS), ("TOKENS", _TOKENS), ("num_warps", 4))


@kernel
def _join_blocks(  # type: ignore[no-untyped-def]
    parts,
    targets,
    statistics,
    statistics_stride,
    blocks,
    num_tokens,
    num_rows,
    SUM: tl.constexpr,
    MEAN: tl.constexpr,
    OTHER: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    part = blocks.to(tl.int64) * num_tokens
    block = tl.arange(0, BLOCKS)
    own = parts + block[:, None].to(tl.int64) * num_tokens + tokens[None, :]
    # Lane by lane until the end: lane i has the blocks i, i + BLOCKS and so on.
    peak = tl.full((BLOCKS, TOKENS), -float("inf"), tl.float32)
    total = tl.zeros((BLOCKS, TOKENS), tl.float32)
    plain = tl.zeros((BLOCKS, TOKENS), tl.float32)
    weighted = tl.zeros((BLOCKS, TOKENS), tl.float32)
    others_peak = tl.full((BLOCKS, TOKENS), -float("inf"), tl.float32)
    for start in range(0, blocks, BLOCKS):
        here = (start + block < blocks)[:, None] & inside[None, :]
        at = own + tl.cast(start, tl.int64) * num_tokens
        lse = tl.load(at, mask=here, other=-float("inf"))
        larger = tl.maximum(peak, lse)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        rescale = tl.exp2((peak - shift) * LOG2E)
        share = tl.exp2((lse - shift) * LOG2E)
        if SUM > 0:
            plain += tl.load(at + (SUM - 1) * part, mask=here, other=0.0)
        if MEAN > 0:  # relative to `shift`, which moves with the peak
            expected = tl.load(at + (MEAN - 1) * part, mask=here, other=0.0)
            expected += tl.where(share > 0.0, lse - shift, 0.0)
            moved = tl.where(peak == -float("inf"), 0.0, peak - shift)
            weighted = (weighted + moved * total) * rescale + share * expected
        total = total * rescale + share
        if OTHER > 0:
            other = tl.load(at + (OTHER - 1) * part, mask=here, other=-float("inf"))
            others_peak = tl.maximum(others_peak, other)
        peak = larger
    top = tl.max(peak, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    rescale = tl.exp2((peak - shift[None, :]) * LOG2E)
    sums = tl.sum(total * rescale, 0)
    divisor = tl.where(sums == 0.0, 1.0, sums)
    lse = tl.where(sums == 0.0, top, top + tl.log(divisor))
    out = statistics + tokens
    tl.store(out, lse, mask=inside)
    target = tl.load(targets + tokens, mask=inside, other=-1).to(tl.int32)
    nowhere = (target < 0) | (target >= num_rows)
    tl.store(out + statistics_stride, 0.0, mask=inside & nowhere)
    if SUM > 0:
        tl.store(out + SUM * statistics_stride, tl.sum(plain, 0), mask=inside)
    if MEAN > 0:
        weighted += tl.where(peak == -float("inf"), 0.0, peak - shift[None, :]) * total
        expected = tl.sum(weighted * rescale, 0) / divisor - tl.where(sums == 0.0, 0.0, lse - shift)
        tl.store(out + MEAN * statistics_stride, expected, mask=inside)
    if OTHER > 0:
        tl.store(out + OTHER * statistics_stride, tl.max(others_peak, 0), mask=inside)
