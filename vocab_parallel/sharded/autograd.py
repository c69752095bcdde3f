"""The thin autograd.Functions over the two halves."""

from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel.local.interface import Wanted
from vocab_parallel.local.statistics import Statistics
from vocab_parallel.sharded.backward import first_derivative_only, wanted_inputs
from vocab_parallel.sharded.call import Call
from vocab_parallel.sharded.halves import (
    Inputs,
    gathered_hidden,
    joined_statistics,
    summed_gradients,
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
        made: list[Statistics],  # what it is made of is added to it
    ) -> Tensor:
        inputs = Inputs(gathered_hidden(call, hidden), classifier, bias, targets)
        needs_grad = call.records and any(ctx.needs_input_grad[:3])
        statistics, ctx.kept = joined_statistics(call, inputs, needs_grad)
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
        names = call.shard.names
        found = summed_gradients(
            call,
            inputs,
            Statistics(values, names),
            Statistics(ctx.loss.total_gradient(values, grad), names),
            _wanted(ctx, inputs),
            ctx.kept,
        )
        return (*found, None, None, None, None)


def _wanted(ctx: Any, inputs: Inputs) -> Wanted:
    return Wanted(*wanted_inputs(ctx, (True, True, inputs.bias is not None)))
