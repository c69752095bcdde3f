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

from vocab_parallel.statistics import StatisticName, StatisticNames

NO_TARGET = -1  # in Shard.targets: the token's target is another rank's row, or there is none


@dataclass(frozen=True)
class Demand:
    """What a call asks of its implementation, known before any work.

    Attributes:
        dtype, device_type: of the hidden states.
        bias, softcap, temperature: whether the logits have one (a temperature other than 1).
        names: the statistics that the loss reads.
        separate_lse_grad: whether the gradient of lse may differ from minus that of the target,
            as a z-loss or a use of lse makes it.
        elements: of this rank's largest operand, hidden states [N, D] or classifier [rows, D].
    """

    dtype: torch.dtype
    device_type: str
    bias: bool
    softcap: bool
    temperature: bool
    names: StatisticNames
    separate_lse_grad: bool
    elements: int

    def reads(self, name: StatisticName) -> bool:
        """Whether the loss reads a statistic."""
        return name in self.names


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
        separate_lse_grad: see `Demand`.
        sum_dtype: in which the partial gradients of the hidden states are summed over the group,
            or their own where they are not. An implementation that can writes that dtype.
        needs_grad: whether a backward may follow.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None
    temperature: float
    separate_lse_grad: bool
    sum_dtype: torch.dtype
    needs_grad: bool

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


class Forward(NamedTuple):
    """What a forward produced.

    ``statistics`` [k, N] are those of this shard's logits, in ``shard.statistics_dtype``;
    ``saved`` is what the implementation's backward wants back, beside the shard.
    """

    statistics: Tensor
    saved: tuple[Tensor, ...] = ()


class LocalImpl(Protocol):
    """One way to do the local work."""

    def check(self, demand: Demand) -> None:
        """Raise ValueError where this implementation cannot do what a call asks."""
        ...

    def forward(self, shard: Shard, names: StatisticNames) -> Forward:
        """Compute the statistics of this shard's logits."""
        ...

    def backward(
        self,
        shard: Shard,
        names: StatisticNames,
        saved: tuple[Tensor, ...],  # of this implementation's forward
        statistics: Tensor,  # (k, N), of the whole vocabulary
        grads: Tensor,  # (k, N), what each statistic receives
        wanted: Wanted,
    ) -> Gradients:
        """Return the wanted gradients; must not write to any of its arguments."""
        ...
