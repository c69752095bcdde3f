"""A shard's whole logits and autograd: the oracle, and the same under torch.compile.

Memory: N x R logits in float32 (float64 for float64 inputs), several times over in the oracle.
The gradients come from autograd and the chain rule of `statistics.join` alone, so that
they check the formula which the other implementations use.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import BackwardPlan, TileShape
from vocab_parallel.local.interface import Gradients, Shard, Upstream
from vocab_parallel.local.statistics import Statistics, share_of

Leaves = Sequence[Tensor | None]  # hidden states, classifier, bias
StatisticsFunction = Callable[[Shard, Leaves], Tensor]


class RecomputeOnly:
    """Base of implementations that make the logits anew in backward."""

    def plan(self, shard: Shard, *, tokens: int, backward: str, **_: Any) -> BackwardPlan:
        """See `LocalImpl.plan`; whatever is held is the implementation's own, and not counted."""
        if backward not in ("auto", "recompute"):
            raise ValueError(
                f'backward="{backward}" is done by impl="chunked" alone; this one makes the logits '
                f'anew in backward: use backward="recompute" or "auto"'
            )
        tile = TileShape(tokens, shard.num_rows)
        return BackwardPlan("recompute", tile, tokens, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ReferenceImpl(RecomputeOnly):
    """Materialises its shard's logits in float32 or wider; has no options."""

    def forward(self, shard: Shard, plan: BackwardPlan) -> tuple[Statistics, None]:
        """See `LocalImpl.forward`."""
        leaves = (shard.hidden, shard.classifier, shard.bias)
        return Statistics(self._statistics()(shard, leaves), shard.names), None

    def backward(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `LocalImpl.backward`."""
        leaves = [
            None if tensor is None else self._leaf(tensor, shard).requires_grad_(want)
            for tensor, want in zip(
                (shard.hidden, shard.classifier, shard.bias), upstream.wanted, strict=True
            )
        ]
        with torch.enable_grad():
            local = self._statistics()(shard, leaves)
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if not sought:
            return Gradients(None, None, None)
        own = Statistics(local.detach(), shard.names)
        pulled = _shard_gradients(own, upstream.statistics, upstream.grads)
        found = iter(torch.autograd.grad(local, sought, pulled.values))
        hidden, classifier, bias = (
            next(found) if leaf is not None and leaf.requires_grad else None for leaf in leaves
        )
        return Gradients(hidden, upstream.classifier_grad.placed(classifier), bias)

    def _leaf(self, tensor: Tensor, shard: Shard) -> Tensor:
        # In the wide dtype, so that the partial gradient of the hidden states is not rounded
        # before it is summed over the group.
        return tensor.detach().to(shard.dtype)

    def _statistics(self) -> StatisticsFunction:
        return _exact_statistics


@dataclass(frozen=True)
class TorchCompileImpl(ReferenceImpl):
    """Materialises its shard's logits in the inputs' dtype and leaves the rest to torch.compile.

    The local work of cut-cross-entropy's ``torch_compile``; the logits are computed again in
    backward instead of being kept. As there, a shard's partial gradient of the hidden states is
    rounded to their dtype before it is summed over the group. Operands of two dtypes are widened
    whole.
    """

    def plan(self, shard: Shard, **given: Any) -> BackwardPlan:
        """See `LocalImpl.plan`."""
        if shard.logits_dtype != shard.product_dtype:
            raise ValueError(
                f'impl "torch_compile" makes logits in {shard.product_dtype}, as its operands are: '
                f'leave out logits_dtype, or use impl="chunked"'
            )
        return super().plan(shard, **given)

    def _leaf(self, tensor: Tensor, shard: Shard) -> Tensor:
        return tensor.detach()

    def _statistics(self) -> StatisticsFunction:
        return _compiled()


def _exact_statistics(shard: Shard, leaves: Leaves) -> Tensor:
    dtype = shard.dtype
    widened = [None if leaf is None else leaf.to(dtype) for leaf in leaves]
    return _statistics_of(_product(widened), widened[2], shard)


@functools.cache
def _compiled() -> StatisticsFunction:
    # At its first use, since torch.compile loads its whole compiler.
    return torch.compile(_native_statistics, dynamic=True)


def _native_statistics(shard: Shard, leaves: Leaves) -> Tensor:
    operands = [None if leaf is None else leaf.to(shard.product_dtype) for leaf in leaves[:2]]
    logits = _product(operands).to(shard.dtype)
    return _statistics_of(logits, leaves[2], shard)


def _product(leaves: Leaves) -> Tensor:
    hidden, classifier = leaves[:2]
    assert hidden is not None
    assert classifier is not None
    return hidden @ classifier.T


def _statistics_of(logits: Tensor, bias: Tensor | None, shard: Shard) -> Tensor:
    cap, temperature = shard.transform
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature

    owned, rows = shard.owned_targets()
    at_target = logits.gather(-1, rows.unsqueeze(-1)).squeeze(-1)
    # A token whose logits are all -inf (a bias may mask a shard so) has a softmax of NaN.
    masked = (logits == -torch.inf).all(-1)
    safe = logits.masked_fill(masked[:, None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(masked, -torch.inf)
    found = [lse, torch.where(owned, at_target, 0.0)]
    if "sum" in shard.names:
        found.append(logits.sum(-1))
    if "expected" in shard.names:
        log_p = torch.log_softmax(safe, -1)
        # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
        finite = log_p.masked_fill(safe == -torch.inf, 0.0)
        found.append((log_p.exp() * finite).sum(-1).masked_fill(masked, 0.0))
    if "rival" in shard.names:
        others = logits.scatter(-1, rows.unsqueeze(-1), -torch.inf).amax(-1)
        found.append(torch.where(owned, others, logits.amax(-1)))
    return torch.stack(found)


def _shard_gradients(own: Statistics, whole: Statistics, grads: Statistics) -> Statistics:
    """Pull the gradients [k, N] of the joined statistics back to this shard's statistics.

    With w = exp(lse_r - lse), the shard's share of the probability: dlse / dlse_r = w,
    dexpected / dexpected_r = w and dexpected / dlse_r = w (expected_r + lse_r - lse - expected).
    """
    share = share_of(own.lse, whole.lse)
    pulled = Statistics(grads.values.clone(), grads.names)
    pulled.lse.mul_(share)
    if "expected" in own:
        pulled.expected.mul_(share)
        beyond = own.expected + (own.lse - whole.lse) - whole.expected
        pulled.lse.add_((pulled.expected * beyond).masked_fill(share == 0.0, 0.0))
    return pulled
