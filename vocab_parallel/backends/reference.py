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

from vocab_parallel.backends.interface import Gradients, Shard, Upstream
from vocab_parallel.backends.torch import owned_targets
from vocab_parallel.plan import BackwardPlan, TileShape
from vocab_parallel.statistics import lines_of, share_of

Leaves = Sequence[Tensor | None]  # hidden states, classifier, bias
StatisticsFunction = Callable[[Shard, Leaves], Tensor]


class RecomputeOnly:
    """Base of backends that make the logits anew in backward."""

    def plan(self, shard: Shard, *, tokens: int, backward: str, **_: Any) -> BackwardPlan:
        """See `Backend.plan`; whatever is held is the backend's own, and not counted."""
        if backward not in ("auto", "recompute"):
            raise ValueError(
                f'backward="{backward}" is done by impl="chunked" alone; this one makes the logits '
                f'anew in backward: use backward="recompute" or "auto"'
            )
        tile = TileShape(tokens, shard.classifier.shape[0])
        return BackwardPlan("recompute", tile, tokens, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ReferenceBackend(RecomputeOnly):
    """Materialises its shard's logits in float32 or wider; has no options."""

    def statistics(self, shard: Shard, plan: BackwardPlan) -> tuple[Tensor, None]:
        """See `Backend.statistics`."""
        leaves = (shard.hidden, shard.classifier, shard.bias)
        return self._statistics()(shard, leaves), None

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `Backend.gradients`."""
        leaves = [
            None if tensor is None else self._leaf(tensor, shard).requires_grad_(want)
            for tensor, want in zip(
                (shard.hidden, shard.classifier, shard.bias), upstream.wanted, strict=True
            )
        ]
        shard = shard._replace(columns=shard.grad_columns)
        with torch.enable_grad():
            local = self._statistics()(shard, leaves)
        sought = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if not sought:
            return Gradients(None, None, None)
        pulled = _shard_gradients(shard, local.detach(), upstream.statistics, upstream.grads)
        found = iter(torch.autograd.grad(local, sought, pulled))
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
class TorchCompileBackend(ReferenceBackend):
    """Materialises its shard's logits in the inputs' dtype and leaves the rest to torch.compile.

    The local work of cut-cross-entropy's ``torch_compile``; the logits are computed again in
    backward instead of being kept. As there, a shard's partial gradient of the hidden states is
    rounded to their dtype before it is summed over the group. Operands of two dtypes are widened
    whole.
    """

    def plan(self, shard: Shard, **given: Any) -> BackwardPlan:
        """See `Backend.plan`."""
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

    owned, rows = owned_targets(shard.targets, shard.classifier.shape[0])
    names = [column.name for column in shard.columns]
    at_target = logits.gather(-1, rows.unsqueeze(-1)).squeeze(-1)
    # A token whose logits are all -inf (a bias may mask a shard so) has a softmax of NaN.
    masked = (logits == -torch.inf).all(-1)
    safe = logits.masked_fill(masked[:, None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(masked, -torch.inf)
    found = [lse, torch.where(owned, at_target, 0.0)]
    if "sum" in names:
        found.append(logits.sum(-1))
    if "mean_log_prob" in names:
        log_p = torch.log_softmax(safe, -1)
        # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
        finite = log_p.masked_fill(safe == -torch.inf, 0.0)
        found.append((log_p.exp() * finite).sum(-1).masked_fill(masked, 0.0))
    if "largest_other" in names:
        others = logits.scatter(-1, rows.unsqueeze(-1), -torch.inf).amax(-1)
        found.append(torch.where(owned, others, logits.amax(-1)))
    return torch.stack(found)


def _shard_gradients(shard: Shard, own: Tensor, whole: Tensor, grads: Tensor) -> Tensor:
    """Pull the gradients [k, N] of the joined statistics back to this shard's statistics.

    With w = exp(lse_r - lse), the shard's share of the probability: dlse / dlse_r = w,
    dexpected / dexpected_r = w and dexpected / dlse_r = w (expected_r + lse_r - lse - expected).
    """
    share = share_of(own[0], whole[0])
    pulled = grads.clone()
    pulled[0].mul_(share)
    at = lines_of(shard.grad_columns).get("mean_log_prob")
    if at is not None:
        pulled[at].mul_(share)
        beyond = own[at] + (own[0] - whole[0]) - whole[at]
        pulled[:1].add_((pulled[at] * beyond).masked_fill(share == 0.0, 0.0))
    return pulled
