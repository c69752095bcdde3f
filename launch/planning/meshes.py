"""Every mesh of so many GPUs: which fit, and the fastest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.planning.estimate import Job, Mesh, StageEstimate, estimate_stages
from launch.planning.hardware import Hardware
from launch.planning.orders import stages_of
from launch.planning.timeline import Span, simulate

# What the runtime, the allocator's gaps and the communicators take.
RESERVED = 0.06  # of a GPU's memory; assumed


@dataclass(frozen=True)
class MeshPlan:
    """What one mesh holds, and how long its step takes.

    Attributes:
        recompute_layers: whether layers run again in backward, since nothing else fits.
        stages: one rank's part of each.
        ranks: the stages that each rank of a column runs.
        step_seconds: of one optimizer step.
        bubble: the share of the stages' time in which they wait.
        tokens_per_second: of the whole mesh.
        missing: bytes that the fullest rank lacks; 0 where it fits.
        spans: the simulated step.
    """

    mesh: Mesh
    recompute_layers: bool
    stages: list[StageEstimate]
    ranks: list[list[int]]
    step_seconds: float
    bubble: float
    tokens_per_second: float
    missing: float
    spans: list[Span]

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.missing <= 0.0

    @property
    def rank_memory(self) -> list[float]:
        """Bytes of each rank of a column."""
        return of_ranks(self.stages, self.ranks, "memory")

    @property
    def imbalance(self) -> float:
        """The last stage's time of a microbatch over the slowest other one's; 1 if alone."""
        times = [_seconds(stage) for stage in self.stages]
        return times[-1] / max(times[:-1]) if len(times) > 1 else 1.0


def plan_meshes(job: Job, gpus: int, hardware: Hardware, gpu_memory: float) -> list[MeshPlan]:
    """Plan every mesh; those that fit first, by tokens a second, then by what is missing.

    Raises:
        ValueError: no GPUs, less memory than one layer's weights and state need, or a schedule
            that runs on no mesh.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    least = job.shape.layer_parameters * (2 * job.itemsize + job.state_bytes)
    if gpu_memory < least:
        raise ValueError(
            f"--gpu-memory {gpu_memory / 1e9:.2f}GB is below one layer of {job.shape.name}, whose "
            f"weights, gradients and optimizer state are {least / 1e9:.2f} GB"
        )
    plans = []
    refused = ""
    for mesh in _meshes(gpus, job):
        try:
            plans.append(_plan(job, mesh, hardware, gpu_memory * (1 - RESERVED)))
        except ValueError as error:  # of the schedule, for this pipeline degree
            refused = str(error)
    if not plans:
        raise ValueError(f"--schedule {job.schedule} runs on no mesh of {gpus} GPUs: {refused}")
    return sorted(plans, key=lambda plan: (max(plan.missing, 0.0), -plan.tokens_per_second))


def _meshes(gpus: int, job: Job) -> Iterator[Mesh]:
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for pipeline in divisors:
        if sum(map(len, stages_of(job.schedule, pipeline))) > job.shape.layers:
            break
        for vocab in divisors:
            if (gpus // pipeline) % vocab == 0 and vocab <= min(job.shape.vocabulary, 64):
                yield Mesh(gpus // pipeline // vocab, pipeline, vocab)


def _plan(job: Job, mesh: Mesh, hardware: Hardware, room: float) -> MeshPlan:
    """Plan one mesh; layers run again where the ranks have no room for what they keep."""
    ranks = stages_of(job.schedule, mesh.pipeline)
    stages = estimate_stages(job, mesh, hardware)
    if max(of_ranks(stages, ranks, "memory")) > room:
        job = replace(job, recompute_layers=True)
        stages = estimate_stages(job, mesh, hardware)
    transfer = job.tokens * job.shape.hidden * job.itemsize / hardware.link_bytes
    times = [stage.times for stage in stages]
    spans = simulate(job.schedule, mesh.pipeline, job.microbatches, times, transfer)
    computed = max(span.stop for span in spans)
    # Replicas of the body sum their gradients after the step: a ring moves nearly twice the bytes.
    replicas = mesh.data * mesh.vocab
    summed = max(of_ranks(stages, ranks, "gradients")) * 2 * (1 - 1 / replicas)
    step = computed + summed / hardware.link_bytes
    busy = sum(span.stop - span.start for span in spans)
    tokens = job.tokens * job.microbatches * replicas
    return MeshPlan(
        mesh=mesh,
        recompute_layers=job.recompute_layers,
        stages=stages,
        ranks=ranks,
        step_seconds=step,
        bubble=1 - busy / (computed * len(ranks)),
        tokens_per_second=tokens / step,
        missing=max(of_ranks(stages, ranks, "memory")) - room,
        spans=spans,
    )


def of_ranks(stages: list[StageEstimate], ranks: list[list[int]], part: str) -> list[float]:
    """Add up one part of each rank's stages, in bytes."""
    return [sum(getattr(stages[stage], part) for stage in own) for own in ranks]


def _seconds(stage: StageEstimate) -> float:
    return stage.forward_seconds + stage.backward_seconds + stage.loss_seconds
