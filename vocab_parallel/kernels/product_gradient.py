"""The product and the gradient of its raw logits in one kernel: the logits never leave the chip.

Reads hidden states and rows, writes the gradient once, one exponential a logit. Where the bias has
a gradient, a program adds up the columns of its tile's 128 tokens, and another kernel those sums.
"""

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels import product
from vocab_parallel.kernels.launch import kernel
from vocab_parallel.kernels.logit import (
    Transform,
    gradient_of,
    gradient_places,
    load_tokens,
    logit_values,
    to_logit_and_slope,
)
from vocab_parallel.kernels.product import HALF, TOKENS, multiply, tile_origin


def product_gradient(
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (r, D)
    bias: Tensor | None,  # (r,)
    targets: Tensor,  # (n,), counted from the row `row_start` before the tile's first
    row_start: int,
    statistics: Tensor,  # (k, n) float32, of the whole vocabulary
    grads: Tensor,  # (k, n) float32, what each statistic receives
    names: tuple[str, ...],
    out: Tensor,  # (n, r) in the dtype of the hidden states; written
    transform: Transform,
    *,
    sum_tokens: bool,
) -> Tensor | None:  # (r,) float32
    """Write the gradient of the raw logits to ``out``; return its sum over tokens where asked.

    Args:
        hidden, classifier, out: float16 or bfloat16, as `product.operands_fit` wants them.
        targets: int32 or int64.
    """
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    assert statistics.stride(1) == grads.stride(1) == 1
    groups, row_blocks = product.count_blocks(num_tokens, num_rows)
    tiles = groups * row_blocks
    programs = product.num_programs(hidden.device, tiles)
    sums = None
    if sum_tokens:
        sums = torch.empty((groups, num_rows), dtype=torch.float32, device=hidden.device)
    values = (
        *product.describe_operands(hidden, classifier),
        product.describe_halves(out),
        bias,
        targets,
        statistics,
        statistics.stride(0),
        grads,
        grads.stride(0),
        sums,
        num_tokens,
        num_rows,
        tiles,
        row_start,
        *logit_values(transform),
    )
    constants = gradient_places(names) + product.tile_constants(depth, programs)
    _product_gradient.start(hidden, (programs,), values, constants)
    return None if sums is None else sums.sum(0)


@kernel
def _product_gradient(  # type: ignore[no-untyped-def]
    hidden,
    classifier,
    out,
    bias,
    targets,
    statistics,
    statistics_stride,
    grads,
    grads_stride,
    sums,
    num_tokens,
    num_rows,
    tiles,
    row_start,
    softcap,
    temperature,
    SUM: tl.constexpr,  # its place in the statistics, 0 where there is none
    MEAN: tl.constexpr,
    DEPTHS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        token, row = tile_origin(tile, num_tokens, num_rows)
        tokens = token + tl.arange(0, TOKENS)
        # Before the product, which hides the wait for them.
        of_tokens = load_tokens(
            tokens, num_tokens, targets, row_start, statistics, statistics_stride, grads,
            grads_stride, SUM, MEAN,
        )  # fmt: skip
        first, second = multiply(hidden, classifier, token, row, DEPTHS)
        for half in tl.static_range(2):
            z = first if half == 0 else second
            start = row + half * HALF
            columns = start + tl.arange(0, HALF)
            if bias is not None:
                z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
            z, slope = to_logit_and_slope(z, softcap, temperature)
            gradient = gradient_of(z, slope, temperature, columns, of_tokens, SUM, MEAN)
            if sums is not None:
                tl.store(
                    sums + (token // TOKENS).to(tl.int64) * num_rows + columns,
                    tl.sum(gradient, 0),
                    mask=columns < num_rows,
                )
            out.store([token, start], gradient.to(out.dtype))
