"""The oracle: a shard's whole logits, plain differentiable torch, any dtype.

Memory: N x R logits in float32 (float64 for float64 inputs), several times over. Its gradients
come from autograd and the chain rule of `statistics.join_shards` alone, so that they check the
formula which the other implementations use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.impls.base import Gradients, Shard, Wanted
from vocab_parallel.statistics import StatisticNames


@dataclass(frozen=True)
class ReferenceImpl:
    """Materialises its shard's logits; has no options."""

    def forward(self, shard: Shard, names: StatisticNames) -> Tensor:
        """See `LocalImpl.forward`."""
        return _statistics(shard, (shard.hidden, shard.classifier, shard.bias), names)

    def backward(
        self,
        shard: Shard,
        names: StatisticNames,
        statistics: Tensor,
        grads: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        """See `LocalImpl.backward`."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(want)
            for tensor, want in zip(
                (shard.hidden, shard.classifier, shard.bias), wanted, strict=True
            )
        ]
        with torch.enable_grad():
            local = _statistics(shard, leaves, names)
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if not sought:
            return Gradients(None, None, None)
        found = iter(
            torch.autograd.grad(
                local, sought, _shard_gradients(names, local.detach(), statistics, grads)
            )
        )
        return Gradients(
            *(next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves)
        )


def _statistics(
    shard: Shard,
    leaves: Sequence[Tensor | None],  # hidden states, classifier, bias
    names: StatisticNames,
) -> Tensor:
    hidden, classifier, bias = leaves
    assert hidden is not None
    assert classifier is not None
    dtype = shard.statistics_dtype
    logits = hidden.to(dtype) @ classifier.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if shard.softcap is not None:
        logits = shard.softcap * torch.tanh(logits / shard.softcap)
    logits = logits / shard.temperature

    owned = shard.targets >= 0
    rows = shard.targets.clamp(min=0).unsqueeze(-1)
    every = {
        "lse": lambda: torch.logsumexp(logits, -1),
        "target": lambda: torch.where(owned, logits.gather(-1, rows).squeeze(-1), 0.0),
        "sum": lambda: logits.sum(-1),
        "expected": lambda: (torch.softmax(logits, -1) * logits).sum(-1),
    }
    return torch.stack([every[name]() for name in names])


def _shard_gradients(
    names: StatisticNames, local: Tensor, statistics: Tensor, grads: Tensor
) -> Tensor:
    """Pull the gradients [k, N] of the joined statistics back to this shard's statistics.

    With w = exp(lse_r - lse), the shard's share of the probability: dlse / dlse_r = w,
    dexpected / dexpected_r = w and dexpected / dlse_r = w (expected_r - expected).
    """
    lse = names.index("lse")
    share = (local[lse] - statistics[lse]).exp()
    pulled = grads.clone()
    pulled[lse] *= share
    if "expected" in names:
        row = names.index("expected")
        pulled[row] *= share
        pulled[lse] += pulled[row] * (local[row] - statistics[row])
    return pulled
