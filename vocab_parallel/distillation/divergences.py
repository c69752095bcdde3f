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

from vocab_parallel.settings import Rule, check_values, is_number
from vocab_parallel.statistics import accumulation_dtype

DIVERGENCES = ("forward_kl", "reverse_kl", "js")

# Beyond exp(60) the smaller of the two terms of a mixture is lost in float64 too.
_STEEP = 60.0


_RULES = (
    Rule(
        "beta",
        lambda beta: beta is None or (is_number(beta) and 0.0 < beta < 1.0),
        "lie between 0 and 1",
        ': at the ends take "forward_kl" or "reverse_kl"',
    ),
    Rule(
        "cross_entropy_weight",
        lambda weight: is_number(weight) and 0.0 <= weight < 1.0,
        "lie in [0, 1)",
        ": for the cross-entropy alone call linear_cross_entropy",
    ),
    Rule("other", lambda other: isinstance(other, bool), "be True or False"),
)


@dataclass(frozen=True)
class DistillationSettings:
    """What a distillation takes beside the settings of the loss; equal on every rank.

    Attributes:
        divergence: its name.
        beta: of "js".
        cross_entropy_weight: of the labels' cross-entropy.
        other: whether what a teacher's top-k leaves counts as one more token.
    """

    divergence: str
    beta: float | None = None
    cross_entropy_weight: float = 0.0
    other: bool = True

    def check(self, has_targets: bool) -> None:
        """Raise ValueError for a value that cannot be, or a weight of labels that are not there."""
        check_values(self, {"divergence": DIVERGENCES}, _RULES)
        if self.beta is not None and self.divergence != "js":
            raise ValueError(
                f'beta is of divergence="js", got {self.beta!r} with {self.divergence!r}: leave it '
                f"out"
            )
        if self.cross_entropy_weight and not has_targets:
            raise ValueError(
                f"cross_entropy_weight={self.cross_entropy_weight} mixes in the cross-entropy of "
                f"labels, but targets is None: pass them"
            )
        if not self.other and self.divergence == "reverse_kl":
            raise ValueError(
                'divergence="reverse_kl" is infinite where the teacher has no probability, which '
                'other=False says of all tokens but its k: use other=True, "forward_kl" or "js"'
            )

    @property
    def share(self) -> float:
        """The teacher's share of the mixture of "js"."""
        return 0.5 if self.beta is None else self.beta

    def of_outcomes(self, log_q: Tensor, log_p: Tensor) -> Tensor:  # (outcomes, N) twice -> (N,)
        """Return the divergence of distributions that are there as a whole, differentiable in p.

        An outcome of no probability, -inf, adds nothing where its factor is 0, and receives no
        gradient.
        """
        in_q, in_p = log_q > -torch.inf, log_p > -torch.inf
        if self.divergence == "forward_kl":
            ratio = log_q.masked_fill(~in_q, 0.0) - log_p.masked_fill(~in_q, 0.0)
            return (log_q.exp() * ratio).sum(0)
        if self.divergence == "reverse_kl":
            ratio = log_p.masked_fill(~in_p, 0.0) - log_q.masked_fill(~in_p, 0.0)
            return (log_p.exp() * ratio).sum(0)
        ratio = log_q - log_p
        teacher = log_mixture_(-ratio.masked_fill(~in_q, 0.0), 1.0 - self.share)
        student = log_mixture_(+ratio.masked_fill(~in_p, 0.0), self.share)
        return -(
            self.share * (log_q.exp() * teacher).sum(0)
            + (1.0 - self.share) * (log_p.exp() * student).sum(0)
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

    Each logarithm is rounded in proportion to its size, in the dtype that it was given in or, where
    that is narrower, in its own; what computed it in float32 or wider is granted 64 times that
    one's epsilon.
    """
    narrow = max(given_dtype, log_q.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    computed = 64.0 * torch.finfo(accumulation_dtype(narrow)).eps
    return torch.special.entr(log_q.exp()).sum(0) * torch.finfo(narrow).eps + computed
