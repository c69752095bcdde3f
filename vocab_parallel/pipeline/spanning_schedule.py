"""A schedule of torch.distributed.pipelining's own runtime, with the loss's passes on every rank.

It is torch's runtime for lists of actions, and adds actions of its own to the lists: torch looks
custom actions up before its own. What torch does stays torch's: sends and receives, shapes, the
gradients' scale. The lists are a restriction of one total order (`spanning_order.py`), so that no
two ranks wait for one another.
"""

from collections.abc import Sequence
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

from vocab_parallel.pipeline.spanning import SpanningLoss
from vocab_parallel.pipeline.spanning_order import (
    Costs,
    Order,
    Task,
    best_order,
    one_forward_one_backward,
)
from vocab_parallel.sharded.backward import keep_graph, loses_nodes

SCHEDULES = ("1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble")


class LossAction(StrEnum):
    """What a rank does of the loss, beside torch's own computation types."""

    BROADCAST = "broadcast"
    STATISTICS = "S"
    EXCHANGE = "exchange"
    GRADIENTS = "T"


class SpanningSchedule(_PipelineScheduleRuntime):
    """A pipeline schedule whose every rank carries rows of the classifier.

    Every rank of the column makes it alike and calls ``step`` with the labels:

        loss = SpanningLoss(classifier, span_groups, last, shift=1)
        schedule = SpanningSchedule(stages, n_microbatches=16, loss=loss, schedule="1F1B")
        schedule.step(*inputs, target=labels, losses=losses, return_outputs=False)

    Args:
        stages: this rank's `PipelineStage`s; the last one returns hidden states.
        n_microbatches: M.
        loss: of this rank.
        schedule: the name of the schedule whose order of forwards and backwards it keeps.
        costs: how long everything takes, for the order; None: layers alike, a loss of half a stage.
        scale_grads: as torch's schedules have it.

    Attributes:
        order: of the step.

    Raises:
        ValueError: an unknown schedule, or one of several stages a rank for one stage.
    """

    def __init__(
        self,
        stages: Sequence[Any],
        n_microbatches: int,
        loss: SpanningLoss,
        schedule: str = "1F1B",
        *,
        costs: Costs | None = None,
        scale_grads: bool = True,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}: known are {list(SCHEDULES)}")
        # torch calls loss_fn itself only to infer shapes.
        super().__init__(
            list(stages), n_microbatches, loss_fn=_no_loss_yet, scale_grads=scale_grads
        )
        self._loss = loss
        self._hidden: Tensor | None = None  # of the shape of the last stage's hidden states
        listed = self._listed(list(stages), schedule)
        stages_of = [sorted({task.stage for task in own}) for own in listed]
        self.order = best_order(listed, costs or _even(len(listed)))
        self._prepare_schedule_with_comms(_lowered(self.order, stages_of), format="compute_comms")
        made: dict[int, Any] = dict(self.pipeline_order_with_comms)
        self.pipeline_order = made
        for kind in LossAction:
            self._comp_type_to_function_map[kind] = self._act  # type: ignore[index]
        self._keeps_graph = loses_nodes()

    def step(self, *args: Any, target: Tensor | None = None, **kwargs: Any) -> Any:
        """Run one step; every rank gives the labels [b, T] of the whole batch as ``target``.

        Raises:
            ValueError: no labels.
        """
        if target is None:
            raise ValueError("every rank computes its rows' share of the loss: give it the labels")
        if not self._has_backward:
            raise ValueError("a spanning schedule has no eval(): use score_tokens on hidden states")
        result = super().step(*args, target=target, **kwargs)
        self._loss.finish()
        return result

    def _listed(self, stages: list[Any], schedule: str) -> list[list[Task]]:
        """Return the order of every rank that torch's own schedule of that name has."""
        ranks = stages[0].group_size
        if schedule == "1F1B":
            if len(stages) != 1:
                raise ValueError(f"1F1B has one stage a rank, got {len(stages)}")
            return one_forward_one_backward(ranks, self._n_microbatches)
        cls = torch_schedules.get_schedule_class(schedule)
        made = cls(stages, n_microbatches=self._n_microbatches, loss_fn=_no_loss_yet)
        listed = []
        for rank in range(ranks):
            actions = [action for action in made.pipeline_order[rank] if action is not None]
            single = [one for action in actions for one in (action.sub_actions or (action,))]
            tasks = [(one.computation_type.value, one.stage_index) for one in single]
            numbers = [one.microbatch_index for one in single]
            listed.append(
                [Task(*task, number) for task, number in zip(tasks, numbers, strict=True)]
            )
        return listed

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._initialize_stages(*args, **kwargs)
        own = None
        stage: Any
        for stage in self._stages:
            if stage.is_last:
                meta = _hidden_of(stage)
                own = (tuple(meta.shape), meta.dtype)
        told = self._loss.tell_shape(own)
        device = self._stages[0].device
        self._hidden = torch.empty(0, dtype=told[1], device=device).new_empty(told[0])
        return result

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, *_: Any
    ) -> None:
        if stage.is_last:
            hidden = output[0] if isinstance(output, tuple) else output
            loss = self._loss.deferred(hidden, mb_index)
            if self._keeps_graph:
                keep_graph(loss)
            self._internal_losses.append(loss)

    def _act(self, action: Any, context: Any) -> None:
        microbatch = action.microbatch_index
        if action.computation_type is LossAction.BROADCAST:
            assert self._hidden is not None
            self._loss.broadcast(microbatch, self._hidden)
        elif action.computation_type is LossAction.STATISTICS:
            self._loss.statistics(microbatch, context.target_mbs[microbatch])
        elif action.computation_type is LossAction.EXCHANGE:
            self._loss.exchange(microbatch)
        else:
            self._loss.gradients(microbatch)


def _hidden_of(stage: Any) -> Any:
    """Return what a stage knows of its first output's shape and dtype."""
    known = getattr(stage, "_stage_meta", None)  # since torch 2.13
    outputs = stage.get_outputs_meta() if known is None else known.outputs
    return outputs[0]


def _no_loss_yet(hidden: Any, labels: Any) -> Tensor:
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden.sum() * 0.0


def _even(ranks: int) -> Costs:
    return Costs(
        forward=lambda stage: 1.0,
        backward_input=lambda stage: 1.0,
        backward_weight=lambda stage: 1.0,
        statistics=[1.0 / ranks] * ranks,
        gradients=[0.5 / ranks] * ranks,
    )


def _lowered(order: Order, stages_of: list[list[int]]) -> dict[int, list[_Action | None]]:
    """Write each rank's part of the order as torch's actions."""
    lists: dict[int, list[_Action | None]] = {rank: [] for rank in range(len(stages_of))}
    computation = _ComputationType
    for event in order.events:
        number = event.microbatch
        if event.kind in ("activations", "gradients"):
            sender, receiver = event.ranks
            forward = event.kind == "activations"
            there = event.stage + 1 if forward else event.stage - 1
            send = computation.SEND_F if forward else computation.SEND_B
            receive = computation.RECV_F if forward else computation.RECV_B
            lists[sender].append(_Action(event.stage, send, number))
            lists[receiver].append(_Action(there, receive, number))
            continue
        for rank in event.ranks:
            if event.kind in ("broadcast", "S", "exchange", "T"):
                kind: Any = LossAction(event.kind)
                stage = stages_of[rank][0]
            else:
                kind, stage = computation(event.kind), event.stage
            lists[rank].append(_Action(stage, kind, number))
    for rank, stages in enumerate(stages_of):  # after the last B, W and T of the rank
        lists[rank] += [_Action(stage, computation.REDUCE_GRAD, None) for stage in stages]
    return lists
