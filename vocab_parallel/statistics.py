"""What is known of each token's logits: named columns, and how those of parts become the whole's.

A part is some rows of the vocabulary: a tile's, or a rank's. All that is known of a token is one
column of numbers, a line [N] of each kind or several, so that ranks exchange it in one all-gather.

With z the logits of a token over some rows, the loss knows

    lse            logsumexp(z)
    target         z at the token's target where these rows have it, else 0
    sum            the sum of z, for label smoothing
    mean_log_prob  the mean of z - lse under softmax(z): minus the entropy. The difference, since
                   the mean of z itself would lose the entropy's digits to an offset of the logits
    largest_other  the largest z of rows other than the target, for the accuracy

and a distillation its own (`distillation/`). The gradients that columns receive are those of the
first of them: what is only reported comes last, and receives none.

A target is the arg-max where target >= largest_other: a tie counts. It is compared with the others
and not with the largest of all z, since a backend may make the target's logit in another order than
the others': beside the largest z it would seem smaller than itself by a rounding. Two rows whose
logits differ by less than a rounding may count either way.
"""

import functools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

Joins = Literal["logsumexp", "sum", "max", "mean", "mean_log_prob"]


class Column(NamedTuple):
    """One kind of statistic.

    Attributes:
        name: by which it is read.
        joins: what makes that of a whole of those of its parts. A "mean" counts each part's by the
            probability that lies there; a "mean_log_prob" is one of logits less their logsumexp.
        under: of a mean, the name of the logsumexp, an earlier column, that tells that probability.
        width: how many lines it takes.
    """

    name: str
    joins: Joins
    under: str = "lse"
    width: int = 1


Columns = tuple[Column, ...]
LSE = Column("lse", "logsumexp")
TARGET = Column("target", "sum")
SUM = Column("sum", "sum")
MEAN_LOG_PROB = Column("mean_log_prob", "mean_log_prob")
LARGEST_OTHER = Column("largest_other", "max")


@dataclass(frozen=True)
class Statistics:
    """Numbers of every token, one tensor [k, N] read by name.

    Attributes:
        values: [k, N] float32 or wider.
        columns: what its lines are, in order.
    """

    values: Tensor
    columns: Columns

    def __getitem__(self, name: str) -> Tensor:
        """Return [N], or [width, N] of a column of several lines, a view."""
        lines = lines_of(self.columns)[name]
        return self.values[lines.start if lines.stop - lines.start == 1 else lines]

    def of(self, tokens: slice) -> Self:
        """Return those of some tokens, a view."""
        return replace(self, values=self.values[:, tokens])


@functools.lru_cache(maxsize=256)
def lines_of(columns: Columns) -> dict[str, slice]:
    """Return the lines that each column takes, by name."""
    found, start = {}, 0
    for column in columns:
        found[column.name] = slice(start, start + column.width)
        start += column.width
    return found


@functools.lru_cache(maxsize=256)
def names_of(columns: Columns) -> tuple[str, ...]:
    """Return the names of some columns, in order."""
    return tuple(column.name for column in columns)


@functools.lru_cache(maxsize=256)
def count_lines(columns: Columns) -> int:
    """Return k, how many lines some columns take."""
    return sum(column.width for column in columns)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def of_no_rows(columns: Columns, num_tokens: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return the statistics [k, N] of a part without rows: no probability, nothing to sum."""
    found = like.new_zeros((count_lines(columns), num_tokens), dtype=dtype)
    for column, lines in zip(columns, lines_of(columns).values(), strict=True):
        if column.joins in ("logsumexp", "max"):
            found[lines].fill_(-torch.inf)
    return found


def share_of(part_lse: Tensor, lse: Tensor) -> Tensor:
    """Return the probability that lies in a part of the vocabulary, from its lse and the whole's.

    A part without rows, or whose logits are all -inf, has none; so has each part of a whole
    without any, where the difference would be NaN.
    """
    return (part_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp()


def join(parts: Tensor, columns: Columns) -> Tensor:
    """Join the statistics [V, k, N] of parts of the vocabulary into those of the whole [k, N]."""
    if parts.shape[0] == 1:
        return parts[0]
    whole = parts.new_empty(parts.shape[1:])
    every = lines_of(columns)
    for column, lines in zip(columns, every.values(), strict=True):
        own, out = parts[:, lines], whole[lines]
        if column.joins == "logsumexp":
            torch.logsumexp(own, 0, out=out)
        elif column.joins == "sum":
            torch.sum(own, 0, out=out)
        elif column.joins == "max":
            torch.amax(own, 0, out=out)
        else:
            under = every[column.under]
            torch.sum(_weighted(column, own, parts[:, under], whole[under]), 0, out=out)
    return whole


def _weighted(column: Column, means: Tensor, lse: Tensor, whole_lse: Tensor) -> Tensor:
    """Return what each part [V, 1, N] adds to a mean: by its share of the probability."""
    shares = share_of(lse, whole_lse)
    total = shares.sum(0)  # 1, but for the rounding of each lse
    shares = shares / total.masked_fill(total == 0.0, 1.0)
    if column.joins == "mean_log_prob":
        means = means + (lse - whole_lse)
    # A part without probability adds nothing, were its mean infinite.
    return (shares * means).masked_fill_(shares == 0.0, 0.0)
