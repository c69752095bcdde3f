"""What each rank of a pipeline does, in order."""

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch import nn

Kind = Literal["forward", "backward", "inputs", "weights"]
# torch's names of them; the last two are the halves of a split backward.
KINDS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "inputs", "W": "weights"}
SINGLE = ("1f1b", "gpipe")  # one stage a rank; the others run two
V_SHAPED = ("zbvzerobubble", "dualpipev")
SPLIT = ("interleavedzerobubble", *V_SHAPED)  # the two halves of a backward run apart
_TORCHS = (
    *("1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble"),
    *("ZBVZeroBubble", "DualPipeV"),
)
NAMES = {name.lower(): name for name in _TORCHS}  # as torch and launch.train write them
SCHEDULES = tuple(NAMES)


class Entry(NamedTuple):
    """One microbatch's work on one stage."""

    stage: int
    kind: Kind
    microbatch: int


def stages_of(schedule: str, ranks: int) -> list[list[int]]:
    """Return the stages that each rank of a column runs."""
    if schedule in SINGLE:
        return [[rank] for rank in range(ranks)]
    if schedule in V_SHAPED:
        return [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)]
    return [[rank, ranks + rank] for rank in range(ranks)]


@functools.cache
def orders(schedule: str, ranks: int, microbatches: int) -> list[list[Entry]]:
    """Return what each rank does, in order.

    Of two stages a rank, torch's own orders, which follow from the number of ranks, stages and
    microbatches alone. What torch 2.13 reports of 1F1B starts the last rank at microbatch 1, so
    the orders of one stage a rank are written out here.

    Raises:
        ValueError: an unknown schedule, or microbatches that it cannot run on so many ranks.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: the planner knows {list(SCHEDULES)}")
    if schedule in SINGLE:
        warm = [microbatches if schedule == "gpipe" else ranks - rank for rank in range(ranks)]
        return [list(_one_stage(rank, warm[rank], microbatches)) for rank in range(ranks)]
    # Not loaded before it is needed.
    from torch.distributed.pipelining.schedules import get_schedule_class

    stages = [_stand_in(stage, ranks, 2 * ranks) for stage in stages_of(schedule, ranks)[0]]
    cls: Any = get_schedule_class(schedule)
    found = cls(stages, n_microbatches=microbatches).pipeline_order
    return [list(_entries(found[rank])) for rank in range(ranks)]


def _one_stage(stage: int, warm: int, microbatches: int) -> Iterator[Entry]:
    """Yield so many forwards, then backwards and forwards in turn."""
    for index in range(min(warm, microbatches)):
        yield Entry(stage, "forward", index)
    for done in range(microbatches):
        yield Entry(stage, "backward", done)
        if warm + done < microbatches:
            yield Entry(stage, "forward", warm + done)


def most_in_flight(order: list[Entry], weights: dict[int, float]) -> dict[int, int]:
    """Return how many microbatches of each stage wait for their backward at the worst moment.

    Args:
        order: of one rank.
        weights: what a microbatch of a stage holds; the worst moment is that of the largest sum.
    """
    waiting = dict.fromkeys(weights, 0)
    worst, held, most = dict(waiting), 0.0, 0.0
    for entry in order:
        if entry.kind == "forward":
            waiting[entry.stage] += 1
            held += weights[entry.stage]
            if held > most:
                worst, most = dict(waiting), held
        elif entry.kind != "inputs":
            waiting[entry.stage] -= 1
            held -= weights[entry.stage]
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


def _entries(actions: Any) -> Iterator[Entry]:
    """Yield what is computed: neither pauses, nor communication; pairs one after the other."""
    for action in actions:
        for one in () if action is None else getattr(action, "sub_actions", None) or (action,):
            kind = KINDS.get(one.computation_type.value)
            if kind is not None:
                yield Entry(one.stage_index, kind, one.microbatch_index)
