"""Joins what a product's tiles found of each token, and multiplies out the target's logit.

A tile would have to look for the target among all its columns; one dot product a token costs less.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.logit import Transform, cdiv, logit_arguments, rival_place, to_logit

# What a program joins at a time: blocks of rows by tokens; and how much of the hidden size.
_BLOCKS, _TOKENS, _DEPTH = 32, 32, 64


def join_blocks(
    parts: Tensor,  # (k - 1, blocks, n) float32: lse, then sum, expected and rival where wanted
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    targets: Tensor,  # (n,)
    statistics: Tensor,  # (k, n) float32; written
    names: tuple[str, ...],
    transform: Transform,
) -> None:
    """Write the statistics of all blocks of rows together, and the target's logit.

    That is 0 where the target is none of the rows.
    """
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    assert hidden.stride(1) == classifier.stride(1) == statistics.stride(1) == 1
    with torch.cuda.device_of(hidden):
        _join_blocks[(cdiv(num_tokens, _TOKENS),)](
            parts,
            hidden,
            hidden.stride(0),
            classifier,
            classifier.stride(0),
            bias,
            targets,
            statistics,
            statistics.stride(0),
            parts.shape[1],
            num_tokens,
            num_rows,
            depth,
            **logit_arguments(bias, transform, names),
            **rival_place(names),
            BLOCKS=_BLOCKS,
            TOKENS=_TOKENS,
            DEPTH=_DEPTH,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["blocks", "num_rows"])  # neither is to be a constant 1
def _join_blocks(  # type: ignore[no-untyped-def]
    parts,
    hidden,
    hidden_stride,
    classifier,
    classifier_stride,
    bias,
    targets,
    statistics,
    statistics_stride,
    blocks,
    num_tokens,
    num_rows,
    depth,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SUM: tl.constexpr,
    EXPECTED: tl.constexpr,
    RIVAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
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
    rivals = tl.full((BLOCKS, TOKENS), -float("inf"), tl.float32)
    for start in range(0, blocks, BLOCKS):
        here = (start + block < blocks)[:, None] & inside[None, :]
        at = own + tl.cast(start, tl.int64) * num_tokens
        lse = tl.load(at, mask=here, other=-float("inf"))
        larger = tl.maximum(peak, lse)
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        rescale = tl.exp2((peak - shift) * LOG2E)
        share = tl.exp2((lse - shift) * LOG2E)
        total = total * rescale + share
        if SUM > 0:
            plain += tl.load(at + (SUM - 1) * part, mask=here, other=0.0)
        if EXPECTED > 0:
            expected = tl.load(at + (EXPECTED - 1) * part, mask=here, other=0.0)
            weighted = weighted * rescale + share * expected
        if RIVAL > 0:
            rival = tl.load(at + (RIVAL - 1) * part, mask=here, other=-float("inf"))
            rivals = tl.maximum(rivals, rival)
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
    owned = inside & (target >= 0) & (target < num_rows)
    row = tl.where(owned, target, 0).to(tl.int64)
    products = tl.zeros((TOKENS, DEPTH), tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + tl.arange(0, DEPTH)
        here = owned[:, None] & (at < depth)[None, :]
        e = tokens.to(tl.int64)[:, None] * hidden_stride + at[None, :]
        c = row[:, None] * classifier_stride + at[None, :]
        e = tl.load(hidden + e, mask=here, other=0.0).to(tl.float32)
        products += e * tl.load(classifier + c, mask=here, other=0.0).to(tl.float32)
    z = tl.sum(products, 1)
    if HAS_BIAS:
        z += tl.load(bias + row, mask=owned, other=0.0).to(tl.float32)
    z = to_logit(z, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
    tl.store(out + statistics_stride, tl.where(owned, z, 0.0), mask=inside)
    if SUM > 0:
        tl.store(out + SUM * statistics_stride, tl.sum(plain, 0), mask=inside)
    if EXPECTED > 0:
        expected = tl.sum(weighted * rescale, 0) / divisor
        tl.store(out + EXPECTED * statistics_stride, expected, mask=inside)
    if RIVAL > 0:
        tl.store(out + RIVAL * statistics_stride, tl.max(rivals, 0), mask=inside)
