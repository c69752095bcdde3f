"""The passes of the loss where all stages of a pipeline carry the vocabulary.

Every rank of a column holds rows of the classifier, and for each microbatch m, in this order:

    broadcast   the last stage's hidden states go to every rank
    S(m)        statistics of this rank's rows, and its share of dE before anything is known of the
                others: that of its local softmax
    exchange    statistics are joined, shares rescaled and summed at the last stage
    T(m)        dC of this rank's rows, added to their ``.grad``, any time later

With z the logits of a rank's rows R, l_r their logsumexp, l that of all, and d what the joined
statistics receive (`backends/interface.py`), the gradient of a logit that is no target is

    d.lse exp(z - l) = d.lse exp(l_r - l) exp(z - l_r)

so that the share sum_R exp(z - l_r) c is scaled by one number a token after the exchange. The
target's own part is left out of it and added in float32, by the one rank that has its row: a
confident token's would cancel. The identity needs a gradient that is made of lse and the target
alone. Label smoothing adds a part that a softcap bends: it takes the other form, with two barriers,

    broadcast, S(m) statistics alone, exchange of them, T(m) dE and dC, reduction of dE

which keeps no share [N, D] between S and the exchange, and holds the last stage's backward back
until every rank's T.

Source: arXiv 2411.05288, Algorithms 1 and 2, with cut cross-entropy in place of their softmax.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vocab_parallel.arguments import Call, Operands, prepare
from vocab_parallel.backends.interface import ClassifierGrad, Upstream, Wanted
from vocab_parallel.backends.torch import TorchBackend, owned_targets
from vocab_parallel.collectives import Pending
from vocab_parallel.engine import (
    Inputs,
    classifier_grad,
    own_gradients,
    own_statistics,
    with_padding,
)
from vocab_parallel.functional import token_losses
from vocab_parallel.metrics import loss_metrics
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.spanning.owners import Owners
from vocab_parallel.plan import blocks
from vocab_parallel.settings import LossSettings
from vocab_parallel.split_backward import first_derivative_only
from vocab_parallel.statistics import (
    Statistics,
    accumulation_dtype,
    count_lines,
    join,
    share_of,
)


@dataclass
class _Microbatch:
    """What a rank holds of a microbatch between its passes; N are all columns' tokens."""

    hidden: Tensor  # [n b, T, D]
    arrives: Pending
    trains: bool
    call: Call | None = None
    labels: Tensor | None = None  # [N], marked
    inputs: Inputs | None = None
    own: Tensor | None = None  # [k, N]
    kept: object = None
    share: Tensor | None = None  # of dE, [N, D], partial
    joined: Tensor | None = None
    grads: Tensor | None = None
    exchanged: torch.cuda.Event | None = None  # when the three above are there
    summed: Pending | None = None

    @property
    def ready(self) -> tuple[Call, Inputs]:
        """What S has made."""
        assert self.call is not None
        assert self.inputs is not None
        return self.call, self.inputs


def barriers_of(settings: LossSettings) -> int:
    """Return how many barriers the last stage's backward waits for: 1, or 2 where it must."""
    return 2 if settings.label_smoothing else 1


class LossPasses:
    """The loss over rows that the ranks of all stages hold; each rank makes one, all alike.

    Args:
        loss: of the schedule; its ``output_weight`` is this rank's rows, its settings are the
            loss's, and its ``num_valid_tokens`` divides the mean.
        last: the ranks that run the last stage.
        barriers: 1 or 2, see above; must be 2 where `barriers_of` says so.
    """

    def __init__(self, loss: CCEPipelineLoss, last: Owners, barriers: int) -> None:
        self._loss, self._last, self._messages = loss, last, last.messages
        self._barriers = barriers
        self._held: dict[int, _Microbatch] = {}
        self._losses: dict[int, Tensor] = {}
        self._aside: torch.cuda.Stream | None = None

    def deferred(self, hidden: Tensor, microbatch: int) -> Tensor:
        """Return the last stage's loss of a microbatch, whose value comes with its exchange.

        It is NaN until then. Its backward gives the hidden states the summed dE. The loss must
        receive 1, since the rows' gradients may be made before it receives anything: another
        number is a ValueError on a CPU, and makes the gradient NaN on a GPU.

        Args:
            hidden: [b, T, D] of this column.
            microbatch: counted from 0.
        """
        self._held[microbatch] = _Microbatch(hidden, Pending(hidden, None, "", None), True)
        loss = cast(Tensor, _DeferredLoss.apply(hidden, self, microbatch))
        self._losses[microbatch] = loss
        return loss

    @torch.no_grad()
    def broadcast(self, microbatch: int, like: Tensor, *, trains: bool) -> None:
        """Send and receive a microbatch's hidden states; all ranks call.

        Args:
            microbatch: counted from 0.
            like: of the shape and the dtype of the last stage's hidden states of one column.
            trains: whether a backward follows.
        """
        parts = self._last.parts
        if self._last.here and parts == 1:
            of_all = self._held[microbatch].hidden.detach().contiguous()
        else:
            of_all = like.new_empty((parts * like.shape[0], *like.shape[1:]))
            if self._last.here:
                self._last.of_column(of_all).copy_(self._held[microbatch].hidden.detach())
        arrives = self._last.start_to_all(of_all)
        self._held[microbatch] = _Microbatch(of_all, arrives, trains)

    @torch.no_grad()
    def statistics(self, microbatch: int, labels: Tensor, token_weight: Tensor | None) -> None:
        """S: this rank's statistics, and with one barrier its share of dE.

        Args:
            microbatch: counted from 0.
            labels: [n b, T] of all columns.
            token_weight: [n b, T], or None.
        """
        held = self._held[microbatch]
        hidden = held.arrives.wait()
        rows = self._loss.output_weight.read()
        operands = Operands.of(hidden, rows.weight, labels, rows.bias, token_weight)
        held.call = call = prepare(operands, self._settings(), rows.options, validate=False)
        held.labels = call.labels()
        targets = call.rows.local_targets(held.labels)
        held.inputs = Inputs(
            operands.flat_hidden, operands.classifier.detach(), operands.bias, targets
        )
        if not held.trains or self._barriers == 2:
            held.own, held.kept = own_statistics(call, held.inputs, needs_grad=held.trains)
        elif call.bound.plan.backward == "recompute" and call.settings.impl != "reference":
            held.own, held.share = _by_chunks(call, held.inputs)
        else:
            held.own, held.kept = own_statistics(call, held.inputs, needs_grad=True)
            held.share = _local_share(call, held.inputs, held.own, held.kept)

    @torch.no_grad()
    def exchange(self, microbatch: int) -> None:
        """Join the statistics, and with one barrier sum the shares of dE; all ranks call."""
        held = self._held[microbatch]
        call, _ = held.ready
        assert held.labels is not None
        assert held.own is not None
        with self._beside_layers(held):
            gathered = self._messages.gather.gather_shards(held.own)
            held.joined = joined = join(gathered, call.bound.shard.columns)
            loss, one = token_losses(call, held.labels), joined.new_ones(())
            held.grads = loss.total_gradient(joined, one)
            if self._last.here:
                self._losses[microbatch].data.copy_(loss.total_value(joined))
            if held.share is not None:
                share, held.share = held.share, None
                scale = share_of(held.own[0], joined[0]) * held.grads[0]
                share.mul_(scale.unsqueeze(1))
                self._add_targets(held, share)
                self._start_sum(held, share)
        if not held.trains:
            self._wait_for_exchange(held)
            self._report(held)
            self._release(held)

    @torch.no_grad()
    def gradients(self, microbatch: int) -> None:
        """T: add this rank's dC to the gradient of its rows; with two barriers also make dE."""
        held = self._held[microbatch]
        call, inputs = held.ready
        self._wait_for_exchange(held)
        self._report(held)
        assert held.joined is not None
        assert held.grads is not None
        rows = self._loss.output_weight.read()
        weight, bias = cast(nn.Parameter, rows.weight), rows.bias
        wanted = Wanted(
            self._barriers == 2, weight.requires_grad, bias is not None and bias.requires_grad
        )
        target = classifier_grad(call, weight)
        if call.settings.accumulate_into is None and weight.grad is not None:
            target = ClassifierGrad(weight.grad.dtype, call.rows.tokens_alone(weight.grad))
        count = count_lines(call.bound.shard.grad_columns)
        upstream = Upstream(held.joined[:count], held.grads[:count], wanted, target, held.kept)
        found = own_gradients(call, inputs, upstream)
        if wanted.classifier and target.add_to is None:
            weight.grad = with_padding(found.classifier, weight)
        if wanted.bias and bias is not None:
            own = with_padding(found.bias, bias)
            bias.grad = own if bias.grad is None else bias.grad.add_(own)
        if wanted.hidden:
            dtype = call.bound.shard.sum_dtype
            made = found.hidden
            held.share = (
                torch.zeros_like(inputs.hidden, dtype=dtype) if made is None else made.to(dtype)
            )
        elif not self._last.here and held.summed is not None:
            held.summed.wait()  # its buffer has stayed until here
            held.summed = None
        self._release(held)

    @torch.no_grad()
    def reduction(self, microbatch: int) -> None:
        """Sum what T made of dE at the last stage; all ranks call, with two barriers."""
        held = self._held[microbatch]
        assert held.share is not None, "the order has every T before its reduction"
        share, held.share = held.share, None
        self._start_sum(held, share)
        self._release(held)
        before = self._held.get(microbatch - 1)
        if not self._last.here and before is not None and before.summed is not None:
            before.summed.wait()  # its buffer has stayed until here
            before.summed = None

    def hidden_grad(self, microbatch: int) -> Tensor:
        """Return the summed dE of a microbatch's tokens of this column, once, on its last stage."""
        held = self._held[microbatch]
        assert held.summed is not None, "the order has every exchange before its backward"
        summed, held.summed = held.summed.wait(), None
        own = self._last.of_column(summed)
        scale = self._loss.settings.hidden_grad_scale
        return own if scale == 1.0 else own * scale

    def finish(self) -> None:
        """Wait for what is under way: a reduction's buffer stays until it is done."""
        for held in self._held.values():
            if held.summed is not None:
                held.summed.wait()
            self._wait_for_exchange(held)
        self._held.clear()
        self._losses.clear()

    def _settings(self) -> LossSettings:
        """Return the loss's settings of this step, for tokens that are gathered already.

        Nothing is known of the loss's gradient in S: as where a result is returned beside it.
        """
        return replace(
            self._loss.settings,
            hidden_layout="replicated",
            return_lse=True,
            num_valid_tokens=self._loss.num_valid_tokens,
        )

    def _add_targets(self, held: _Microbatch, share: Tensor) -> None:
        """Add the targets' own part of dE: their logits' gradient, in float32, times their rows."""
        call, inputs = held.ready
        joined, grads = held.joined, held.grads
        assert joined is not None
        assert grads is not None
        rows = call.rows.tokens_alone(inputs.classifier)
        if rows.shape[0] == 0:
            return
        owned, chosen = owned_targets(inputs.targets, rows.shape[0])
        (lse, at_target), (lse_grad, target_grad) = joined[:2], grads[:2]
        factor = lse_grad * torch.expm1(at_target - lse) + (lse_grad + target_grad)
        cap, temperature = call.settings.transform
        if cap is not None:  # d tanh = 1 - tanh^2
            factor = factor * (1.0 - (at_target * (temperature / cap)).square())
        factor = (factor / temperature).masked_fill(~owned, 0.0)
        share.addcmul_(rows[chosen].to(share.dtype), factor.unsqueeze(1))

    def _start_sum(self, held: _Microbatch, partial: Tensor) -> None:
        call, _ = held.ready
        if self._aside is not None:  # where it is made anew there, the old one is freed early
            partial.record_stream(self._aside)
        partial = partial.to(call.bound.shard.sum_dtype).contiguous()
        held.summed = self._last.start_sum(partial.view(held.hidden.shape))

    @contextmanager
    def _beside_layers(self, held: _Microbatch) -> Iterator[None]:
        """Run on a stream of its own on a GPU: other ranks' S may end later than this one's.

        Waiting for them on the layers' stream would hold its layers back. What is read was made on
        the layers' stream, and is held until that one has waited for the event.
        """
        if not held.hidden.is_cuda:
            yield
            return
        layers = torch.cuda.current_stream(held.hidden.device)
        if self._aside is None:
            self._aside = torch.cuda.Stream(held.hidden.device)
        self._aside.wait_stream(layers)
        with torch.cuda.stream(self._aside):
            yield
            held.exchanged = self._aside.record_event()

    def _wait_for_exchange(self, held: _Microbatch) -> None:
        """Let the layers' stream wait for what was made beside it, and use it."""
        if held.exchanged is None:
            return
        layers = torch.cuda.current_stream(held.hidden.device)
        layers.wait_event(held.exchanged)
        for made in (held.joined, held.grads):
            if made is not None:
                made.record_stream(layers)
        held.exchanged = None

    def _report(self, held: _Microbatch) -> None:
        """Add what the loss reports of a microbatch to that of the others, all columns' tokens."""
        assert held.joined is not None
        assert held.labels is not None
        if self._loss.settings.return_metrics:
            statistics = Statistics(held.joined, held.ready[0].bound.shard.columns)
            self._loss.add_metrics(loss_metrics(statistics, held.labels))

    def _release(self, held: _Microbatch) -> None:
        """Drop all that no later pass reads; a sum that is under way stays."""
        if held.share is None:  # else a reduction follows
            held.hidden = held.hidden.new_empty(0)
            held.call = held.inputs = None
        held.labels = held.own = held.joined = held.grads = held.kept = None
        held.arrives = Pending(held.hidden, None, "", None)


def _by_chunks(call: Call, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Make statistics and share of some tokens at a time, for which the logits are made once.

    T makes them once more: four products, where S and T that know nothing of each other make five.
    """
    num_tokens, shard = inputs.hidden.shape[0], call.bound.shard
    assert isinstance(call.bound.backend, TorchBackend)
    plan = call.bound.backend.plan_chunks(shard, num_tokens)
    in_chunks = call._replace(bound=call.bound._replace(plan=plan))
    own = inputs.hidden.new_empty((count_lines(shard.columns), num_tokens), dtype=shard.dtype)
    share = torch.empty_like(inputs.hidden, dtype=shard.dtype)
    for tokens in blocks(num_tokens, plan.span):
        part = inputs.of(tokens)
        found, kept = own_statistics(in_chunks, part, needs_grad=True)
        own[:, tokens] = found
        share[tokens] = _local_share(in_chunks, part, found, kept)
    return own, share


def _local_share(call: Call, inputs: Inputs, own: Tensor, kept: object) -> Tensor:
    """Return this rank's share of dE [n, D] for its local softmax, without the targets' part.

    With nothing at the target: there p + d.target is 0.
    """
    own = own[: count_lines(call.bound.shard.grad_columns)]
    local = torch.zeros_like(own)
    local[0] = 1.0
    local[1] = -share_of(own[1], own[0])
    nothing = ClassifierGrad(inputs.classifier.dtype)
    upstream = Upstream(own, local, Wanted(True, False, False), nothing, kept)
    share = own_gradients(call, inputs, upstream).hidden
    if share is None:
        share = torch.zeros_like(inputs.hidden, dtype=own.dtype)
    return share.to(own.dtype)


class _DeferredLoss(torch.autograd.Function):
    """A number whose value and whose gradient are made by passes that come after it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, passes: LossPasses, microbatch: int) -> Tensor:
        ctx.passes, ctx.microbatch = passes, microbatch
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return hidden.new_full((), torch.nan, dtype=accumulation_dtype(hidden.dtype))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if grad.is_cpu and grad != 1.0:
            raise ValueError(
                f"the loss over all stages received {float(grad)}, but the rows' gradients are "
                f"made as of a loss that receives 1: scale the gradients after the step, not the "
                f"loss"
            )
        found: Tensor = ctx.passes.hidden_grad(ctx.microbatch)
        # On a GPU nobody waits to see it: what is not right is NaN.
        known = torch.where(grad == 1.0, 1.0, torch.nan)
        return (found * known).to(ctx.dtype).view(ctx.shape), None, None
