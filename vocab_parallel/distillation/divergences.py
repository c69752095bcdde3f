"""The divergences between a teacher's distribution q and the student's p, as formulas.

    forward_kl   KL(q || p) = sum q (log q - log p)
    reverse_kl   KL(p || q) = sum p (log p - log q)
    js           beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

The last is the generalised Jensen-Shannon divergence of arXiv 2306.13649, section 2, there
D_JSD(beta)(teacher || student). Divided by beta it becomes the forward divergence as beta goes to
0, and divided by 1 - beta the reverse one as beta goes to 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.statistics import accumulation_dtype

DIVERGENCES = ("forward_kl", "reverse_kl", "js")

# Beyond exp(60) the smaller of the two terms of a mixture is lost in float64 too.
_STEEP = 60.0


@dataclass(frozen=True)
class Divergence:
    """One of the three.

    Attributes:
        name: which.
        beta: the teacher's share of the mixture, for "js" alone.
    """

    name: str
    beta: float = 0.5

    def of_outcomes(self, log_q: Tensor, log_p: Tensor) -> Tensor:  # (outcomes, N) twice -> (N,)
        """Return the divergence of distributions that are there as a whole, differentiable in p.

        An outcome of no probability, -inf, adds nothing where its factor is 0, and receives no
        gradient.
        """
        in_q, in_p = log_q > -torch.inf, log_p > -torch.inf
        if self.name == "forward_kl":
            ratio = log_q.masked_fill(~in_q, 0.0) - log_p.masked_fill(~in_q, 0.0)
            return (log_q.exp() * ratio).sum(0)
        if self.name == "reverse_kl":
            ratio = log_p.masked_fill(~in_p, 0.0) - log_q.masked_fill(~in_p, 0.0)
            return (log_p.exp() * ratio).sum(0)
        ratio = log_q - log_p
        teacher = log_mixture_(-ratio.masked_fill(~in_q, 0.0), 1.0 - self.beta)
        student = log_mixture_(+ratio.masked_fill(~in_p, 0.0), self.beta)
        return -(
            self.beta * (log_q.exp() * teacher).sum(0)
            + (1.0 - self.beta) * (log_p.exp() * student).sum(0)
        )


def log_mixture_(ratio: Tensor, share: float) -> Tensor:
    """Return log(1 - share + share exp(ratio)), in the place of the ratio where it has no gradient.

    That is log(m / p) for the ratio log(q / p) and the share of q. Near 0 it loses nothing: what a
    student that has learned much still differs by is not rounded away.
    """
    if ratio.requires_grad:
        flat, steep = ratio.clamp(max=_STEEP), (ratio - _STEEP).clamp(min=0.0)
        return (share * flat.expm1()).log1p() + steep
    steep = (ratio - _STEEP).clamp_(min=0.0)
    return ratio.clamp_(max=_STEEP).expm1_().mul_(share).log1p_().add_(steep)


def log_remainder(log_q: Tensor) -> Tensor:  # (k, N) -> (N,)
    """Return the logarithm of the probability that some outcomes leave for all others.

    At least that of what the dtype can tell from nothing: rounded logarithms may sum up to 1. The
    difference is taken in float64, so that it is exactly what the given numbers leave.
    """
    least = math.log(torch.finfo(log_q.dtype).eps)
    rest = -torch.expm1(torch.logsumexp(log_q.double(), 0).clamp(max=0.0))
    return rest.log().clamp(min=least).to(log_q.dtype)


def rounding_of(log_q: Tensor, given_dtype: torch.dtype) -> Tensor:  # (k, N) -> (N,)
    """Return up to which remainder probabilities that sum up to 1 may leave by rounding alone.

    Each logarithm is rounded in proportion to its size, in the dtype that it was given in; what
    computed it in float32 or wider is granted 64 times that one's epsilon.
    """
    computed = 64.0 * torch.finfo(accumulation_dtype(given_dtype)).eps
    least = max(computed, torch.finfo(log_q.dtype).eps)
    return torch.special.entr(log_q.exp()).sum(0) * torch.finfo(given_dtype).eps + least
