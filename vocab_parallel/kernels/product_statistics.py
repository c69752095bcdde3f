"""The product and each token's statistics in one kernel: raw logits never leave the chip.

A tile's statistics, k - 1 float32 a token and block of rows, are joined by a second kernel. What
the first rows' tiles made is written too, where somebody wants to keep it. One exponential a logit.

Without a reference the raw logits are kept, and a tile's statistics are relative to its maximum.

With r a number of each token, its reference, the kernel keeps exp(z - r). The probability is that
times exp(r - lse), a number of the token, so that both gradients are products of what was kept
(`kept_probabilities.py`), and backward needs no pass over it. No maximum is looked for: the sum
over a tile is that of the same numbers. bfloat16 and float32 have room for 88 nats on either side
of r; a tile in which a token's sum has left them, or one that has rows beyond the last, is done
again by its maximum, in registers. It is the faster way where lse and the target's logit alone
receive a gradient.

Its time beside cuBLAS's is that of the instructions between two tiles' products. A branch that
masks a tile's exponentials, taken or not, keeps the compiler from mixing them with the sums: 3.6%.

Statistics that receive no gradient, for metrics, cost a sum and a maximum a logit: what is kept is
the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels import product
from vocab_parallel.kernels.join_blocks import join_blocks
from vocab_parallel.kernels.launch import kernel
from vocab_parallel.kernels.logit import (
    LOG2E,
    Transform,
    load_reference,
    load_target,
    logit_values,
    statistic_places,
    to_logit,
    to_logit_and_slope,
)
from vocab_parallel.kernels.product import (
    HALF,
    ROWS,
    TOKENS,
    multiply,
    store_at_target,
    tile_origin,
)

# Exponents of 2 beyond which a sum of a tile's exponentials is not trusted.
_FARTHEST = tl.constexpr(86.0)


def bytes_a_token(num_rows: int, names: tuple[str, ...]) -> int:
    """Return what is held of a token until its blocks' statistics are joined."""
    return (len(names) - 1) * product.count_blocks(1, num_rows)[1] * 4


def product_statistics(
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    targets: Tensor,  # (n,)
    reference: Tensor | None,  # (n,) any floating dtype
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
    kept: Tensor | None,  # (n, r), r a multiple of 256 or R; written
    transform: Transform,
) -> None:
    """Write the statistics of the logits of all rows, and keep something of the first rows.

    Args:
        hidden, classifier: float16 or bfloat16, as `product.operands_fit` wants them.
        targets: int32 or int64; a token whose target is none of the rows has a target logit of 0.
        reference: near the largest logits of the token; -inf counts as 0. What is kept is then
            exp(z - reference), times the slope of the logit z in its raw entry where there is a
            softcap, for which float16 has no room. With None it is the raw logits.
        names: "lse", "target", then "sum", which has no reference, "mean_log_prob" and
            "largest_other" where wanted; see `statistics.py`.
    """
    assert reference is None or "sum" not in names
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    token_blocks, row_blocks = product.count_blocks(num_tokens, num_rows)
    parts = statistics.new_empty((len(names) - 1, row_blocks, num_tokens))
    tiles = token_blocks * row_blocks
    programs = product.num_programs(hidden.device, tiles)
    operands = (
        *product.describe_operands(hidden, classifier),
        None if kept is None else product.describe_halves(kept),
        0 if kept is None else kept.shape[1],
        bias,
        targets,
        reference,
        parts,
        statistics[1],
        num_tokens,
        num_rows,
        *logit_values(transform),
    )
    constants = statistic_places(names) + product.tile_constants(depth, programs)
    for first, last in product.launches(tiles, programs):
        _product_statistics.start(hidden, (programs,), (*operands, first, last), constants)
    join_blocks(parts, num_rows, targets, statistics, names)


@kernel
def _product_statistics(  # type: ignore[no-untyped-def]
    hidden,
    classifier,
    kept,
    rows_kept,
    bias,
    targets,
    reference,
    parts,
    at_target,
    num_tokens,
    num_rows,
    softcap,
    temperature,
    first_tile,
    last_tile,
    SUM: tl.constexpr,  # its place in the statistics, 0 where it is not wanted
    MEAN: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTHS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    part = tl.cdiv(num_rows, ROWS).to(tl.int64) * num_tokens  # numbers of one statistic in `parts`
    for tile in tl.range(first_tile + tl.program_id(0), last_tile, PROGRAMS, flatten=True):
        token, row = tile_origin(tile, num_tokens, num_rows)
        tokens = token + tl.arange(0, TOKENS)
        inside = tokens < num_tokens
        # Before the product, which hides the wait for them.
        target = load_target(targets, tokens, num_tokens)
        if reference is not None:
            origin = load_reference(reference, tokens, num_tokens)
        first, second = multiply(hidden, classifier, token, row, DEPTHS)
        store_at_target(
            at_target, first, second, row, num_rows, tokens, target, inside, bias, softcap,
            temperature,
        )  # fmt: skip
        if reference is None:
            for half in tl.static_range(2):
                start = row + half * HALF
                if kept is not None:  # noqa: SIM102 (one is known to the compiler)
                    if start < rows_kept:
                        raw = first if half == 0 else second
                        kept.store([token, start], raw.to(kept.dtype))
            lse, plain, expected, other = _statistics_by_maximum(
                first, second, row, num_rows, target, bias, softcap, temperature,
                SUM > 0, MEAN > 0, OTHER > 0,
            )  # fmt: skip
        else:
            lse, expected, other = _statistics_by_reference(
                first, second, token, row, num_rows, target, origin, bias, softcap, temperature,
                kept, rows_kept, MEAN > 0, OTHER > 0,
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
def _statistics_by_reference(  # type: ignore[no-untyped-def]
    first, second, token, row, num_rows, target, origin, bias, softcap, temperature, kept,
    rows_kept, HAS_MEAN: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """Return each token's lse, mean and largest other logit in a tile; keep its exponentials."""
    shift = origin * LOG2E
    total = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    other = tl.full((TOKENS,), -float("inf"), tl.float32)
    for half in tl.static_range(2):
        z = first if half == 0 else second
        start = row + half * HALF
        columns = start + tl.arange(0, HALF)
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
        z, slope = to_logit_and_slope(z, softcap, temperature)
        exponential = tl.exp2(z * LOG2E - shift[:, None])
        total += tl.sum(exponential, 1)
        if HAS_MEAN:
            # A logit of -inf adds nothing: not 0 times -inf.
            finite = tl.where(exponential > 0.0, z - origin[:, None], 0.0)
            weighted += tl.sum(finite * exponential, 1)
        if HAS_OTHER:
            is_other = (columns < num_rows)[None, :] & (columns[None, :] != target[:, None])
            other = tl.maximum(other, tl.max(tl.where(is_other, z, -float("inf")), 1))
        if kept is not None:  # noqa: SIM102 (one is known to the compiler)
            if start < rows_kept:
                kept.store([token, start], (exponential * slope).to(kept.dtype))
    exponent = tl.log2(total)
    lse = (shift + exponent) / LOG2E
    expected = weighted
    if HAS_MEAN:
        expected = weighted / total - (lse - origin)
    # Rows beyond the last one were read as 0 and counted: a mask of every tile's would be dear.
    if (tl.max(tl.abs(exponent)) > _FARTHEST) | (row + ROWS > num_rows):
        lse, _, by_maximum, _ = _statistics_by_maximum(
            first, second, row, num_rows, target, bias, softcap, temperature,
            False, HAS_MEAN, False,
        )  # fmt: skip
        if HAS_MEAN:
            expected = by_maximum
    return lse, expected, other


@triton.jit
def _statistics_by_maximum(  # type: ignore[no-untyped-def]
    first, second, row, num_rows, target, bias, softcap, temperature,
    HAS_SUM: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """Return each token's lse, sum, mean and largest other logit in a tile, from its raw halves.

    They are right however far apart the logits are.
    """
    peak = tl.full((TOKENS,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    plain = tl.zeros((TOKENS,), tl.float32)
    weighted = tl.zeros((TOKENS,), tl.float32)
    other = tl.full((TOKENS,), -float("inf"), tl.float32)
    for half in tl.static_range(2):
        z = first if half == 0 else second
        start = row + half * HALF
        columns = start + tl.arange(0, HALF)
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
        z = to_logit(z, softcap, temperature)
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
