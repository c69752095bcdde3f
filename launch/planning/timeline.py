"""A simulated step: who computes and who waits, under GPipe and 1F1B."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SCHEDULES = ("1f1b", "gpipe")
Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Span:
    """One microbatch's work on one stage, in seconds from the step's start."""

    stage: int
    kind: Kind
    microbatch: int
    start: float
    stop: float


def orders(schedule: str, stages: int, microbatches: int) -> list[list[tuple[Kind, int]]]:
    """Return what each stage does, in order.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: the planner knows {list(SCHEDULES)}")
    found: list[list[tuple[Kind, int]]] = []
    for stage in range(stages):
        warm = microbatches if schedule == "gpipe" else min(stages - stage, microbatches)
        order: list[tuple[Kind, int]] = [("forward", index) for index in range(warm)]
        for done in range(microbatches):
            order.append(("backward", done))
            if warm + done < microbatches:
                order.append(("forward", warm + done))
        found.append(order)
    return found


def simulate(
    schedule: str,
    microbatches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float,
) -> list[Span]:
    """Run the orders, each entry as soon as its input has come and its stage is free.

    Args:
        schedule: "1f1b" or "gpipe".
        microbatches: of the step.
        forward, backward: seconds of a microbatch on each stage, the loss included on the last.
        transfer: seconds that an activation or its gradient takes to the next stage.
    """
    stages = len(forward)
    waiting = [list(reversed(order)) for order in orders(schedule, stages, microbatches)]
    free = [0.0] * stages
    done: dict[tuple[int, Kind, int], float] = {}
    spans: list[Span] = []
    while any(waiting):
        for stage in range(stages):
            while waiting[stage]:
                kind, index = waiting[stage][-1]
                ready = _ready(done, stage, kind, index, stages, transfer)
                if ready is None:
                    break
                waiting[stage].pop()
                start = max(free[stage], ready)
                stop = start + (forward if kind == "forward" else backward)[stage]
                free[stage] = done[stage, kind, index] = stop
                spans.append(Span(stage, kind, index, start, stop))
    return spans


def _ready(
    done: dict[tuple[int, Kind, int], float],
    stage: int,
    kind: Kind,
    index: int,
    stages: int,
    transfer: float,
) -> float | None:
    """Return when an entry's input is there; None where it is not known yet."""
    if kind == "forward":
        if stage == 0:
            return 0.0
        before = done.get((stage - 1, "forward", index))
    elif stage == stages - 1:
        return done.get((stage, "forward", index))
    else:
        before = done.get((stage + 1, "backward", index))
    return None if before is None else before + transfer
