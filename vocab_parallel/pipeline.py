"""The loss as a pipeline schedule calls it, and the check that the two fit together."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from vocab_parallel import schedule_check
from vocab_parallel.arguments import LossSettings
from vocab_parallel.impls import create_impl
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.loss import linear_cross_entropy
from vocab_parallel.output_weight import OutputWeight
from vocab_parallel.split_backward import keep_graph, loses_nodes

_NOT_OPTIONS = ("e", "c", "targets", "bias", "return_lse", "num_valid_tokens", "validate")


class CCEPipelineLoss:
    """``loss_fn`` of a pipeline schedule: the linear cross-entropy of the last stage's output.

    Every rank of the last stage's vocab group calls it, once for each microbatch. It only reads
    the classifier's weight, at each call, and must not own it: the weight is a parameter of the
    last stage's module, or training goes wrong (`validate_pipeline_loss` says how).

        loss = CCEPipelineLoss(last_stage_module.classifier, hidden_layout="sharded")
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss)
        validate_pipeline_loss(schedule, loss)
        schedule.step(target=labels, losses=losses, return_outputs=False)

    Args:
        output_weight: the classifier [rows, D]: the module that owns it (`VocabParallelClassifier`,
            nn.Linear, a LoRA layer of PEFT's over one; see `OutputWeight`), a Parameter, or a
            DTensor sharded over its rows.
        output_bias: its bias; None takes the module's own, if it has one.
        impl: "auto", or a name of `available_impls`.
        vocab_parallel_options: which rows these are. None: the module's ``.options``, or the
            DTensor's placement; a plain tensor is the whole vocabulary.
        ignore_index, softcap, shift, reduction, hidden_layout, **loss_options: as in
            `linear_cross_entropy`; ``shift`` is 1 by default, since a schedule's labels are
            usually its inputs.

    Attributes:
        num_valid_tokens: divides the mean in place of each microbatch's own count, until it is set
            to another value: the tokens of the whole step, from `count_valid_tokens`, set before
            each step of a schedule that was built with ``scale_grads=False``. A schedule that
            knows ``step(loss_kwargs={"num_valid_tokens": ...})`` may pass it so instead.

    Raises:
        ValueError: an unknown option or a value that cannot be, a reduction that gives no scalar,
            or an ``output_weight`` whose logits may be more than its rows'.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        output_bias: Tensor | None = None,
        impl: str = "auto",
        *,
        vocab_parallel_options: Any = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        shift: int = 1,
        reduction: str = "mean",
        hidden_layout: HiddenLayout = "replicated",
        **loss_options: Any,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f'a schedule needs a scalar loss: reduction must be "mean" or "sum", got '
                f"{reduction!r}"
            )
        self.output_weight = OutputWeight(output_weight, output_bias, vocab_parallel_options)
        self.reduction = reduction
        self.accumulate_into = loss_options.get("accumulate_into")
        self.num_valid_tokens: int | Tensor | None = None
        self._scaled_by_schedule = False
        self._last_stage: Any = None
        self._options: dict[str, Any] = {
            "impl": impl,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "shift": shift,
            "reduction": reduction,
            "hidden_layout": hidden_layout,
            **loss_options,
        }
        _check_options(self._options)
        self._validated = False
        self._keeps_graph = loses_nodes()

    def __call__(
        self,
        hidden_states: Tensor,  # (..., T, D), or (..., T / V, D) in the "sequence" layout
        labels: Tensor,  # (..., T)
        *,
        num_valid_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """Return the scalar loss of one microbatch, equal on every rank of the vocab group.

        The first call agrees over the group that the arguments are right, on any device; the
        later ones as `linear_cross_entropy` does by default. A schedule may call it on
        uninitialised hidden states to infer shapes: nothing is kept of a call.
        """
        divisor = self.num_valid_tokens if num_valid_tokens is None else num_valid_tokens
        if divisor is not None and self._scaled_by_schedule:
            raise ValueError(
                "num_valid_tokens already divides by the tokens of the whole step, but the "
                "schedule was built with scale_grads=True and divides by the number of "
                "microbatches again: build it with scale_grads=False"
            )
        self._warn_of_kept_outputs()
        rows = self.output_weight.read()
        e, c = rows.operands(hidden_states)
        loss = linear_cross_entropy(
            e,
            c,
            labels,
            rows.bias,
            vocab_parallel_options=rows.options,
            num_valid_tokens=divisor,
            validate=None if self._validated else True,
            **self._options,
        )
        self._validated = True
        assert isinstance(loss, Tensor)
        if self._keeps_graph:
            keep_graph(loss)
        return loss

    def plan_for(self, microbatches_in_flight: int) -> None:
        """Let ``backward="auto"`` count on so many microbatches between forward and backward.

        `validate_pipeline_loss` calls it with the schedule's number.
        """
        if self._options["impl"] in ("auto", "chunked"):
            self._options.setdefault("microbatches_in_flight", microbatches_in_flight)

    def _warn_of_kept_outputs(self) -> None:
        stage, self._last_stage = self._last_stage, None
        if stage is None:
            return
        if not getattr(stage, "fwd_cache", True):  # shapes are being inferred: ask again
            self._last_stage = stage
        elif getattr(stage, "output_chunks", None):
            warnings.warn(
                "the schedule keeps the last stage's hidden states of every microbatch alive: "
                "call its step with return_outputs=False",
                stacklevel=3,
            )


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the loss does not know, before any microbatch."""
    parameters = inspect.signature(linear_cross_entropy).parameters
    known = parameters.keys() - set(_NOT_OPTIONS) - {"impl_options"}
    settings = {each.name for each in fields(LossSettings)}
    of_impl = {name: value for name, value in options.items() if name not in parameters}
    impl, budget = options["impl"], options.get("memory_budget")
    for name in options.keys() & set(_NOT_OPTIONS):
        raise ValueError(f"{name} is not an option of a pipeline loss: known are {sorted(known)}")
    LossSettings(**{name: value for name, value in options.items() if name in settings}).check()
    try:
        create_impl(impl, budget, of_impl)
    except ValueError as error:
        raise ValueError(f"{error}; options of the loss are {sorted(known)}") from None


def validate_pipeline_loss(schedule: Any, loss: Any) -> None:
    """Refuse a schedule and a loss that would train wrongly together, or hang.

    Call it on every rank of the world after building the schedule, with whatever was given to the
    schedule as ``loss_fn``: each rank tells the others what is wrong, so that all of them raise.
    Communicates one small object a rank. Where ``loss_fn`` is a function of yours that adds
    something to a `CCEPipelineLoss` (a router's auxiliary loss, several losses over one
    classifier), give the `CCEPipelineLoss` here, once for each. It also tells the loss how many
    microbatches the schedule has in flight on the last stage, for its choice of ``backward``.

    Raises:
        ValueError: on every rank, where on some rank
            the classifier's weight is not a parameter of the last stage's module. A weight that
                only the loss owns is trained wrongly and silently: its gradient is M times too
                large with ``scale_grads=True`` (M microbatches; the schedule divides only its
                modules' gradients), missing under InterleavedZeroBubble and ZBVZeroBubble, and
                partial under DualPipeV;
            a parameter is shared by two stages of one rank and ``scale_grads=True`` divides it
                twice;
            the loss is a sum, or was given a divisor, and ``scale_grads=True`` divides it again;
            the loss accumulates the classifier's gradient by itself, and the schedule scales it
                or splits the backward;
            the loss is compiled, or a stage is wrapped by DDP or FSDP, under a schedule that
                splits the backward;
            the vocab group has a rank that does not run the last stage, and would never come.
    """
    # Imported here, since it takes a second that the loss alone should not cost.
    from torch.distributed.pipelining import schedules

    if isinstance(schedule, schedules.PipelineScheduleSingle):
        stages = [schedule._stage]
    elif isinstance(schedule, schedules.PipelineScheduleMulti):
        stages = list(schedule._stages)
    else:
        kind = type(schedule).__name__
        text = f"schedule must be a schedule of torch.distributed.pipelining, got {kind}"
        schedule_check.agree_over_world(text, False, [])
        return
    splits = isinstance(
        schedule,
        schedules.ScheduleInterleavedZeroBubble
        | schedules.ScheduleZBVZeroBubble
        | schedules.ScheduleDualPipeV,
    )
    last = next((stage for stage in stages if stage.is_last), None)
    problem = schedule_check.problem_of_stages(stages, schedule.scale_grads, splits)
    members: list[int] = []
    if problem is None and last is not None:
        problem = schedule_check.problem_of_loss(loss, schedule.scale_grads, splits)
        if problem is None and not isinstance(loss, CCEPipelineLoss):
            problem = f"loss must be a CCEPipelineLoss, got {type(loss).__name__}"
        if problem is None:
            problem = schedule_check.problem_of_weight(loss.output_weight.tensors, last.submod)
            members = schedule_check.vocab_group_ranks(loss.output_weight.read().options)
    schedule_check.agree_over_world(problem, last is not None, members)
    if last is not None:
        loss._scaled_by_schedule = schedule.scale_grads
        loss._last_stage = last
        if isinstance(schedule, schedules.PipelineScheduleMulti):
            actions = schedule.pipeline_order[schedule.rank]
            in_flight = schedule_check.microbatches_in_flight(actions, last.stage_index)
        else:
            fills = isinstance(schedule, schedules.ScheduleGPipe)
            in_flight = schedule._n_microbatches if fills else 1
        loss.plan_for(in_flight)
