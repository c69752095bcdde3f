"""A shard's whole logits and autograd: the oracle, and the same under torch.compile.

Memory: N x R logits in float32 (float64 for float64 inputs), several times over in the oracle.
The gradients come from autograd and the chain rule of `statistics.join_shards` alone, so that
they check the formula which the other implementations use.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.impls.base import (
    BackwardTask,
    Demand,
    Forward,
    ForwardTask,
    Gradients,
    Shard,
)
from vocab_parallel.impls.recompute_only import RecomputeOnly, placed
from vocab_parallel.statistics import StatisticNames, share_of

Leaves = Sequence[Tensor | None]  # hidden states, classifier, bias
StatisticsFunction = Callable[[Shard, Leaves, StatisticNames], Tensor]


@dataclass(frozen=True)
class ReferenceImpl(RecomputeOnly):
    """Materialises its shard's logits in float32 or wider; has no options."""

    def check(self, demand: Demand) -> None:
        """Accept every call but one that names another way than to recompute."""
        self.refuse_other_ways(demand)

    def forward(self, shard: Shard, task: ForwardTask) -> Forward:
        """See `LocalImpl.forward`."""
        leaves = (shard.hidden, shard.classifier, shard.bias)
        return Forward(self._statistics()(shard, leaves, task.names))

    def backward(self, shard: Shard, task: BackwardTask) -> Gradients:
        """See `LocalImpl.backward`."""
        leaves = [
            None if tensor is None else self._leaf(tensor, shard).requires_grad_(want)
            for tensor, want in zip(
                (shard.hidden, shard.classifier, shard.bias), task.wanted, strict=True
            )
        ]
        with torch.enable_grad():
            local = self._statistics()(shard, leaves, task.names)
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if not sought:
            return Gradients(None, None, None)
        pulled = _shard_gradients(task.names, local.detach(), task.statistics, task.grads)
        found = iter(torch.autograd.grad(local, sought, pulled))
        hidden, classifier, bias = (
            next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves
        )
        return Gradients(hidden, placed(classifier, task.classifier_grad), bias)

    def _leaf(self, tensor: Tensor, shard: Shard) -> Tensor:
        # In the wide dtype, so that the partial gradient of the hidden states is not rounded
        # before it is summed over the group.
        return tensor.detach().to(shard.statistics_dtype)

    def _statistics(self) -> StatisticsFunction:
        return _exact_statistics


@dataclass(frozen=True)
class TorchCompileImpl(ReferenceImpl):
    """Materialises its shard's logits in the inputs' dtype and leaves the rest to torch.compile.

    The local work of cut-cross-entropy's ``torch_compile``; the logits are computed again in
    backward instead of being kept. As there, a shard's partial gradient of the hidden states is
    rounded to their dtype before it is summed over the group.
    """

    def _leaf(self, tensor: Tensor, shard: Shard) -> Tensor:
        return tensor.detach()

    def _statistics(self) -> StatisticsFunction:
        return _compiled()


def _exact_statistics(shard: Shard, leaves: Leaves, names: StatisticNames) -> Tensor:
    dtype = shard.statistics_dtype
    widened = [None if leaf is None else leaf.to(dtype) for leaf in leaves]
    return _statistics_of(_product(widened), widened[2], shard, names)


@functools.cache
def _compiled() -> StatisticsFunction:
    # At its first use, since torch.compile loads its whole compiler.
    return torch.compile(_native_statistics, dynamic=True)


def _native_statistics(shard: Shard, leaves: Leaves, names: StatisticNames) -> Tensor:
    logits = _product(leaves).to(shard.statistics_dtype)
    return _statistics_of(logits, leaves[2], shard, names)


def _product(leaves: Leaves) -> Tensor:
    hidden, classifier, _ = leaves
    assert hidden is not None
    assert classifier is not None
    return hidden @ classifier.T


def _statistics_of(
    logits: Tensor, bias: Tensor | None, shard: Shard, names: StatisticNames
) -> Tensor:
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if shard.softcap is not None:
        logits = shard.softcap * torch.tanh(logits / shard.softcap)
    logits = logits / shard.temperature

    owned, rows = shard.owned_targets()
    rows = rows.unsqueeze(-1)
    found = []
    lse = torch.logsumexp(logits, -1)
    for name in names:
        if name == "lse":
            found.append(lse)
        elif name == "target":
            found.append(torch.where(owned, logits.gather(-1, rows).squeeze(-1), 0.0))
        elif name == "sum":
            found.append(logits.sum(-1))
        else:
            # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
            finite = logits.masked_fill(logits == -torch.inf, 0.0)
            probabilities = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[:, None])
            found.append((probabilities * finite).sum(-1))
    return torch.stack(found)


def _shard_gradients(
    names: StatisticNames, local: Tensor, statistics: Tensor, grads: Tensor
) -> Tensor:
    """Pull the gradients [k, N] of the joined statistics back to this shard's statistics.

    With w = exp(lse_r - lse), the shard's share of the probability: dlse / dlse_r = w,
    dexpected / dexpected_r = w and dexpected / dlse_r = w (expected_r - expected).
    """
    lse = names.index("lse")
    share = share_of(local[lse], statistics[lse])
    pulled = grads.clone()
    pulled[lse] *= share
    if "expected" in names:
        row = names.index("expected")
        pulled[row] *= share
        pulled[lse] += pulled[row] * (local[row] - statistics[row])
    return pulled
