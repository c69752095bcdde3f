"""One pass over a tile of raw logits: each token's statistics, and its target's logit.

Reads the tile once and writes k numbers a token: n r itemsize bytes, one exponential a logit.
"""

import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import aligned_kernel
from vocab_parallel.kernels.logit import (
    LOG2E,
    Transform,
    logit_values,
    readable_width,
    statistic_places,
    to_logit,
)

# Logits that a program works on at a time: one warp, so that no reduction waits for another.
_BLOCK = tl.constexpr(512)


def logits_statistics(
    logits: Tensor,  # (n, r), raw: hidden classifier^T
    bias: Tensor | None,  # (r,)
    targets: Tensor,  # (n,), counted from the row `row_start` before the tile's first
    row_start: int,
    statistics: Tensor,  # (k, n) float32; written, or joined with what is there
    names: tuple[str, ...],
    transform: Transform,
    *,
    first: bool,
) -> None:
    """Write the statistics of the tile, or join them with those of the rows before it.

    Args:
        logits: float16, bfloat16 or float32; columns are adjacent, rows may be further apart.
        targets: int32 or int64; a token whose target lies outside of the tile adds nothing.
        names: "lse", "target", then "sum", "mean_log_prob" and "largest_other" where wanted; see
            `statistics.py`.
        first: whether the tile's are the first rows; else ``statistics`` are joined.
    """
    num_tokens, num_rows = logits.shape
    assert logits.stride(1) == 1
    assert statistics.stride(1) == 1
    values = (
        logits, logits.stride(0), bias, targets, statistics, statistics.stride(0), num_rows,
        readable_width(logits), row_start, *logit_values(transform),
    )  # fmt: skip
    constants = (*statistic_places(names), ("FIRST", first), ("num_warps", 1))
    _logits_statistics.start(logits, (num_tokens,), values, constants)


@aligned_kernel("row_start")  # one binary for all tiles
def _logits_statistics(  # type: ignore[no-untyped-def]
    logits,
    token_stride,
    bias,
    targets,
    statistics,
    statistics_stride,
    num_rows,
    width,  # of the columns that may be read, at least num_rows
    row_start,
    softcap,
    temperature,
    SUM: tl.constexpr,  # its place in the statistics, 0 where it is not wanted
    MEAN: tl.constexpr,
    OTHER: tl.constexpr,
    FIRST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    own = logits + token * token_stride
    target = tl.load(targets + token).to(tl.int64) - row_start
    owned = (target >= 0) & (target < num_rows)
    at_target = tl.load(own + target, mask=owned, other=0.0).to(tl.float32)
    if bias is not None:
        at_target += tl.load(bias + target, mask=owned, other=0.0).to(tl.float32)
    at_target = to_logit(at_target, softcap, temperature)
    at_target = tl.where(owned, at_target, 0.0)
    columns = tl.arange(0, _BLOCK)
    peak = -float("inf")
    totals = tl.zeros((_BLOCK,), tl.float32)
    weighted = tl.zeros((_BLOCK,), tl.float32)
    plain = tl.zeros((_BLOCK,), tl.float32)
    others_peak = tl.full((_BLOCK,), -float("inf"), tl.float32)
    out = statistics + token
    if not FIRST:
        # The rows before count as one logit more, which is their lse.
        peak = tl.load(out)
        totals = tl.where(columns == 0, tl.where(peak == -float("inf"), 0.0, 1.0), 0.0)
        at_target += tl.load(out + statistics_stride)
        if SUM > 0:
            plain = tl.where(columns == 0, tl.load(out + SUM * statistics_stride), 0.0)
        if MEAN > 0:
            weighted = totals * tl.load(out + MEAN * statistics_stride)
        if OTHER > 0:
            others_peak = tl.maximum(others_peak, tl.load(out + OTHER * statistics_stride))
    # The next block is on its way while one is worked on; the last, which alone is masked, follows.
    ahead = tl.load(own + columns, mask=columns < width, other=0.0)
    for _ in range(0, num_rows // _BLOCK):
        z = ahead.to(tl.float32)
        if bias is not None:
            z += tl.load(bias + columns).to(tl.float32)
        if OTHER > 0:
            is_target = columns == target
        columns += _BLOCK
        ahead = tl.load(own + columns, mask=columns < width, other=0.0)
        z = to_logit(z, softcap, temperature)
        if OTHER > 0:
            others_peak = tl.maximum(others_peak, tl.where(is_target, -float("inf"), z))
        if SUM > 0:
            plain += z
        peak, totals, weighted = _join_block(z, peak, totals, weighted, MEAN > 0)
    if num_rows % _BLOCK != 0:
        inside = columns < num_rows
        z = ahead.to(tl.float32)
        if bias is not None:
            z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        z = to_logit(z, softcap, temperature)
        if SUM > 0:
            plain += tl.where(inside, z, 0.0)
        z = tl.where(inside, z, -float("inf"))
        if OTHER > 0:
            others_peak = tl.maximum(others_peak, tl.where(columns == target, -float("inf"), z))
        peak, totals, weighted = _join_block(z, peak, totals, weighted, MEAN > 0)
    total = tl.sum(totals, 0)
    # Compared with 0 and not by >: a NaN stays one.
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, -float("inf"), peak + tl.log(divisor))
    origin = tl.where(total == 0.0, 0.0, peak)

    tl.store(out, lse)
    tl.store(out + statistics_stride, at_target)
    if SUM > 0:
        tl.store(out + SUM * statistics_stride, tl.sum(plain, 0))
    if MEAN > 0:
        expected = tl.sum(weighted, 0) / divisor - tl.where(total == 0.0, 0.0, lse - origin)
        tl.store(out + MEAN * statistics_stride, expected)
    if OTHER > 0:
        tl.store(out + OTHER * statistics_stride, tl.max(others_peak, 0))


@triton.jit
def _join_block(z, peak, totals, weighted, MEAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add a block's exponentials to the sums, lane by lane, under the largest logit so far."""
    new_peak = tl.maximum(peak, tl.max(z, 0))
    # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    rescale = tl.exp2((peak - shift) * LOG2E)
    exponential = tl.exp2(z * LOG2E - shift * LOG2E)
    if MEAN:  # relative to `shift`, which moves with the peak
        finite = tl.where(exponential > 0.0, z - shift, 0.0)
        moved = tl.where(peak == -float("inf"), 0.0, peak - shift)
        weighted = (weighted + moved * totals) * rescale + finite * exponential
    totals = totals * rescale + exponential
    return new_peak, totals, weighted
