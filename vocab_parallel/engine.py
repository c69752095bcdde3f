"""One call's work: its two halves, which a schedule can place by itself, and what joins them.

    S   this rank's statistics of a microbatch, and their exchange
    T   from the joined statistics and what they receive: dE, partial or summed, and dC

The names are those of arXiv 2411.05288. Who holds a microbatch between S and T holds its `Inputs`,
the joined statistics, and what S kept. Two thin autograd.Functions call S in forward and T in
backward: one returns the statistics, the other the loss that is made of them.

A long call (`plan.py`) does the local work of both a span of its tokens at a time. The statistics
are exchanged at once, and dE is reduced span by span.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vocab_parallel.arguments import Call
from vocab_parallel.backends.interface import ClassifierGrad, Gradients, Shard, Upstream, Wanted
from vocab_parallel.hidden_gradient import HiddenGradSum
from vocab_parallel.plan import blocks
from vocab_parallel.split_backward import first_derivative_only, wanted_inputs
from vocab_parallel.statistics import count_lines, join, of_no_rows
from vocab_parallel.token_loss import TokenLoss


class Inputs(NamedTuple):
    """What both halves read of a microbatch.

    Attributes:
        hidden: [N, D], of all the loss's tokens: gathered, where the layout gathers.
        classifier: [rows, D], this rank's.
        bias: [rows], or None.
        targets: [N] int32, rows of this shard, or outside of them.
        others, beside: what a distillation reads beside these; see `Shard`.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    targets: Tensor
    others: tuple[Tensor, ...] = ()
    beside: tuple[Tensor | None, ...] = ()

    def of(self, tokens: slice) -> "Inputs":
        """Return those of some tokens, views."""
        if tokens.stop - tokens.start == self.hidden.shape[0]:
            return self
        others = tuple(each[tokens] for each in self.others)
        return self._replace(
            hidden=self.hidden[tokens], targets=self.targets[tokens], others=others
        )


def vocab_statistics(
    call: Call,
    labels: Tensor,
    others: tuple[Tensor, ...] = (),
    beside: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """Return the statistics [k, N] of the whole vocabulary, differentiable; all ranks call.

    Args:
        call: of the loss or of a relative.
        labels: [N], as `Call.labels` returns them.
        others, beside: see `Inputs`; they get no gradient.
    """
    tensors = _tensors(call, labels)
    found = _VocabStatistics.apply(*tensors, call, len(others), *others, *beside)
    return cast(Tensor, found)


def scalar_loss(call: Call, labels: Tensor, loss: TokenLoss) -> tuple[Tensor, Tensor]:
    """Return the loss of all tokens, a number that is differentiable; all ranks call.

    The second of the pair are the statistics [k, N] that it is made of, without a gradient: no
    output of the Function, which has one alone.
    """
    made: list[Tensor] = []
    value = _VocabLoss.apply(*_tensors(call, labels), call, loss, made)
    return cast(Tensor, value), made[0]


def _tensors(call: Call, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    operands, start = call.operands, call.rows.start
    hidden = operands.hidden.reshape(-1, operands.hidden.shape[-1])
    return hidden, operands.classifier, operands.bias, labels - start if start else labels


# --- S ---


def gathered_hidden(call: Call, hidden: Tensor) -> Tensor:
    """Gather hidden states [T, D] over the group where the layout does; all ranks call."""
    return call.rows.group.gather_tokens(hidden) if call.bound.gathers else hidden


def own_statistics(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Tensor, object]:
    """S without the exchange: the statistics of this rank's rows, and what T is given back."""
    bound = call.bound
    shard = shard_of(call, inputs, needs_grad)
    if shard is None:
        num_tokens, columns = inputs.hidden.shape[0], bound.shard.columns
        return of_no_rows(columns, num_tokens, bound.shard.dtype, inputs.hidden), None
    return bound.backend.statistics(shard, bound.plan)


def joined_statistics(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Tensor, Sequence[Any]]:
    """S: the statistics [k, N] of the whole vocabulary; all ranks call, and each gets the same.

    The second of the pair is what T is given back. Communicates [k, N] float32 of each rank, once;
    where some statistics need others of the whole vocabulary, those apart.
    """
    values, kept = _exchanged(call, inputs, needs_grad)
    bound = call.bound
    if bound.later_columns:
        later = bound.shard._replace(columns=bound.later_columns)
        again = call._replace(bound=bound._replace(shard=later))
        inputs = inputs._replace(others=(*inputs.others, values.T))
        values = torch.cat((values, _exchanged(again, inputs, False)[0]))
    return values, kept


def _exchanged(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Tensor, Sequence[Any]]:
    spans = _spans(call, inputs)
    found = [own_statistics(call, inputs.of(tokens), needs_grad) for tokens in spans]
    own = found[0][0] if len(found) == 1 else torch.cat([values for values, _ in found], 1)
    kept = [each for _, each in found]
    if call.rows.group.degree == 1:
        return own, kept
    return join(call.rows.group.gather_shards(own), call.bound.shard.columns), kept


def _spans(call: Call, inputs: Inputs) -> Sequence[slice]:
    """Return which tokens the work is done of at a time: equal on all ranks."""
    num_tokens = inputs.hidden.shape[0]
    return blocks(num_tokens, max(call.bound.plan.span, 1)) or (slice(0, 0),)


# --- T ---


def own_gradients(call: Call, inputs: Inputs, upstream: Upstream) -> Gradients:
    """T without the reduction: dE is the partial sum over this rank's rows, or None.

    Its statistics are those that may receive a gradient, and no others.
    """
    shard = shard_of(call, inputs, needs_grad=True)
    if shard is None or not any(upstream.wanted):
        return Gradients(None, None, None)
    return call.bound.backend.gradients(shard, call.bound.plan, upstream)


def summed_gradients(
    call: Call,
    inputs: Inputs,
    statistics: Tensor,
    grads: Tensor,
    wanted: Wanted,
    kept: Sequence[Any],
) -> Gradients:
    """T: the wanted gradients, that of the hidden states [T, D] summed; all ranks call.

    Those of classifier and bias have all of this rank's rows, padding too, in the parameters'
    dtypes. That of the classifier is None where it was added to the accumulator that
    ``accumulate_into`` names. Communicates the sum of [N, D], beside the classifier's product.

    Args:
        call: of the loss.
        inputs: what S read.
        statistics, grads: [k, N], joined, and what each of them receives.
        wanted: the gradients to produce.
        kept: what S kept, of each span.
    """
    shard, spans = call.bound.shard, _spans(call, inputs)
    num_lines = count_lines(shard.grad_columns)
    statistics, grads = statistics[:num_lines], grads[:num_lines]
    target = into = classifier_grad(call, inputs.classifier)
    # Over spans what is narrower would be rounded with each of them.
    if len(spans) > 1 and (target.add_to is None or target.dtype != shard.dtype):
        into = ClassifierGrad(shard.dtype)
    adds_there = into is target
    total: _HiddenGrad | None = None
    if wanted.hidden:
        total = hidden_grad_sum(call, inputs.hidden)
    classifier = bias = None
    for tokens, kept_of_span in zip(spans, kept, strict=True):
        part, when_hidden = inputs.of(tokens), None
        own = statistics, grads
        if part is not inputs:
            own = statistics[:, tokens].contiguous(), grads[:, tokens].contiguous()
        if isinstance(total, HiddenGradSum):  # else it is only rounded, once all is done
            when_hidden = partial(total.add, tokens=tokens)
        found = own_gradients(call, part, Upstream(*own, wanted, into, kept_of_span, when_hidden))
        if total is not None:
            total.add(found.hidden, tokens)
            found = found._replace(hidden=None)  # it is rounded, or under way
        if found.classifier is not None:
            classifier = found.classifier
            into = ClassifierGrad(classifier.dtype, classifier)
        if found.bias is not None:
            bias = found.bias if bias is None else bias + found.bias
    if not adds_there:
        classifier = target.placed(classifier)
    hidden = None
    if total is not None:
        hidden, scale = total.total(), call.settings.hidden_grad_scale
        hidden = hidden if scale == 1.0 else hidden * scale
    in_place = target.add_to is not None
    return Gradients(
        hidden,
        with_padding(classifier, inputs.classifier) if wanted.classifier and not in_place else None,
        with_padding(bias, inputs.bias) if wanted.bias and inputs.bias is not None else None,
    )


class _OwnHiddenGrad:
    """Puts together the gradient [N, D] of the hidden states where nobody else adds to it."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._total: Tensor | None = None

    def add(self, partial: Tensor | None, tokens: slice) -> None:
        """Take some tokens' gradients [n, D]; None where this rank has no rows."""
        if self._total is None and tokens.stop == self._hidden.shape[0] and partial is not None:
            self._total = partial.to(self._hidden.dtype)
            return
        if self._total is None:
            self._total = torch.zeros_like(self._hidden, memory_format=torch.contiguous_format)
        if partial is not None:
            self._total[tokens] = partial

    def total(self) -> Tensor:
        """Return the gradient [N, D] in hidden's dtype."""
        assert self._total is not None
        return self._total


_HiddenGrad = HiddenGradSum | _OwnHiddenGrad


def hidden_grad_sum(call: Call, hidden: Tensor) -> _HiddenGrad:
    """Return what sums the gradient of the hidden states [N, D] over the group, where it is."""
    if not call.bound.sums_hidden_grad:
        return _OwnHiddenGrad(hidden)
    group, dtype = call.rows.group, call.bound.shard.sum_dtype
    return HiddenGradSum(hidden, group, scatters=call.bound.gathers, dtype=dtype)


def classifier_grad(call: Call, classifier: Tensor) -> ClassifierGrad:
    """Return where the gradient of the rows that are tokens goes.

    The accumulator is read now, in backward: an optimizer may have freed and replaced it since.
    """
    attribute = call.settings.accumulate_into
    if attribute is None:
        return ClassifierGrad(classifier.dtype)
    accumulated: Tensor | None = getattr(call.operands.classifier, attribute, None)
    if accumulated is None and attribute == "main_grad":
        raise RuntimeError("the classifier's main_grad was removed between forward and backward")
    if accumulated is None:  # autograd makes .grad
        return ClassifierGrad(classifier.dtype)
    return ClassifierGrad(accumulated.dtype, accumulated[: call.rows.num_token_rows])


def with_padding(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient of all rows: padding rows, and those of an idle rank, get zeros."""
    if grad is not None and grad.shape == parameter.shape:
        return grad.to(parameter.dtype)
    full = torch.zeros_like(parameter)
    if grad is not None:
        full[: grad.shape[0]] = grad
    return full


def shard_of(call: Call, inputs: Inputs, needs_grad: bool) -> Shard | None:
    """Return what the backend works on, or None where there is nothing to do."""
    shard = call.bound.shard
    num_rows, bias = shard.classifier.shape[0], inputs.bias
    if num_rows == 0 or inputs.hidden.shape[0] == 0:
        return None
    return shard._replace(
        hidden=inputs.hidden.detach(),
        classifier=inputs.classifier.detach()[:num_rows],
        # Kernels read it without a stride.
        bias=None if bias is None else bias.detach()[:num_rows].contiguous(),
        targets=inputs.targets,
        others=inputs.others,
        beside=inputs.beside,
        needs_grad=needs_grad,
    )


# --- autograd ---


class _VocabStatistics(torch.autograd.Function):
    """S in forward, T in backward.

    It has one output on purpose: a zero-bubble schedule of torch 2.11 and older adds up the
    gradients of a Function's outputs before it asks for the weights' half.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        call: Call,
        count: int,  # of the first of the rest, which are of tokens
        *rest: Any,
    ) -> Tensor:  # (k, N)
        hidden = gathered_hidden(call, hidden)
        inputs = Inputs(hidden, classifier, bias, targets, rest[:count], rest[count:])
        needs_grad = call.bound.records and any(ctx.needs_input_grad[:3])
        statistics, ctx.kept = joined_statistics(call, inputs, needs_grad)
        ctx.save_for_backward(statistics, *inputs[:4], *rest)
        ctx.call, ctx.count = call.without_tokens(), count
        return statistics

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        statistics, *tensors = ctx.saved_tensors
        hidden, classifier, bias, targets, *more = tensors
        rest, count = tuple(more), ctx.count
        inputs = Inputs(hidden, classifier, bias, targets, rest[:count], rest[count:])
        wanted = Wanted(*wanted_inputs(ctx, (True, True, inputs.bias is not None)))
        found = summed_gradients(ctx.call, inputs, statistics, grads.contiguous(), wanted, ctx.kept)
        return (*found, None, None, None, *(None for _ in rest))


class _VocabLoss(torch.autograd.Function):
    """S and the loss in forward, T in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        call: Call,
        loss: TokenLoss,
        made: list[Tensor],  # what it is made of is added to it
    ) -> Tensor:
        inputs = Inputs(gathered_hidden(call, hidden), classifier, bias, targets)
        needs_grad = call.bound.records and any(ctx.needs_input_grad[:3])
        statistics, ctx.kept = joined_statistics(call, inputs, needs_grad)
        made.append(statistics)
        ctx.save_for_backward(statistics, *inputs[:4])
        ctx.call, ctx.loss = call.without_tokens(), loss
        return loss.total_value(statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        statistics, *tensors = ctx.saved_tensors
        hidden, classifier, bias, targets = tensors
        inputs = Inputs(hidden, classifier, bias, targets)
        grads = ctx.loss.total_gradient(statistics, grad)
        wanted = Wanted(*wanted_inputs(ctx, (True, True, inputs.bias is not None)))
        found = summed_gradients(ctx.call, inputs, statistics, grads, wanted, ctx.kept)
        return (*found, None, None, None, None)
