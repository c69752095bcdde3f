"""The autograd.Function between the tensors of all ranks and the statistics of every token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vocab_parallel import collectives
from vocab_parallel.arguments import LossSettings
from vocab_parallel.impls import Demand, LocalImpl, Shard, Wanted
from vocab_parallel.layout import TokenLayout
from vocab_parallel.shard import VocabShard
from vocab_parallel.split_backward import wanted_inputs
from vocab_parallel.statistics import StatisticNames, empty_shard, join_shards


@dataclass(frozen=True)
class LossProblem:
    """What the Function below needs beside tensors."""

    settings: LossSettings
    shard: VocabShard
    layout: TokenLayout
    impl: LocalImpl
    demand: Demand

    @property
    def names(self) -> StatisticNames:
        """The statistics that the loss reads."""
        return self.demand.names

    def local(
        self,
        hidden: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs_grad: bool,
    ) -> Shard | None:
        """Return what the implementation works on, or None where there is nothing to do."""
        rows = self.shard.num_token_rows
        if rows == 0 or hidden.shape[0] == 0:
            return None
        return Shard(
            hidden=hidden.detach(),
            classifier=classifier.detach()[:rows],
            bias=None if bias is None else bias.detach()[:rows],
            targets=targets,
            softcap=self.settings.softcap,
            temperature=float(self.settings.temperature),
            separate_lse_grad=self.demand.separate_lse_grad,
            sum_dtype=self.sum_dtype(hidden.dtype),
            needs_grad=needs_grad,
        )

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether the gradient of the hidden states is summed over the group."""
        return self.shard.degree > 1 and (self.layout.gathers or self.shard.reduce_e_grad)

    def sum_dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Return the dtype of that sum: never narrower than asked for, float64 for float64."""
        if hidden == torch.float64 or not self.sums_hidden_grad:
            return hidden
        return self.settings.e_grad_reduce_dtype


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
        targets: Tensor,  # (N,), rows of this shard or -1
        problem: LossProblem,
    ) -> Tensor:
        """Compute the statistics [k, N]; gathers them, and hidden states where it must."""
        shard = problem.shard
        if problem.layout.gathers:
            hidden = collectives.gather_tokens(hidden, shard.group, shard.degree)
        needs_grad = any(ctx.needs_input_grad[:3])
        local = problem.local(hidden, classifier, bias, targets, needs_grad)
        saved: tuple[Tensor, ...] = ()
        if local is None:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            own = empty_shard(hidden.shape[0], problem.names, hidden.new_empty(0, dtype=dtype))
        else:
            own, saved = problem.impl.forward(local, problem.names)
        gathered = collectives.gather_shards(own, shard.group, shard.degree)
        statistics = join_shards(gathered, problem.names)
        ctx.save_for_backward(hidden, classifier, bias, targets, statistics, *saved)
        ctx.problem = problem
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Turn the gradients [k, N] of the statistics into the wanted ones; reduces dE."""
        hidden, classifier, bias, targets, statistics, *saved = ctx.saved_tensors
        problem: LossProblem = ctx.problem
        wanted = Wanted(*wanted_inputs(ctx, (True, True, bias is not None)))
        local = problem.local(hidden, classifier, bias, targets, needs_grad=True)
        partial: Tensor | None = None
        found: tuple[Tensor | None, Tensor | None] = (None, None)
        if local is not None and any(wanted):
            partial, *rows_found = problem.impl.backward(
                local, problem.names, tuple(saved), statistics, grads, wanted
            )
            found = (rows_found[0], rows_found[1])
        return (
            _reduced_hidden_grad(partial, hidden, problem) if wanted.hidden else None,
            _with_padding(found[0], classifier) if wanted.classifier else None,
            _with_padding(found[1], bias) if wanted.bias else None,
            None,
            None,
        )


def _reduced_hidden_grad(partial: Tensor | None, hidden: Tensor, problem: LossProblem) -> Tensor:
    """Sum the shards' partial gradients [N, D] and return this rank's [T, D]."""
    shard, settings = problem.shard, problem.settings
    if partial is None:
        partial = torch.zeros_like(hidden)
    if problem.sums_hidden_grad:
        partial = partial.to(problem.sum_dtype(hidden.dtype))
        join = collectives.scatter_sum if problem.layout.gathers else collectives.sum_over_group
        partial = join(partial, shard.group, shard.degree)
    if settings.hidden_grad_scale != 1.0:
        partial = partial * settings.hidden_grad_scale
    return partial.to(hidden.dtype)


def _with_padding(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """Return the gradient of all rows: padding rows, and those of an idle rank, get zeros."""
    if grad is not None and grad.shape == parameter.shape:
        return grad
    full = torch.zeros_like(parameter)
    if grad is not None:
        full[: grad.shape[0]] = grad
    return full
