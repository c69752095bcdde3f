"""Tokens that one stage's ranks own, and all stages' ranks work on."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from stage_groups import StageGroups
from vocab_parallel.collectives import Pending, Several, VocabGroup


@dataclass(frozen=True)
class VocabMessages:
    """The ranks of all stages and columns, a group for each kind of message.

    Attributes:
        broadcast, gather, reduce: the same ranks in the same order, pipeline rank by pipeline rank.
        columns: the ranks of this pipeline rank, one a column.
    """

    broadcast: VocabGroup = VocabGroup()  # noqa: RUF009 (frozen)
    gather: VocabGroup = VocabGroup()  # noqa: RUF009
    reduce: VocabGroup = VocabGroup()  # noqa: RUF009
    columns: VocabGroup = VocabGroup()  # noqa: RUF009

    @classmethod
    def of(cls, groups: StageGroups) -> Self:
        """Read them off groups that were built with ``vocab_over="all_stages"``."""
        assert groups.message_groups is not None
        every = (*groups.message_groups, groups.columns_group)
        return cls(*(VocabGroup.of(group) for group in every))

    @property
    def pipeline_rank(self) -> int:
        """Of this process."""
        return self.gather.rank // self.columns.degree


@dataclass(frozen=True)
class Owners:
    """The ranks of all columns that run one stage.

    Each has its own column's tokens, or all have the same. What is called "of all" below is a
    tensor [n T, ...] of all columns' tokens, column by column; n is V, or 1 where they are shared.

    Attributes:
        messages: of all ranks.
        pipeline_rank: which runs the stage.
        shared: whether the columns have the same tokens.
    """

    messages: VocabMessages
    pipeline_rank: int
    shared: bool

    @property
    def here(self) -> bool:
        """Whether this process is one of them."""
        return self.messages.pipeline_rank == self.pipeline_rank

    @property
    def parts(self) -> int:
        """How many columns' tokens a tensor of all has: n."""
        return 1 if self.shared else self.messages.columns.degree

    def of_column(self, of_all: Tensor) -> Tensor:
        """Return the tokens of this process's column, a view."""
        if self.parts == 1:
            return of_all
        return of_all.unflatten(0, (self.parts, -1))[self.messages.columns.rank]

    def gather_columns(self, own: Tensor) -> Tensor:
        """Gather what each column has, [T, ...], into one of all; all ranks call."""
        return own if self.parts == 1 else self.messages.columns.gather_tokens(own)

    def start_to_all(self, own: Tensor | None, like: Tensor) -> Pending:
        """Send what each owner has, [T, ...], to all ranks, as one of all; all ranks call.

        Args:
            own: of this process, if it is an owner.
            like: of the shape and the dtype of each owner's.
        """
        if own is not None and self.parts == 1:
            of_all = own.contiguous()
        else:
            of_all = like.new_empty((self.parts * like.shape[0], *like.shape[1:]))
            if own is not None:
                self.of_column(of_all).copy_(own)
        group = self.messages.broadcast
        sent = [group.start_broadcast(part, rank) for part, rank in self._parts_and_ranks(of_all)]
        return Several(of_all, sent)

    def start_sum(self, of_all: Tensor) -> Pending:
        """Sum the ranks' partial values, each owner's part at that owner; all ranks call.

        The owners' parts hold the sum, in place; what the others hold is nothing in particular.
        """
        group = self.messages.reduce
        if self.shared and self.messages.columns.degree > 1:  # every owner needs all of it
            return group.start_sum(of_all)
        summed = [group.start_sum_at(part, rank) for part, rank in self._parts_and_ranks(of_all)]
        return Several(of_all, summed)

    def _parts_and_ranks(self, of_all: Tensor) -> list[tuple[Tensor, int]]:
        first = self.pipeline_rank * self.messages.columns.degree
        return [(part, first + column) for column, part in enumerate(of_all.chunk(self.parts))]
