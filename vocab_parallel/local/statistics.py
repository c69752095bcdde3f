"""What is known of each token's logits, by name.

With z the logits of a token over some rows, an implementation returns some of:

    lse       logsumexp(z)
    target    z at the token's target where these rows have it, else 0
    sum       the sum of z, for label smoothing
    expected  the mean of z - lse under softmax(z): minus the entropy. The difference, since the
              mean of z itself would lose the entropy's digits to an offset of the logits
    rival     the largest z of rows other than the target, for the accuracy

Statistics of a shard and of the whole vocabulary have the same shape, [k, N]. The gradients that
they receive are those of the first of them: what is only reported comes last, and receives none.

A target is the arg-max where target >= rival: a tie counts. The rival and not the largest of all z,
since an implementation may make the target's logit in another order than the others': beside the
largest z it would seem smaller than itself by a rounding. Two rows whose logits differ by less than
a rounding may count either way.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

StatisticName = Literal["lse", "target", "sum", "expected", "rival"]
StatisticNames = tuple[StatisticName, ...]


@dataclass(frozen=True)
class Statistics:
    """Numbers of every token, one tensor [k, N] read by name.

    Attributes:
        values: [k, N] float32 or wider.
        names: of the k rows; "lse" and "target" are always the first two.
    """

    values: Tensor
    names: StatisticNames

    @classmethod
    def empty(cls, names: StatisticNames, num_tokens: int, like: Tensor) -> Self:
        """Allocate statistics in the dtype that accumulates ``like``'s."""
        dtype = accumulation_dtype(like.dtype)
        return cls(like.new_empty((len(names), num_tokens), dtype=dtype), names)

    @classmethod
    def of_no_rows(cls, names: StatisticNames, num_tokens: int, like: Tensor) -> Self:
        """Return the statistics of a shard without rows: no probability, nothing to sum."""
        found = cls.empty(names, num_tokens, like)
        found.clear_()
        return found

    def clear_(self) -> None:
        """Make them those of no rows."""
        self.values.zero_()
        self.lse.fill_(-torch.inf)
        if "rival" in self:
            self.rival.fill_(-torch.inf)

    def __getitem__(self, name: StatisticName) -> Tensor:
        return self.values[self.names.index(name)]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def lse(self) -> Tensor:
        """[N]."""
        return self.values[0]

    @property
    def target(self) -> Tensor:
        """[N]."""
        return self.values[1]

    @property
    def sum(self) -> Tensor:
        """[N], where it is one of the names."""
        return self["sum"]

    @property
    def expected(self) -> Tensor:
        """[N], where it is one of the names."""
        return self["expected"]

    @property
    def rival(self) -> Tensor:
        """[N], where it is one of the names."""
        return self["rival"]

    def of(self, tokens: slice) -> Self:
        """Return those of some tokens, a view."""
        return type(self)(self.values[:, tokens], self.names)

    def first(self, names: StatisticNames) -> Self:
        """Return those of the first names, a view."""
        assert self.names[: len(names)] == names
        return self if self.names == names else type(self)(self.values[: len(names)], names)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def share_of(part_lse: Tensor, lse: Tensor) -> Tensor:
    """Return the probability that lies in a part of the vocabulary, from its lse and the whole's.

    A part without rows, or whose logits are all -inf, has none; so has each part of a whole
    without any, where the difference would be NaN.
    """
    return (part_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp()


def join_means(expected: Tensor, lse: Tensor, joined_lse: Tensor) -> Tensor:
    """Return ``expected`` [...] of the union of some parts, from [parts, ...] of each.

    Each part's own mean is taken from the joint lse, and counts by its share of the probability.
    """
    shares = share_of(lse, joined_lse)
    total = shares.sum(0)  # 1, but for the rounding of each lse
    # A part without a share may have an lse of -inf: not 0 times -inf.
    means = (shares * (expected + (lse - joined_lse))).masked_fill(shares == 0.0, 0.0)
    return means.sum(0) / total.masked_fill(total == 0.0, 1.0)


def join(gathered: Tensor, names: StatisticNames) -> Tensor:
    """Join the statistics [V, k, N] of parts of the vocabulary into those of the whole [k, N]."""
    if gathered.shape[0] == 1:
        return gathered[0]
    parts = Statistics(gathered.movedim(1, 0), names)  # each [V, N]
    joined = Statistics(gathered.new_empty(gathered.shape[1:]), names)
    torch.logsumexp(parts.lse, 0, out=joined.lse)
    torch.sum(parts.target, 0, out=joined.target)
    if "sum" in names:
        torch.sum(parts.sum, 0, out=joined.sum)
    if "expected" in names:
        joined.expected.copy_(join_means(parts.expected, parts.lse, joined.lse))
    if "rival" in names:
        torch.amax(parts.rival, 0, out=joined.rival)
    return joined.values
