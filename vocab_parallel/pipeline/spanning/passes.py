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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vocab_parallel.arguments import Call, Operands, prepare
from vocab_parallel.backends.interface import ClassifierGrad, Shard, Upstream, Wanted
from vocab_parallel.backends.torch import TorchBackend, owned_targets
from vocab_parallel.collectives import Pending
from vocab_parallel.engine import (
    classifier_grad,
    own_gradients,
    own_statistics,
    part_of,
    shard_of,
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


class LossInputs(NamedTuple):
    """What the loss of a step needs beside hidden states.

    Attributes:
        labels: [n b, T] of all columns, of each microbatch.
        token_weight: [n b, T] of every microbatch, or None.
        num_valid_tokens: divides the mean.
    """

    labels: Sequence[Tensor]
    token_weight: Tensor | None = None
    num_valid_tokens: int | Tensor | None = None


@dataclass
class _Microbatch:
    """What a rank holds of a microbatch between its passes; N are all columns' tokens.

    Attributes:
        arrives: the hidden states [n b, T, D], under way.
        call, labels, shard: of S, the labels [N] marked.
        own: statistics [k, N] of this rank's rows.
        kept: what S kept for T.
        share: of dE, [N, D], partial; None where T makes it.
        joined, grads: [k, N], of all rows, and what each receives.
        exchanged: when the two and the share's sum are there, on a GPU.
    """

    arrives: Pending
    call: Call = field(init=False)
    labels: Tensor = field(init=False)
    shard: Shard = field(init=False)
    own: Tensor = field(init=False)
    kept: object = None
    share: Tensor | None = None
    joined: Tensor = field(init=False)
    grads: Tensor = field(init=False)
    exchanged: torch.cuda.Event | None = None


def barriers_of(settings: LossSettings) -> int:
    """Return how many barriers the last stage's backward waits for: 1, or 2 where it must."""
    return 2 if settings.label_smoothing else 1


class LossPasses:
    """The loss over rows that the ranks of all stages hold; each rank makes one, all alike.

    Args:
        loss: of the schedule, bound to it; its ``output_weight`` is this rank's rows.
        last: the ranks that run the last stage.
        barriers: 1 or 2, see above; must be 2 where `barriers_of` says so.
    """

    def __init__(self, loss: CCEPipelineLoss, last: Owners, barriers: int) -> None:
        self._loss, self._last, self._barriers = loss, last, barriers
        # The tokens are gathered already. Nothing is known of the loss's gradient in S: as where a
        # result is returned beside it.
        self._settings = replace(loss.settings, hidden_layout="replicated", return_lse=True)
        self._held: dict[int, _Microbatch] = {}
        self._hidden: dict[int, Tensor] = {}  # of the last stage, until they are sent
        self._losses: dict[int, Tensor] = {}
        # With two barriers, what T made of dE; and its sums that are under way.
        self._shares: dict[int, Tensor] = {}
        self._sums: dict[int, Pending] = {}
        self._aside: torch.cuda.Stream | None = None

    def begin(self, step: LossInputs, like: Tensor, *, trains: bool) -> None:
        """Begin a step or an evaluation.

        Args:
            step: what it needs.
            like: of the shape and the dtype of the last stage's hidden states of one column.
            trains: whether a backward follows.
        """
        self._step, self._like, self._trains = step, like, trains
        self._settings = replace(self._settings, num_valid_tokens=step.num_valid_tokens)

    def deferred(self, hidden: Tensor, microbatch: int) -> Tensor:
        """Return the last stage's loss of a microbatch, whose value comes with its exchange.

        It is NaN until then. Its backward gives the hidden states the summed dE. The loss must
        receive 1, since the rows' gradients may be made before it receives anything: another
        number is a ValueError on a CPU, and makes the gradient NaN on a GPU.

        Args:
            hidden: [b, T, D] of this column.
            microbatch: counted from 0.
        """
        self._hidden[microbatch] = hidden.detach()
        loss = cast(Tensor, _DeferredLoss.apply(hidden, self, microbatch))
        self._losses[microbatch] = loss
        return loss

    @torch.no_grad()
    def broadcast(self, microbatch: int) -> None:
        """Send and receive a microbatch's hidden states; all ranks call."""
        own = self._hidden.pop(microbatch, None)
        self._held[microbatch] = _Microbatch(self._last.start_to_all(own, self._like))

    @torch.no_grad()
    def statistics(self, microbatch: int) -> None:
        """S: this rank's statistics, and with one barrier its share of dE."""
        held, rows = self._held[microbatch], self._loss.output_weight.read()
        labels, token_weight, _ = self._step
        operands = Operands.of(
            held.arrives.wait(), rows.weight, labels[microbatch], rows.bias, token_weight
        )
        held.call = call = prepare(operands, self._settings, rows.options, validate=False)
        held.labels = call.labels()
        targets = held.labels - call.rows.start
        held.shard = shard_of(
            call,
            operands.flat_hidden,
            operands.classifier,
            operands.bias,
            targets,
            needs_grad=self._trains,
        )
        if not self._trains or self._barriers == 2:
            held.own, held.kept = own_statistics(call, held.shard)
        elif call.bound.plan.backward == "recompute" and call.settings.impl != "reference":
            held.own, held.share = _by_chunks(call, held.shard)
        else:
            held.own, held.kept = own_statistics(call, held.shard)
            held.share = _local_share(call, held.shard, held.own, held.kept)

    @torch.no_grad()
    def exchange(self, microbatch: int) -> None:
        """Join the statistics, and with one barrier sum the shares of dE; all ranks call."""
        held = self._held[microbatch]
        with self._beside_layers(held):
            gathered = self._last.messages.gather.gather_shards(held.own)
            held.joined = join(gathered, held.call.bound.shard.columns)
            loss = token_losses(held.call, held.labels)
            held.grads = loss.total_gradient(held.joined, held.joined.new_ones(()))
            if self._last.here:
                self._losses[microbatch].data.copy_(loss.total_value(held.joined))
            if held.share is not None:
                share, held.share = held.share, None
                scale = share_of(held.own[0], held.joined[0]) * held.grads[0]
                share.mul_(scale.unsqueeze(1))
                _add_targets(held, share)
                if self._aside is not None:  # where it is made anew there, it is freed early
                    share.record_stream(self._aside)
                self._start_sum(microbatch, _summable(held, share))
        if not self._trains:
            self._begin_gradients(microbatch)

    @torch.no_grad()
    def gradients(self, microbatch: int) -> None:
        """T: add this rank's dC to the gradient of its rows; with two barriers also make dE."""
        held = self._begin_gradients(microbatch)
        call, shard = held.call, held.shard
        rows = self._loss.output_weight.read()
        weight, bias = cast(nn.Parameter, rows.weight), rows.bias
        wanted = Wanted(
            self._barriers == 2, weight.requires_grad, bias is not None and bias.requires_grad
        )
        target = classifier_grad(call, weight)
        if call.settings.accumulate_into is None and weight.grad is not None:
            target = ClassifierGrad(weight.grad.dtype, call.rows.tokens_alone(weight.grad))
        count = count_lines(shard.grad_columns)
        upstream = Upstream(held.joined[:count], held.grads[:count], wanted, target, held.kept)
        found = own_gradients(call, shard, upstream)
        if wanted.classifier and target.add_to is None:
            weight.grad = with_padding(found.classifier, weight)
        if wanted.bias and bias is not None:
            own = with_padding(found.bias, bias)
            bias.grad = own if bias.grad is None else bias.grad.add_(own)
        if wanted.hidden:
            share = torch.zeros_like(shard.hidden) if found.hidden is None else found.hidden
            self._shares[microbatch] = _summable(held, share)

    @torch.no_grad()
    def reduction(self, microbatch: int) -> None:
        """Sum what T made of dE at the last stage; all ranks call, with two barriers."""
        self._start_sum(microbatch, self._shares.pop(microbatch))

    def hidden_grad(self, microbatch: int) -> Tensor:
        """Return the summed dE of a microbatch's tokens of this column, once, on its last stage."""
        own = self._last.of_column(self._sums.pop(microbatch).wait())
        scale = self._settings.hidden_grad_scale
        return own if scale == 1.0 else own * scale

    def finish(self) -> None:
        """Wait for what is under way, and forget the step."""
        for summed in self._sums.values():
            summed.wait()
        for microbatch in list(self._held):
            self._begin_gradients(microbatch)
        for left in (self._sums, self._hidden, self._losses):
            left.clear()

    def _start_sum(self, microbatch: int, partial: Tensor) -> None:
        """Sum dE at the last stage; elsewhere its buffer stays until the next one's is begun."""
        if not self._last.here:
            for earlier in list(self._sums):
                self._sums.pop(earlier).wait()
        self._sums[microbatch] = self._last.start_sum(partial)

    @contextmanager
    def _beside_layers(self, held: _Microbatch) -> Iterator[None]:
        """Run on a stream of its own on a GPU: other ranks' S may end later than this one's.

        Waiting for them on the layers' stream would hold its layers back. What is read was made on
        the layers' stream, and is held until that one has waited for the event.
        """
        device = held.labels.device
        if device.type != "cuda":
            yield
            return
        layers = torch.cuda.current_stream(device)
        if self._aside is None:
            self._aside = torch.cuda.Stream(device)
        self._aside.wait_stream(layers)
        with torch.cuda.stream(self._aside):
            yield
            held.exchanged = self._aside.record_event()

    def _begin_gradients(self, microbatch: int) -> _Microbatch:
        """Take out a microbatch that is exchanged: what T reads, and what the loss reports.

        The layers' stream waits for what was made beside it, and uses it.
        """
        held = self._held.pop(microbatch)
        if held.exchanged is not None:
            layers = torch.cuda.current_stream(held.labels.device)
            layers.wait_event(held.exchanged)
            held.joined.record_stream(layers)
            held.grads.record_stream(layers)
        if self._settings.return_metrics:  # of all columns' tokens
            statistics = Statistics(held.joined, held.call.bound.shard.columns)
            self._loss.add_metrics(loss_metrics(statistics, held.labels))
        return held


def _summable(held: _Microbatch, share: Tensor) -> Tensor:
    """Return a share of dE [N, D] as it is summed, [n b, T, D]."""
    dtype = held.call.bound.shard.sum_dtype
    return share.to(dtype).contiguous().view(held.call.operands.hidden.shape)


def _add_targets(held: _Microbatch, share: Tensor) -> None:
    """Add the targets' own part of dE: their logits' gradient, in float32, times their rows."""
    rows = held.shard.classifier
    if rows.shape[0] == 0:
        return
    owned, chosen = owned_targets(held.shard.targets, rows.shape[0])
    (lse, at_target), (lse_grad, target_grad) = held.joined[:2], held.grads[:2]
    factor = lse_grad * torch.expm1(at_target - lse) + (lse_grad + target_grad)
    cap, temperature = held.shard.transform
    if cap is not None:  # d tanh = 1 - tanh^2
        factor = factor * (1.0 - (at_target * (temperature / cap)).square())
    factor = (factor / temperature).masked_fill(~owned, 0.0)
    share.addcmul_(rows[chosen].to(share.dtype), factor.unsqueeze(1))


def _by_chunks(call: Call, shard: Shard) -> tuple[Tensor, Tensor]:
    """Make statistics and share of some tokens at a time, for which the logits are made once.

    T makes them once more: four products, where S and T that know nothing of each other make five.
    """
    num_tokens = shard.hidden.shape[0]
    assert isinstance(call.bound.backend, TorchBackend)
    plan = call.bound.backend.plan_chunks(shard, num_tokens)
    in_chunks = call._replace(bound=call.bound._replace(plan=plan))
    own = shard.hidden.new_empty((count_lines(shard.columns), num_tokens), dtype=shard.dtype)
    share = torch.empty_like(shard.hidden, dtype=shard.dtype)
    for tokens in blocks(num_tokens, plan.span):
        part = part_of(shard, tokens)
        found, kept = own_statistics(in_chunks, part)
        own[:, tokens] = found
        share[tokens] = _local_share(in_chunks, part, found, kept)
    return own, share


def _local_share(call: Call, shard: Shard, own: Tensor, kept: object) -> Tensor:
    """Return this rank's share of dE [n, D] for its local softmax, without the targets' part.

    With nothing at the target: there p + d.target is 0.
    """
    own = own[: count_lines(shard.grad_columns)]
    local = torch.zeros_like(own)
    local[0] = 1.0
    local[1] = -share_of(own[1], own[0])
    nothing = ClassifierGrad(shard.classifier.dtype)
    upstream = Upstream(own, local, Wanted(True, False, False), nothing, kept)
    share = own_gradients(call, shard, upstream).hidden
    if share is None:
        share = torch.zeros_like(shard.hidden, dtype=own.dtype)
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
