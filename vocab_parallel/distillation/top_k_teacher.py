"""A teacher of whom the k likeliest tokens of each position are known.

One pass over the student's tiles picks its logits at those k tokens, and accumulates the logsumexp
of all others: that of the remainder is never a difference of two nearly equal numbers. What follows
is arithmetic on k + 1 numbers of each token, which autograd differentiates.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vocab_parallel.backends.torch import Block
from vocab_parallel.distillation.comparison import Comparison
from vocab_parallel.distillation.divergences import log_remainder, rounding_of
from vocab_parallel.distillation.labels import logsumexp_
from vocab_parallel.statistics import Column, Columns, Statistics

ABSENT = -1  # the id of an entry that is none: its log-probability is -inf


@dataclass(frozen=True, kw_only=True)
class TopKTeacher(Comparison):
    """Picks the student's logits at a teacher's tokens.

    Of the shard's ``others`` the first are the teacher's ids [N, k] int32 of the whole vocabulary,
    `ABSENT` where there is none, and the second its log-probabilities [N, k].

    Attributes:
        k: how many.
        start: the first row of this rank.
        vocab_size: of the whole vocabulary, None where it is not known.
        given_dtype: that the teacher's log-probabilities were given in.
    """

    k: int
    start: int
    vocab_size: int | None
    given_dtype: torch.dtype

    spare: ClassVar[int] = 1  # a column that takes what belongs to other tiles

    @property
    def own_columns(self) -> Columns:
        """See `Comparison.own_columns`."""
        return (Column("rest_lse", "logsumexp"), Column("chosen", "sum", width=self.k))

    @property
    def tiles(self) -> int:
        """The logits, and what their exponentials take."""
        return 2

    def own_statistics(self, logits: Tensor, block: Block, tokens: slice) -> list[Tensor]:
        """See `Comparison.own_statistics`."""
        index = self._columns_of(block, tokens)
        wide = _with_spare(logits)
        wide[:, -1] = 0.0
        chosen = wide.gather(1, index)
        wide.scatter_(1, index, -torch.inf)
        return [logsumexp_(logits), chosen.T]

    def put_own_gradient(
        self, logits: Tensor, block: Block, tokens: slice, statistics: Tensor, grads: Tensor
    ) -> None:
        """See `Comparison.put_own_gradient`."""
        lse = statistics[0]
        lse = lse.masked_fill(lse == -torch.inf, 0.0)  # all rows are among the k
        logits.sub_(lse.unsqueeze(1)).exp_().mul_(grads[0].unsqueeze(1))
        _with_spare(logits).scatter_(1, self._columns_of(block, tokens), grads[1:].T)

    def divergences(self, statistics: Statistics, others: tuple[Tensor, ...]) -> Tensor:
        """See `Comparison.divergences`."""
        ids, log_q = others[0], others[1].T
        absent = ids.T == ABSENT
        rest = statistics["rest_lse"]
        chosen = torch.atleast_2d(statistics["chosen"]).masked_fill(absent, -torch.inf)
        # One log_softmax of all outcomes: the k alone may all be masked, and have no gradient then.
        log_p = torch.log_softmax(torch.cat([chosen, rest.unsqueeze(0)]), 0)
        if self.settings.other:
            rest_q = log_remainder(log_q)
            nothing = rest_q.exp() <= rounding_of(log_q, self.given_dtype)
            if self.vocab_size is not None:  # the k are the vocabulary
                nothing |= (~absent).sum(0) == self.vocab_size
            # A student without a rest may have a teacher with one: that divergence is infinite.
            rest_q = rest_q.masked_fill(nothing & (rest == -torch.inf), -torch.inf)
        else:
            sums = torch.logsumexp(log_q, 0)
            log_q = log_q - sums.masked_fill(sums == -torch.inf, 0.0)
            rest_q = torch.full_like(rest, -torch.inf)
        return self.settings.of_outcomes(torch.cat([log_q, rest_q.detach().unsqueeze(0)]), log_p)

    def _columns_of(self, block: Block, tokens: slice) -> Tensor:
        """Return the ids' columns [n, k] in a tile, the spare one for those that it has not."""
        index = block.shard.others[0][tokens].long() - (self.start + block.rows.start)
        num_rows = block.rows.stop - block.rows.start
        return index.masked_fill_((index < 0) | (index >= num_rows), num_rows)


def _with_spare(logits: Tensor) -> Tensor:
    """Return a tile [n, r] of `Comparison.buffer` with the spare column that follows it."""
    return logits.as_strided((logits.shape[0], logits.shape[1] + 1), logits.stride())
