"""A schedule of torch.distributed.pipelining's own runtime, with the loss's passes on every rank.

It is torch's runtime for lists of actions, and adds actions of its own to the lists: torch looks
custom actions up before its own. What torch does stays torch's: sends and receives, shapes, the
gradients' scale. The lists are a restriction of one total order (`order.py`), so that no two ranks
wait for one another, whichever communicator a message belongs to.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from stage_groups import StageGroups
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.spanning.embedding import EmbeddingPasses
from vocab_parallel.pipeline.spanning.order import (
    Costs,
    Order,
    Task,
    best_order,
    forwards_alone,
    one_forward_one_backward,
    order_of,
    tasks_listed,
)
from vocab_parallel.pipeline.spanning.owners import Owners, VocabMessages
from vocab_parallel.pipeline.spanning.passes import LossPasses, barriers_of
from vocab_parallel.pipeline.spanning.validation import (
    ScheduleArguments,
    StepCall,
    StepInputs,
    agree_on_schedule,
    agree_on_shapes,
    step_inputs,
)

# What this schedule overrides, calls or writes of torch's own: true of 2.11 to 2.14.
_OF_TORCH = (
    "_comp_type_to_function_map",
    "_initialize_stages",
    "_maybe_compute_loss",
    "_prepare_schedule_with_comms",
    "_split_inputs",
)

_TO_NEIGHBOURS: dict[str, tuple[_ComputationType, _ComputationType, int]] = {
    "activations": (_ComputationType.SEND_F, _ComputationType.RECV_F, 1),
    "gradients": (_ComputationType.SEND_B, _ComputationType.RECV_B, -1),
}


class VocabAction(StrEnum):
    """What a rank does for the vocabulary, beside torch's own computation types."""

    BROADCAST = "broadcast"
    STATISTICS = "S"
    EXCHANGE = "exchange"
    GRADIENTS = "T"
    REDUCTION = "reduction"
    LOOKUP = "lookup"
    ARRIVAL = "arrival"
    EMBEDDING_GRAD = "embedding_grad"
    END = "end"  # of all that is under way, before gradients are scaled and anybody reads them


class SpanningSchedule(_PipelineScheduleRuntime):
    """A pipeline schedule whose every rank carries rows of the vocabulary.

    In place of torch's schedule of that name. Every rank of the pipeline, in all columns, makes it
    alike and calls ``step`` with the labels of its column:

        groups = build_stage_groups(pipeline=4, vocab=1, vocab_over="all_stages")
        rows = VocabParallelClassifier(D, vocab_size, group=groups.vocab_group)  # of one stage
        schedule = SpanningSchedule(stages, 16, CCEPipelineLoss(rows), groups, "1F1B")
        schedule.step(*inputs, target=labels, losses=losses, return_outputs=False)
        schedule.eval(*inputs, target=labels, losses=losses)

    A step communicates, for each microbatch: the hidden states [T, D] to every rank, 2 float32 a
    token and rank, and dE [T, D] in float32 to the last stage (with an embedding two [T, D] more).
    The rows' gradients are added to their ``.grad`` (or what ``accumulate_into`` names) by passes
    of the schedule's, not by autograd.

    Args:
        stages: this rank's `PipelineStage`s, or the only one; the last stage returns hidden
            states [b, T, D].
        n_microbatches: M.
        loss_fn: on every rank, of a `VocabParallelClassifier` over ``groups.vocab_group`` that
            is a submodule of exactly one of the rank's stages. With several columns,
            ``hidden_layout="sharded"`` says that each has sequences of its own, "replicated" that
            all have the same.
        groups: built with ``vocab_over="all_stages"``.
        schedule: the name of the schedule whose order of forwards and backwards it keeps, with
            one forward more before the last stage's first backward, or two: 1F1B (one stage a
            rank), Interleaved1F1B, LoopedBFS, InterleavedZeroBubble or ZBVZeroBubble.
        embedding: this rank's rows of the input embedding, over the same group, a submodule of
            one of its stages. Then every rank passes its column's ids [b, T] to ``step`` and
            ``eval``, and the first stage's module receives their embeddings [b, T, D]. A tied
            weight is one parameter: ``embedding.weight = classifier.weight``.
        barriers: 1, or 2 to hold no float32 [T, D] between S and the exchange, for one
            microbatch more in flight; None: 1 where the loss's options allow it.
        costs: how long everything takes, the same on every rank, for the order; None: layers
            alike, a loss of half a stage.
        scale_grads: as torch's schedules have it.

    Attributes:
        order: of the step.

    Raises:
        ValueError: on every rank, where on some rank something cannot be right: see
            `validation.py`.
    """

    def __init__(
        self,
        stages: Any,
        n_microbatches: int,
        loss_fn: CCEPipelineLoss,
        groups: StageGroups,
        schedule: str = "1F1B",
        *,
        embedding: VocabParallelEmbedding | None = None,
        barriers: int | None = None,
        costs: Costs | None = None,
        scale_grads: bool = True,
    ) -> None:
        own = list(stages) if isinstance(stages, Sequence) else [stages]
        given = ScheduleArguments(
            own, n_microbatches, loss_fn, groups, schedule, embedding, barriers, scale_grads
        )
        agree_on_schedule(given)
        loss_fn.output_weight.warn_of_padding(own[0].submod)
        # torch calls its loss_fn only to infer shapes.
        super().__init__(own, n_microbatches, loss_fn=_no_loss_yet, scale_grads=scale_grads)
        self.loss_fn = loss_fn
        missing = [name for name in _OF_TORCH if not hasattr(self, name)]
        if missing:  # an override that nobody calls would leave the loss out
            raise ValueError(
                f"torch {torch.__version__} has no {missing} in its pipeline schedules, on which "
                f"this one is built: use torch 2.11 to 2.14, or give the vocabulary to the last "
                f"stage alone"
            )
        self._given = given
        barriers = barriers_of(loss_fn.settings) if barriers is None else barriers
        messages = VocabMessages.of(groups)
        shared = loss_fn.settings.hidden_layout == "replicated"
        last_rank = 0 if schedule == "ZBVZeroBubble" else groups.pipeline_degree - 1
        first, self._last = (Owners(messages, rank, shared) for rank in (0, last_rank))
        self._embedding = None if embedding is None else EmbeddingPasses(embedding, first)
        self._inputs: StepInputs | None = None
        self._split: tuple[list[Any], list[Any]] | None = None  # a step's inputs that came split
        # Of the shape of the last stage's hidden states, where there is a backward and where not.
        self._hidden: dict[bool, Tensor] = {}
        self._shapes: list[Any] | None = None  # of the last step's labels and inputs

        listed = tasks_of(own, schedule, n_microbatches)
        costs = costs or _even(len(listed))
        spans = embedding is not None
        self.order = best_order(listed, costs, barriers=barriers, embedding=spans)
        alone = order_of(forwards_alone(listed), costs, embedding=spans)
        stages_of = [sorted({task.stage for task in tasks}) for tasks in listed]
        self._lists = {
            True: _lowered(self.order, stages_of, reduces=True),
            False: _lowered(alone, stages_of, reduces=False),
        }
        self._prepare_schedule_with_comms(self._lists[True], format="compute_comms")
        loss_fn.bind(
            next((stage for stage in own if stage.is_last), None),
            scale_grads=scale_grads,
            num_microbatches=n_microbatches,
            microbatches_in_flight=self.order.hidden_held,
        )
        self._loss = LossPasses(loss_fn, self._last, barriers)
        acts = self._acts()

        def act(action: Any, _: Any) -> None:
            acts[action.computation_type](action.microbatch_index)

        self._comp_type_to_function_map.update(dict.fromkeys(acts, act))

    def step(
        self,
        *args: Any,
        target: Tensor | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        arg_mbs: list[tuple[Any, ...]] | None = None,
        kwarg_mbs: list[dict[str, Any]] | None = None,
        target_mbs: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run one step, as torch's schedules do; all ranks call, each with its column's labels.

        On a CPU every step agrees first that its inputs are right, on a GPU the first one and each
        whose labels have another shape than those before. Then shapes are inferred, whatever the
        stages were made for, so that a step or an evaluation may have sequences of any length.

        Args:
            args: inputs of the first stage, on its ranks; with an embedding the ids [b, T], on all.
            target: labels [b, T] of the whole batch.
            losses: receives each microbatch's loss on ranks with the last stage.
            return_outputs: whether to return, and so to keep, the last stage's hidden states.
            loss_kwargs: ``num_valid_tokens``, equal on all ranks, or nothing.
            arg_mbs, kwarg_mbs, target_mbs: in place of args, kwargs and target, one for each
                microbatch, as torch has them since 2.14; here with every torch.
            kwargs: of the stages' modules.

        Raises:
            ValueError: on every rank, labels, ids or lengths that cannot be right on some.
        """
        call = StepCall(args, kwargs, target, loss_kwargs, arg_mbs, kwarg_mbs, target_mbs)
        trains = self._has_backward
        self._inputs = inputs = step_inputs(
            self._given, self._last, call, trains=trains, known=self._shapes
        )
        if trains and inputs.loss.num_valid_tokens is None:
            self.loss_fn.warn_of_missing_divisor()
        if inputs.changed:
            self._forget_shapes()
        number = self._n_microbatches
        split = arg_mbs or [()] * number, kwarg_mbs or [{}] * number
        self._split = split if call.is_split else None
        self.pipeline_order_with_comms = self._lists[trains]  # type: ignore[assignment]
        if inputs.ids is not None and self._embedding is not None:
            self._embedding.begin(inputs.ids, trains=trains)
        result = super().step(
            *args, target=inputs.target, losses=losses, return_outputs=return_outputs, **kwargs
        )
        self._shapes, self._split = inputs.shapes, None
        return result

    def _forget_shapes(self) -> None:
        """Have torch infer the stages' shapes in this step; all ranks call."""
        stage: Any
        for stage in self._stages:
            given = getattr(stage, "_user_meta", None)  # since torch 2.13
            if given is not None:
                stage._user_meta = type(given)()
            else:
                stage.inputs_meta = stage._outputs_meta = None
        self._stages_forward_initialized = self._stages_backward_initialized = False
        self._shapes = None
        self._hidden.clear()

    def _split_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        split, kwargs_split = self._split or super()._split_inputs(args, kwargs)
        if self._embedding is not None:
            split = [(leaf,) for leaf in self._embedding.inputs]
        return split, kwargs_split

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._initialize_stages(*args, **kwargs)
        step, trains = self._inputs, self._has_backward
        assert step is not None
        if trains not in self._hidden:
            labels = step.loss.labels[0]
            self._hidden[trains] = agree_on_shapes(self._stages, labels, self._given, self._last)
        self._loss.begin(step.loss, self._hidden[trains], trains=trains)
        return result

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, *_: Any
    ) -> None:
        if stage.is_last:
            hidden = output[0] if isinstance(output, tuple) else output
            self.loss_fn.warn_of_kept_outputs()
            loss = self.loss_fn.finished(self._loss.deferred(hidden, mb_index))
            self._internal_losses.append(loss)

    def _acts(self) -> dict[Any, Callable[[int], None]]:
        """Return what each of our actions does, of a microbatch."""
        loss, embedding = self._loss, self._embedding

        def end(_: int) -> None:
            loss.finish()
            if embedding is not None:
                embedding.finish()

        acts: dict[Any, Callable[[int], None]] = {
            VocabAction.END: end,
            VocabAction.BROADCAST: loss.broadcast,
            VocabAction.STATISTICS: loss.statistics,
            VocabAction.EXCHANGE: loss.exchange,
            VocabAction.GRADIENTS: loss.gradients,
            VocabAction.REDUCTION: loss.reduction,
        }
        if embedding is not None:
            acts[VocabAction.LOOKUP] = embedding.lookup
            acts[VocabAction.ARRIVAL] = embedding.arrival
            acts[VocabAction.EMBEDDING_GRAD] = embedding.gradient
        return acts


def tasks_of(stages: list[Any], schedule: str, num_microbatches: int) -> list[list[Task]]:
    """Return the order of every rank that torch's own schedule of that name has.

    Args:
        stages: of one rank.
        schedule: its name.
        num_microbatches: M.

    What torch lists of 1F1B starts the last rank at microbatch 1, so that it is written out.
    """
    ranks = stages[0].group_size
    if schedule == "1F1B":
        return one_forward_one_backward(ranks, num_microbatches)
    cls = torch_schedules.get_schedule_class(schedule)
    made = cls(stages, n_microbatches=num_microbatches, loss_fn=_no_loss_yet)
    return [tasks_listed(made.pipeline_order[rank]) for rank in range(ranks)]


def _no_loss_yet(hidden: Any, labels: Any) -> Tensor:
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden.sum() * 0.0


def _even(ranks: int) -> Costs:
    def layers(stage: int) -> float:
        return 1.0

    return Costs(layers, layers, layers, [1.0 / ranks] * ranks, [0.5 / ranks] * ranks)


def _lowered(
    order: Order, stages_of: list[list[int]], *, reduces: bool
) -> dict[int, list[_Action | None]]:
    """Write each rank's part of the order as torch's actions.

    A body that FSDP2 shards over a data axis is whole from the first one to the last.
    """
    lists: dict[int, list[Any]] = {
        rank: [_Action(stage, _ComputationType.UNSHARD, None) for stage in stages]
        for rank, stages in enumerate(stages_of)
    }

    def add(rank: int, stage: int, kind: Any, microbatch: int = 0) -> None:
        lists[rank].append(_Action(stage, kind, microbatch))

    embeds = any(event.kind == "lookup" for event in order.events)
    for kind, stage, microbatch, ranks, *_ in order.events:
        if kind in _TO_NEIGHBOURS:
            send, receive, step = _TO_NEIGHBOURS[kind]
            add(ranks[0], stage, send, microbatch)
            add(ranks[1], stage + step, receive, microbatch)
        elif kind in set(VocabAction):
            for rank in ranks:
                add(rank, stages_of[rank][0], VocabAction(kind), microbatch)
        else:
            if embeds and kind == "F" and stage == 0:
                add(ranks[0], stage, VocabAction.ARRIVAL, microbatch)
            add(ranks[0], stage, _ComputationType(kind), microbatch)
    last = (_ComputationType.REDUCE_GRAD, _ComputationType.RESHARD)[0 if reduces else 1 :]
    for rank, stages in enumerate(stages_of):
        add(rank, stages[0], VocabAction.END)
        lists[rank] += [_Action(stage, kind, None) for kind in last for stage in stages]
    return lists
