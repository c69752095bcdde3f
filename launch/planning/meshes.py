"""Every mesh of so many GPUs: which fit, and the fastest first."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from launch.planning.estimate import Job, Mesh, StageEstimate, estimate_stages
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
        times = [_seconds(stage) for stage in self.stages]
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
    planner = _Planner(hardware, batch)
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


def plan_mesh(
    job: Job,
    mesh: Mesh,
    hardware: Hardware,
    vocab_over: VocabOver,
    *,
    simulated: bool,
) -> MeshPlan:
    """Plan one mesh as it would be under another schedule, or with other microbatches.

    Args:
        job, mesh, hardware, vocab_over: as `plan_meshes` has them.
        simulated: whether its own order is simulated where all stages carry the vocabulary.

    Raises:
        ValueError: the schedule cannot run on it.
    """
    planner = _Planner(hardware, None)
    if vocab_over == "all-stages":
        return planner.on_all_stages(job, mesh, simulated=simulated)
    return planner.on_last_stage(job, mesh)


def least_gpus(
    job: Job,
    hardware: Hardware,
    vocab_over: tuple[VocabOver, ...],
    batch: int | None = None,
) -> int | None:
    """Return the least number of GPUs of which a mesh fits; None where none of `MOST_GPUS` does.

    Copies over the data axis need no less each, and are left out.
    """
    planner = _Planner(hardware, batch)
    shape = job.shape
    if (
        job.tokens * shape.activation_bytes(job.itemsize) > hardware.room
    ):  # of a layer that runs again
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


class _Planner:
    """Plans meshes; for an equal batch where one is given."""

    def __init__(self, hardware: Hardware, batch: int | None) -> None:
        self._hardware, self._batch = hardware, batch
        self._spanning = SpanningPlanner(hardware)

    def places(self, job: Job, mesh: Mesh, vocab_over: tuple[VocabOver, ...]) -> list[MeshPlan]:
        """Plan a mesh with the vocabulary in each of these places that its schedule has.

        Raises:
            ValueError: the schedule does not run on it, or it cannot share the batch.
        """
        plans = []
        if "last-stage" in vocab_over:
            plans.append(self.on_last_stage(job, mesh))
        spans = SCHEDULES[job.schedule].held and mesh.pipeline > 1
        if "all-stages" in vocab_over and spans:
            plans.append(self.on_all_stages(job, mesh))
        return plans

    def on_last_stage(self, job: Job, mesh: Mesh) -> MeshPlan:
        """Plan the vocabulary on the last stage."""
        job = self._of_batch(job, mesh)
        return self._plan(
            job, mesh, "last-stage", "balanced", lambda job: _step(job, mesh, self._hardware)
        )

    def on_all_stages(self, job: Job, mesh: Mesh, *, simulated: bool = False) -> MeshPlan:
        """Plan the vocabulary on all stages, with the better of balanced and filled rows."""
        job = self._of_batch(job, mesh)
        rules: list[Rows] = ["balanced"]
        if filling_helps(job, mesh.pipeline):
            rules.append("filled")
        plans = []
        for rows in rules:

            def step(job: Job, rows: Rows = rows) -> Step:
                return self._spanning.step(job, mesh, rows, simulated=simulated)

            plans.append(self._plan(job, mesh, "all-stages", rows, step))
        return _best_first(plans)[0]

    def with_own_order(self, job: Job, plans: list[MeshPlan]) -> list[MeshPlan]:
        """Simulate the best mesh's own order, until it is the best by that.

        Others of its pipeline degree are corrected by what that changes.
        """
        while (best := best_of(plans, "all-stages")) is not None and not best.simulated:
            own = self.on_all_stages(job, best.mesh, simulated=True)
            plans = _best_first(
                [own if plan is best else self._corrected(job, plan, best.mesh) for plan in plans]
            )
        return plans

    def _of_batch(self, job: Job, mesh: Mesh) -> Job:
        """Return the job with as many microbatches as the batch makes on a mesh."""
        if self._batch is None:
            return job
        piece = mesh.data * mesh.vocab * job.microbatch
        if self._batch % piece:
            raise ValueError(
                f"a batch of {self._batch} sequences is no multiple of data x vocab x --microbatch "
                f"= {mesh.data} x {mesh.vocab} x {job.microbatch}"
            )
        return replace(job, microbatches=self._batch // piece)

    def _corrected(self, job: Job, plan: MeshPlan, by: Mesh) -> MeshPlan:
        spans = plan.vocab_over == "all-stages" and not plan.simulated
        alike = spans and plan.mesh.pipeline == by.pipeline
        return self.on_all_stages(job, plan.mesh) if alike else plan

    def _plan(
        self,
        job: Job,
        mesh: Mesh,
        vocab_over: VocabOver,
        rows: Rows,
        step_of: Callable[[Job], Step],
    ) -> MeshPlan:
        """Plan one mesh; layers run again where the ranks have no room for what they keep."""
        step = step_of(job)
        if max(step.rank_memory) > self._hardware.room:
            job = replace(job, recompute_layers=True)
            step = step_of(job)
        # Replicas of the body sum their gradients after the step: a ring moves nearly twice the
        # bytes.
        replicas = mesh.data * mesh.vocab
        summed = max(step.of_ranks("gradients")) * 2 * (1 - 1 / replicas)
        seconds = step.seconds + summed / self._hardware.link_of(mesh.columns)
        tokens = job.tokens * job.microbatches * replicas
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


def _seconds(stage: StageEstimate) -> float:
    return stage.forward_seconds + stage.backward_seconds + stage.loss_seconds
