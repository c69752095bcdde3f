"""The product and its exponentials in one kernel: what is kept needs no pass in backward.

With r a number of each token, its reference, the kernel writes exp(z - r) where others write z. The
probability is that times exp(r - lse), a number of the token, so that both gradients are products
of what was kept (`kept_probabilities.py`). No maximum is looked for: the sum over a tile is that of
the same numbers. bfloat16 and float32 have room for 88 nats on either side of r; a tile in which a
token's sum has left them, or one that has rows beyond the last, is done again by its maximum, in
registers.

Its time beside cuBLAS's is that of the instructions between two tiles' products. A branch that
masks a tile's exponentials, taken or not, keeps the compiler from mixing them with the sums: 3.6%.

Statistics that receive no gradient, for metrics, cost a sum and a maximum a logit: what is kept is
the same.
"""

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import kernel
from vocab_parallel.kernels.logit import (
    Transform,
    load_reference,
    load_target,
    to_logit_and_slope,
)
from vocab_parallel.kernels.product import multiply, store_at_target, tile_origin
from vocab_parallel.kernels.product_statistics import statistics_by_maximum
from vocab_parallel.kernels.put_statistics import put_statistics

# Exponents of 2 beyond which a sum of a tile's exponentials is not trusted.
_FARTHEST = 86.0


def product_probabilities(
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    targets: Tensor,  # (n,)
    reference: Tensor,  # (n,) any floating dtype
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
    kept: Tensor | None,  # (n, r), r a multiple of 256 or R; written
    transform: Transform,
) -> None:
    """Write the statistics of the logits of all rows, and keep the first rows' exponentials.

    What is kept is exp(z - reference), times the slope of the logit z in its raw entry where there
    is a softcap.

    Args:
        hidden, classifier: bfloat16, as `product.operands_fit` wants them; float16 too where
            nothing is kept.
        targets: int32 or int64; a token whose target is none of the rows has a target logit of 0.
        reference: near the largest logits of the token; -inf counts as 0.
        names: "lse", "target", then "mean_log_prob" and "largest_other" where wanted; see
            `statistics.py`.
    """
    assert "sum" not in names
    put_statistics(
        _product_probabilities, hidden, classifier, bias, targets, statistics, names, kept,
        transform, more_values=(reference,), more_constants=(("FARTHEST", _FARTHEST),),
    )  # fmt: skip


@kernel
def _product_probabilities(  # type: ignore[no-untyped-def]
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
    reference,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SUM: tl.constexpr,  # never wanted
    MEAN: tl.constexpr,  # its place in the statistics, 0 where it is not wanted
    OTHER: tl.constexpr,
    KEEPS: tl.constexpr,
    FARTHEST: tl.constexpr,
    DEPTHS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    HALF: tl.constexpr = ROWS // 2
    LOG2E: tl.constexpr = 1.4426950408889634
    part = tl.cdiv(num_rows, ROWS).to(tl.int64) * num_tokens  # numbers of one statistic in `parts`
    for tile in tl.range(first_tile + tl.program_id(0), last_tile, PROGRAMS, flatten=True):
        token, row = tile_origin(tile, num_tokens, num_rows, TOKENS, ROWS, SWIZZLE)
        tokens = token + tl.arange(0, TOKENS)
        inside = tokens < num_tokens
        # Before the product, which hides the wait for them.
        target = load_target(targets, tokens, num_tokens)
        origin = load_reference(reference, tokens, num_tokens)
        shift = origin * LOG2E
        first, second = multiply(hidden, classifier, token, row, DEPTHS, TOKENS, ROWS, DEPTH)
        store_at_target(
            at_target, first, second, row, num_rows, tokens, target, inside, bias, softcap,
            temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, HALF,
        )  # fmt: skip
        total = tl.zeros((TOKENS,), tl.float32)
        weighted = tl.zeros((TOKENS,), tl.float32)
        other = tl.full((TOKENS,), -float("inf"), tl.float32)
        for half in tl.static_range(2):
            z = first if half == 0 else second
            start = row + half * HALF
            columns = start + tl.arange(0, HALF)
            if HAS_BIAS:
                z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
            z, slope = to_logit_and_slope(z, softcap, 1.0, HAS_SOFTCAP, False)
            if HAS_TEMPERATURE:
                z = z / temperature
            exponential = tl.exp2(z * LOG2E - shift[:, None])
            total += tl.sum(exponential, 1)
            if MEAN > 0:
                # A logit of -inf adds nothing: not 0 times -inf.
                finite = tl.where(exponential > 0.0, z - origin[:, None], 0.0)
                weighted += tl.sum(finite * exponential, 1)
            if OTHER > 0:
                is_other = (columns < num_rows)[None, :] & (columns[None, :] != target[:, None])
                other = tl.maximum(other, tl.max(tl.where(is_other, z, -float("inf")), 1))
            if KEEPS:  # noqa: SIM102 (one is known to the compiler)
                if start < rows_kept:
                    kept.store([token, start], (exponential * slope).to(kept.dtype))
        exponent = tl.log2(total)
        lse = (shift + exponent) / LOG2E
        expected = weighted
        if MEAN > 0:
            expected = weighted / total - (lse - origin)
        # Rows beyond the last one were read as 0 and counted: a mask of every tile's would be dear.
        if (tl.max(tl.abs(exponent)) > FARTHEST) | (row + ROWS > num_rows):
            lse, _, by_maximum, _ = statistics_by_maximum(
                first, second, row, num_rows, target, bias, softcap, temperature,
                HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE, False, MEAN > 0, False,
            )  # fmt: skip
            if MEAN > 0:
                expected = by_maximum
        out = parts + (row // ROWS).to(tl.int64) * num_tokens + tokens
        tl.store(out, lse, mask=inside)
        if MEAN > 0:
            tl.store(out + (MEAN - 1) * part, expected, mask=inside)
        if OTHER > 0:
            tl.store(out + (OTHER - 1) * part, other, mask=inside)
