"""What each rank of a pipeline does, in order, and when."""

import functools
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from launch.planning.schedules import SCHEDULES
from vocab_parallel.pipeline.spanning.order import (
    Costs,
    Event,
    Order,
    Task,
    one_forward_one_backward,
    order_of,
)


def stages_of(schedule: str, ranks: int) -> list[list[int]]:
    """Return the stages that each rank of a column runs."""
    found = SCHEDULES[schedule]
    if found.stages == 1:
        return [[rank] for rank in range(ranks)]
    return [
        [rank, 2 * ranks - 1 - rank if found.v_shaped else ranks + rank] for rank in range(ranks)
    ]


@functools.cache
def tasks_of(schedule: str, ranks: int, microbatches: int) -> list[list[Task]]:
    """Return what each rank does, in order; of two stages a rank, torch's own order.

    It follows from the number of ranks, stages and microbatches alone.

    Raises:
        ValueError: microbatches that the schedule cannot run on so many ranks.
    """
    if schedule == "1f1b":
        return one_forward_one_backward(ranks, microbatches)
    if schedule == "gpipe":
        counted = range(microbatches)
        return [
            [Task(kind, rank, m) for kind in ("F", "B") for m in counted] for rank in range(ranks)
        ]
    # Not loaded before it is needed.
    from vocab_parallel.pipeline.spanning import schedule as spanning

    stages = [_stand_in(stage, ranks, 2 * ranks) for stage in stages_of(schedule, ranks)[0]]
    return spanning.tasks_of(stages, SCHEDULES[schedule].name, microbatches)


def alone(
    schedule: str,
    ranks: int,
    microbatches: int,
    times: Sequence[tuple[float, float, float]],
    message: float,
) -> Order:
    """Run a schedule on paper whose last stage has the loss among its passes.

    Args:
        schedule, ranks, microbatches: as `tasks_of` has them.
        times: of each stage, in seconds: forward, and the inputs' and weights' halves of backward.
        message: seconds that an activation or its gradient takes to another rank.

    Raises:
        ValueError: see `tasks_of`.
    """
    forward, inputs, weights = (list(column) for column in zip(*times, strict=True))
    costs = Costs(
        forward=forward.__getitem__,
        backward_input=inputs.__getitem__,
        backward_weight=weights.__getitem__,
        statistics=(),
        gradients=(),
        message=message,
    )
    return order_of(tasks_of(schedule, ranks, microbatches), costs, vocabulary=False)


def most_in_flight(order: Iterable[Task | Event], weights: dict[int, float]) -> dict[int, int]:
    """Return how many microbatches of each stage wait for their backward at the worst moment.

    Args:
        order: of one rank.
        weights: what a microbatch of a stage holds; the worst moment is that of the largest sum.
    """
    waiting = dict.fromkeys(weights, 0)
    worst, held, most = dict(waiting), 0.0, 0.0
    for kind, stage, *_ in order:
        if kind == "F":
            waiting[stage] += 1
            held += weights[stage]
            if held > most:
                worst, most = dict(waiting), held
        elif kind in ("B", "W"):
            waiting[stage] -= 1
            held -= weights[stage]
    return worst


def _stand_in(stage: int, ranks: int, stages: int) -> Any:
    """Make what a schedule asks of a stage before it runs."""
    return SimpleNamespace(
        stage_index=stage,
        num_stages=stages,
        group_rank=0,
        group_size=ranks,
        is_first=stage == 0,
        is_last=stage == stages - 1,
        has_backward=True,
        submod=nn.Identity(),
        stage_index_to_group_rank={},
    )
