"""From a product's raw entry to a logit, and what else the kernels share."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vocab_parallel.kernels.launch import Constants

Transform = tuple[float | None, float]  # softcap or None, temperature
LOG2E = tl.constexpr(1.4426950408889634)


def cdiv(length: int, size: int) -> int:
    """Return how many blocks of one size cover a length (triton's own takes microseconds)."""
    return -(-length // size)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def readable_width(tile: Tensor) -> int:
    """Return how many columns of a tile [n, r] a kernel may touch: whole 32-byte sectors if it can.

    What follows a tile's columns in its own row of the buffer is nobody's, if the tile begins the
    row; a mask that ends at a multiple of 16 lets loads and stores stay wide.
    """
    rounded = cdiv(tile.shape[1], 16) * 16
    begins_row = tile.stride(0) > 0 and tile.storage_offset() % tile.stride(0) == 0
    return rounded if begins_row and rounded <= tile.stride(0) else tile.shape[1]


# Where the statistics lie that not every loss reads, as kernels call it.
_PLACES = (("SUM", "sum"), ("MEAN", "mean_log_prob"), ("OTHER", "largest_other"))


@functools.cache
def statistic_places(names: tuple[str, ...]) -> Constants:
    """Return where those lie that not every loss reads, 0 where they are not wanted."""
    assert names[:2] == ("lse", "target")
    return tuple((place, names.index(name) if name in names else 0) for place, name in _PLACES)


def gradient_places(names: tuple[str, ...]) -> Constants:
    """Return the same of those that may receive a gradient."""
    return statistic_places(names)[:2]


def logit_values(transform: Transform) -> tuple[float | None, float | None]:
    """Return softcap and temperature as kernels take them: None is compiled away."""
    softcap, temperature = transform
    return (
        None if softcap is None else float(softcap),
        None if temperature == 1.0 else float(temperature),
    )


@triton.jit
def to_logit_and_slope(x, softcap, temperature):  # type: ignore[no-untyped-def]
    """softcap tanh(x / softcap) / temperature, for x in float32 with the bias added.

    And the derivative by x of what the temperature divides.
    """
    slope = 1.0
    if softcap is not None:  # d tanh = 1 - tanh^2; the interpreter has no library's tanh
        tanh = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        x = softcap * tanh
        slope = 1.0 - tanh * tanh
    if temperature is not None:
        x = x / temperature
    return x, slope


@triton.jit
def to_logit(x, softcap, temperature):  # type: ignore[no-untyped-def]
    """The logit alone."""
    x, _ = to_logit_and_slope(x, softcap, temperature)
    return x


@triton.jit
def expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 to float32's precision; a series near 0, where the difference would cancel."""
    series = x * (
        1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))))
    )
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def load_tokens(  # type: ignore[no-untyped-def]
    tokens, num_tokens, targets, row_start, statistics, statistics_stride, grads, grads_stride,
    SUM: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Tokens' targets, statistics and what these receive, as columns; 0 beyond the last token."""
    here = tokens < num_tokens
    lse = tl.load(statistics + tokens, mask=here, other=float("inf"))
    at_target = tl.load(statistics + statistics_stride + tokens, mask=here, other=0.0)
    lse_grad = tl.load(grads + tokens, mask=here, other=0.0)
    target_grad = tl.load(grads + grads_stride + tokens, mask=here, other=0.0)
    target = tl.load(targets + tokens, mask=here, other=-1).to(tl.int32) - row_start
    expected, expected_grad, sum_grad = lse, lse, lse
    if MEAN > 0:
        expected = tl.load(statistics + MEAN * statistics_stride + tokens, mask=here, other=0.0)
        expected_grad = tl.load(grads + MEAN * grads_stride + tokens, mask=here, other=0.0)
    if SUM > 0:
        sum_grad = tl.load(grads + SUM * grads_stride + tokens, mask=here, other=0.0)
    return (
        target[:, None], lse[:, None], at_target[:, None], lse_grad[:, None],
        target_grad[:, None], sum_grad[:, None], expected[:, None], expected_grad[:, None],
    )  # fmt: skip


@triton.jit
def gradient_of(  # type: ignore[no-untyped-def]
    z, slope, temperature, columns, of_tokens, SUM: tl.constexpr, MEAN: tl.constexpr
):
    """The gradient of raw entries from their logits z; `backends/interface.py` has the formula.

    Their slopes are those of `to_logit_and_slope`; what is known of their tokens is what
    `load_tokens` found.
    """
    target, lse, at_target, lse_grad, target_grad, sum_grad, expected, expected_grad = of_tokens
    # Here: where it is used, the compiler would make it for all entries beforehand, as bits.
    is_target = columns[None, :] == target
    p = tl.exp2(z * LOG2E - lse * LOG2E)
    gradient = p * lse_grad
    own = lse_grad * expm1(at_target - lse) + (lse_grad + target_grad)
    if MEAN > 0:
        finite = tl.where(p > 0.0, z - lse, 0.0)
        gradient += p * expected_grad * (finite - expected)
        # As above: a logit of -inf has no probability, and 0 times -inf is not 0.
        log_p = at_target - lse
        finite_log_p = tl.where(log_p == -float("inf"), 0.0, log_p)
        own += expected_grad * tl.exp(log_p) * (finite_log_p - expected)
    gradient = tl.where(is_target, own, gradient)
    if SUM > 0:
        gradient += sum_grad
    if temperature is not None:
        slope = slope / temperature
    return gradient * slope


@triton.jit
def load_reference(reference, tokens, num_tokens):  # type: ignore[no-untyped-def]
    """Tokens' references; 0 where the sample that they are of was masked whole."""
    found = tl.load(reference + tokens, mask=tokens < num_tokens, other=0.0).to(tl.float32)
    return tl.where(found == -float("inf"), 0.0, found)


@triton.jit
def load_target(targets, tokens, num_tokens):  # type: ignore[no-untyped-def]
    """Tokens' targets, rows of the shard or outside of them, as int32."""
    return tl.load(targets + tokens, mask=tokens < num_tokens, other=-1).to(tl.int32)
