"""A mesh whose every stage carries the vocabulary: the order of its step, and what it holds.

Each of the P x V ranks holds rows of the classifier and of the embedding (tied: of one parameter),
and does its share of every microbatch's loss between its own layers. Two answers for a step:

    formula     the schedule's own step of the layers alone; for each microbatch what the loss adds
                to the busiest rank; and one microbatch's way through the loss, for nothing else is
                left to do then
    simulated   the order that `vocab_parallel.pipeline` would run, with the seconds of this
                hardware. Of 4 P microbatches or more, 2 P and some are simulated, and P more: what
                those add, each further round of P adds, for there every round is like the one
                before

A simulation costs up to seconds, so there is one where it matters, and its ratio to the formula is
kept for other vocab degrees, whose V columns have a loss of V times the tokens on 1 / V of the
rows. The vocab group's messages run beside the layers, as the order places them.
"""

from dataclasses import dataclass

from launch.planning.estimate import Job, LossShare, Mesh, StageEstimate, estimate_parts
from launch.planning.hardware import Hardware
from launch.planning.orders import most_in_flight, tasks_of
from launch.planning.rank_work import RankWork, Rows
from launch.planning.schedules import SCHEDULES
from launch.planning.step import Step
from vocab_parallel.pipeline.spanning.order import (
    Costs,
    Event,
    Order,
    Task,
    best_order,
    more_forwards,
    order_of,
)

# S leaves kept logits as they are, and makes their gradient beside them in so many parts.
_PARTS = 4
# What a rank keeps of the loss from S to T is counted like a stage, under this index.
_LOSS = -1


class SpanningPlanner:
    """Plans meshes whose every stage carries the vocabulary, and remembers what it simulated."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._alone: dict[tuple[Job, int], float] = {}  # seconds of the layers' own step
        self._ratios: dict[tuple[Job, int, Rows], float] = {}

    def step(self, job: Job, mesh: Mesh, rows: Rows, *, simulated: bool) -> Step:
        """Plan a step.

        Args:
            job: what is to be trained.
            mesh: its degrees.
            rows: ranks have equally many, or those with fewer layers more.
            simulated: whether this mesh's own order is simulated.

        Raises:
            ValueError: the schedule cannot run on so many ranks and microbatches.
        """
        work = RankWork(job, mesh, self._hardware, rows)
        costs = work.costs()
        seconds = self._formula(work, costs)
        key = (job, mesh.pipeline, rows)
        passes: list[Event] = []
        if simulated:
            order, found = simulate_spanning(job.schedule, job.microbatches, costs)
            self._ratios[key] = found / seconds
            seconds, held = found, _Held.of_order(order, work)
            passes = order.passes
        else:
            seconds *= self._ratios.get(key, 1.0)
            held = _Held.expected(work)
        moved = _collective_bytes(job, mesh)
        seconds = max(seconds, job.microbatches * moved / self._hardware.link_of(mesh.ranks))
        busy = job.microbatches * sum(work.of_ranks)
        return Step(
            stages=_stages(work, held, moved),
            ranks=work.ranks,
            seconds=seconds,
            bubble=1 - busy / (seconds * len(work.ranks)),
            microbatches=job.microbatches,
            passes=passes,
            drawn=_fewer(job.microbatches, mesh.pipeline) if simulated else 0,
            simulated=simulated,
            hidden_held=held.hidden,
        )

    def _formula(self, work: RankWork, costs: Costs) -> float:
        """Return a step's seconds without its order."""
        job, ranks = work.job, len(work.ranks)
        if (job, ranks) not in self._alone:
            tasks = tasks_of(job.schedule, ranks, job.microbatches)
            self._alone[job, ranks] = order_of(tasks, costs, vocabulary=False).finish
        of_loss = max(work.of_ranks) - max(work.layers_of_ranks)
        through = costs.broadcast + max(costs.statistics) + costs.exchange
        return self._alone[job, ranks] + job.microbatches * of_loss + through


def simulate_spanning(schedule: str, microbatches: int, costs: Costs) -> tuple[Order, float]:
    """Return the order of a step, and the seconds of all its microbatches.

    Args:
        schedule: one that can span.
        microbatches: of a column. The order is that of fewer, where there are 4 P or more.
        costs: of P ranks, in seconds.

    Raises:
        ValueError: the schedule cannot run on so many ranks and microbatches.
    """
    ranks = len(costs.statistics)
    fewer = _fewer(microbatches, ranks)
    order = best_order(tasks_of(schedule, ranks, fewer), costs)
    if fewer == microbatches:
        return order, order.finish
    round_more = best_order(tasks_of(schedule, ranks, fewer + ranks), costs).finish - order.finish
    return order, order.finish + (microbatches - fewer) // ranks * round_more


def _fewer(microbatches: int, ranks: int) -> int:
    """Return of how many microbatches a step is simulated: two rounds of P, and what is over."""
    return microbatches if microbatches < 4 * ranks else 2 * ranks + microbatches % ranks


def _collective_bytes(job: Job, mesh: Mesh) -> float:
    """Return what a rank's link moves for the vocab group, a microbatch of every column.

    Hidden states, the share of dE in float32, statistics; embeddings and their gradient.
    """
    degree = mesh.pipeline * mesh.vocab
    tokens = mesh.vocab * job.tokens
    each = job.shape.hidden * (3 * job.itemsize + 4) + 8 * degree
    return tokens * each * (1 - 1 / degree)


@dataclass(frozen=True)
class _Held:
    """What a rank holds at its worst moment, in microbatches.

    Attributes:
        waiting: of each stage, between forward and backward.
        hidden: between the broadcast of hidden states and T.
        shares: of each rank, between S and T.
    """

    waiting: dict[int, int]
    hidden: int
    shares: list[int]

    @classmethod
    def of_order(cls, order: Order, work: RankWork) -> "_Held":
        """Count in an order: what a rank keeps of layers is most when it keeps less of the loss."""
        waiting: dict[int, int] = {}
        shares = []
        layer = work.job.layer_bytes(work.hardware)
        numbers = work.mesh.vocab * work.job.tokens * work.job.shape.hidden
        for rank, own in enumerate(work.ranks):
            plan = work.plans[rank]
            share = numbers * 4 + (0 if plan is None else plan.kept_bytes)
            sizes = {stage: work.counts[stage] * layer for stage in own}
            own_passes = [_counted(event) for event in order.passes if rank in event.ranks]
            counted = most_in_flight(own_passes, {**sizes, _LOSS: share})
            shares.append(counted.pop(_LOSS))
            waiting |= counted
        return cls(waiting, order.hidden_held, shares)

    @classmethod
    def expected(cls, work: RankWork) -> "_Held":
        """Count what the schedule's own order has with a forward more."""
        job = work.job
        waiting: dict[int, int] = {}
        fewer = _fewer(job.microbatches, len(work.ranks))
        for rank, own in enumerate(tasks_of(job.schedule, len(work.ranks), fewer)):
            weights = {stage: float(work.counts[stage]) for stage in work.ranks[rank]}
            waiting |= most_in_flight(more_forwards(own, 1), weights)
        most = min(SCHEDULES[job.schedule].held, job.microbatches)
        return cls(waiting, most, [most] * len(work.ranks))


def _counted(event: Event) -> Event | Task:
    """Return a pass as it is counted in flight: S begins what T ends."""
    if event.kind in ("S", "T"):
        return Task("F" if event.kind == "S" else "B", _LOSS, event.microbatch)
    return event


def _stages(work: RankWork, held: _Held, moved: float) -> list[StageEstimate]:
    """Estimate every stage; a rank's rows belong to its first one."""
    losses = {
        own[0]: LossShare(
            rows=work.rows[rank],
            loss=_loss_bytes(work, rank, held),
            statistics_seconds=work.passes[rank][0],
            gradients_seconds=work.passes[rank][1],
            loss_way="" if (plan := work.plans[rank]) is None else plan.backward,
            collective_bytes=moved,
        )
        for rank, own in enumerate(work.ranks)
    }
    times = 1 if work.job.shape.tied else 2
    vocabulary = {stage: times * loss.rows for stage, loss in losses.items()}
    return estimate_parts(
        work.job, work.mesh, work.hardware, work.counts, held.waiting, vocabulary, losses
    )


def _loss_bytes(work: RankWork, rank: int, held: _Held) -> float:
    """Return what a rank holds for the loss beside its rows and their gradient.

    Hidden states from their broadcast to T, the float32 share of dE from S to T, what the loss's
    own plan says; T adds to the rows' gradient, which the plan has a second time.
    """
    job, backward_plan, shares = work.job, work.plans[rank], held.shares[rank]
    numbers = work.mesh.vocab * job.tokens * job.shape.hidden
    found = float(held.hidden * numbers * job.itemsize + shares * numbers * 4)
    if backward_plan is None:
        return found
    found += (shares - SCHEDULES[job.schedule].held) * backward_plan.kept_bytes
    if backward_plan.backward == "probs":
        found += backward_plan.kept_bytes / _PARTS
    return found + backward_plan.peak_bytes - work.rows[rank] * job.shape.hidden * job.itemsize
