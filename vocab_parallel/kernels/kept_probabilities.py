"""Makes what forward kept ready for the products of backward, without a pass over it.

Forward kept q = exp(z - r) (`product_statistics.py`). Where lse receives a and the target's
logit b, a raw entry receives s q with s = a exp(r - lse), a number of the token, but for the
target's, which receives o = a (p - 1) + (a + b). With 0 in the targets' places of Q, and y a
token's target,

    dE = s (Q c) + o c[y]      dC = Q^T (s e) + the sum of o e over each row's tokens

The targets' terms, the largest, are so added in float32 (`target_rows.py`); rounding s e once more
costs less than rounding those did.

Tokens whose reference was too far from their lse for q to hold their probabilities get q anew,
with lse for a reference. Nobody knows of them but the device: a program that finds none has done
its work with a few numbers of each token.
"""

import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants, kernel
from vocab_parallel.kernels.logit import (
    Transform,
    cdiv,
    expm1,
    load_reference,
    load_target,
    logit_values,
    to_logit_and_slope,
)
from vocab_parallel.kernels.product import describe

_TOKENS, _ROWS, _DEPTH = tl.constexpr(128), tl.constexpr(64), tl.constexpr(64)
# Programs that share a block of tokens, should its rows have to be done anew.
_SHARES = tl.constexpr(8)
# How far a token's lse may lie from its reference: exp of it, and of it over a gradient of 1e-12,
# are floats.
_FARTHEST = tl.constexpr(60.0)


def rescale_kept(
    kept: Tensor,  # (n, r) bfloat16, of the shard's first rows; the targets' places become 0
    hidden: Tensor,  # (n, D)
    classifier: Tensor,  # (r, D), those rows
    bias: Tensor | None,  # (r,)
    targets: Tensor,  # (n,), counted from the first row
    reference: Tensor,  # (n,) any floating dtype, that of forward
    statistics: Tensor,  # (2, n) float32, of the whole vocabulary
    grads: Tensor,  # (2, n) float32, what each statistic receives
    transform: Transform,
) -> tuple[Tensor, Tensor]:  # (n,) float32 both
    """Return s and o of each token; may be called again."""
    (num_tokens, depth), num_rows = hidden.shape, classifier.shape[0]
    assert kept.stride(1) == statistics.stride(1) == grads.stride(1) == 1
    scale, own = statistics.new_empty((2, num_tokens)).unbind()
    values = (
        describe(hidden, _TOKENS.value, _DEPTH.value),
        describe(classifier, _ROWS.value, _DEPTH.value),
        describe(kept, _TOKENS.value, _ROWS.value),
        kept,
        kept.stride(0),
        bias,
        targets,
        reference,
        statistics,
        statistics.stride(0),
        grads,
        grads.stride(0),
        scale,
        own,
        num_tokens,
        num_rows,
        *logit_values(transform),
    )
    grid = (cdiv(num_tokens, _TOKENS.value), _SHARES.value)
    constants: Constants = (("DEPTHS", cdiv(depth, _DEPTH.value)), ("num_warps", 4))
    _rescale.start(hidden, grid, values, constants)
    return scale, own


@kernel
def _rescale(  # type: ignore[no-untyped-def]
    hidden,
    classifier,
    kept,
    kept_numbers,  # the same, to write single numbers
    kept_stride,
    bias,
    targets,
    reference,
    statistics,
    statistics_stride,
    grads,
    grads_stride,
    scales,
    owns,
    num_tokens,
    num_rows,
    softcap,
    temperature,
    DEPTHS: tl.constexpr,
):
    token = tl.program_id(0) * _TOKENS
    share = tl.program_id(1)
    tokens = token + tl.arange(0, _TOKENS)
    here = tokens < num_tokens
    target = load_target(targets, tokens, num_tokens)
    lse = tl.load(statistics + tokens, mask=here, other=0.0)
    at_target = tl.load(statistics + statistics_stride + tokens, mask=here, other=0.0)
    lse_grad = tl.load(grads + tokens, mask=here, other=0.0)
    target_grad = tl.load(grads + grads_stride + tokens, mask=here, other=0.0)
    shift = load_reference(reference, tokens, num_tokens)

    own = lse_grad * expm1(at_target - lse) + (lse_grad + target_grad)
    if softcap is not None:  # d tanh = 1 - tanh^2
        tanh = at_target / softcap
        if temperature is not None:
            tanh = at_target * temperature / softcap
        own *= 1.0 - tanh * tanh
    far = here & (tl.abs(lse - shift) > _FARTHEST)
    shift = tl.where(far, lse, shift)
    # Ignored tokens, whose statistics may be anything, receive nothing.
    scale = tl.where(lse_grad == 0.0, 0.0, lse_grad * tl.exp(shift - lse))
    if share == 0:
        slope = 1.0
        if temperature is not None:
            slope = 1.0 / temperature
        tl.store(scales + tokens, scale * slope, mask=here)
        tl.store(owns + tokens, own * slope, mask=here)
        owned = here & (target >= 0) & (target < num_rows)
        at = kept_numbers + tokens.to(tl.int64) * kept_stride + target
        tl.store(at, 0.0, mask=owned)
    if tl.max(far.to(tl.int32)) > 0:
        for row in range(share * _ROWS, num_rows, _SHARES * _ROWS):
            z = tl.zeros((_TOKENS, _ROWS), dtype=tl.float32)
            for step in range(DEPTHS):
                e = hidden.load([token, step * _DEPTH])
                z = tl.dot(e, classifier.load([row, step * _DEPTH]).T, z)
            columns = row + tl.arange(0, _ROWS)
            if bias is not None:
                z += tl.load(bias + columns, mask=columns < num_rows, other=0.0).to(tl.float32)
            z, slope = to_logit_and_slope(z, softcap, temperature)
            anew = tl.exp(z - shift[:, None]) * slope
            anew = tl.where(columns[None, :] == target[:, None], 0.0, anew)
            kept.store([token, row], anew.to(kept.dtype))
