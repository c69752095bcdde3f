"""Joins what a kernel found of each token in every block of rows."""

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import LOG2E, cdiv, statistic_places

# What a program joins at a time: blocks of rows by tokens.
_BLOCKS, _TOKENS = tl.constexpr(32), tl.constexpr(32)
_WARPS: Constants = (("num_warps", 4),)


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
    grid = (cdiv(num_tokens, _TOKENS.value),)
    _join_blocks.start(parts, grid, values, statistic_places(names) + _WARPS)


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
):
    tokens = tl.program_id(0) * _TOKENS + tl.arange(0, _TOKENS)
    inside = tokens < num_tokens
    part = blocks.to(tl.int64) * num_tokens
    block = tl.arange(0, _BLOCKS)
    own = parts + block[:, None].to(tl.int64) * num_tokens + tokens[None, :]
    # Lane by lane until the end: lane i has the blocks i, i + _BLOCKS and so on.
    peak = tl.full((_BLOCKS, _TOKENS), -float("inf"), tl.float32)
    total = tl.zeros((_BLOCKS, _TOKENS), tl.float32)
    plain = tl.zeros((_BLOCKS, _TOKENS), tl.float32)
    weighted = tl.zeros((_BLOCKS, _TOKENS), tl.float32)
    others_peak = tl.full((_BLOCKS, _TOKENS), -float("inf"), tl.float32)
    for start in range(0, blocks, _BLOCKS):
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
