"""One call's work: its two halves, which a schedule can place by itself, and what joins them.

    S   this rank's statistics of a microbatch, and their exchange
    T   from the joined statistics and what they receive: dE, partial or summed, and dC

The names are those of arXiv 2411.05288. Who holds a microbatch between S and T holds its `Shard`,
the joined statistics, and what S kept. One thin autograd.Function calls S in forward and T in
backward; it returns the statistics, or the loss that is made of them.

One call each way is all that the loss communicates: the statistics are gathered once, and the sum
of dE is started as soon as it is complete, beside the classifier's product. A long call (`plan.py`)
does the local work of both a span of its tokens at a time: the statistics are exchanged at once,
and dE is summed span by span, beside the next span's products.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel.arguments import Call
from vocab_parallel.backends.interface import ClassifierGrad, Gradients, Shard, Upstream, Wanted
from vocab_parallel.collectives import Pending
from vocab_parallel.plan import blocks
from vocab_parallel.split_backward import first_derivative_only, wanted_inputs
from vocab_parallel.statistics import count_lines, join, of_no_rows
from vocab_parallel.token_loss import TokenLoss


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
        others, beside: see `Shard`; they get no gradient.
    """
    return _apply(call, labels, None, [], others, beside)


def scalar_loss(call: Call, labels: Tensor, loss: TokenLoss) -> tuple[Tensor, Tensor]:
    """Return the loss of all tokens, a number that is differentiable; all ranks call.

    The second of the pair are the statistics [k, N] that it is made of, without a gradient: no
    output of the Function, which has one alone.
    """
    made: list[Tensor] = []
    return _apply(call, labels, loss, made), made[0]


def _apply(
    call: Call,
    labels: Tensor,
    loss: TokenLoss | None,
    made: list[Tensor],
    others: tuple[Tensor, ...] = (),
    beside: tuple[Tensor | None, ...] = (),
) -> Tensor:
    operands, start = call.operands, call.rows.start
    hidden = operands.hidden.reshape(-1, operands.hidden.shape[-1])
    targets = labels - start if start else labels
    tensors = hidden, operands.classifier, operands.bias, targets
    found = _VocabLoss.apply(*tensors, call, loss, made, len(others), *others, *beside)
    return cast(Tensor, found)


# --- S ---


def gathered_hidden(call: Call, hidden: Tensor) -> Tensor:
    """Gather hidden states [T, D] over the group where the layout does; all ranks call."""
    return call.rows.group.gather_tokens(hidden) if call.bound.gathers else hidden


def shard_of(
    call: Call,
    hidden: Tensor,  # (N, D), of all the loss's tokens: gathered, where the layout gathers
    classifier: Tensor,  # (rows, D), this rank's
    bias: Tensor | None,  # (rows,)
    targets: Tensor,  # (N,) int32, rows of this shard, or outside of them
    others: tuple[Tensor, ...] = (),
    beside: tuple[Tensor | None, ...] = (),
    *,
    needs_grad: bool = True,
) -> Shard:
    """Return what both halves read of a microbatch, without padding: it may have no row."""
    num_rows = call.bound.shard.classifier.shape[0]
    return call.bound.shard._replace(
        hidden=hidden.detach(),
        classifier=classifier.detach()[:num_rows],
        # Kernels read it without a stride.
        bias=None if bias is None else bias.detach()[:num_rows].contiguous(),
        targets=targets,
        others=others,
        beside=beside,
        needs_grad=needs_grad,
    )


def part_of(shard: Shard, tokens: slice) -> Shard:
    """Return the shard of some of its tokens, views."""
    if tokens.stop - tokens.start == shard.hidden.shape[0]:
        return shard
    others = tuple(each[tokens] for each in shard.others)
    return shard._replace(hidden=shard.hidden[tokens], targets=shard.targets[tokens], others=others)


def own_statistics(call: Call, shard: Shard) -> tuple[Tensor, object]:
    """S without the exchange: the statistics of this rank's rows, and what T is given back."""
    num_tokens = shard.hidden.shape[0]
    if 0 in (shard.classifier.shape[0], num_tokens):
        return of_no_rows(shard.columns, num_tokens, shard.dtype, shard.hidden), None
    return call.bound.backend.statistics(shard, call.bound.plan)


def joined_statistics(call: Call, shard: Shard) -> tuple[Tensor, Sequence[Any]]:
    """S: the statistics [k, N] of the whole vocabulary; all ranks call, and each gets the same.

    The second of the pair is what T is given back. Communicates [k, N] float32 of each rank, once;
    where some statistics need others of the whole vocabulary, those apart.
    """
    bound, group = call.bound, call.rows.group
    found = [own_statistics(call, part_of(shard, tokens)) for tokens in _spans(call, shard)]
    own = found[0][0] if len(found) == 1 else torch.cat([values for values, _ in found], 1)
    values = own if group.degree == 1 else join(group.gather_shards(own), shard.columns)
    if bound.later_columns:
        again = call._replace(bound=bound._replace(later_columns=()))
        others = (*shard.others, values.T)
        later = shard._replace(columns=bound.later_columns, others=others, needs_grad=False)
        values = torch.cat((values, joined_statistics(again, later)[0]))
    return values, [kept for _, kept in found]


def _spans(call: Call, shard: Shard) -> Sequence[slice]:
    """Return which tokens the work is done of at a time: equal on all ranks."""
    num_tokens = shard.hidden.shape[0]
    return blocks(num_tokens, max(call.bound.plan.span, 1)) or (slice(0, 0),)


# --- T ---


def own_gradients(call: Call, shard: Shard, upstream: Upstream) -> Gradients:
    """T without the reduction: dE is the partial sum over this rank's rows, or None.

    Its statistics are those that may receive a gradient, and no others.
    """
    if 0 in (shard.classifier.shape[0], shard.hidden.shape[0]) or not any(upstream.wanted):
        return Gradients(None, None, None)
    return call.bound.backend.gradients(shard, call.bound.plan, upstream)


def summed_gradients(
    call: Call,
    shard: Shard,
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
        shard: what S read.
        statistics, grads: [k, N], joined, and what each of them receives.
        wanted: the gradients to produce.
        kept: what S kept, of each span.
    """
    operands, spans = call.operands, _spans(call, shard)
    num_lines = count_lines(shard.grad_columns)
    statistics, grads = statistics[:num_lines], grads[:num_lines]
    target = into = classifier_grad(call, operands.classifier)
    # Over spans what is narrower would be rounded with each of them.
    spanned = len(spans) > 1 and (target.add_to is None or target.dtype != shard.dtype)
    if spanned:
        into = ClassifierGrad(shard.dtype)
    total = _HiddenGradSum(call, shard.hidden) if wanted.hidden else None
    classifier = bias = None
    for tokens, kept_of_span in zip(spans, kept, strict=True):
        part, when_hidden = part_of(shard, tokens), None
        own = statistics, grads
        if part is not shard:
            own = statistics[:, tokens].contiguous(), grads[:, tokens].contiguous()
        if total is not None and call.bound.sums_hidden_grad:  # else it is only rounded
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
    if spanned:
        classifier = target.placed(classifier)
    hidden = None
    if total is not None:
        hidden, scale = total.total(), call.settings.hidden_grad_scale
        hidden = hidden if scale == 1.0 else hidden * scale
    own_grad = wanted.classifier and target.add_to is None
    return Gradients(
        hidden,
        with_padding(classifier, operands.classifier) if own_grad else None,
        with_padding(bias, operands.bias) if wanted.bias and operands.bias is not None else None,
    )


class _HiddenGradSum:
    """Sums the shards' partial gradients of the hidden states over the group, where it is summed.

    Every rank adds the same tokens in the same order, all at once or a span at a time. Where every
    rank wants all tokens, each sums its share of them, and the sums are gathered in the dtype that
    is wanted: as an all-reduce does it, with fewer bytes. What is not rounded after its sum, or
    does not divide, is all-reduced. Where each wants its own tokens, all are reduce-scattered; a
    span is summed at the ranks that have its tokens.

    Args:
        call: of the loss.
        hidden: [N, D], of all tokens; the result has its dtype.
    """

    def __init__(self, call: Call, hidden: Tensor) -> None:
        self._hidden, self._group = hidden, call.rows.group
        self._sums, self._scatters = call.bound.sums_hidden_grad, call.bound.gathers
        self._dtype = call.bound.shard.sum_dtype
        self._length = hidden.shape[0] // (self._group.degree if self._scatters else 1)
        self._first = self._group.rank * self._length if self._scatters else 0
        self._total: Tensor | None = None
        # Where a part begins, its sum, and whether that is this rank's share of it.
        self._under_way: list[tuple[int, Pending, bool]] = []
        self._added = -1  # where the tokens end that were added

    def add(self, partial: Tensor | None, tokens: slice) -> None:
        """Start the sum of some tokens' partial gradients, unless they were added already.

        Args:
            partial: [n, D], which may be overwritten; None where this rank has none.
            tokens: which they are.
        """
        if tokens.stop <= self._added:
            return
        self._added = tokens.stop
        count, degree = tokens.stop - tokens.start, self._group.degree
        if partial is None:
            partial = self._hidden.new_zeros((count, self._hidden.shape[1]), dtype=self._dtype)
        partial = partial.to(self._dtype)
        if not self._sums:
            self._put(partial, tokens.start)
            return
        self._finish()  # so that one part is under way at a time
        if not self._scatters:
            rounds = self._hidden.element_size() < self._dtype.itemsize
            shares = rounds and count > 0 and count % degree == 0
            start = self._group.start_scatter_sum if shares else self._group.start_sum
            self._under_way.append((tokens.start, start(partial), shares))
        elif count == self._hidden.shape[0]:
            self._under_way.append((self._first, self._group.start_scatter_sum(partial), False))
        else:
            owners = range(tokens.start // self._length, -(-tokens.stop // self._length))
            edges = [tokens.start, *(rank * self._length for rank in owners[1:]), tokens.stop]
            for owner, (start_at, stop) in zip(owners, pairwise(edges), strict=True):
                part = partial[start_at - tokens.start : stop - tokens.start]
                self._under_way.append((start_at, self._group.start_sum_at(part, owner), False))

    def total(self) -> Tensor:
        """Return the summed gradient [N, D], or of this rank's own tokens, in hidden's dtype."""
        if self._under_way:
            self._finish()
        assert self._total is not None, "every token is added before the total is asked for"
        return self._total

    def _finish(self) -> None:
        """Wait for what is under way, and put what is wanted of it in its place."""
        for start, pending, shared in self._under_way:
            found = pending.wait().to(self._hidden.dtype)
            self._put(self._group.gather_tokens(found) if shared else found, start)
        self._under_way.clear()

    def _put(self, found: Tensor, start: int) -> None:
        """Put the sum [n, D] of tokens in its place, unless they are another rank's."""
        start -= self._first
        whole = start == 0 and found.shape[0] == self._length
        if whole and found.nbytes == found.untyped_storage().nbytes():  # else it holds a span's
            self._total = found
            return
        if self._total is None:
            self._total = self._hidden.new_empty((self._length, self._hidden.shape[1]))
        if 0 <= start < self._length:
            self._total[start : start + found.shape[0]] = found


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


# --- autograd ---


class _VocabLoss(torch.autograd.Function):
    """S, and the loss where there is one, in forward; T in backward.

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
        loss: TokenLoss | None,  # None: the statistics (k, N) are the output
        made: list[Tensor],  # the statistics are added to it where they are not
        count: int,  # of the first of the rest, which are of tokens
        *rest: Any,
    ) -> Tensor:
        tensors = gathered_hidden(call, hidden), classifier, bias, targets
        needs_grad = call.bound.records and any(ctx.needs_input_grad[:3])
        shard = shard_of(call, *tensors, rest[:count], rest[count:], needs_grad=needs_grad)
        statistics, ctx.kept = joined_statistics(call, shard)
        ctx.save_for_backward(statistics, *tensors, *rest)
        ctx.call, ctx.loss, ctx.count = call.without_tokens(), loss, count
        if loss is None:
            return statistics
        made.append(statistics)
        return loss.total_value(statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        statistics, hidden, classifier, bias, targets, *rest = ctx.saved_tensors
        others, beside = tuple(rest[: ctx.count]), tuple(rest[ctx.count :])
        shard = shard_of(ctx.call, hidden, classifier, bias, targets, others, beside)
        loss = ctx.loss
        grads = grad.contiguous() if loss is None else loss.total_gradient(statistics, grad)
        wanted = Wanted(*wanted_inputs(ctx, (True, True, bias is not None)))
        found = summed_gradients(ctx.call, shard, statistics, grads, wanted, ctx.kept)
        return (*found, *[None] * (5 + len(rest)))
