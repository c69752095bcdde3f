"""What is known of each token's logits, and how the statistics of shards join.

With z the logits of a token over the rows of one shard, an implementation returns some of:

    lse       logsumexp(z)
    target    z at the token's target where the shard owns that row, else 0
    sum       the sum of z, for label smoothing
    expected  the mean of z under softmax(z), for the entropy: H = lse - expected

Statistics of a shard and of the whole vocabulary have the same shape, [k, N], in the order of a
tuple of these names.
"""

from typing import Literal

import torch
from torch import Tensor

StatisticName = Literal["lse", "target", "sum", "expected"]
StatisticNames = tuple[StatisticName, ...]


def join_shards(gathered: Tensor, names: StatisticNames) -> Tensor:
    """Join the shards' statistics [V, k, N] into those of the whole vocabulary [k, N]."""
    if gathered.shape[0] == 1:
        return gathered[0]
    shard_lse = gathered[:, names.index("lse")]
    lse = torch.logsumexp(shard_lse, 0)
    joined = gathered.new_empty(gathered.shape[1:])
    for row, name in enumerate(names):
        if name == "lse":
            joined[row] = lse
        elif name == "expected":
            # Each shard's mean counts by its share of the probability.
            joined[row] = (share_of(shard_lse, lse) * gathered[:, row]).sum(0)
        else:
            torch.sum(gathered[:, row], 0, out=joined[row])
    return joined


def share_of(part_lse: Tensor, lse: Tensor) -> Tensor:
    """Return the probability that lies in a part of the vocabulary, from its lse and the whole's.

    A part without rows, or whose logits are all -inf, has none; so has each part of a whole
    without any, where the difference would be NaN.
    """
    return (part_lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp()


def empty_shard(num_tokens: int, names: StatisticNames, like: Tensor) -> Tensor:
    """Return the statistics [k, N] of a shard without rows: no probability, nothing to sum."""
    statistics = like.new_zeros((len(names), num_tokens))
    statistics[names.index("lse")] = -torch.inf
    return statistics
