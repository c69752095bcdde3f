"""A step's milliseconds from measured pieces: every place of the vocabulary, nothing is run.

All are of one column of P ranks, which has microbatches of its own. A stage may hold no layers.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launch.planning.orders import alone, stages_of, tasks_of
from vocab_parallel import filled_rows
from vocab_parallel.pipeline.spanning.order import Costs, best_order


@dataclass(frozen=True)
class Pieces:
    """Milliseconds of a microbatch.

    Attributes:
        layers, vocabulary: of the model.
        layer_forward, layer_backward: of a decoder layer.
        loss: all of it, on the whole vocabulary.
        group_loss: of all columns' tokens on one of V ranks' rows, V x T tokens on R / V rows.
        passes: S and T by the number of rows.
        message: hidden states from a rank to the next.
        broadcast, exchange: of the vocab group of all stages.
        group_link: what a vocab group of the last stage communicates.
    """

    layers: int
    vocabulary: int
    layer_forward: float
    layer_backward: float
    loss: float
    group_loss: float
    passes: Mapping[int, tuple[float, float]]
    message: float
    broadcast: float
    exchange: float
    group_link: float

    @property
    def layer(self) -> float:
        """Forward and backward of a decoder layer."""
        return self.layer_forward + self.layer_backward

    def passes_of(self, rows: int) -> tuple[float, float]:
        """Return S and T of some rows: as measured, between two measured numbers in proportion."""
        known = sorted(self.passes)
        above = min(bisect.bisect_left(known, rows), len(known) - 1)
        high = known[above]
        low = known[above - 1] if above else 0
        low_passes = self.passes[low] if above else (0.0, 0.0)
        share = (rows - low) / (high - low)
        s, t = (a + share * (b - a) for a, b in zip(low_passes, self.passes[high], strict=True))
        return s, t


@dataclass(frozen=True)
class Pipeline:
    """A schedule on P ranks, with M microbatches."""

    schedule: str
    ranks: int
    microbatches: int

    @property
    def stages(self) -> list[list[int]]:
        """The stages that each rank runs."""
        return stages_of(self.schedule, self.ranks)


@dataclass(frozen=True)
class Spanned:
    """A step over all stages.

    Attributes:
        milliseconds: of it.
        rows: of each rank.
        in_flight: the most microbatches of any stage.
        hidden_held: microbatches whose hidden states a rank holds for the loss.
    """

    milliseconds: float
    rows: list[int]
    in_flight: int
    hidden_held: int


def ideal(pieces: Pieces, pipeline: Pipeline, *, whole_layers: bool = False) -> float:
    """Return (layers + loss) / P for each microbatch, and the bubble of the schedule's own step.

    Args:
        pieces, pipeline: what is simulated.
        whole_layers: whether the busiest rank has a whole number of layers, at least: no loss can
            even out more than what it takes.
    """
    count = sum(map(len, pipeline.stages))
    alone = _simulated(pieces, pipeline, [pieces.layers / count] * count, 0.0, 0.0, message=0.0)
    each = pieces.layers * pieces.layer / pipeline.ranks
    busiest = each + pieces.loss / pipeline.ranks
    if whole_layers:
        busiest = max(busiest, -(-pieces.layers // pipeline.ranks) * pieces.layer)
    return alone + pipeline.microbatches * (busiest - each)


def equal(pieces: Pieces, pipeline: Pipeline) -> float:
    """Return the step of equally many layers a stage, the loss on the last besides."""
    counts = spread(pieces.layers, sum(map(len, pipeline.stages)))
    return _simulated(pieces, pipeline, counts, pieces.loss, 0.0)


def rebalanced(
    pieces: Pieces, pipeline: Pipeline, *, group: bool = False
) -> tuple[float, list[int]]:
    """Return the step of the best number of layers on the last stage, and all numbers.

    The others have equally many. Where a rank runs two stages, the best number on the other stage
    of the last one's rank is looked for too.

    Args:
        pieces, pipeline: what is simulated.
        group: whether the last stage has V ranks that share the vocabulary, with equal GPUs: V
            columns, whose communication waits.
    """
    loss = pieces.group_loss if group else pieces.loss
    link = pieces.group_link if group else 0.0
    found = (
        (_simulated(pieces, pipeline, counts, loss, link), counts)
        for counts in _layers_on_the_last(pieces.layers, pipeline.stages)
    )
    return min(found, key=lambda one: one[0])


def spanning(pieces: Pieces, pipeline: Pipeline, *, filled: bool) -> Spanned:
    """Return the step over all stages, in the order that is run."""
    stages = pipeline.stages
    counts = spread(pieces.layers, sum(map(len, stages)))
    rows = [-(-pieces.vocabulary // pipeline.ranks)] * pipeline.ranks
    if filled:
        loads = [pieces.layer * sum(counts[stage] for stage in own) for own in stages]
        cost = sum(pieces.passes_of(rows[0])) / rows[0]
        rows = filled_rows(pieces.vocabulary, loads, cost)
    passes = [pieces.passes_of(number) for number in rows]
    half = pieces.layer_backward / 2  # inputs and weights
    costs = Costs(
        forward=lambda stage: counts[stage] * pieces.layer_forward,
        backward_input=lambda stage: counts[stage] * half,
        backward_weight=lambda stage: counts[stage] * half,
        statistics=[s for s, _ in passes],
        gradients=[t for _, t in passes],
        message=pieces.message,
        broadcast=pieces.broadcast,
        exchange=pieces.exchange,
    )
    order = best_order(tasks_of(pipeline.schedule, pipeline.ranks, pipeline.microbatches), costs)
    return Spanned(order.finish, rows, max(order.in_flight.values()), order.hidden_held)


def spread(layers: int, stages: int) -> list[int]:
    """Return equally many layers for every stage, one more for the first ones."""
    share, more = divmod(layers, stages)
    return [share + (stage < more) for stage in range(stages)]


def _layers_on_the_last(layers: int, ranks: list[list[int]]) -> Iterator[list[int]]:
    """Yield layers of all stages, with every number on the last stage up to an equal share."""
    count = sum(map(len, ranks))
    beside = [stage for own in ranks if count - 1 in own for stage in own if stage != count - 1]
    most = -(-layers // count)
    for own in itertools.product(range(most + 1), repeat=1 + len(beside)):
        left = layers - sum(own)
        others = [stage for stage in range(count - 1) if stage not in beside]
        if left < 0 or (left > 0 and not others):
            continue
        counts = [0] * count
        for stage, number in zip([count - 1, *beside], own, strict=True):
            counts[stage] = number
        for stage, number in zip(others, spread(left, len(others)), strict=True):
            counts[stage] = number
        yield counts


def _simulated(
    pieces: Pieces,
    pipeline: Pipeline,
    counts: list[int] | list[float],
    loss: float,
    link: float,
    message: float | None = None,
) -> float:
    """Simulate the loss on the last stage: a third of it in forward, a third in each half after."""
    half = pieces.layer_backward / 2
    times = [(count * pieces.layer_forward, count * half, count * half) for count in counts]
    forward, inputs, weights = times[-1]
    times[-1] = (forward + loss / 3, inputs + loss / 3 + link, weights + loss / 3)
    order = alone(
        pipeline.schedule,
        pipeline.ranks,
        pipeline.microbatches,
        times,
        pieces.message if message is None else message,
    )
    return order.finish
