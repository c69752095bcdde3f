"""The loss's two halves, without autograd: what a schedule can place by itself.

    S   this rank's statistics of a microbatch, and their exchange
    T   from the joined statistics and what they receive: dE, partial or summed, and dC

The names are those of arXiv 2411.05288. Who holds a microbatch between S and T holds its `Inputs`,
the joined statistics, and what S kept.

A long call (`local/backward_plan.py`) does the local work of both a span of its tokens at a time.
The statistics are exchanged at once, and dE is reduced span by span.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.local.backward_plan import blocks
from vocab_parallel.local.interface import (
    ClassifierGrad,
    Gradients,
    Shard,
    Upstream,
    Wanted,
)
from vocab_parallel.local.statistics import Statistics, join
from vocab_parallel.sharded.call import Call
from vocab_parallel.sharded.exchange import HiddenGradSum


class Inputs(NamedTuple):
    """What both halves read of a microbatch.

    Attributes:
        hidden: [N, D], of all the loss's tokens: gathered, where the layout gathers.
        classifier: [rows, D], this rank's.
        bias: [rows], or None.
        targets: [N] int32, rows of this shard, or outside of them.
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    targets: Tensor

    def of(self, tokens: slice) -> "Inputs":
        """Return those of some tokens, views."""
        return self._replace(hidden=self.hidden[tokens], targets=self.targets[tokens])


class RowSums:
    """Adds up the gradients of this rank's rows over parts of the tokens, by their products.

    Attributes:
        classifier: [R, D], the sum so far, or None.
        bias: [R], or None.
    """

    def __init__(self, target: ClassifierGrad) -> None:
        self._target = target
        self.classifier: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def target(self) -> ClassifierGrad:
        """Where the classifier's gradient of the next part goes."""
        if self.classifier is None:
            return self._target
        return ClassifierGrad(self.classifier.dtype, self.classifier)

    def add(self, found: Gradients) -> None:
        """Take what a part gave; that of the classifier is in its place already."""
        if found.classifier is not None:
            self.classifier = found.classifier
        if found.bias is not None:
            self.bias = found.bias if self.bias is None else self.bias + found.bias


def gathered_hidden(call: Call, hidden: Tensor) -> Tensor:
    """Gather hidden states [T, D] over the group where the layout does; all ranks call."""
    return call.rows.group.gather_tokens(hidden) if call.layout.gathers else hidden


def own_statistics(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Statistics, object]:
    """S without the exchange: the statistics of this rank's rows, and what T is given back."""
    shard = shard_of(call, inputs, needs_grad)
    if shard is None:
        num_tokens, names = inputs.hidden.shape[0], call.shard.names
        return Statistics.of_no_rows(names, num_tokens, inputs.hidden), None
    return call.impl.forward(shard, call.plan)


def joined_statistics(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Statistics, object]:
    """S: the statistics of the whole vocabulary; all ranks call, and each gets the same.

    Communicates [k, N] float32 of each rank, once.
    """
    names = call.shard.names
    find = _statistics_of_spans if is_long(call, inputs) else own_statistics
    own, kept = find(call, inputs, needs_grad)
    gathered = call.rows.group.gather_shards(own.values)
    return Statistics(join(gathered, names), names), kept


def is_long(call: Call, inputs: Inputs) -> bool:
    """Tell whether a call takes its tokens a span at a time; equal on all ranks."""
    return call.plan.span < inputs.hidden.shape[0]


def _statistics_of_spans(call: Call, inputs: Inputs, needs_grad: bool) -> tuple[Statistics, object]:
    """Return this rank's statistics, and what T of each span is given back."""
    num_tokens = inputs.hidden.shape[0]
    own = Statistics.empty(call.shard.names, num_tokens, inputs.hidden)
    kept = []
    for tokens in blocks(num_tokens, call.plan.span):
        found, kept_of_span = own_statistics(call, inputs.of(tokens), needs_grad)
        own.values[:, tokens] = found.values
        kept.append(kept_of_span)
    return own, kept


def own_gradients(call: Call, inputs: Inputs, upstream: Upstream) -> Gradients:
    """T without the reduction: dE is the partial sum over this rank's rows, or None.

    Its statistics are those that may receive a gradient, and no others.
    """
    shard = shard_of(call, inputs, needs_grad=True)
    if shard is None or not any(upstream.wanted):
        return Gradients(None, None, None)
    assert upstream.statistics.names == upstream.grads.names == shard.grad_names
    return call.impl.backward(shard._replace(names=shard.grad_names), call.plan, upstream)


def summed_gradients(
    call: Call,
    inputs: Inputs,
    statistics: Statistics,
    grads: Statistics,
    wanted: Wanted,
    kept: object = None,
) -> Gradients:
    """T: the wanted gradients, that of the hidden states [T, D] summed; all ranks call.

    Those of classifier and bias have all of this rank's rows, padding too, in the parameters'
    dtypes. That of the classifier is None where it was added to the accumulator that
    ``accumulate_into`` names. Communicates the sum of [N, D], beside the classifier's product.
    """
    target = classifier_grad(call, inputs.classifier)
    names = call.shard.grad_names
    upstream = Upstream(statistics.first(names), grads.first(names), wanted, target, kept)
    reduction = hidden_grad_sum(call, inputs.hidden) if wanted.hidden else None
    if is_long(call, inputs):
        found = _gradients_of_spans(call, inputs, upstream, reduction)
    else:
        found = _gradients_of(call, inputs, upstream, slice(0, inputs.hidden.shape[0]), reduction)
    if reduction is not None:
        found = found._replace(hidden=total_hidden_grad(call, reduction))
    added = target.add_to is not None
    return of_all_rows(found, inputs, wanted._replace(classifier=wanted.classifier and not added))


def _gradients_of(
    call: Call,
    inputs: Inputs,
    upstream: Upstream,
    tokens: slice,
    reduction: HiddenGradSum | None,
) -> Gradients:
    """Return some tokens' gradients of rows and bias; that of the hidden states goes to its sum.

    Args:
        call: of the loss.
        inputs, upstream: of these tokens.
        tokens: which they are, of all.
        reduction: sums the hidden states' gradient; None where it is not wanted.
    """
    if reduction is not None and call.sums_hidden_grad:  # else it is only rounded, once all is done
        upstream = replace(upstream, when_hidden=partial(reduction.add, tokens=tokens))
    found = own_gradients(call, inputs, upstream)
    if reduction is not None:
        reduction.add(found.hidden, tokens)
    return found._replace(hidden=None)


def _gradients_of_spans(
    call: Call, inputs: Inputs, upstream: Upstream, reduction: HiddenGradSum | None
) -> Gradients:
    """Return the same of all tokens, taken a span at a time."""
    target, wide = upstream.classifier_grad, upstream.statistics.values.dtype
    # What is narrower would be rounded with each span.
    adds_there = target.add_to is not None and target.dtype == wide
    row_sums = RowSums(target if adds_there else ClassifierGrad(wide))
    spans = list(blocks(inputs.hidden.shape[0], call.plan.span))
    kept: Sequence[object] = upstream.kept or [None] * len(spans)
    for tokens, kept_of_span in zip(spans, kept, strict=True):
        own = Upstream(
            _of_span(upstream.statistics, tokens),
            _of_span(upstream.grads, tokens),
            upstream.wanted,
            row_sums.target,
            kept_of_span,
        )
        row_sums.add(_gradients_of(call, inputs.of(tokens), own, tokens, reduction))
    classifier = row_sums.classifier
    if target.add_to is not None and not adds_there:
        classifier = target.placed(classifier)
    return Gradients(None, classifier, row_sums.bias)


def _of_span(statistics: Statistics, tokens: slice) -> Statistics:
    return Statistics(statistics.values[:, tokens].contiguous(), statistics.names)


def hidden_grad_sum(call: Call, hidden: Tensor) -> HiddenGradSum:
    """Return what sums the gradient of the hidden states [N, D] over the group."""
    return HiddenGradSum(
        hidden,
        call.rows.group if call.sums_hidden_grad else VocabGroup(),
        scatters=call.layout.gathers,
        dtype=call.shard.sum_dtype if call.sums_hidden_grad else hidden.dtype,
    )


def total_hidden_grad(call: Call, reduction: HiddenGradSum) -> Tensor:
    """Return this rank's summed gradient [T, D] of the hidden states."""
    total, scale = reduction.total(), call.settings.hidden_grad_scale
    return total if scale == 1.0 else total * scale


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


def of_all_rows(found: Gradients, inputs: Inputs, wanted: Wanted) -> Gradients:
    """Return the wanted gradients of classifier and bias with those of padding rows."""
    classifier = with_padding(found.classifier, inputs.classifier) if wanted.classifier else None
    bias = None
    if wanted.bias and inputs.bias is not None:
        bias = with_padding(found.bias, inputs.bias)
    return Gradients(found.hidden, classifier, bias)


def with_padding(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient of all rows: padding rows, and those of an idle rank, get zeros."""
    if grad is not None and grad.shape == parameter.shape:
        return grad.to(parameter.dtype)
    full = torch.zeros_like(parameter)
    if grad is not None:
        full[: grad.shape[0]] = grad
    return full


def shard_of(call: Call, inputs: Inputs, needs_grad: bool) -> Shard | None:
    """Return what the implementation works on, or None where there is nothing to do."""
    if call.shard.num_rows == 0 or inputs.hidden.shape[0] == 0:
        return None
    bias = inputs.bias
    return call.shard._replace(
        hidden=inputs.hidden.detach(),
        classifier=call.rows.tokens_alone(inputs.classifier.detach()),
        # Kernels read it without a stride.
        bias=None if bias is None else call.rows.tokens_alone(bias.detach()).contiguous(),
        targets=inputs.targets,
        needs_grad=needs_grad,
    )
