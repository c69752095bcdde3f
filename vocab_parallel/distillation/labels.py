"""The cross-entropy of labels, in the same pass over the student's tiles.

It is that of the logits at temperature 1, whatever temperature the distributions are compared at:
arXiv 1503.02531, section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.distillation.columns import Column, Columns, TokenStatistics
from vocab_parallel.local.interface import owned_targets


@dataclass(frozen=True)
class LabelTerm:
    """What the labels ask of the student's logits, which are divided by the temperature already."""

    temperature: float

    @property
    def shares_lse(self) -> bool:
        """Whether the lse of the comparison is that of the labels too."""
        return self.temperature == 1.0

    @property
    def columns(self) -> Columns:
        """Its statistics: the target's logit, and the lse where it is another one."""
        target = Column("target", "sum")
        return (target,) if self.shares_lse else (target, Column("label_lse", "logsumexp"))

    def statistics(self, logits: Tensor, targets: Tensor) -> list[Tensor]:
        """Return the statistics [n] of a tile.

        Args:
            logits: [n, r]; they stay as they are.
            targets: [n], counted from the tile's first row.
        """
        inside, index = owned_targets(targets, logits.shape[1])
        at_target = logits.gather(1, index.unsqueeze(1)).squeeze(1).mul_(self.temperature)
        found = [torch.where(inside, at_target, 0.0)]
        if not self.shares_lse:
            found.append(logsumexp_(logits * self.temperature))
        return found

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        statistics: TokenStatistics,
        lse: Tensor,
        grad: Tensor,
    ) -> Tensor:
        """Return the gradient [n, r] of a tile's logits at temperature 1.

        A target's own entry takes expm1 for p - 1, as in `vocab_parallel.local.interface`.

        Args:
            logits, targets: see `statistics`.
            statistics: of the tile's tokens, of the whole vocabulary.
            lse: [n], of the comparison.
            grad: [n], what each token's cross-entropy receives.
        """
        own_lse = self.lse(statistics, lse)
        probabilities = (logits * self.temperature).sub_(own_lse.unsqueeze(1)).exp_()
        inside, index = owned_targets(targets, logits.shape[1])
        index = index.unsqueeze(1)
        at_target = torch.expm1(statistics["target"] - own_lse).unsqueeze(1)
        entry = torch.where(inside.unsqueeze(1), at_target, probabilities.gather(1, index))
        return probabilities.scatter_(1, index, entry).mul_(grad.unsqueeze(1))

    def losses(self, statistics: TokenStatistics, lse: Tensor) -> Tensor:
        """Return the cross-entropy of each token [N]."""
        return self.lse(statistics, lse) - statistics["target"]

    def lse(self, statistics: TokenStatistics, lse: Tensor) -> Tensor:
        """Return the lse [N] of the logits at temperature 1, given that of the comparison."""
        return lse if self.shares_lse else statistics["label_lse"]


def logsumexp_(logits: Tensor) -> Tensor:  # (n, r) -> (n,)
    """Return the logsumexp of logits that are no longer needed; holds nothing of their size."""
    return softmax_parts_(logits)[0]


def softmax_parts_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (lse [n], exponentials [n, r] in the logits' place, their sums [n]).

    A line of -inf alone (a bias may mask rows so) has the lse -inf, and sum 0.
    """
    largest = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
    sums = exponentials.sum(1)
    return sums.log().add_(largest), exponentials, sums
