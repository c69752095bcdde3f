"""One pass over a tile of raw logits: the gradient of the product in the logits' place.

Reads and writes the tile once: 2 n r itemsize bytes, one exponential a logit. `impls/base.py` has
the formula. Where the bias has a gradient, a program adds up the columns of several tokens before
it writes the sums, so that no second pass reads the tile and the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.logit import gradient_of, readable_width, to_logit_and_slope

BLOCK = 1024  # logits that a program works on at a time
# For the bias's gradient a program adds up many tokens' logits, fewer of each.
TOKENS_A_SUM, BLOCK_A_SUM = 64, 512


def logits_gradient(
    logits: Tensor,  # (n, r), raw: hidden classifier^T
    bias: Tensor | None,  # (r,)
    targets: Tensor,  # (n,), counted from the row `row_start` before the tile's first
    row_start: int,
    statistics: Tensor,  # (k, n) float32, of the whole vocabulary
    grads: Tensor,  # (k, n) float32, what each statistic receives
    names: tuple[str, ...],
    out: Tensor,  # (n, r) in the logits' dtype; may be the logits
    *,
    softcap: float | None,
    temperature: float,
    sum_tokens: bool,
) -> Tensor | None:  # (r,) float32
    """Write the gradient of the raw logits to ``out``; return its sum over tokens where asked."""
    num_tokens, num_rows = logits.shape
    assert logits.stride(1) == out.stride(1) == 1
    assert statistics.stride(1) == grads.stride(1) == 1
    assert names[:2] == ("lse", "target")
    steps, block = (TOKENS_A_SUM, BLOCK_A_SUM) if sum_tokens else (1, BLOCK)
    groups = triton.cdiv(num_tokens, steps)
    sums = None
    if sum_tokens:
        sums = torch.empty((groups, num_rows), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _logits_gradient[(triton.cdiv(num_rows, block), groups)](
            logits,
            logits.stride(0),
            out,
            out.stride(0),
            bias,
            targets,
            statistics,
            statistics.stride(0),
            grads,
            grads.stride(0),
            sums,
            num_tokens,
            num_rows,
            min(readable_width(logits), readable_width(out)),
            row_start,
            0.0 if softcap is None else softcap,
            temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_TEMPERATURE=temperature != 1.0,
            SUM=names.index("sum") if "sum" in names else 0,
            EXPECTED=names.index("expected") if "expected" in names else 0,
            HAS_SUMS=sum_tokens,
            STEPS=steps,
            BLOCK=block,
            num_warps=2,
        )
    return None if sums is None else sums.sum(0)


@triton.jit(do_not_specialize=["row_start"])  # one binary for all tiles
def _logits_gradient(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
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
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    SUM: tl.constexpr,  # its row in the statistics, 0 where there is none
    EXPECTED: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    STEPS: tl.constexpr,  # tokens of a program
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    inside = columns < num_rows
    touched = columns < width
    summed = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    first = group.to(tl.int64) * STEPS
    for token in range(first, tl.minimum(first + STEPS, num_tokens)):
        lse = tl.load(statistics + token)
        at = tl.load(statistics + statistics_stride + token)
        lse_grad = tl.load(grads + token)
        target_grad = tl.load(grads + grads_stride + token)
        target = tl.load(targets + token).to(tl.int64) - row_start

        z = tl.load(logits + token * row_stride + columns, mask=touched, other=0.0)
        z = z.to(tl.float32)
        if HAS_BIAS:
            z += added
        z, slope = to_logit_and_slope(z, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
        expected, expected_grad, sum_grad = 0.0, 0.0, 0.0
        if EXPECTED > 0:
            expected = tl.load(statistics + EXPECTED * statistics_stride + token)
            expected_grad = tl.load(grads + EXPECTED * grads_stride + token)
        if SUM > 0:
            sum_grad = tl.load(grads + SUM * grads_stride + token)
        gradient = gradient_of(
            z, slope, columns == target, lse, at, lse_grad, target_grad, sum_grad,
            expected, expected_grad,
            SUM, EXPECTED, HAS_SOFTCAP or HAS_TEMPERATURE,
        )  # fmt: skip
        if HAS_SUMS:
            summed += gradient
        tl.store(
            out + token * out_stride + columns,
            gradient.to(out.dtype.element_ty),
            mask=touched,
        )
    if HAS_SUMS:
        tl.store(sums + group.to(tl.int64) * num_rows + columns, summed, mask=inside)
