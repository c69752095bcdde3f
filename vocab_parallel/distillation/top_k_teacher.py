"""A teacher of whom the k likeliest tokens of each position are known.

One pass over the student's tiles picks its logits at those k tokens, and accumulates the logsumexp
of all others: that of the remainder is never a difference of two nearly equal numbers. What follows
is arithmetic on k + 1 numbers of each token, which autograd differentiates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vocab_parallel.distillation.columns import Column, Columns, TokenStatistics
from vocab_parallel.distillation.divergences import Divergence, log_remainder, rounding_of
from vocab_parallel.distillation.labels import logsumexp_

ABSENT = -1  # the id of an entry that is none: its log-probability is -inf


@dataclass(frozen=True)
class TopKTeacher:
    """Picks the student's logits at a teacher's tokens.

    Attributes:
        ids: [N, k] int32 of the whole vocabulary, `ABSENT` where there is none.
        start: the first row of this rank.
    """

    ids: Tensor
    start: int

    spare: ClassVar = 1  # a column that takes what belongs to other tiles
    later_columns: ClassVar[Columns] = ()
    tiles: ClassVar = 2

    @property
    def columns(self) -> Columns:
        """What one pass accumulates."""
        chosen = Column("chosen", "sum", width=self.ids.shape[1])
        return (Column("rest_lse", "logsumexp"), chosen)

    def statistics(self, logits: Tensor, tokens: slice, rows: slice) -> list[Tensor]:
        """Return the statistics of a tile: [n] and [k, n]; overwrites its logits [n, r + 1]."""
        index = self._columns_of(tokens, rows)
        logits[:, -1] = 0.0
        chosen = logits.gather(1, index)
        logits.scatter_(1, index, -torch.inf)
        logits[:, -1] = -torch.inf
        return [logsumexp_(logits), chosen.T]

    def later_statistics(
        self, logits: Tensor, statistics: TokenStatistics, tokens: slice, rows: slice
    ) -> list[Tensor]:
        """Return nothing: there is no second pass."""
        return []

    def gradient(
        self, logits: Tensor, statistics: TokenStatistics, grads: Tensor, tokens: slice, rows: slice
    ) -> Tensor:
        """Return the gradient [n, r] of a tile's logits [n, r + 1], in their place.

        Args:
            grads: [1 + k, n], what the statistics receive.
            logits, statistics, tokens, rows: see `HiddenTeacher.gradient`.
        """
        lse = statistics["rest_lse"]
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # all rows are among the k
        logits.sub_(lse.unsqueeze(1)).exp_().mul_(grads[0].unsqueeze(1))
        logits.scatter_(1, self._columns_of(tokens, rows), grads[1:].T)
        return logits[:, :-1]

    def student_lse(self, statistics: TokenStatistics) -> Tensor:
        """Return the logsumexp [N] of the student's logits."""
        return torch.logaddexp(statistics["rest_lse"], torch.logsumexp(self._chosen(statistics), 0))

    def values(self, statistics: TokenStatistics) -> Tensor:
        """Return what is differentiated, [1 + k, N]: the statistics of the pass themselves."""
        return torch.cat([statistics["rest_lse"].unsqueeze(0), statistics["chosen"]])

    def divergences(
        self,
        values: Tensor,
        log_q: Tensor,
        divergence: Divergence,
        *,
        other: bool,
        vocab_size: int | None,
        given_dtype: torch.dtype,
    ) -> Tensor:
        """Return the divergence of each token [N], differentiable in the values [1 + k, N].

        Args:
            values: see `values`.
            log_q: [k, N], the teacher's, -inf for an entry that is none.
            divergence: which.
            other: whether the teacher's remainder counts as one more token. Otherwise its k are
                scaled up to a probability of 1.
            vocab_size: of the whole vocabulary, None where it is not known.
            given_dtype: that the teacher's log-probabilities were given in.
        """
        rest, chosen = values[0], values[1:].masked_fill(self._absent, -torch.inf)
        # One log_softmax of all outcomes: the k alone may all be masked, and have no gradient then.
        log_p = torch.log_softmax(torch.cat([chosen, rest.unsqueeze(0)]), 0)
        if other:
            rest_q = log_remainder(log_q)
            nothing = rest_q.exp() <= rounding_of(log_q, given_dtype)
            if vocab_size is not None:  # the k are the vocabulary
                nothing |= (~self._absent).sum(0) == vocab_size
            # A student without a rest may have a teacher with one: that divergence is infinite.
            rest_q = rest_q.masked_fill(nothing & (rest == -torch.inf), -torch.inf)
        else:
            sums = torch.logsumexp(log_q, 0)
            log_q = log_q - sums.masked_fill(sums == -torch.inf, 0.0)
            rest_q = torch.full_like(rest, -torch.inf)
        return divergence.of_outcomes(torch.cat([log_q, rest_q.detach().unsqueeze(0)]), log_p)

    def _chosen(self, statistics: TokenStatistics) -> Tensor:
        return statistics["chosen"].masked_fill(self._absent, -torch.inf)

    @property
    def _absent(self) -> Tensor:
        return self.ids.T == ABSENT

    def _columns_of(self, tokens: slice, rows: slice) -> Tensor:
        """Return the ids' columns [n, k] in a tile, the spare one for those that it has not."""
        index = self.ids[tokens].long() - (self.start + rows.start)
        num_rows = rows.stop - rows.start
        return index.masked_fill_((index < 0) | (index >= num_rows), num_rows)
