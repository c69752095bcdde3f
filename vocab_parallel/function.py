"""The autograd.Function between the tensors of all ranks and the statistics of every token."""

from typing import Any

import torch
from torch import Tensor

from vocab_parallel import collectives
from vocab_parallel.impls import BackwardTask, ForwardTask, KeptLogits, Wanted
from vocab_parallel.pieces import HiddenGradSum, StatisticsExchange
from vocab_parallel.problem import LossProblem
from vocab_parallel.second_derivative import first_derivative_only
from vocab_parallel.split_backward import wanted_inputs
from vocab_parallel.statistics import empty_shard

Parameters = tuple[Tensor, Tensor, Tensor | None]  # hidden states, classifier, bias


class VocabStatistics(torch.autograd.Function):
    """Statistics [k, N] of the logits over the whole vocabulary, equal on every rank.

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
        problem: LossProblem,
    ) -> Tensor:
        """Compute the statistics [k, N]; gathers them, and hidden states where it must."""
        shard = problem.shard
        if problem.layout.gathers:
            hidden = collectives.gather_tokens(hidden, shard.group, shard.degree)
        needs_grad = problem.grad_enabled and any(ctx.needs_input_grad[:3])
        local = problem.local(hidden, classifier, bias, targets, needs_grad)
        overlap = problem.impl.overlap
        exchange = StatisticsExchange(hidden.shape[0], problem.names, shard, overlap=overlap)
        saved: tuple[Tensor, ...] = ()
        ctx.kept = None
        if local is None:
            own = own_of_idle_rank(hidden, problem)
        else:
            task = ForwardTask(
                problem.names,
                keep_rows=problem.rows_to_keep(local) if needs_grad else 0,
                progress=exchange if overlap else None,
            )
            own, saved, ctx.kept = problem.impl.forward(local, task)
        statistics = exchange.join(own)
        ctx.save_for_backward(hidden, classifier, bias, targets, statistics, *saved)
        ctx.problem = problem
        return statistics

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Turn the gradients [k, N] of the statistics into the wanted ones; reduces dE."""
        hidden, classifier, bias, targets, statistics, *saved = ctx.saved_tensors
        wanted = Wanted(*wanted_inputs(ctx, (True, True, bias is not None)))
        found = pull_back(
            ctx.problem,
            (hidden, classifier, bias),
            targets,
            statistics,
            grads,
            wanted,
            saved=tuple(saved),
            kept=ctx.kept,
        )
        return (*found, None, None)


def pull_back(
    problem: LossProblem,
    parameters: Parameters,
    targets: Tensor,
    statistics: Tensor,
    grads: Tensor,
    wanted: Wanted,
    *,
    saved: tuple[Tensor, ...] = (),
    kept: KeptLogits | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the wanted gradients of hidden states [T, D], classifier and bias; sums the first."""
    hidden, classifier, bias = parameters
    local = problem.local(hidden, classifier, bias, targets, needs_grad=True)
    reduction = problem.hidden_grad_sum(hidden) if wanted.hidden else None
    partial: Tensor | None = None
    rows_found: tuple[Tensor | None, Tensor | None] = (None, None)
    target = problem.classifier_grad(classifier)
    if local is not None and any(wanted):
        task = BackwardTask(
            problem.names,
            statistics,
            grads,
            wanted,
            target,
            saved,
            kept,
            progress=reduction if problem.impl.overlap else None,
        )
        partial, *found = problem.impl.backward(local, task)
        rows_found = (found[0], found[1])
    hidden_grad = None
    if wanted.hidden:
        hidden_grad = total_hidden_grad(partial, hidden, reduction, problem)
    added = target.add_to is not None
    return (
        hidden_grad,
        with_padding(rows_found[0], classifier) if wanted.classifier and not added else None,
        with_padding(rows_found[1], bias) if wanted.bias and bias is not None else None,
    )


def own_of_idle_rank(hidden: Tensor, problem: LossProblem) -> Tensor:
    """Return the statistics [k, N] of a rank that has no rows, or meets no tokens."""
    like = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return empty_shard(hidden.shape[0], problem.names, like)


def total_hidden_grad(
    partial: Tensor | None, hidden: Tensor, reduction: HiddenGradSum | None, problem: LossProblem
) -> Tensor:
    """Sum the shards' partial gradients [N, D] and return this rank's [T, D]."""
    if partial is None:
        partial = hidden.new_zeros(hidden.shape)
    if reduction is None:
        total = partial.to(hidden.dtype)
    else:
        total = reduction.total(partial, hidden.dtype)
    scale = problem.settings.hidden_grad_scale
    return total if scale == 1.0 else total * scale


def with_padding(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient of all rows: padding rows, and those of an idle rank, get zeros."""
    if grad is not None and grad.shape == parameter.shape:
        return grad.to(parameter.dtype)
    full = torch.zeros_like(parameter)
    if grad is not None:
        full[: grad.shape[0]] = grad
    return full
