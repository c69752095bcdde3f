"""What a call is, beside its tensors: the same on every rank but for the rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.arguments import LossSettings
from vocab_parallel.impls import Choice, ClassifierGrad, Demand, LocalImpl, Shard, Way
from vocab_parallel.layout import TokenLayout
from vocab_parallel.pieces import HiddenGradSum
from vocab_parallel.shard import VocabShard
from vocab_parallel.statistics import StatisticNames
from vocab_parallel.weight_grad import WeightGrad


@dataclass(frozen=True)
class LossProblem:
    """Attributes: what the two Functions need.

    ``choice`` is what the implementation chose; ``weight_grad`` is where
    the classifier's gradient is added in place of being returned, or None; ``grad_enabled``
    whether autograd was recording (inside of a Function it never is).
    """

    settings: LossSettings
    shard: VocabShard
    layout: TokenLayout
    impl: LocalImpl
    demand: Demand
    choice: Choice
    weight_grad: WeightGrad | None
    grad_enabled: bool

    @property
    def names(self) -> StatisticNames:
        """The statistics that the loss reads."""
        return self.demand.names

    @property
    def way(self) -> Way:
        """How backward finds the logits."""
        return self.choice.way

    @property
    def chunk_tokens(self) -> int:
        """How many tokens forward takes at a time where it computes the gradients."""
        return self.choice.chunk_tokens

    def rows_to_keep(self, local: Shard) -> int:
        """Return of how many of this rank's first rows forward keeps the logits, at most."""
        return local.classifier.shape[0] if self.way == "probs" else self.choice.kept_rows

    def local(
        self,
        hidden: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs_grad: bool,
    ) -> Shard | None:
        """Return what the implementation works on, or None where there is nothing to do."""
        rows = self.shard.num_token_rows
        if rows == 0 or hidden.shape[0] == 0:
            return None
        return Shard(
            hidden=hidden.detach(),
            classifier=classifier.detach()[:rows],
            bias=None if bias is None else bias.detach()[:rows],
            targets=targets,
            softcap=self.settings.softcap,
            temperature=float(self.settings.temperature),
            separate_lse_grad=self.demand.separate_lse_grad,
            sum_dtype=self.sum_dtype(hidden.dtype),
            needs_grad=needs_grad,
        )

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether the gradient of the hidden states is summed over the group."""
        return self.shard.degree > 1 and (self.layout.gathers or self.shard.reduce_e_grad)

    def sum_dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Return the dtype of that sum: never narrower than asked for, float64 for float64."""
        if hidden == torch.float64 or not self.sums_hidden_grad:
            return hidden
        return self.settings.e_grad_reduce_dtype

    def hidden_grad_sum(
        self, hidden: Tensor, pieces: list[slice] | None = None
    ) -> HiddenGradSum | None:
        """Return what sums the gradient of the hidden states [N, D] over the group, if any."""
        if not self.sums_hidden_grad:
            return None
        return HiddenGradSum(
            hidden.shape[0],
            self.shard,
            scatters=self.layout.gathers,
            dtype=self.sum_dtype(hidden.dtype),
            overlap=self.impl.overlap,
            pieces=pieces,
        )

    def classifier_grad(self, classifier: Tensor) -> ClassifierGrad:
        """Return where the gradient of the rows that are tokens goes."""
        accumulated = None if self.weight_grad is None else self.weight_grad.destination()
        if accumulated is None:
            return ClassifierGrad(classifier.dtype)
        return ClassifierGrad(accumulated.dtype, accumulated[: self.shard.num_token_rows])
