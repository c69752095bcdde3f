"""What a step reports beside its loss, from statistics that are there already."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from vocab_parallel.layout import IGNORED
from vocab_parallel.statistics import Statistics


class LossMetrics(NamedTuple):
    """Of the vocab group's valid tokens, each a tensor [] without a gradient, equal on its ranks.

    Token weights and label smoothing do not count in them; softcap and temperature do.

    Attributes:
        accuracy: the share of tokens whose target has the largest logit; ties count. Logits that
            differ by less than the rounding of a product may count either way; on a GPU that is no
            Hopper they are rounded to the operands' dtype, unless ``logits_dtype`` says not to, and
            more of them are ties.
        entropy: the mean of -sum p log p, in nats.
        num_tokens: how many tokens they are of, int64. Both are 0 where there are none.
    """

    accuracy: Tensor
    entropy: Tensor
    num_tokens: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor, dtype: torch.dtype) -> Self:
        """Return the means, in a dtype, of what `sums` returns."""
        count, correct, entropy = sums.unbind()
        divisor = count.clamp(min=1.0)
        return cls((correct / divisor).to(dtype), (entropy / divisor).to(dtype), count.long())

    def sums(self) -> Tensor:
        """Return [3] float64: the number of tokens, and it times each mean.

        They may be added up over calls, or all-reduced over data-parallel ranks, and `of_sums`
        makes means of them again. In float64 a count stays exact whatever is added to it.
        """
        count = self.num_tokens.double()
        return torch.stack((count, self.accuracy * count, self.entropy * count))


def loss_metrics(statistics: Statistics, labels: Tensor) -> LossMetrics:
    """Return the metrics of some tokens; waits for no device.

    Args:
        statistics: [k, N] of the whole vocabulary.
        labels: [N], marked.
    """
    statistics = Statistics(statistics.values.detach(), statistics.columns)
    counted, dtype = labels != IGNORED, statistics.values.dtype
    correct = right_predictions(statistics, counted)
    entropy = (-statistics["mean_log_prob"]).masked_fill(~counted, 0.0)
    parts = torch.stack((counted.to(dtype), correct.to(dtype), entropy))
    return LossMetrics.of_sums(parts.sum(1, dtype=torch.float64), dtype)


def right_predictions(statistics: Statistics, counted: Tensor) -> Tensor:
    """Tell which of the counted tokens [N] have a target with the largest logit."""
    # A NaN among the logits may not have reached the others' largest, but lse has it.
    known = counted & ~statistics["lse"].isnan()
    return known & (statistics["target"] >= statistics["largest_other"])
