"""The one face of every implementation: a shard of rows in, statistics and gradients out.

An implementation works on one rank's rows alone. It never communicates, never sees a group, and
never meets an empty shard, an empty batch or a padding row: those end before it.

The gradient of a logit follows from the statistics s of the whole vocabulary and the gradients d
that they receive (`statistics.py` names them): with p = exp(z - s.lse),

    dz = d.lse p + d.target [is target] + d.sum + d.expected p (1 + z - s.expected)

A target's own entry takes expm1(s.target - s.lse) for p - 1, so that a confident token, whose
d.lse p + d.target nearly cancels, keeps its precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from vocab_parallel.statistics import StatisticName, StatisticNames

# How backward finds the logits that forward made:
#   "recompute"  by the product again
#   "probs"      kept, in the operands' dtype
#   "gradients"  not at all: forward computes the gradients too
Way = Literal["recompute", "probs", "gradients"]


class Choice(NamedTuple):
    """How an implementation will work, equal on all ranks.

    Attributes:
        way: how backward finds the logits.
        chunk_tokens: how many tokens forward takes at a time where that is "gradients".
        kept_rows: of how many of the first rows "recompute" keeps the logits all the same.
    """

    way: Way
    chunk_tokens: int
    kept_rows: int = 0


@dataclass(frozen=True)
class Demand:
    """What a call asks of its implementation, known before any work.

    Attributes:
        dtype, device_type: of the hidden states.
        bias, softcap, temperature: whether the logits have one (a temperature other than 1).
        names: the statistics that the loss reads.
        separate_lse_grad: whether the gradient of lse may differ from minus that of the target,
            as a z-loss or a use of lse makes it.
        tokens: N, those of the loss.
        hidden_size: D.
        rows: of this rank.
        even_rows: of the largest shard where the vocabulary is cut evenly, equal on every rank;
            None where the size of the vocabulary is not known.
        degree: V, over how many ranks the rows are spread.
        backward: "auto", or the `Way` that the caller names.
        scalar_loss: whether the loss is one number and nothing else is returned.
        accumulates: whether the classifier's gradient is added to an accumulator in backward.
    """

    dtype: torch.dtype
    device_type: str
    bias: bool
    softcap: bool
    temperature: bool
    names: StatisticNames
    separate_lse_grad: bool
    tokens: int
    hidden_size: int
    rows: int
    even_rows: int | None
    degree: int
    backward: str
    scalar_loss: bool
    accumulates: bool

    @property
    def elements(self) -> int:
        """Of this rank's largest operand, hidden states [N, D] or classifier [rows, D]."""
        return max(self.tokens, self.rows) * self.hidden_size

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
        targets: [N] int32, the row in [0, R) of each token's target; outside of [0, R) where the
            target is another rank's row, or there is none.
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

    def owned_targets(self) -> tuple[Tensor, Tensor]:
        """Return which targets are rows of this shard [N], and int64 rows [N] that are safe."""
        num_rows = self.classifier.shape[0]
        owned = (self.targets >= 0) & (self.targets < num_rows)
        return owned, self.targets.long().masked_fill(~owned, 0)

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
    implementation accumulated it in; ``classifier`` [R, D] is complete and in the dtype of
    `ClassifierGrad`; ``bias`` [R] is complete, in the parameter's dtype or wider.
    """

    hidden: Tensor | None
    classifier: Tensor | None
    bias: Tensor | None


class Progress(Protocol):
    """Whom an implementation tells that a part of its result is ready to be communicated.

    Attributes:
        pieces: consecutive slices of the tokens [0, N) that are communicated one by one.
    """

    pieces: Sequence[slice]

    def complete(self, result: Tensor, stop: int) -> None:
        """Say that the result of the tokens [0, stop) will not change any more.

        Args:
            result: statistics [k, N], or the partial gradient [N, D] of the hidden states.
            stop: counts from 0; never less than in the call before.
        """
        ...


class KeptLogits:
    """Raw logits [N, r] of a forward, for backward to turn into their gradient in place, once.

    Under a split backward the inputs' half leaves them as they are, and the weights' half takes
    them. Who comes later (a backward that is run again) makes them anew.

    Attributes:
        num_rows: r, those of the shard's first rows; the buffer may be wider.
    """

    def __init__(self, logits: Tensor, num_rows: int) -> None:
        self._logits: Tensor | None = logits
        self.num_rows = num_rows

    def look(self) -> Tensor | None:
        """Return the logits, not to be changed; None where they are gone."""
        return self._logits

    def take(self) -> Tensor | None:
        """Return the logits and forget them; None where they are gone."""
        logits, self._logits = self._logits, None
        return logits


@dataclass(frozen=True)
class ForwardTask:
    """What a forward is asked for.

    Attributes:
        names: the statistics.
        keep_rows: of how many of the first rows, at most, to keep the logits for backward: all
            where `LocalImpl.way` said "probs" or "gradients", and never more than it said.
        progress: whom to tell of statistics that are complete; None where nobody waits.
    """

    names: StatisticNames
    keep_rows: int = 0
    progress: Progress | None = None


class Forward(NamedTuple):
    """What a forward produced.

    ``statistics`` [k, N] are those of this shard's logits, in ``shard.statistics_dtype``;
    ``saved`` is what the implementation's backward wants back, beside the shard; ``kept`` the
    logits, where they were to be kept.
    """

    statistics: Tensor
    saved: tuple[Tensor, ...] = ()
    kept: KeptLogits | None = None


@dataclass(frozen=True)
class ClassifierGrad:
    """Where the classifier's gradient [R, D] goes.

    Attributes:
        dtype: of the gradient.
        add_to: a tensor [R, D] of that dtype to which it is added, and which is then returned;
            None for a tensor of its own.
    """

    dtype: torch.dtype
    add_to: Tensor | None = None


@dataclass(frozen=True)
class BackwardTask:
    """What a backward is asked for; it must not write to the tensors of its attributes.

    (Other than `KeptLogits.take` and `ClassifierGrad.add_to`, which are there to be written to.)

    Attributes:
        names: the statistics' names.
        statistics: [k, N], of the whole vocabulary.
        grads: [k, N], what each statistic receives.
        wanted: the gradients to produce.
        classifier_grad: where that of the classifier goes.
        saved, kept: of this implementation's forward.
        progress: whom to tell of tokens whose gradient is complete; None where nobody waits.
    """

    names: StatisticNames
    statistics: Tensor
    grads: Tensor
    wanted: Wanted
    classifier_grad: ClassifierGrad
    saved: tuple[Tensor, ...] = ()
    kept: KeptLogits | None = None
    progress: Progress | None = None


class LocalImpl(Protocol):
    """One way to do the local work.

    Attributes:
        overlap: whether communication may run beside the work; only an implementation that
            reports its progress gains from it.
    """

    @property
    def overlap(self) -> bool:
        """See above."""
        ...

    def check(self, demand: Demand) -> None:
        """Raise ValueError where this implementation cannot do what a call asks."""
        ...

    def way(self, demand: Demand) -> Choice:
        """Choose how backward finds the logits, equally on all ranks.

        Raises:
            ValueError: the way that the caller names cannot be gone, or nothing fits.
        """
        ...

    def forward(self, shard: Shard, task: ForwardTask) -> Forward:
        """Compute the statistics of this shard's logits."""
        ...

    def backward(self, shard: Shard, task: BackwardTask) -> Gradients:
        """Return the wanted gradients."""
        ...
