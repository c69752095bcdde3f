"""What cannot be right between a schedule, its stages and the loss, said on every rank."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.pipeline.problems import DIVIDED_TWICE, check_loss, check_stages
from vocab_parallel.pipeline.scheduled_loss import ScheduledLoss
from vocab_parallel.pipeline.spanning.order import in_flight, tasks_listed
from vocab_parallel.rank_rows import RankRows

_UNWRAPPED = (
    "does not work under a schedule that splits the backward: use 1F1B, Interleaved1F1B, GPipe or "
    "LoopedBFS, or reduce the gradients over the data group after the step"
)


def validate_pipeline_loss(
    schedule: Any,
    loss: Any,
    *,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
) -> None:
    """Refuse a schedule and a loss that would train wrongly together, or hang.

    Call it on every rank of the world after building the schedule, with whatever was given to the
    schedule as ``loss_fn``: each rank tells the others what is wrong, so that all of them raise.
    Communicates one small object a rank. Where ``loss_fn`` is a function of yours that adds
    something to a `CCEPipelineLoss` (a router's auxiliary loss, several losses over one
    classifier), give the `CCEPipelineLoss` here, once for each. A `LogprobsPipelineLoss` is checked
    likewise, but for its function's scale, which nobody knows, and so is a
    `DistillationPipelineLoss`. It also tells the loss how many
    microbatches the schedule has in flight on the last stage, for its choice of ``backward``.

    With ``scale_grads=True`` the first call of the schedule's ``step`` or ``eval`` exchanges one
    more object a rank of the world: a divisor that was set since ends it on every rank, before
    anything is sent. One that is set later still is refused by the loss, on the last stage alone.

    Args:
        schedule: of torch.distributed.pipelining, or a `SpanningSchedule`.
        loss: what the schedule was given as ``loss_fn``, see above.
        optimizer: of this rank's parameters, or several that share them, to be checked too; built
            after the rows were sharded.

    Warns:
        UserWarning: on the ranks of the last stage, more rows count as tokens than the ``config``
            of its module, or of one within it, says: padding that no options name.

    Raises:
        ValueError: on every rank, where on some rank
            the classifier's weight is not a parameter of the last stage's module. A weight that
                only the loss owns is trained wrongly and silently: its gradient is M times too
                large with ``scale_grads=True`` (M microbatches; the schedule divides only its
                modules' gradients), missing under InterleavedZeroBubble and ZBVZeroBubble, and
                partial under DualPipeV;
            the classifier has fewer rows than the ``config`` of the last stage's module, or of one
                within it, says (its ``vocab_size``, or that of its ``text_config``);
            a parameter is shared by two stages of one rank and ``scale_grads=True`` divides it
                twice;
            the loss is a sum, or was given a divisor, and ``scale_grads=True`` divides it again;
            the loss accumulates the classifier's gradient by itself, and the schedule scales it
                or splits the backward;
            the schedule has no ``loss_fn`` on some rank (`no_loss` is one), which hangs its steps;
            the optimizers lack a parameter of this rank's stages that requires a gradient, as one
                that was built before the rows were sharded does, or have one twice, or another;
            the loss is compiled, or a stage is wrapped by DDP or FSDP, under a schedule that
                splits the backward;
            the vocab group has a rank that does not run the last stage, and would never come,
                but for a `SpanningSchedule`, which is right for such a group.
    """
    # Imported here, since it takes a second that the loss alone should not cost.
    from torch.distributed.pipelining import schedules

    from vocab_parallel.pipeline.spanning.schedule import SpanningSchedule

    problem: str | None = None
    last, members = None, []
    spans = isinstance(schedule, SpanningSchedule)
    single = isinstance(schedule, schedules.PipelineScheduleSingle)
    try:
        if not isinstance(schedule, schedules.PipelineScheduleMulti) and not single:
            kind = type(schedule).__name__
            raise ValueError(f"schedule must be a schedule of torch's pipelining, got {kind}")
        stages = [schedule._stage] if single else list(schedule._stages)
        last = next((stage for stage in stages if stage.is_last), None)
        _check_optimizer(optimizer, stages)
        if not spans:
            members = _checked_members(schedule, stages, last, loss)
        elif schedule.loss_fn is not loss:  # it has agreed on all the rest when it was made
            raise ValueError("give the CCEPipelineLoss that the schedule has, which is another one")
    except ValueError as error:
        problem = str(error)
    _agree_over_world(problem, last is not None, members)
    if spans:
        return
    if schedule.scale_grads:
        _refuse_divisor_at_first_step(schedule, loss if last is not None else None)
    if last is not None:
        loss.output_weight.warn_of_padding(last.submod)
        if single:
            fills = isinstance(schedule, schedules.ScheduleGPipe)
            waiting = schedule._n_microbatches if fills else 1
        else:
            listed = tasks_listed(schedule.pipeline_order[schedule.rank])
            waiting = max(in_flight(listed)[last.stage_index], 1)
        loss.bind(
            last,
            scale_grads=schedule.scale_grads,
            num_microbatches=schedule._n_microbatches,
            microbatches_in_flight=waiting,
        )


def _checked_members(schedule: Any, stages: Sequence[Any], last: Any, loss: Any) -> list[int]:
    """Check a schedule of torch's on this rank; return the ranks that its loss's options name.

    Args:
        schedule, loss: of `validate_pipeline_loss`.
        stages: of this rank.
        last: the last stage, where it is one of them.

    Raises:
        ValueError: see `validate_pipeline_loss`.
    """
    from torch.distributed.pipelining import schedules

    if schedule._loss_fn is None:
        raise ValueError(
            "the schedule has loss_fn=None, which hangs its steps: where the last stage is not, "
            "give it no_loss"
        )
    splits = isinstance(
        schedule,
        schedules.ScheduleInterleavedZeroBubble
        | schedules.ScheduleZBVZeroBubble
        | schedules.ScheduleDualPipeV,
    )
    check_stages(stages, schedule.scale_grads, _UNWRAPPED if splits else None)
    if last is None:
        return []
    check_loss(loss, schedule.scale_grads, splits)
    if not isinstance(loss, ScheduledLoss):
        kind = type(loss).__name__
        raise ValueError(f"loss must be a CCEPipelineLoss or another pipeline loss, got {kind}")
    owned = {id(parameter) for parameter in last.submod.parameters()}
    for tensor in loss.output_weight.tensors:
        if id(tensor) not in owned:
            raise ValueError(
                f"the classifier's tensor {list(tensor.shape)} that the loss reads is not a "
                f"parameter of the last stage's module, whose gradients alone a schedule scales "
                f"and splits: register the classifier there, e.g. as a VocabParallelClassifier, "
                f"and give the loss that module"
            )
    loss.output_weight.check_vocab_size(last.submod)
    options = loss.output_weight.read().options
    if options is None:
        return []
    RankRows.from_options(options)  # raises for what is none, or of a group of other ranks
    return dist.get_process_group_ranks(options.group or dist.group.WORLD)


def _refuse_divisor_at_first_step(schedule: Any, loss: Any) -> None:
    """Let the ranks agree in the next step of the schedule, and in no later one, on no divisor.

    The last stage alone has one, and the loss would refuse it in the middle of a step, while the
    ranks of other stages wait for what the last one never sends.

    Args:
        schedule: that scales gradients; its ``step``, which ``eval`` calls too, is put back.
        loss: of the last stage, on its ranks.
    """
    step = schedule.step

    @functools.wraps(step)
    def first_step(*args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get("loss_kwargs") or {}).get("num_valid_tokens")
        given = getattr(loss, "num_valid_tokens", None) if given is None else given
        _agree_over_world(None if given is None else DIVIDED_TWICE, True, [])
        schedule.step = step
        return step(*args, **kwargs)

    schedule.step = first_step


def _check_optimizer(optimizer: Any, stages: Sequence[Any]) -> None:
    """Raise ValueError for what the optimizers lack, have twice or should not have."""
    if optimizer is None:
        return
    optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    if not all(isinstance(getattr(each, "param_groups", None), list) for each in optimizers):
        kinds = [type(each).__name__ for each in optimizers]
        raise ValueError(
            f"optimizer must be an optimizer of torch's, or several of them, got {kinds}"
        )
    groups = [group for each in optimizers for group in each.param_groups]
    held = Counter(id(each) for group in groups for each in group["params"])
    own = {
        id(parameter): (f"{name} of stage {stage.stage_index}", parameter.requires_grad)
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    }
    for key, count in held.items():
        if count > 1:
            name, _ = own.get(key, ("a foreign parameter", True))
            raise ValueError(f"the optimizer has {name} twice: name each parameter once")
    for key, (name, trains) in own.items():
        if trains and key not in held:
            raise ValueError(
                f"the optimizer lacks {name}, which would never change: build it after the rows "
                f"are sharded, of all parameters of this rank's stages"
            )
    foreign = held.keys() - own.keys()
    if foreign:
        raise ValueError(
            f"the optimizer has {len(foreign)} parameters of none of this rank's stages: build it "
            f"of theirs alone, after the rows are sharded"
        )


def _agree_over_world(problem: str | None, has_last_stage: bool, members: list[int]) -> None:
    """Raise on every rank of the world where one has a problem; all ranks must call.

    Args:
        problem: of this rank, or None.
        has_last_stage: whether this rank runs the last stage.
        members: the ranks of its loss's vocab group, where it has one.

    Raises:
        ValueError: some rank has a problem, or a vocab group has a rank without the last stage.
    """
    told = VocabGroup.of(None).exchange_objects((problem, has_last_stage, members))
    found = {text: rank for rank, (text, _, _) in reversed(list(enumerate(told))) if text}
    for rank, (_, _, group) in enumerate(told):
        strangers = [member for member in group if not told[member][1]]
        if strangers:
            text = (
                f"the vocab group {group} has ranks {strangers}, which do not run the last stage "
                f"and would never join its loss: pass StageGroups.vocab_group of groups built for "
                f"the last stage, or let all stages carry the vocabulary with SpanningSchedule"
            )
            found.setdefault(text, rank)
    if found:
        raise ValueError("; ".join(f"on rank {rank}: {text}" for text, rank in found.items()))
