"""The schedules that there are: one list, without torch."""

from typing import NamedTuple


class Schedule(NamedTuple):
    """One of torch.distributed.pipelining's.

    Attributes:
        name: torch's.
        stages: of a rank.
        v_shaped: whether the last stage is on the first rank.
        splits: whether the two halves of a backward run apart.
        fills: whether it takes no fewer microbatches than stages, with the vocabulary on the last.
        held: where all stages carry the vocabulary, of how many microbatches a rank has done S and
            not T: more than two wait for T no longer than they must. 0 where they cannot.
    """

    name: str
    stages: int
    v_shaped: bool = False
    splits: bool = False
    fills: bool = False
    held: int = 0


# By their names in small letters, which the planner uses.
SCHEDULES = {
    one.name.lower(): one
    for one in (
        Schedule("1F1B", 1, fills=True, held=3),
        Schedule("GPipe", 1),
        Schedule("Interleaved1F1B", 2, held=3),
        Schedule("LoopedBFS", 2, held=4),
        Schedule("InterleavedZeroBubble", 2, splits=True, held=3),
        Schedule("ZBVZeroBubble", 2, v_shaped=True, splits=True, held=3),
        Schedule("DualPipeV", 2, v_shaped=True, splits=True),
    )
}
