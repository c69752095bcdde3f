"""Each token's loss from its statistics, with a gradient that is written down.

With s = label_smoothing, Z = z_loss, w = the token's weight:

    loss      = w (lse - (1 - s) target - s sum / vocabulary + Z lse^2)
    d.lse     = w (1 + 2 Z lse)      d.target = -w (1 - s)      d.sum = -w s / vocabulary

0 where the label is ignored, whatever its weight, and NaN where it is no token. On a GPU each way
is one kernel: written with tensor operations it is thirty, which together take as long as a pass
over the logits.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel.impls import passes
from vocab_parallel.layout import IGNORED, OUT_OF_RANGE
from vocab_parallel.second_derivative import first_derivative_only


@dataclass(frozen=True)
class TokenLossTerms:
    """What the loss of a token is made of; ``vocabulary`` counts its tokens."""

    smoothing: float
    vocabulary: int
    z_loss: float

    @property
    def smoothing_share(self) -> float:
        """How much of the smoothing each token of the vocabulary gets."""
        return self.smoothing / self.vocabulary if self.smoothing else 0.0


def token_loss(
    statistics: Tensor,  # (k, n): lse, target, and sum where there is label smoothing
    labels: Tensor,  # (n,) int32, marked
    weight: Tensor | None,  # (n,)
    terms: TokenLossTerms,
) -> Tensor:  # (n,)
    """Return each token's loss, differentiable in the statistics."""
    return cast(Tensor, _TokenLoss.apply(statistics, labels, weight, terms))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, statistics: Tensor, labels: Tensor, weight: Tensor | None, terms: TokenLossTerms
    ) -> Tensor:
        ctx.save_for_backward(statistics, labels, weight)
        ctx.terms = terms
        if passes.kernels_work(statistics):
            from vocab_parallel.kernels import token_loss as kernels

            return kernels.token_loss(statistics, labels, weight, **_numbers(terms))
        ignored = labels == IGNORED
        lse = statistics[0].masked_fill(ignored, 0.0)
        loss = lse - (1.0 - terms.smoothing) * statistics[1]
        if terms.smoothing:
            loss -= terms.smoothing_share * statistics[2]
        if terms.z_loss:
            loss += terms.z_loss * lse.square()
        if weight is not None:
            loss = loss * weight
        return loss.masked_fill_(ignored, 0.0).masked_fill_(labels == OUT_OF_RANGE, torch.nan)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        statistics, labels, weight = ctx.saved_tensors
        terms: TokenLossTerms = ctx.terms
        if passes.kernels_work(statistics):
            from vocab_parallel.kernels import token_loss as kernels

            found = kernels.token_loss_grad(statistics, labels, weight, upstream, **_numbers(terms))
            return found, None, None, None
        unit = upstream if weight is None else upstream * weight
        unit = unit.masked_fill((labels == IGNORED) | (labels == OUT_OF_RANGE), 0.0)
        grads = torch.zeros_like(statistics)
        lse = statistics[0].masked_fill(labels == IGNORED, 0.0)
        grads[0] = unit * (1.0 + 2.0 * terms.z_loss * lse)
        grads[1] = -(1.0 - terms.smoothing) * unit
        if terms.smoothing:
            grads[2] = -terms.smoothing_share * unit
        return grads, None, None, None


def _numbers(terms: TokenLossTerms) -> dict[str, Any]:
    return {
        "smoothing": float(terms.smoothing),
        "smoothing_share": terms.smoothing_share,
        "z_loss": float(terms.z_loss),
        "ignored": IGNORED,
        "out_of_range": OUT_OF_RANGE,
    }
