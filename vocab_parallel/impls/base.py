"""The one face of every implementation: a shard of rows in, statistics and gradients out.

An implementation works on one rank's rows alone. It never communicates, never sees a group, and
never meets an empty shard, an empty batch or a padding row: those end before it.

The gradient of a logit follows from the statistics s of the whole vocabulary and the gradients d
that they receive (`statistics.py` names them): with p = exp(z - s.lse),

    dz = d.lse p + d.target [is target] + d.sum + d.expected p (1 + z - s.expected)

A target's own entry takes expm1(s.target - s.lse) for p - 1, so that a confident token, whose
d.lse p + d.target nearly cancels, keeps its precision.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vocab_parallel.statistics import StatisticNames

NO_TARGET = -1  # in Shard.targets: the token's target is another rank's row, or there is none


@dataclass(frozen=True)
class Shard:
    """One rank's share of the problem: z = softcap(hidden classifier^T + bias) / temperature.

    Attributes:
        hidden: [N, D].
        classifier: [R, D], the rows of this rank that are tokens; R > 0.
        bias: [R], or None.
        targets: [N] int64, the row in [0, R) of each token's target, else `NO_TARGET`.
        softcap: s in s tanh(x / s), or None.
        temperature: divides the logits.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None
    temperature: float

    @property
    def statistics_dtype(self) -> torch.dtype:
        """The dtype of statistics and of accumulation: float32, or float64 for float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


class Wanted(NamedTuple):
    """Which gradients a backward must produce; the products of the others are skipped."""

    hidden: bool
    classifier: bool
    bias: bool


class Gradients(NamedTuple):
    """What a backward produced: None where it was not wanted.

    ``hidden`` [N, D] is the partial sum over this rank's rows, in the dtype that the
    implementation accumulated it in; ``classifier`` [R, D] and ``bias`` [R] are complete and in
    the parameters' dtypes.
    """

    hidden: Tensor | None
    classifier: Tensor | None
    bias: Tensor | None


class LocalImpl(Protocol):
    """One way to do the local work."""

    def forward(self, shard: Shard, names: StatisticNames) -> Tensor:
        """Return the statistics [k, N] of this shard's logits, in ``shard.statistics_dtype``."""
        ...

    def backward(
        self,
        shard: Shard,
        names: StatisticNames,
        statistics: Tensor,  # (k, N), of the whole vocabulary
        grads: Tensor,  # (k, N), what each statistic receives
        wanted: Wanted,
    ) -> Gradients:
        """Return the wanted gradients; must not write to any of its arguments."""
        ...
