"""What a microbatch takes of each rank where all stages carry the vocabulary: rows and seconds."""

from collections.abc import Sequence
from typing import Literal

from launch.planning.balance import layer_counts
from launch.planning.estimate import Job, Mesh
from launch.planning.hardware import Hardware
from launch.planning.loss_time import passes_seconds
from launch.planning.orders import stages_of
from launch.planning.schedules import SCHEDULES
from vocab_parallel import BackwardPlan, filled_rows
from vocab_parallel.pipeline.spanning.order import Costs

Rows = Literal["balanced", "filled"]


class RankWork:
    """What a microbatch takes of a column's ranks on a mesh, before anything is placed.

    Args:
        job, mesh, hardware: what is trained, and where.
        rows: ranks have equally many, or those with fewer layers more.

    Attributes:
        ranks: the stages that each runs.
        counts: layers of every stage.
        forward: seconds of a stage's layers.
        layers_of_ranks: seconds of each rank's layers.
        of_ranks: seconds of each rank.
        rows: of each rank, the most of its V.
        plans: of the loss on them; None for no rows.
        passes: S and T, in seconds.
    """

    def __init__(self, job: Job, mesh: Mesh, hardware: Hardware, rows: Rows) -> None:
        shape = job.shape
        self.job, self.mesh, self.hardware = job, mesh, hardware
        self.ranks = stages_of(job.schedule, mesh.pipeline)
        self.counts = layer_counts(shape.layers, sum(map(len, self.ranks)), 0.0)
        layer = job.layer_seconds(hardware)
        self.forward = [count * layer for count in self.counts]
        factor = 4 if job.recompute_layers else 3
        self.layers_of_ranks = [
            factor * sum(self.forward[stage] for stage in own) for own in self.ranks
        ]
        even = -(-shape.vocabulary // (mesh.pipeline * mesh.vocab))
        self.rows = [even] * mesh.pipeline
        if rows == "filled":
            counted = filled_rows(
                shape.vocabulary,
                [load for load in self.layers_of_ranks for _ in range(mesh.vocab)],
                sum(self._loss_of(even)[1]) / even,
            )
            self.rows = [
                max(counted[rank * mesh.vocab : (rank + 1) * mesh.vocab])
                for rank in range(mesh.pipeline)
            ]
        losses = {number: self._loss_of(number) for number in set(self.rows)}
        self.plans = [losses[number][0] for number in self.rows]
        self.passes = [losses[number][1] for number in self.rows]
        both = zip(self.layers_of_ranks, self.passes, strict=True)
        self.of_ranks = [layers + sum(passes) for layers, passes in both]

    def costs(self) -> Costs:
        """Return how long everything takes, in seconds."""
        mesh, itemsize = self.mesh, self.job.itemsize
        inputs = 2.0 if self.job.recompute_layers else 1.0
        of_column = self.job.tokens * self.job.shape.hidden
        of_all = mesh.vocab * of_column
        link = self.hardware.link_of(mesh.ranks)
        gathered = 8 * mesh.pipeline * mesh.vocab * mesh.vocab * self.job.tokens
        return Costs(
            forward=lambda stage: self.forward[stage],
            backward_input=lambda stage: inputs * self.forward[stage],
            backward_weight=lambda stage: self.forward[stage],
            statistics=[s for s, _ in self.passes],
            gradients=[t for _, t in self.passes],
            message=of_column * itemsize / link,
            broadcast=of_all * itemsize / link,
            exchange=(4 * of_all + gathered) / link,
        )

    def _loss_of(self, rows: int) -> tuple[BackwardPlan | None, tuple[float, float]]:
        """Plan the loss of all columns' tokens on some rows; return S and T in seconds besides."""
        if rows == 0:
            return None, (0.0, 0.0)
        job, mesh = self.job, self.mesh
        tokens = mesh.vocab * job.tokens
        backward_plan = job.plan_loss(
            tokens,
            rows,
            mesh.pipeline * mesh.vocab,
            microbatches_in_flight=SCHEDULES[job.schedule].held,
            in_spans=False,  # dE is reduced when all of it is there
        )
        return backward_plan, passes_seconds(
            backward_plan, tokens, rows, job.shape.hidden, job.itemsize, self.hardware
        )


def filling_helps(job: Job, pipeline: int) -> bool:
    """Tell whether ranks have different numbers of layers, so that rows can even them out."""
    ranks = stages_of(job.schedule, pipeline)
    counts: Sequence[int] = layer_counts(job.shape.layers, sum(map(len, ranks)), 0.0)
    return len({sum(counts[stage] for stage in own) for own in ranks}) > 1
