"""The passes of the loss where all stages of a pipeline carry the vocabulary.

Every rank of a column holds rows of the classifier, and for each microbatch m, in this order:

    broadcast   the last stage's hidden states go to every rank
    S(m)        statistics of this rank's rows, and its share of dE before anything is known of the
                others: that of its local softmax
    exchange    statistics are joined, shares rescaled and summed at the last stage
    T(m)        dC of this rank's rows, added to their ``.grad``, any time later

With z the logits of a rank's rows R, l_r their logsumexp, l that of all, and d what the joined
statistics receive (`local/interface.py`), the gradient of a logit that is no target is

    d.lse exp(z - l) = d.lse exp(l_r - l) exp(z - l_r)

so that the share sum_R exp(z - l_r) c is scaled by one number a token after the exchange. The
target's own part is left out of it and added in float32, by the one rank that has its row: a
confident token's would cancel. The identity needs a gradient that is made of lse and the target
alone: label smoothing and entropies are refused.

Source: arXiv 2411.05288, Algorithm 2 (one barrier), with cut cross-entropy in place of its softmax.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.collectives import Pending, VocabGroup
from vocab_parallel.local.interface import ClassifierGrad, Upstream, Wanted, owned_targets
from vocab_parallel.local.statistics import Statistics, accumulation_dtype, join, share_of
from vocab_parallel.loss import token_losses
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.sharded.backward import first_derivative_only
from vocab_parallel.sharded.call import Call, Operands, prepare
from vocab_parallel.sharded.halves import Inputs, own_gradients, own_statistics
from vocab_parallel.sharded.settings import LossSettings


@dataclass(frozen=True)
class SpanGroups:
    """The ranks of a column, three times: each kind of message has a group of its own.

    A group runs its collectives one after the other. With one for each kind, the hidden states of a
    microbatch need not wait for the gradient of the one before.

    Attributes:
        broadcast, statistics, gradient: the same ranks in the same order.
    """

    broadcast: VocabGroup
    statistics: VocabGroup
    gradient: VocabGroup


@dataclass
class _Microbatch:
    """What a rank holds of a microbatch between its passes."""

    hidden: Tensor  # [..., T, D]
    arrives: Pending
    call: Call | None = None
    labels: Tensor | None = None  # [T], marked
    inputs: Inputs | None = None
    own: Statistics | None = None
    kept: object = None
    share: Tensor | None = None  # of dE, [T, D], of the local softmax
    gathered: Pending | None = None
    joined: Statistics | None = None
    grads: Statistics | None = None
    summed: Pending | None = None


class SpanningLoss:
    """The loss over rows that all ranks of a column hold; each rank makes one, all alike.

    Args:
        classifier: this rank's rows, over the group of the column's ranks; a parameter of one of
            its stages' modules.
        groups: of the column.
        last: the rank in these groups that runs the last stage.
        **options: of `CCEPipelineLoss`: shift, softcap, reduction, z_loss, temperature, ...

    Attributes:
        num_valid_tokens: divides the mean, as `CCEPipelineLoss` has it.

    Raises:
        ValueError: an option whose gradient is not made of lse and the target alone.
    """

    def __init__(
        self, classifier: VocabParallelClassifier, groups: SpanGroups, last: int, **options: Any
    ) -> None:
        # Nothing is known of the loss's gradient in S: as where a result is returned beside it.
        given = {"reduction": "mean", "shift": 1, **options}
        settings = LossSettings(**given, return_lse=True)
        settings.check()
        for name, wrong in (
            ("label_smoothing", bool(settings.label_smoothing)),
            ("accumulate_into", settings.accumulate_into is not None),
            ("backward", settings.backward == "gradients"),
            ("hidden_layout", settings.hidden_layout != "replicated"),
            ("reduction", settings.reduction == "none"),
        ):
            if wrong:
                raise ValueError(
                    f"a loss over all stages does not take {name}={getattr(settings, name)!r}: "
                    f"leave it out, or give the vocabulary to the last stage alone"
                )
        self._classifier, self._groups, self._last = classifier, groups, last
        self._settings = settings
        self.num_valid_tokens: int | Tensor | None = None
        self._held: dict[int, _Microbatch] = {}
        self._losses: dict[int, Tensor] = {}

    @property
    def is_last(self) -> bool:
        """Whether this rank runs the last stage."""
        return self._groups.broadcast.rank == self._last

    def tell_shape(self, own: Any) -> Any:
        """Return what the last stage's rank says of its hidden states' shape; all ranks call."""
        return self._groups.statistics.exchange_objects(own)[self._last]

    def deferred(self, hidden: Tensor, microbatch: int) -> Tensor:
        """Return the last stage's loss of a microbatch, whose value comes with its exchange.

        Its backward gives the hidden states the summed dE. The loss must receive 1, since the rows'
        gradients may be made before it receives anything: another number is a ValueError on a CPU,
        and makes the gradient NaN on a GPU.
        """
        self._held[microbatch] = _Microbatch(hidden, Pending(hidden, None, "", None))
        loss = _DeferredLoss.apply(hidden, self, microbatch)
        self._losses[microbatch] = loss
        return loss

    def broadcast(self, microbatch: int, like: Tensor) -> None:
        """Send or receive a microbatch's hidden states; all ranks call.

        Args:
            microbatch: counted from 0.
            like: of the shape and the dtype of the last stage's hidden states.
        """
        if self.is_last:
            hidden = self._held[microbatch].hidden.detach().contiguous()
        else:
            hidden = torch.empty_like(like)
        arrives = self._groups.broadcast.start_broadcast(hidden, self._last)
        self._held[microbatch] = _Microbatch(hidden, arrives)

    @torch.no_grad()
    def statistics(self, microbatch: int, labels: Tensor) -> None:
        """S: this rank's statistics, and its share of dE.

        Args:
            microbatch: counted from 0.
            labels: [..., T] of the microbatch.
        """
        held = self._held[microbatch]
        hidden = held.arrives.wait()
        weight, bias = self._classifier.weight, self._classifier.bias
        operands = Operands.of(hidden, weight, labels, bias)
        settings = replace(self._settings, num_valid_tokens=self.num_valid_tokens)
        options = self._classifier.options
        held.call = call = prepare(operands, settings, options, validate=False)
        held.labels = call.labels()
        targets = call.rows.local_targets(held.labels)
        held.inputs = Inputs(operands.flat_hidden, weight, bias, targets)
        held.own, held.kept = own_statistics(call, held.inputs, needs_grad=True)
        # Of the local softmax, with nothing at the target: there p + d.target is 0.
        received = torch.zeros_like(held.own.values)
        local = Statistics(received, held.own.names)
        local.lse.fill_(1.0)
        local.target.copy_(-share_of(held.own.target, held.own.lse))
        upstream = Upstream(
            held.own, local, Wanted(True, False, False), ClassifierGrad(weight.dtype), held.kept
        )
        share = own_gradients(call, held.inputs, upstream).hidden
        flat = held.inputs.hidden
        held.share = torch.zeros_like(flat, dtype=held.own.values.dtype)
        if share is not None:
            held.share.copy_(share)

    @torch.no_grad()
    def exchange(self, microbatch: int) -> None:
        """Join the statistics, and sum the rescaled shares at the last stage; all ranks call."""
        held = self._held[microbatch]
        assert held.call is not None
        assert held.labels is not None
        assert held.own is not None
        assert held.share is not None
        names = held.own.names
        gathered = self._groups.statistics.gather_shards(held.own.values)
        held.joined = joined = Statistics(join(gathered, names), names)
        losses = token_losses(held.call, held.labels)
        loss, grads = losses.part(joined.values, slice(None))
        held.grads = Statistics(grads, names)
        if self.is_last:
            self._losses[microbatch].data.copy_(loss)
        share = held.share.mul_((share_of(held.own.lse, joined.lse) * held.grads.lse).unsqueeze(1))
        self._add_targets(held, share)
        held.share = None
        held.summed = self._groups.gradient.start_sum_at(share, self._last)

    @torch.no_grad()
    def gradients(self, microbatch: int) -> None:
        """T: add this rank's dC to the ``.grad`` of its rows."""
        held = self._held[microbatch]
        assert held.call is not None
        assert held.inputs is not None
        assert held.joined is not None
        assert held.grads is not None
        weight, bias = self._classifier.weight, self._classifier.bias
        wanted = Wanted(False, weight.requires_grad, bias is not None and bias.requires_grad)
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        tokens_alone = held.call.rows.tokens_alone
        target = ClassifierGrad(weight.grad.dtype, tokens_alone(weight.grad))
        upstream = Upstream(held.joined, held.grads, wanted, target, held.kept)
        found = own_gradients(held.call, held.inputs, upstream)
        if wanted.bias and bias is not None:
            if bias.grad is None:
                bias.grad = torch.zeros_like(bias)
            if found.bias is not None:
                tokens_alone(bias.grad).add_(found.bias)
        if not self.is_last and held.summed is not None:
            held.summed.wait()  # its buffer has stayed until here
            held.summed = None
        held.call = held.labels = held.inputs = held.own = held.joined = held.grads = None
        held.kept, held.hidden = None, held.hidden.new_empty(0)
        held.arrives = Pending(held.hidden, None, "", None)

    def hidden_grad(self, microbatch: int) -> Tensor:
        """Return the summed dE [T, D] of a microbatch, once, on the last stage's rank."""
        held = self._held[microbatch]
        assert held.summed is not None, "the order has every exchange before its backward"
        summed, held.summed = held.summed.wait(), None
        return summed

    def finish(self) -> None:
        """Wait for what is under way: a reduction's buffer stays until it is done."""
        for held in self._held.values():
            if held.summed is not None:
                held.summed.wait()
        self._held.clear()
        self._losses.clear()

    def _add_targets(self, held: _Microbatch, share: Tensor) -> None:
        """Add the targets' own part of dE: their logits' gradient, in float32, times their rows."""
        assert held.call is not None
        assert held.inputs is not None
        assert held.joined is not None
        assert held.grads is not None
        call, inputs, joined, grads = held.call, held.inputs, held.joined, held.grads
        rows = call.rows.tokens_alone(inputs.classifier)
        if rows.shape[0] == 0:
            return
        owned, chosen = owned_targets(inputs.targets, rows.shape[0])
        factor = grads.lse * torch.expm1(joined.target - joined.lse) + (grads.lse + grads.target)
        cap, temperature = call.settings.transform
        if cap is not None:  # d tanh = 1 - tanh^2
            factor = factor * (1.0 - (joined.target * (temperature / cap)).square())
        factor = (factor / temperature).masked_fill(~owned, 0.0)
        share.addcmul_(rows[chosen].to(share.dtype), factor.unsqueeze(1))


class _DeferredLoss(torch.autograd.Function):
    """A number whose value and whose gradient are made by passes that come after it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: SpanningLoss, microbatch: int) -> Tensor:
        ctx.loss, ctx.microbatch = loss, microbatch
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_zeros((), dtype=accumulation_dtype(hidden.dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if grad.is_cpu and grad != 1.0:
            raise ValueError(
                f"the loss over all stages received {float(grad)}, but the rows' gradients are "
                f"made as of a loss that receives 1: scale the gradients after the step, not the "
                f"loss"
            )
        found: Tensor = ctx.loss.hidden_grad(ctx.microbatch)
        # On a GPU nobody waits to see it: what is not right is NaN.
        known = torch.where(grad == 1.0, 1.0, torch.nan)
        return (found * known).to(ctx.dtype).view(ctx.shape), None, None
