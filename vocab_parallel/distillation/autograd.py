"""The one autograd.Function of a distillation: S in forward, T in backward."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vocab_parallel.distillation.call import Student
from vocab_parallel.distillation.columns import TokenStatistics, join
from vocab_parallel.distillation.hidden_teacher import HiddenTeacher
from vocab_parallel.distillation.passes import Comparison, Passes, all_columns
from vocab_parallel.distillation.top_k_teacher import TopKTeacher
from vocab_parallel.local.interface import Gradients, Wanted
from vocab_parallel.sharded.backward import first_derivative_only, wanted_inputs
from vocab_parallel.sharded.call import Call
from vocab_parallel.sharded.halves import (
    Inputs,
    gathered_hidden,
    hidden_grad_sum,
    of_all_rows,
    shard_of,
    total_hidden_grad,
)


class TeacherTensors(NamedTuple):
    """What is saved of a teacher for backward; it gets no gradient.

    Attributes:
        tokens: hidden states [N, D'], or ids [N, k] of its top-k.
        classifier: [rows, D'], or None.
        bias: [rows], or None.
    """

    tokens: Tensor
    classifier: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """What both halves read beside tensors.

    Attributes:
        student: its side of the call.
        teacher: the call of a teacher with hidden states, None for a top-k.
    """

    student: Student
    teacher: Call | None

    def without_tokens(self) -> "Job":
        """Return what backward needs; see `Call.without_tokens`."""
        call = self.student.call.without_tokens()
        teacher = None if self.teacher is None else self.teacher.without_tokens()
        return Job(replace(self.student, call=call), teacher)

    def comparison(self, inputs: Inputs, given: TeacherTensors) -> Comparison:
        """Return with what the student is compared."""
        if self.teacher is None:
            return TopKTeacher(given.tokens, self.student.call.rows.start)
        assert given.classifier is not None
        own = Inputs(given.tokens, given.classifier, given.bias, inputs.targets)
        shard = shard_of(self.teacher, own, needs_grad=False)
        return HiddenTeacher(self.student.divergence, shard)

    def passes(self, inputs: Inputs, comparison: Comparison) -> Passes | None:
        """Return this rank's own work, or None where there is none."""
        call = self.student.call
        shard = shard_of(call, inputs, needs_grad=False)
        if shard is None:
            return None
        budget = call.settings.memory_budget
        return Passes(shard, comparison, self.student.labels_term, budget)


def student_values(job: Job, labels: Tensor, teacher: TeacherTensors) -> Tensor:
    """Return `Comparison.values` [m, N], and the labels' losses as one line more where they count.

    All ranks call. Communicates the statistics [k, N] of each rank, once, and for "js" [2, N] more;
    in backward the gradient of the hidden states, as `linear_cross_entropy` does.

    Args:
        job: the call.
        labels: [N] int32, marked.
        teacher: of all the loss's tokens.
    """
    operands = job.student.call.operands
    targets = job.student.call.rows.local_targets(labels)
    tensors = (operands.flat_hidden, operands.classifier, operands.bias, targets, *teacher)
    return cast(Tensor, _StudentValues.apply(*tensors, job))


class _StudentValues(torch.autograd.Function):
    """It has one output on purpose: see `vocab_parallel.sharded.autograd`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        teacher_tokens: Tensor,
        teacher_classifier: Tensor | None,
        teacher_bias: Tensor | None,
        job: Job,
    ) -> Tensor:
        inputs = Inputs(gathered_hidden(job.student.call, hidden), classifier, bias, targets)
        teacher = TeacherTensors(teacher_tokens, teacher_classifier, teacher_bias)
        statistics = _joined_statistics(job, inputs, teacher)
        ctx.save_for_backward(*inputs, *teacher, statistics.values)
        ctx.columns, ctx.job = statistics.columns, job.without_tokens()
        return _values(job, job.comparison(inputs, teacher), statistics)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs, teacher = Inputs(*saved[:4]), TeacherTensors(*saved[4:7])
        wanted = Wanted(*wanted_inputs(ctx, (True, True, inputs.bias is not None)))
        statistics = TokenStatistics(saved[7], ctx.columns)
        found = _summed_gradients(ctx.job, inputs, teacher, statistics, grads, wanted)
        return (*found, None, None, None, None, None)


def _values(job: Job, comparison: Comparison, statistics: TokenStatistics) -> Tensor:
    values = comparison.values(statistics)
    term = job.student.labels_term
    if term is None:
        return values
    losses = term.losses(statistics, comparison.student_lse(statistics))
    return torch.cat([values, losses.unsqueeze(0)])


def _joined_statistics(job: Job, inputs: Inputs, teacher: TeacherTensors) -> TokenStatistics:
    """S: the statistics of the whole vocabulary; all ranks call, and each gets the same."""
    group = job.student.call.rows.group
    comparison = job.comparison(inputs, teacher)
    passes = job.passes(inputs, comparison)
    columns, later = all_columns(comparison, job.student.labels_term), comparison.later_columns
    own = _no_rows(job, inputs, columns) if passes is None else passes.statistics()
    statistics = replace(own, values=join(group.gather_shards(own.values), columns))
    if not later:
        return statistics
    more = _no_rows(job, inputs, later).values
    if passes is not None:
        more = passes.later_statistics(statistics)
    values = torch.cat([statistics.values, group.sum(more)])
    return TokenStatistics(values, (*columns, *later))


def _no_rows(job: Job, inputs: Inputs, columns: Any) -> TokenStatistics:
    num_tokens, dtype = inputs.hidden.shape[0], job.student.call.shard.dtype
    return TokenStatistics.of_no_rows(columns, num_tokens, dtype, inputs.hidden)


def _summed_gradients(
    job: Job,
    inputs: Inputs,
    teacher: TeacherTensors,
    statistics: TokenStatistics,
    grads: Tensor,
    wanted: Wanted,
) -> Gradients:
    """T: the wanted gradients, as `vocab_parallel.sharded.halves.summed_gradients` has them."""
    call = job.student.call
    passes = job.passes(inputs, job.comparison(inputs, teacher))
    found = Gradients(None, None, None)
    if passes is not None and any(wanted):
        found = passes.gradients(statistics, grads.contiguous(), wanted)
    if wanted.hidden:
        reduction = hidden_grad_sum(call, inputs.hidden)
        reduction.add(found.hidden, slice(0, inputs.hidden.shape[0]))
        found = found._replace(hidden=total_hidden_grad(call, reduction))
    return of_all_rows(found, inputs, wanted)
