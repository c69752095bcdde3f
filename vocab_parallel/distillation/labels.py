"""The cross-entropy of labels, in the same pass over the student's tiles.

It is that of the logits at temperature 1, whatever temperature the distributions are compared at:
arXiv 1503.02531, section 2.
"""

import torch
from torch import Tensor

from vocab_parallel.backends.torch import owned_targets
from vocab_parallel.statistics import Column, Columns

LABEL_COLUMNS: Columns = (Column("label_lse", "logsumexp"), Column("label_target", "sum"))


def label_statistics(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the statistics of a tile, [n] each.

    Args:
        logits: [n, r] at temperature 1; they stay as they are.
        targets: [n], counted from the tile's first row.
    """
    inside, index = owned_targets(targets, logits.shape[1])
    at_target = logits.gather(1, index.unsqueeze(1)).squeeze(1)
    return [logsumexp_(logits.clone()), torch.where(inside, at_target, 0.0)]


def label_gradient(logits: Tensor, targets: Tensor, statistics: Tensor, grads: Tensor) -> Tensor:
    """Return the gradient [n, r] of a tile's logits at temperature 1.

    A target's own entry takes expm1 for p - 1, as in `backends/interface.py`.

    Args:
        logits, targets: see `label_statistics`.
        statistics, grads: [2, n], of the whole vocabulary, and what each receives.
    """
    (lse, target), (lse_grad, target_grad) = statistics, grads
    found = (logits - lse.unsqueeze(1)).exp_().mul_(lse_grad.unsqueeze(1))
    inside, index = owned_targets(targets, logits.shape[1])
    at = index.unsqueeze(1)
    own = lse_grad * torch.expm1(target - lse) + (lse_grad + target_grad)
    entry = torch.where(inside.unsqueeze(1), own.unsqueeze(1), found.gather(1, at))
    return found.scatter_(1, at, entry)


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
