"""A pipeline loss that learns from a teacher."""

from typing import Any

from torch import Tensor, nn

from vocab_parallel.distillation.loss import linear_distillation, linear_distillation_from_top_k
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.modules.heads import OutputWeight
from vocab_parallel.pipeline.named_batch import NamedBatchLoss
from vocab_parallel.settings import parameters_of

# What the batch has, or the loss is told of otherwise.
_NOT_OPTIONS = {
    "teacher_e", "teacher_c", "teacher_ids", "teacher_logprobs", "teacher_bias", "token_weight",
}  # fmt: skip


class DistillationPipelineLoss(NamedBatchLoss):
    """``loss_fn`` of a pipeline schedule: `linear_distillation` of each microbatch.

    Under any schedule that takes a `CCEPipelineLoss`; every rank of the last stage's vocab group
    makes it and calls it alike. Before each step `load` takes the batch by name and returns the
    target to give to the step:

        loss = DistillationPipelineLoss(head, teacher_head, divergence="reverse_kl", shift=1)
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss, scale_grads=False)
        validate_pipeline_loss(schedule, loss)
        loss.num_valid_tokens = count_valid_tokens(labels, groups, shift=1)
        target = loss.load(labels, teacher_e=teacher_hidden)
        schedule.step(target=target, losses=losses, return_outputs=False)

    ``load`` is given the labels [B, T] (a position counts for nothing where its label is ignored),
    and ``teacher_e`` [B, T, D'], laid out as the student's hidden states; without a teacher's rows
    ``teacher_ids`` and ``teacher_logprobs`` [B, T, k] in its place; and ``token_weight`` [B, T]
    where tokens have weights.

    Args:
        output_weight, output_bias, vocab_parallel_options: the student's, as in `CCEPipelineLoss`.
        teacher_weight, teacher_bias: the teacher's rows of this rank, a tensor or the module that
            owns them; None for a teacher of whom the k likeliest tokens are known.
        hidden_layout: as in `linear_cross_entropy`.
        scaled_outside: as in `CCEPipelineLoss`.
        **loss_options: of `linear_distillation` or `linear_distillation_from_top_k`.

    Attributes:
        num_valid_tokens: divides the mean in place of each microbatch's own count.

    Raises:
        ValueError: an unknown option or a value that cannot be, or an ``output_weight`` or
            ``teacher_weight`` whose logits may be more than its rows'. An unknown
            divergence, or a beta that does not go with it, is refused by the first call.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        teacher_weight: nn.Module | Tensor | None = None,
        *,
        output_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        vocab_parallel_options: Any = None,
        hidden_layout: HiddenLayout = "replicated",
        scaled_outside: bool = False,
        **loss_options: Any,
    ) -> None:
        whole = teacher_weight is not None
        function = linear_distillation if whole else linear_distillation_from_top_k
        super().__init__(
            output_weight,
            output_bias,
            vocab_parallel_options,
            {"reduction": "mean", "hidden_layout": hidden_layout, **loss_options},
            parameters_of(function) - _NOT_OPTIONS,
            scaled_outside=scaled_outside,
        )
        self._teacher: OutputWeight | None = None
        if teacher_weight is not None:
            self._teacher = OutputWeight(teacher_weight, teacher_bias)

    def __call__(
        self,
        hidden_states: Tensor,
        target: Tensor,
        *,
        num_valid_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """Return the scalar loss of one microbatch, equal on every rank of the vocab group.

        Args:
            hidden_states: [b, T, D], or [b, T / V, D] in the "sequence" layout.
            target: what the schedule has split off what `load` returned, [b].
            num_valid_tokens: in place of the attribute.

        Raises:
            ValueError: as `linear_distillation`; another target, a batch without what the teacher
                is given by, or a divisor where the schedule divides too.
        """
        rows, divisor = self.begin(num_valid_tokens)
        batch = self.microbatch(target)
        names = ("teacher_ids", "teacher_logprobs") if self._teacher is None else ("teacher_e",)
        missing = [name for name in names if name not in batch]
        if missing:
            raise ValueError(
                f"load(labels, ...) was not given {missing[0]}: this teacher is known by "
                f"{' and '.join(names)}"
            )
        e, c = rows.operands(hidden_states)
        given: dict[str, Any] = {
            **self._options,
            "targets": batch["targets"],
            "token_weight": batch.get("token_weight"),
            "num_valid_tokens": divisor,
            "vocab_parallel_options": rows.options,
            "validate": self.validates(),
        }
        if self._teacher is None:
            ids, logprobs = (batch[name] for name in names)
            loss = linear_distillation_from_top_k(e, c, ids, logprobs, rows.bias, **given)
        else:
            teacher = self._teacher.read()
            own, teacher_rows = teacher.operands(batch["teacher_e"])
            loss = linear_distillation(e, c, own, teacher_rows, rows.bias, teacher.bias, **given)
        return self.finished(loss)
