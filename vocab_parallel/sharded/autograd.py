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
    """Return the loss of all tokens, a number that is differentiable; all ranks call.

    The second of the pair are the statistics [k, N] that it is made of, without a gradient: no
    output of the Function, which has one alone.
    """
    made: list[Statistics] = []
    value = _VocabLoss.apply(*_tensors(call, labels), call, loss, made)
    return cast(Tensor, value), made[0]


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
    """S and the loss in forward, T in backward; or all in forward, and backward multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        call: Call,
        loss: TokenLoss,
        made: list[Statistics],  # what it is made of is added to it
    ) -> Tensor:
        inputs = Inputs(gathered_hidden(call, hidden), classifier, bias, targets)
        wanted = Wanted(*(need and call.records for need in ctx.needs_input_grad[:3]))
        ctx.gradients, ctx.kept = None, None
        if call.plan.backward == "gradients":
            work = LossWithGradients(call, inputs, wanted, loss)
            value, statistics = work.run(), work.statistics
            ctx.gradients = work.gradients()
        else:
            statistics, ctx.kept = joined_statistics(call, inputs, any(wanted))
            value = loss.total_value(statistics.values)
        made.append(statistics)
        ctx.save_for_backward(*inputs, statistics.values)
        ctx.call, ctx.loss = call.without_tokens(), loss
        return value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, values = ctx.saved_tensors
        inputs, call = Inputs(*tensors), ctx.call
        wanted = _wanted(ctx, inputs)
        handed_out = _hand_out(ctx, wanted)
        if handed_out is not None:
            found = Gradients(
                *(None if one is None else call.shard.ops.scale_(one, grad) for one in handed_out)
            )
            return (*_accumulated(call, inputs, found), None, None, None, None)
        names = call.shard.names
        statistics = Statistics(values, names)
        upstream = Statistics(ctx.loss.total_gradient(values, grad), names)
        found = summed_gradients(call, inputs, statistics, upstream, wanted, ctx.kept)
        return (*found, None, None, None, None)


def _hand_out(ctx: Any, wanted: Wanted) -> Gradients | None:
    """Return the wanted ones of the gradients that forward made; None where one is not there.

    Each is handed out once: it may belong to a parameter afterwards. A graph that is run again
    makes them again.
    """
    made: Gradients | None = ctx.gradients
    if made is None:
        return None
    pairs = list(zip(made, wanted, strict=True))
    if any(want and gradient is None for gradient, want in pairs):
        return None
    ctx.gradients = Gradients(*(None if want else gradient for gradient, want in pairs))
    return Gradients(*(gradient if want else None for gradient, want in pairs))


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
