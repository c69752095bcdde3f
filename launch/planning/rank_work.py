"""What a microbatch takes of each rank where all stages carry the vocabulary: rows and seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from launch.planning.balance import layer_counts
from launch.planning.estimate import Job, Mesh
from launch.planning.hardware import Hardware
from launch.planning.loss_time import passes_seconds
from launch.planning.orders import stages_of
from launch.planning.schedules import SCHEDULES
from vocab_parallel import BackwardPlan, filled_rows, plan_backward
from vocab_parallel.pipeline.spanning.order import Costs

Rows = Literal["balanced", "filled"]


@dataclass(frozen=True)
class RankWork:
    """What a microbatch takes of a column's ranks, before anything is placed.

    Attributes:
        ranks: the stages that each runs.
        counts: layers of every stage.
        forward: seconds of a stage's layers.
        again: whether they run once more in backward.
        rows: of each rank, the most of its V.
        plans: of the loss on them; None for no rows.
        passes: S and T, in seconds.
    """

    ranks: list[list[int]]
    counts: list[int]
    forward: list[float]
    again: bool
    rows: list[int]
    plans: list[BackwardPlan | None]
    passes: list[tuple[float, float]]

    @classmethod
    def of(cls, job: Job, mesh: Mesh, hardware: Hardware, rows: Rows) -> Self:
        """Estimate it on a mesh, with equally many rows a rank or filled ones."""
        shape = job.shape
        ranks = stages_of(job.schedule, mesh.pipeline)
        counts = layer_counts(shape.layers, sum(map(len, ranks)), 0.0)
        layer = shape.layer_flops(job.tokens, job.sequence) / hardware.layer_flops
        forward = [count * layer for count in counts]
        even = -(-shape.vocabulary // (mesh.pipeline * mesh.vocab))
        held = [even] * mesh.pipeline
        if rows == "filled":
            factor = 4 if job.recompute_layers else 3
            loads = [factor * sum(forward[stage] for stage in own) for own in ranks]
            _, passes = _loss_of(job, mesh, hardware, even)
            counted = filled_rows(
                shape.vocabulary,
                [load for load in loads for _ in range(mesh.vocab)],
                sum(passes) / even,
            )
            held = [
                max(counted[rank * mesh.vocab : (rank + 1) * mesh.vocab])
                for rank in range(mesh.pipeline)
            ]
        found = {number: _loss_of(job, mesh, hardware, number) for number in set(held)}
        return cls(
            ranks=ranks,
            counts=counts,
            forward=forward,
            again=job.recompute_layers,
            rows=held,
            plans=[found[number][0] for number in held],
            passes=[found[number][1] for number in held],
        )

    @property
    def layers_of_ranks(self) -> list[float]:
        """Seconds of each rank's layers."""
        factor = 4 if self.again else 3
        return [factor * sum(self.forward[stage] for stage in own) for own in self.ranks]

    @property
    def of_ranks(self) -> list[float]:
        """Seconds of each rank."""
        both = zip(self.layers_of_ranks, self.passes, strict=True)
        return [layers + sum(passes) for layers, passes in both]

    def costs(self, job: Job, mesh: Mesh, hardware: Hardware) -> Costs:
        """Return how long everything takes, in seconds."""
        inputs = 2.0 if self.again else 1.0
        of_column = job.tokens * job.shape.hidden
        of_all = mesh.vocab * of_column
        link = hardware.link_of(mesh.ranks)
        gathered = 8 * mesh.pipeline * mesh.vocab * mesh.vocab * job.tokens
        return Costs(
            forward=lambda stage: self.forward[stage],
            backward_input=lambda stage: inputs * self.forward[stage],
            backward_weight=lambda stage: self.forward[stage],
            statistics=[s for s, _ in self.passes],
            gradients=[t for _, t in self.passes],
            message=of_column * job.itemsize / link,
            broadcast=of_all * job.itemsize / link,
            exchange=(4 * of_all + gathered) / link,
        )


def _loss_of(
    job: Job, mesh: Mesh, hardware: Hardware, rows: int
) -> tuple[BackwardPlan | None, tuple[float, float]]:
    """Plan the loss of all columns' tokens on some rows; return S and T in seconds besides."""
    if rows == 0:
        return None, (0.0, 0.0)
    tokens, hidden = mesh.vocab * job.tokens, job.shape.hidden
    backward_plan = plan_backward(
        tokens,
        rows,
        hidden,
        job.torch_dtype,
        memory_budget=job.memory_budget,
        microbatches_in_flight=SCHEDULES[job.schedule].held,
        degree=mesh.pipeline * mesh.vocab,
        in_spans=False,  # dE is reduced when all of it is there
    )
    return backward_plan, passes_seconds(
        backward_plan, tokens, rows, hidden, job.itemsize, hardware
    )


def filling_helps(job: Job, pipeline: int) -> bool:
    """Tell whether ranks have different numbers of layers, so that rows can even them out."""
    ranks = stages_of(job.schedule, pipeline)
    counts: Sequence[int] = layer_counts(job.shape.layers, sum(map(len, ranks)), 0.0)
    return len({sum(counts[stage] for stage in own) for own in ranks}) > 1
