"""A simulated step: who computes and who waits, under each schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launch.planning.orders import Entry, Kind, orders

# S and T of the loss, where they are no part of the last stage's forward and backward.
SpanKind = Kind | Literal["S", "T"]


class Span(NamedTuple):
    """One microbatch's work on one stage, in seconds from the step's start."""

    rank: int
    stage: int
    kind: SpanKind
    microbatch: int
    start: float
    stop: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a microbatch on one stage, the loss included on the last."""

    forward: float
    backward: float
    weights: float  # of the backward, the weights' half

    @property
    def of(self) -> dict[Kind, float]:
        """The seconds of each kind of work."""
        return {
            "forward": self.forward,
            "backward": self.backward,
            "inputs": self.backward - self.weights,
            "weights": self.weights,
        }


def simulate(
    schedule: str,
    ranks: int,
    microbatches: int,
    times: Sequence[StageTimes],
    transfer: float,
) -> list[Span]:
    """Run the orders, each entry as soon as its input has come and its rank is free.

    Args:
        schedule, ranks, microbatches: as `orders` has them.
        times: of each stage, all ranks' stages in the pipeline's order.
        transfer: seconds that an activation or its gradient takes to another rank.

    Raises:
        ValueError: see `orders`.
    """
    waiting = [list(reversed(order)) for order in orders(schedule, ranks, microbatches)]
    rank_of = {entry.stage: rank for rank, order in enumerate(waiting) for entry in order}
    durations = [one.of for one in times]
    free = [0.0] * ranks
    done: dict[tuple[int, bool, int], float] = {}  # stage, whether forward, microbatch
    spans: list[Span] = []

    def ready(rank: int, entry: Entry) -> float | None:
        """Return when an entry's input is there; None where it is not known yet."""
        forward = entry.kind == "forward"
        before = entry.stage + (-1 if forward else 1)
        if entry.kind == "weights" or before == -1:
            return 0.0
        if before == len(times):
            return done.get((entry.stage, True, entry.microbatch))
        came = done.get((before, forward, entry.microbatch))
        return None if came is None else came + (transfer if rank_of[before] != rank else 0.0)

    while any(waiting):
        before = len(spans)
        for rank, entries in enumerate(waiting):
            while entries and (start := ready(rank, entries[-1])) is not None:
                entry = entries.pop()
                start = max(free[rank], start)
                stop = free[rank] = start + durations[entry.stage][entry.kind]
                spans.append(Span(rank, entry.stage, entry.kind, entry.microbatch, start, stop))
                if entry.kind != "weights":
                    done[entry.stage, entry.kind == "forward", entry.microbatch] = stop
        assert len(spans) > before, f"{schedule} waits for itself"
    return spans
