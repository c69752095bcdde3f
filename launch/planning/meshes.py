"""Every mesh of so many GPUs: which fit, and the fastest first."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from launch.planning.estimate import Job, Mesh, estimate_stages
from launch.planning.hardware import Hardware
from launch.planning.orders import alone, stages_of
from launch.planning.rank_work import Rows, filling_helps
from launch.planning.schedules import SCHEDULES
from launch.planning.spanning import SpanningPlanner
from launch.planning.step import Step

VocabOver = Literal["last-stage", "all-stages"]
MOST_VOCAB = 64  # the largest vocab degree that is looked at
MOST_GPUS = 1024  # of one copy, of which the least number that fits is looked for


@dataclass(frozen=True, kw_only=True)
class MeshPlan(Step):
    """What one mesh holds, and how long its step takes: that of a column, and of the whole mesh.

    Attributes:
        vocab_over: whose ranks hold rows of the vocabulary.
        rows: "filled" where ranks with fewer layers have more of them.
        recompute_layers: whether layers run again in backward, since nothing else fits.
        step_seconds: of one optimizer step, the replicas' sum of gradients included.
        tokens_per_second: of the whole mesh.
        flops_per_second: of the whole mesh, of the model's mathematics: nothing that runs again.
        missing: bytes that the fullest rank lacks; 0 where it fits.
    """

    mesh: Mesh
    vocab_over: VocabOver
    rows: Rows
    recompute_layers: bool
    step_seconds: float
    tokens_per_second: float
    flops_per_second: float
    missing: float

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.missing <= 0.0

    @property
    def imbalance(self) -> float:
        """The last stage's time of a microbatch over the slowest other one's; 1 if alone."""
        times = [
            stage.forward_seconds + stage.backward_seconds + stage.loss_seconds
            for stage in self.stages
        ]
        return times[-1] / max(times[:-1]) if len(times) > 1 else 1.0


def plan_meshes(
    job: Job,
    gpus: int,
    hardware: Hardware,
    vocab_over: tuple[VocabOver, ...] = ("last-stage", "all-stages"),
    batch: int | None = None,
) -> list[MeshPlan]:
    """Plan every mesh; those that fit first, by tokens a second, then by what is missing.

    A mesh is planned with the vocabulary on the last stage, its layers balanced against the loss,
    and on all stages, with equally many rows a rank or filled rows, whichever is better. With a
    batch, sequences of a step over all columns, a mesh has as many microbatches as that makes.

    Raises:
        ValueError: no GPUs, a batch that no mesh can share, less memory than one layer's weights
            and state need, or a schedule that runs on no mesh, or not with the vocabulary on all
            stages.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    least = max(job.shape.layer_parameters) * (2 * job.itemsize + job.state_bytes)
    if hardware.memory < least:
        raise ValueError(
            f"--gpu-memory {hardware.memory / 1e9:.2f}GB is below one layer of {job.shape.name}, "
            f"whose weights, gradients and optimizer state are {least / 1e9:.2f} GB"
        )
    if vocab_over == ("all-stages",) and not SCHEDULES[job.schedule].held:
        raise ValueError(
            f"--schedule {job.schedule} has the vocabulary on the last stage alone: --vocab-over "
            f"all-stages takes one of {[name for name, one in SCHEDULES.items() if one.held]}"
        )
    planner = MeshPlanner(hardware, batch)
    plans: list[MeshPlan] = []
    refused = "all-stages needs at least 2 pipeline ranks, and as many layers as stages"
    for mesh in _meshes(gpus, job):
        try:
            plans += planner.places(job, mesh, vocab_over)
        except ValueError as error:  # of the schedule, for this pipeline degree, or of the batch
            refused = str(error)
    if not plans:
        raise ValueError(f"--schedule {job.schedule} runs on no mesh of {gpus} GPUs: {refused}")
    return _best_first(planner.with_own_order(job, _best_first(plans)))


def least_gpus(
    job: Job,
    hardware: Hardware,
    vocab_over: tuple[VocabOver, ...],
    batch: int | None = None,
) -> int | None:
    """Return the least number of GPUs of which a mesh fits; None where none of `MOST_GPUS` does.

    Copies over the data axis need no less each, and are left out.
    """
    planner = MeshPlanner(hardware, batch)
    shape = job.shape
    again = job.activation_bytes(hardware)  # of a layer that runs again
    if again > hardware.room:
        return None
    body = sum(shape.layer_parameters) + shape.vocabulary_parameters
    fewest = max(1, int(body * (2 * job.itemsize + job.state_bytes) / hardware.room))
    for gpus in range(fewest, MOST_GPUS + 1):
        for mesh in _meshes(gpus, job):
            if mesh.data > 1:
                continue
            with contextlib.suppress(ValueError):  # of the schedule or the batch, for this mesh
                if any(plan.fits for plan in planner.places(job, mesh, vocab_over)):
                    return gpus
    return None


def best_of(plans: list[MeshPlan], vocab_over: VocabOver) -> MeshPlan | None:
    """Return the first of sorted plans that has the vocabulary there."""
    return next((plan for plan in plans if plan.vocab_over == vocab_over), None)


def _best_first(plans: list[MeshPlan]) -> list[MeshPlan]:
    return sorted(plans, key=lambda plan: (max(plan.missing, 0.0), -plan.tokens_per_second))


def _meshes(gpus: int, job: Job) -> Iterator[Mesh]:
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for pipeline in divisors:
        if sum(map(len, stages_of(job.schedule, pipeline))) > job.shape.layers:
            break
        for vocab in divisors:
            if (gpus // pipeline) % vocab == 0 and vocab <= min(job.shape.vocabulary, MOST_VOCAB):
                yield Mesh(gpus // pipeline // vocab, pipeline, vocab)


class MeshPlanner:
    """Plans meshes one by one, and remembers what it simulated.

    Args:
        hardware: of each GPU.
        batch: sequences of a step over all columns, from which microbatches follow; None keeps the
            job's microbatches.
    """

    def __init__(self, hardware: Hardware, batch: int | None = None) -> None:
        self._hardware, self._batch = hardware, batch
        self._spanning = SpanningPlanner(hardware)

    def places(self, job: Job, mesh: Mesh, vocab_over: tuple[VocabOver, ...]) -> list[MeshPlan]:
        """Plan a mesh with the vocabulary in each of these places that its schedule has.

        Raises:
            ValueError: the schedule does not run on it, or it cannot share the batch.
        """
        schedule, microbatches = SCHEDULES[job.schedule], self._of_batch(job, mesh).microbatches
        too_few = schedule.fills and microbatches < mesh.pipeline
        can = {"last-stage": not too_few, "all-stages": schedule.held and mesh.pipeline > 1}
        found = [self.plan(job, mesh, one) for one in vocab_over if can[one]]
        if too_few and not found:
            raise ValueError(f"{microbatches} microbatches are fewer than {mesh.pipeline} stages")
        return found

    def plan(
        self, job: Job, mesh: Mesh, vocab_over: VocabOver, *, simulated: bool = False
    ) -> MeshPlan:
        """Plan a mesh; of the vocabulary on all stages, the better of balanced and filled rows.

        Args:
            job, mesh, vocab_over: what is planned.
            simulated: whether its own order is simulated where all stages carry the vocabulary.

        Raises:
            ValueError: the schedule does not run on it, or it cannot share the batch.
        """
        job = self._of_batch(job, mesh)
        plans = [self._with_rows(job, mesh, vocab_over, "balanced", simulated)]
        if vocab_over == "all-stages" and filling_helps(job, mesh.pipeline):
            plans.append(self._with_rows(job, mesh, vocab_over, "filled", simulated))
        return _best_first(plans)[0]

    def with_own_order(self, job: Job, plans: list[MeshPlan]) -> list[MeshPlan]:
        """Simulate the best mesh's own order, until it is the best by that.

        Others of its pipeline degree, which come behind it, are corrected by what that changes.
        """
        while (best := best_of(plans, "all-stages")) is not None and not best.simulated:
            plans = _best_first(
                [
                    self.plan(job, one.mesh, one.vocab_over, simulated=one is best)
                    if one.vocab_over == "all-stages"
                    and one.mesh.pipeline == best.mesh.pipeline
                    and not one.simulated
                    else one
                    for one in plans
                ]
            )
        return plans

    def _of_batch(self, job: Job, mesh: Mesh) -> Job:
        """Return the job with as many microbatches as the batch makes on a mesh."""
        if self._batch is None:
            return job
        piece = mesh.columns * job.microbatch
        if self._batch % piece:
            raise ValueError(
                f"a batch of {self._batch} sequences is no multiple of data x vocab x --microbatch "
                f"= {mesh.data} x {mesh.vocab} x {job.microbatch}"
            )
        return replace(job, microbatches=self._batch // piece)

    def _with_rows(
        self, job: Job, mesh: Mesh, vocab_over: VocabOver, rows: Rows, simulated: bool
    ) -> MeshPlan:
        """Plan one mesh; layers run again where the ranks have no room for what they keep."""

        def step_of(job: Job) -> Step:
            if vocab_over == "last-stage":
                return _step(job, mesh, self._hardware)
            return self._spanning.step(job, mesh, rows, simulated=simulated)

        step = step_of(job)
        if max(step.rank_memory) > self._hardware.room:
            job = replace(job, recompute_layers=True)
            step = step_of(job)
        # Replicas of the body sum their gradients after the step: a ring moves nearly twice the
        # bytes.
        summed = max(step.of_ranks("gradients")) * 2 * (1 - 1 / mesh.columns)
        seconds = step.seconds + summed / self._hardware.link_of(mesh.columns)
        tokens = job.tokens * job.microbatches * mesh.columns
        return MeshPlan(
            **vars(step),
            mesh=mesh,
            vocab_over=vocab_over,
            rows=rows,
            recompute_layers=job.recompute_layers,
            step_seconds=seconds,
            tokens_per_second=tokens / seconds,
            flops_per_second=job.shape.step_flops(tokens, job.sequence) / seconds,
            missing=max(step.rank_memory) - self._hardware.room,
        )


def _step(job: Job, mesh: Mesh, hardware: Hardware) -> Step:
    """Simulate the step of a mesh that has the vocabulary on its last stage."""
    ranks = stages_of(job.schedule, mesh.pipeline)
    stages = estimate_stages(job, mesh, hardware)
    transfer = job.tokens * job.shape.hidden * job.itemsize / hardware.link_of(mesh.ranks)
    times = [stage.times for stage in stages]
    order = alone(job.schedule, mesh.pipeline, job.microbatches, times, transfer)
    return Step(
        stages=stages,
        ranks=ranks,
        seconds=order.finish,
        bubble=1 - sum(order.busy) / (order.finish * len(ranks)),
        microbatches=job.microbatches,
        passes=order.passes,
        drawn=job.microbatches,
    )
