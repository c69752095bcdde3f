"""Each token's loss from its statistics, with a gradient that is written down.

With s = label_smoothing, Z = z_loss, w = the token's weight:

    loss      = w (lse - (1 - s) target - s sum / vocabulary + Z lse^2)
    d.lse     = w (1 + 2 Z lse)      d.target = -w (1 - s)      d.sum = -w s / vocabulary

0 where the label is ignored, whatever its weight, and NaN where it is no token. On a GPU each way
is one kernel: written with tensor operations it is thirty, which together take as long as a pass
over the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from vocab_parallel.backends.registry import load
from vocab_parallel.layout import IGNORED, OUT_OF_RANGE, count_valid
from vocab_parallel.split_backward import first_derivative_only

_OfStatistics = Callable[[Tensor], Tensor]
_Backward = Callable[[Tensor, Tensor], Tensor]
Divisor = Tensor | int | Literal["counted"] | None


@dataclass(frozen=True)
class TokenLoss:
    """The loss of each of some tokens.

    Attributes:
        labels: [n] int32, marked.
        weight: [n], or None.
        smoothing: label_smoothing.
        vocabulary: how many tokens it has.
        z_loss: the weight of lse^2.
        divisor: of their sum, which counts as 1 where it is 0, or None. "counted": how many labels
            are not ignored, which kernels count where they divide.
        kernels: whether Triton's kernels work here.
    """

    labels: Tensor
    weight: Tensor | None
    smoothing: float
    vocabulary: int
    z_loss: float
    divisor: Divisor
    kernels: bool

    def __call__(self, statistics: Tensor) -> Tensor:
        """Return the losses [n] of statistics [k, n], differentiable in these."""
        return cast(Tensor, _Written.apply(statistics, self.values, self.gradient))

    def total(self, statistics: Tensor) -> Tensor:
        """Return their sum over the divisor, a number that is differentiable in the statistics."""
        return cast(Tensor, _Written.apply(statistics, self.total_value, self.total_gradient))

    def values(self, statistics: Tensor) -> Tensor:
        """Return the losses [n] of statistics [k, n]: lse, target, and sum where it is read."""
        if self.kernels:
            return self._by_kernel("token_loss", statistics)
        ignored = self.labels == IGNORED
        lse = statistics[0].masked_fill(ignored, 0.0)
        loss = lse - (1.0 - self.smoothing) * statistics[1]
        if self.smoothing:
            loss -= self._share * statistics[2]
        if self.z_loss:
            loss += self.z_loss * lse.square()
        if self.weight is not None:
            loss = loss * self.weight
        return loss.masked_fill_(ignored, 0.0).masked_fill_(self.labels == OUT_OF_RANGE, torch.nan)

    def gradient(self, statistics: Tensor, upstream: Tensor) -> Tensor:
        """Return what each statistic [k, n] receives where the losses receive ``upstream`` [n]."""
        if self.kernels:
            return self._by_kernel("token_loss_grad", statistics, upstream, None)
        unit = upstream if self.weight is None else upstream * self.weight
        ignored = self.labels == IGNORED
        unit = unit.masked_fill(ignored | (self.labels == OUT_OF_RANGE), 0.0)
        grads = torch.zeros_like(statistics)
        lse = statistics[0].masked_fill(ignored, 0.0)
        grads[0] = unit * (1.0 + 2.0 * self.z_loss * lse)
        grads[1] = -(1.0 - self.smoothing) * unit
        if self.smoothing:
            grads[2] = -self._share * unit
        return grads

    def total_value(self, statistics: Tensor) -> Tensor:
        """Return `total`, without a gradient."""
        if self.kernels:
            return self._by_kernel("total_loss", statistics, self.divisor)
        return self.divided(self.values(statistics).sum())

    def total_gradient(self, statistics: Tensor, upstream: Tensor) -> Tensor:
        """Return what each statistic [k, n] receives where the total receives ``upstream``."""
        if self.kernels:
            return self._by_kernel("token_loss_grad", statistics, upstream, self.divisor)
        return self.gradient(statistics, self.divided(upstream).expand(statistics.shape[1]))

    def divided(self, total: Tensor) -> Tensor:
        """Return a sum over the tokens, or what it receives, over the divisor."""
        divisor = count_valid(self.labels) if isinstance(self.divisor, str) else self.divisor
        return total if divisor is None else total / at_least_one(divisor, total.dtype)

    @property
    def _share(self) -> float:
        """How much of the smoothing each token of the vocabulary gets."""
        return self.smoothing / self.vocabulary if self.smoothing else 0.0

    def _by_kernel(self, name: str, statistics: Tensor, *others: Any) -> Tensor:
        """Return what one of Triton's kernels does."""
        kernels = load("vocab_parallel.kernels.token_loss")
        numbers = kernels.LossNumbers(
            float(self.smoothing), self._share, float(self.z_loss), IGNORED, OUT_OF_RANGE
        )
        kernel = getattr(kernels, name)
        return cast(Tensor, kernel(statistics, self.labels, self.weight, *others, numbers))


def at_least_one(divisor: int | Tensor, dtype: torch.dtype) -> int | Tensor:
    """Return the divisor of a mean, a tensor in the loss's dtype, whatever torch's default is.

    An empty batch has the mean 0; a negative count gives NaN.
    """
    if isinstance(divisor, int):
        return max(divisor, 1)
    return divisor.clamp(min=1).to(dtype).masked_fill(divisor < 0, torch.nan)


class _Written(torch.autograd.Function):
    """A function of statistics [k, n] whose gradient is written down."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, value: _OfStatistics, gradient: _Backward) -> Tensor:
        ctx.save_for_backward(statistics)
        ctx.gradient = gradient
        return value(statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (statistics,) = ctx.saved_tensors
        return ctx.gradient(statistics, upstream), None, None
