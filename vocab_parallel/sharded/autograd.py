"""The thin autograd.Functions over the two halves."""

from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel.local.interface import Gradients, Wanted
from vocab_parallel.local.statistics import Statistics
from vocab_parallel.sharded.backward import first_derivative_only, wanted_inputs
from vocab_parallel.sharded.call import Call
from vocab_parallel.sharded.gradients_in_forward import LossWithGradients
from vocab_parallel.sharded.halves import (
    Inputs,
    classifier_grad,
    gathered_hidden,
    joined_statistics,
    summed_gradients,
    with_padding,
)
from vocab_parallel.sharded.token_loss import TokenLoss


def vocab_statistics(call: Call, labels: Tensor) -> Statistics:
    """Return the statistics [k, N] of the whole vocabulary, differentiable; all ranks call."""
    values = _VocabStatistics.apply(*_tensors(call, labels), call)
    return Statistics(cast(Tensor, values), call.shard.names)


def scalar_loss(call: Call, labels: Tensor, loss: TokenLoss) -> tuple[Tensor, Statistics]:
    """Return the loss of all tokens, its gradients computed already; all ranks call.

    The second of the pair are the statistics [k, N] that it is made of, without a gradient: no
    output of the Function, which has one alone.
    """
    statistics = Statistics.empty(call.shard.names, labels.shape[0], call.operands.hidden)
    value = _VocabLoss.apply(*_tensors(call, labels), call, loss, statistics)
    return cast(Tensor, value), statistics


def _tensors(call: Call, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    operands = call.operands
    targets = call.rows.local_targets(labels)
    return operands.flat_hidden, operands.classifier, operands.bias, targets


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
    ) -> Tensor:  # (k, N)
        inputs = Inputs(gathered_hidden(call, hidden), classifier, bias, targets)
        needs_grad = call.records and any(ctx.needs_input_grad[:3])
        statistics, ctx.kept = joined_statistics(call, inputs, needs_grad)
        ctx.save_for_backward(*inputs, statistics.values)
        ctx.call = call.without_tokens()
        return statistics.values

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, statistics = ctx.saved_tensors
        inputs, call = Inputs(*tensors), ctx.call
        names = call.shard.names
        found = summed_gradients(
            call,
            inputs,
            Statistics(statistics, names),
            Statistics(grads.contiguous(), names),
            _wanted(ctx, inputs),
            ctx.kept,
        )
        return (*found, None, None)


class _VocabLoss(torch.autograd.Function):
    """S and T in forward; backward multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        call: Call,
        loss: TokenLoss,
        statistics: Statistics,
    ) -> Tensor:
        inputs = Inputs(gathered_hidden(call, hidden), classifier, bias, targets)
        wanted = Wanted(*(need and call.records for need in ctx.needs_input_grad[:3]))
        work = LossWithGradients(call, inputs, wanted, loss, statistics)
        value = work.run()
        ctx.gradients = work.gradients()
        ctx.save_for_backward(*inputs, statistics.values)
        ctx.call, ctx.loss = call.without_tokens(), loss
        return value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, values = ctx.saved_tensors
        inputs, call = Inputs(*tensors), ctx.call
        wanted = _wanted(ctx, inputs)
        made: Gradients = ctx.gradients
        if all(gradient is not None for gradient, want in zip(made, wanted, strict=True) if want):
            # Each is handed out once: it may belong to a parameter afterwards.
            ctx.gradients = Gradients(
                *(None if want else gradient for gradient, want in zip(made, wanted, strict=True))
            )
            found = Gradients(
                *(
                    call.shard.ops.scale_(gradient, grad) if want else None
                    for gradient, want in zip(made, wanted, strict=True)
                )
            )
            return (*_accumulated(call, inputs, found), None, None, None, None)
        # A graph that is run again makes them again.
        statistics = Statistics(values, call.shard.names)
        _, grads = ctx.loss.part(values, slice(0, inputs.hidden.shape[0]))
        upstream = Statistics(grads * grad, statistics.names)
        found = summed_gradients(call, inputs, statistics, upstream, wanted)
        return (*found, None, None, None, None)


def _accumulated(call: Call, inputs: Inputs, found: Gradients) -> Gradients:
    """Add the rows' gradient to the accumulator that ``accumulate_into`` names, if any."""
    if found.classifier is None:
        return found
    target = classifier_grad(call, inputs.classifier).add_to
    if target is None:
        return found._replace(classifier=with_padding(found.classifier, inputs.classifier))
    target.add_(found.classifier[: target.shape[0]])  # padding rows get nothing
    return found._replace(classifier=None)


def _wanted(ctx: Any, inputs: Inputs) -> Wanted:
    return Wanted(*wanted_inputs(ctx, (True, True, inputs.bias is not None)))
