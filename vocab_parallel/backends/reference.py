"""A shard's whole logits and autograd: the oracle, and the same under torch.compile.

Memory: N x R logits in float32 (float64 for float64 inputs), several times over in the oracle.
The gradients come from autograd and the chain rule of `statistics.join` alone, so that
they check the formula which the other implementations use.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Gradients, Shard, Upstream
from vocab_parallel.backends.torch import owned_targets
from vocab_parallel.plan import BackwardPlan, TileShape
from vocab_parallel.statistics import lines_of, share_of


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
        with _as_given(shard):
            return self._statistics(shard), None

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `Backend.gradients`."""
        tensors = {"hidden": shard.hidden, "classifier": shard.classifier, "bias": shard.bias}
        leaves = {
            name: self._leaf(tensor, shard).requires_grad_(getattr(upstream.wanted, name))
            for name, tensor in tensors.items()
            if tensor is not None
        }
        sought = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not sought:
            return Gradients(None, None, None)
        shard = Shard(**{**shard._asdict(), **leaves, "columns": shard.grad_columns})
        with _as_given(shard):
            with torch.enable_grad():
                local = self._statistics(shard)
            pulled = _shard_gradients(shard, local.detach(), upstream.statistics, upstream.grads)
            grads = torch.autograd.grad(local, tuple(sought.values()), pulled)
        found = Gradients(None, None, None)._replace(**dict(zip(sought, grads, strict=True)))
        return found._replace(classifier=upstream.classifier_grad.placed(found.classifier))

    def _leaf(self, tensor: Tensor, shard: Shard) -> Tensor:
        # In the wide dtype, so that the partial gradient of the hidden states is not rounded
        # before it is summed over the group.
        return tensor.detach().to(shard.dtype)

    def _statistics(self, shard: Shard) -> Tensor:
        return _statistics_of(shard, shard.dtype)


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

    def _statistics(self, shard: Shard) -> Tensor:
        return _compiled()(shard, shard.product_dtype)


def _as_given(shard: Shard) -> torch.autocast:
    """Switch autocast off: operands are cast already, and it would round what is widened."""
    return torch.autocast(shard.hidden.device.type, enabled=False)


@functools.cache
def _compiled() -> Callable[[Shard, torch.dtype], Tensor]:
    # At its first use, since torch.compile loads its whole compiler.
    return torch.compile(_statistics_of, dynamic=True)


def _statistics_of(shard: Shard, product_dtype: torch.dtype) -> Tensor:
    (cap, temperature), bias = shard.transform, shard.bias
    product = shard.hidden.to(product_dtype) @ shard.classifier.to(product_dtype).T
    logits = product.to(shard.dtype)
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
