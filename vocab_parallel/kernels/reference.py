"""A number near each token's largest logits, before there are any: the largest of a few rows.

One pass over the hidden states: the sampled rows stay in the cache.
"""

import torch
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import Transform, cdiv, logit_values, to_logit
from vocab_parallel.kernels.product import describe

# Of a program: tokens, the rows that are sampled, and how much of the hidden size at a time.
_TOKENS, _ROWS, _DEPTH = tl.constexpr(64), tl.constexpr(64), tl.constexpr(64)


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
    step = max(num_rows // _ROWS.value, 1)
    sample = classifier[: _ROWS.value * step : step]
    out = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
    values = (
        describe(hidden, _TOKENS.value, _DEPTH.value),
        describe(sample, _ROWS.value, _DEPTH.value),
        bias,
        step,
        out,
        num_tokens,
        sample.shape[0],
        *logit_values(transform),
    )
    depths = cdiv(depth, _DEPTH.value)
    constants: Constants = (("DEPTHS", depths), ("num_warps", 4), ("num_stages", 8))
    _token_reference.start(hidden, (cdiv(num_tokens, _TOKENS.value),), values, constants)
    return out


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
    DEPTHS: tl.constexpr,
):
    token = tl.program_id(0) * _TOKENS
    z = tl.zeros((_TOKENS, _ROWS), dtype=tl.float32)
    for step in range(DEPTHS):
        e = hidden.load([token, step * _DEPTH])
        z = tl.dot(e, sample.load([0, step * _DEPTH]).T, z)
    columns = tl.arange(0, _ROWS)
    if bias is not None:
        at = bias + columns * bias_step
        z += tl.load(at, mask=columns < num_sampled, other=0.0).to(tl.float32)
    z = to_logit(z, softcap, temperature)
    z = tl.where(columns[None, :] < num_sampled, z, -float("inf"))
    tokens = token + tl.arange(0, _TOKENS)
    tl.store(out + tokens, tl.max(z, 1), mask=tokens < num_tokens)
