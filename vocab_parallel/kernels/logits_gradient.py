"""One pass over a tile of raw logits: the gradient of the product in the logits' place.

Reads and writes the tile once: 2 n r itemsize bytes, one exponential a logit. The formula is in
`backends/interface.py`. Where the bias has a gradient, a program adds up the columns of several
tokens before it writes the sums, so that no second pass reads the tile and the result is
deterministic.
"""

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import aligned_kernel
from vocab_parallel.kernels.logit import (
    Transform,
    cdiv,
    gradient_of,
    gradient_places,
    load_tokens,
    logit_values,
    readable_width,
    to_logit_and_slope,
)

BLOCK = 1024  # logits of a token that a program works on
# For the bias's gradient a program adds up many tokens, some at a time, fewer logits of each.
TOKENS_A_SUM, TOKENS_A_STEP, BLOCK_A_SUM = 64, 4, 512


def logits_gradient(
    logits: Tensor,  # (n, r), raw: hidden classifier^T
    bias: Tensor | None,  # (r,)
    targets: Tensor,  # (n,), counted from the row `row_start` before the tile's first
    row_start: int,
    statistics: Tensor,  # (k, n) float32, of the whole vocabulary
    grads: Tensor,  # (k, n) float32, what each statistic receives
    names: tuple[str, ...],
    out: Tensor,  # (n, r) in the logits' dtype; may be the logits
    transform: Transform,
    *,
    sum_tokens: bool,
) -> Tensor | None:  # (r,) float32
    """Write the gradient of the raw logits to ``out``; return its sum over tokens where asked."""
    num_tokens, num_rows = logits.shape
    assert logits.stride(1) == out.stride(1) == 1
    assert statistics.stride(1) == grads.stride(1) == 1
    of_group, at_a_time, block = 1, 1, BLOCK
    if sum_tokens:
        of_group, at_a_time, block = TOKENS_A_SUM, TOKENS_A_STEP, BLOCK_A_SUM
    groups = cdiv(num_tokens, of_group)
    sums = None
    if sum_tokens:
        sums = torch.empty((groups, num_rows), dtype=torch.float32, device=logits.device)
    values = (
        logits, logits.stride(0), out, out.stride(0), bias, targets, statistics,
        statistics.stride(0), grads, grads.stride(0), sums, num_tokens, num_rows,
        min(readable_width(logits), readable_width(out)), row_start, *logit_values(transform),
    )  # fmt: skip
    constants = (
        *gradient_places(names),
        ("STEPS", of_group // at_a_time),
        ("TOKENS", at_a_time),
        ("BLOCK", block),
        ("num_warps", 2),
    )
    _logits_gradient.start(logits, (cdiv(num_rows, block) * groups,), values, constants)
    return None if sums is None else sums.sum(0)


@aligned_kernel("row_start")  # one binary for all tiles
def _logits_gradient(  # type: ignore[no-untyped-def]
    logits,
    token_stride,
    out,
    out_stride,
    bias,
    targets,
    statistics,
    statistics_stride,
    grads,
    grads_stride,
    sums,
    num_tokens,
    num_rows,
    width,  # of the columns that may be touched, at least num_rows
    row_start,
    softcap,
    temperature,
    SUM: tl.constexpr,  # its place in the statistics, 0 where there is none
    MEAN: tl.constexpr,
    STEPS: tl.constexpr,  # of a program, each of some tokens
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Along one axis: the others have 65,535 programs at most, and there may be more tokens.
    program, across = tl.program_id(0), tl.cdiv(num_rows, BLOCK)
    columns = program % across * BLOCK + tl.arange(0, BLOCK)
    group = program // across
    inside = columns < num_rows
    touched = columns < width
    summed = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        added = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    for step in range(STEPS):
        tokens = (group * STEPS + step) * TOKENS + tl.arange(0, TOKENS)
        of_tokens = load_tokens(
            tokens, num_tokens, targets, row_start, statistics, statistics_stride, grads,
            grads_stride, SUM, MEAN,
        )  # fmt: skip
        here = tokens < num_tokens
        mask = here[:, None] & touched[None, :]
        at_token = tokens.to(tl.int64)[:, None]
        z = tl.load(logits + at_token * token_stride + columns[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        if bias is not None:
            z += added
        z, slope = to_logit_and_slope(z, softcap, temperature)
        gradient = gradient_of(z, slope, temperature, columns, of_tokens, SUM, MEAN)
        if sums is not None:
            summed += tl.sum(gradient, 0)
        tl.store(
            out + at_token * out_stride + columns[None, :],
            gradient.to(out.dtype.element_ty),
            mask=mask,
        )
    if sums is not None:
        tl.store(sums + group.to(tl.int64) * num_rows + columns, summed, mask=inside)
