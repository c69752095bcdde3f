"""The product and each token's statistics in one kernel: raw logits never leave the chip.

A tile's statistics, k - 1 float32 a token and block of rows, are joined by a second kernel. The
logits of the first rows are written too, where somebody wants to keep them. One exponential a
logit. Where lse and the target's logit alone receive a gradient, `product_probabilities.py` is
faster.
"""

import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels import product
from vocab_parallel.kernels.launch import kernel
from vocab_parallel.kernels.logit import Transform, cdiv, load_target, to_logit
from vocab_parallel.kernels.product import multiply, store_at_target, tile_origin
from vocab_parallel.kernels.put_statistics import put_statistics


def bytes_a_token(num_rows: int, names: tuple[str, ...]) -> int:
    """Return what is held of a token until its blocks' statistics are joined."""
    return (len(names) - 1) * cdiv(num_rows, product.ROWS) * 4


def product_statistics(
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    targets: Tensor,  # (n,)
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
    kept: Tensor | None,  # (n, r), r a multiple of 256 or R; raw logits, written
    transform: Transform,
) -> None:
    """Write the statistics of the logits of all rows, and keep those of the first rows.

    Args:
        hidden, classifier: float16 or bfloat16, as `product.operands_fit` wants them.
        targets: int32 or int64; a token whose target is none of the rows has a target logit of 0.
        names: "lse", "target", then "sum", "mean_log_prob" and "largest_other" where wanted; see
            `statistics.py`.
    """
    put_statistics(
        _product_statistics, hidden, classifier, bias, targets, statistics, names, kept, transform
    )


@kernel
def _product_statistics(  # type: ignore[no-untyped-def]
    hidden,
    classifier,
    kept,
    rows_kept,
    bias,
    targets,
    parts,
    at_target,
    num_tokens,
    num_rows,
    first_tile,
    last_tile,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SUM: tl.constexpr,  # its place in the statistics, 0 where it is not wanted
    MEAN: tl.constexpr,
    OTHER: tl.constexpr,
    KEEPS: tl.constexpr,
    DEPTHS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    HALF: tl.constexpr = ROWS // 2
    part = tl.cdiv(num_rows, ROWS).to(tl.int64) * num_tokens  # numbers of one statistic in `parts`
    for tile in tl.range(first_tile + tl.program_id(0), last_tile, PROGRAMS, flatten=True):
        token, row = tile_origin(tile, num_tokens, num_rows, TOKENS, ROWS, SWIZZLE)
        tokens = token + tl.arange(0, TOKENS)
        inside = tokens < num_tokens
        # Before the product, which hides the wait for them.
        target = load_target(targets, tokens, num_tokens)
        first, second = multiply(hidden, classifier, token, row, DEPTHS, TOKENS, ROWS, DEPTH)
        store_at_target(
            at_target, first, second, row, num_rows, tokens, target, inside, bias, softcap,
            temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, HALF,
        )  # fmt: skip
        for half in tl.static_range(2):
            start = row + half * HALF
            if KEEPS:  # noqa: SIM102 (one is known to the compiler)
                if start < rows_kept:
                    kept.store([token, start], (first if half == 0 else second).to(hidden.dtype))
        lse, plain, expected, other = statistics_by_maximum(
            first, second, row, num_rows, target, bias, softcap, temperature,
            HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, SUM > 0, MEAN > 0, OTHER > 0,
        )  # fmt: skip
        out = parts + (row // ROWS).to(tl.int64) * num_tokens + tokens
        tl.store(out, lse, mask=inside)
        if SUM > 0:
            tl.store(out + (SUM - 1) * part, plain, mask=inside)
        if MEAN > 0:
            tl.store(out + (MEAN - 1) * part, expected, mask=inside)
        if OTHER > 0:
            tl.store(out + (OTHER - 1) * part, other, mask=inside)


@triton.jit
def statistics_by_maximum(  # type: ignore[no-untyped-def]
    first, second, row, num_rows, target, bias, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_SUM: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """Return each token's lse, sum, mean and largest other logit in a tile, from its raw halves.

    They are right however far apart the logits are.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    TOKENS: tl.constexpr = first.shape[0]
    HALF: tl.constexpr = first.shape[1]
    peak = tl.full((TOKENS,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    plain = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    other = tl.full((TOKENS,), -float("inf"), tl.float32)
    for half in tl.static_range(2):
        z = first if half == 0 else second
        start = row + half * HALF
        columns = start + tl.arange(0, HALF)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
        z = to_logit(z, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
        if HAS_SUM:  # rows beyond the last were read as 0, and so are their logits
            plain += tl.sum(z, 1)
        if start + HALF > num_rows:
            z = tl.where(columns[None, :] < num_rows, z, -float("inf"))
        if HAS_OTHER:
            others = tl.where(columns[None, :] == target[:, None], -float("inf"), z)
            other = tl.maximum(other, tl.max(others, 1))
        larger = tl.maximum(peak, tl.max(z, 1))
        # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
        origin = tl.where(larger == -float("inf"), 0.0, larger)
        shift = origin * LOG2E
        exponential = tl.exp2(z * LOG2E - shift[:, None])
        rescale = tl.exp2(peak * LOG2E - shift)
        if HAS_MEAN:  # relative to `origin`, which moves with the peak
            finite = tl.where(exponential > 0.0, z - origin[:, None], 0.0)
            weighted += tl.where(peak == -float("inf"), 0.0, peak - origin) * total
            weighted = weighted * rescale + tl.sum(finite * exponential, 1)
        total = total * rescale + tl.sum(exponential, 1)
        peak = larger
    # Compared with 0 and not by >: a NaN stays one.
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, peak, peak + tl.log(divisor))
    expected = weighted / divisor - tl.where(total == 0.0, 0.0, lse - origin)
    return lse, plain, expected, other
