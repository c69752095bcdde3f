"""A number near each token's largest logits, before there are any: the largest of a few rows.

One pass over the hidden states: the sampled rows stay in the cache.
"""

import functools

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import (
    Transform,
    cdiv,
    logit_constants,
    logit_values,
    parts_of,
    to_logit,
)
from vocab_parallel.kernels.product import describe

# Of a program: tokens, the rows that are sampled, and how much of the hidden size at a time.
_TOKENS, _ROWS, _DEPTH = 64, 64, 64


def token_reference(
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,  # (R,)
    transform: Transform,
) -> Tensor:  # (n,) float32
    """Return each token's largest logit among rows that lie evenly in the shard.

    Args:
        hidden, classifier: float16 or bfloat16, as `product.operands_fit` wants them.
    """
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    step = max(num_rows // _ROWS, 1)
    sample = classifier[: _ROWS * step : step]
    out = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
    values = (
        describe(hidden, _TOKENS, _DEPTH),
        describe(sample, _ROWS, _DEPTH),
        bias,
        step,
        out,
        num_tokens,
        sample.shape[0],
        *logit_values(transform),
    )
    constants = _constants(bias is not None, parts_of(transform), depth)
    _token_reference.start(hidden, (cdiv(num_tokens, _TOKENS),), values, constants)
    return out


@functools.cache
def _constants(has_bias: bool, parts: tuple[bool, bool], depth: int) -> Constants:
    return (
        *logit_constants(has_bias, parts, ("lse", "target")).items(),
        ("DEPTHS", cdiv(depth, _DEPTH)),
        ("TOKENS", _TOKENS),
        ("ROWS", _ROWS),
        ("DEPTH", _DEPTH),
        ("num_warps", 4),
        ("num_stages", 8),
    )


@kernel
def _token_reference(  # type: ignore[no-untyped-def]
    hidden,
    sample,
    bias,
    bias_step,
    out,
    num_tokens,
    num_sampled,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SUM: tl.constexpr,
    MEAN: tl.constexpr,
    DEPTHS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS
    z = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for step in range(DEPTHS):
        e = hidden.load([token, step * DEPTH])
        z = tl.dot(e, sample.load([0, step * DEPTH]).T, z)
    columns = tl.arange(0, ROWS)
    if HAS_BIAS:
        at = bias + columns * bias_step
        z += tl.load(at, mask=columns < num_sampled, other=0.0).to(tl.float32)
    z = to_logit(z, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
    z = tl.where(columns[None, :] < num_sampled, z, -float("inf"))
    tokens = token + tl.arange(0, TOKENS)
    tl.store(out + tokens, tl.max(z, 1), mask=tokens < num_tokens)
