"""The statistics of a token that student and teacher have, and how those of parts are joined.

A part is a tile's rows, or a rank's. All statistics of a token are one column of numbers, so that
the ranks exchange them in one all-gather.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from vocab_parallel.local.statistics import share_of

Joins = Literal["logsumexp", "sum", "mean"]


class Column(NamedTuple):
    """One kind of statistic.

    Attributes:
        name: by which it is read.
        joins: what makes that of a whole of those of its parts. A "mean" counts each part's by the
            probability that lies there.
        under: of a mean, the name of the logsumexp that tells that probability.
        width: how many numbers of a token it has; None for one without an axis.
    """

    name: str
    joins: Joins
    under: str = ""
    width: int | None = None

    @property
    def size(self) -> int:
        """How many lines of the statistics it takes."""
        return 1 if self.width is None else self.width


Columns = tuple[Column, ...]


@dataclass(frozen=True)
class TokenStatistics:
    """Numbers of every token, one tensor [k, N] read by name.

    Attributes:
        values: [k, N] float32 or wider.
        columns: what its lines are, in order.
    """

    values: Tensor
    columns: Columns

    @classmethod
    def of_no_rows(
        cls, columns: Columns, num_tokens: int, dtype: torch.dtype, like: Tensor
    ) -> Self:
        """Return the statistics of a part without rows: no probability, nothing to sum."""
        lines = sum(column.size for column in columns)
        found = cls(like.new_zeros((lines, num_tokens), dtype=dtype), columns)
        for column in columns:
            if column.joins == "logsumexp":
                found[column.name].fill_(-torch.inf)
        return found

    def __getitem__(self, name: str) -> Tensor:
        """Return [N], or [width, N], a view."""
        start = 0
        for column in self.columns:
            if column.name == name:
                return (
                    self.values[start]
                    if column.width is None
                    else self.values[start : start + column.width]
                )
            start += column.size
        raise KeyError(name)

    def of(self, tokens: slice) -> Self:
        """Return those of some tokens, a view."""
        return replace(self, values=self.values[:, tokens])


def join(gathered: Tensor, columns: Columns) -> Tensor:  # (parts, k, N) -> (k, N)
    """Join the statistics of parts of the vocabulary into those of the whole."""
    if gathered.shape[0] == 1:
        return gathered[0]
    parts = TokenStatistics(gathered.movedim(1, 0), columns)  # each [parts, N]
    joined = TokenStatistics(gathered.new_empty(gathered.shape[1:]), columns)
    for column in columns:
        found = parts[column.name]
        whole = joined[column.name]
        if column.joins == "logsumexp":
            torch.logsumexp(found, 0, out=whole)
        elif column.joins == "sum":
            torch.sum(found, 1 if column.width else 0, out=whole)
    for column in columns:
        if column.joins == "mean":
            shares = share_of(parts[column.under], joined[column.under])
            weighted = shares * parts[column.name]
            # A part without probability adds nothing, were its mean infinite.
            torch.sum(weighted.masked_fill_(shares == 0.0, 0.0), 0, out=joined[column.name])
    return joined.values
