"""Bytes and seconds of each stage on one mesh: arithmetic over the hardware file."""

from dataclasses import dataclass

import torch

from launch.planning.hardware import Hardware
from launch.planning.shape import ModelShape
from vocab_parallel import plan_backward

# Of the products' rate, what a layer reaches with everything between them, attention included.
LAYER_EFFICIENCY = 0.6  # assumed, not measured
# What the loss takes above its products and passes, as benchmarks.loss measured it.
LOSS_OVERHEAD = {"recompute": 1.12, "probs": 1.02, "gradients": 1.04}


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        sequence, microbatch, microbatches: tokens, sequences, and how many a column has a step.
        itemsize: bytes of weights, gradients and activations.
        state_bytes: of the optimizer, for each parameter.
        schedule: "1f1b" or "gpipe".
        memory_budget: of the loss, as `plan_backward` has it.
        recompute_layers: whether a layer keeps its input alone and runs again in backward.
    """

    shape: ModelShape
    sequence: int
    microbatch: int
    microbatches: int
    schedule: str
    itemsize: int = 2
    state_bytes: int = 4
    memory_budget: int | None = None
    recompute_layers: bool = False

    @property
    def tokens(self) -> int:
        """Of one microbatch of one column."""
        return self.sequence * self.microbatch


@dataclass(frozen=True)
class Mesh:
    """Degrees."""

    data: int
    pipeline: int
    vocab: int


@dataclass(frozen=True)
class StageEstimate:
    """One rank of a stage: bytes, and seconds of a microbatch."""

    layers: int
    rows: int
    classifier: float  # weights, gradients and optimizer state of the rows, among those below
    parameters: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    forward_seconds: float
    backward_seconds: float
    loss_seconds: float
    loss_way: str
    collective_bytes: float  # of the vocab group, a microbatch
    collective_seconds: float

    @property
    def memory(self) -> float:
        """Bytes at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def estimate_stages(job: Job, mesh: Mesh, hardware: Hardware) -> list[StageEstimate]:
    """Estimate every stage of a mesh whose columns have sequences of their own.

    Raises:
        ValueError: more stages than layers.
    """
    counts = job.shape.layer_counts(mesh.pipeline)
    return [_estimate(job, mesh, hardware, stage, count) for stage, count in enumerate(counts)]


def _estimate(job: Job, mesh: Mesh, hardware: Hardware, stage: int, layers: int) -> StageEstimate:
    shape, tokens = job.shape, job.tokens
    is_last = stage == mesh.pipeline - 1
    rows = -(-shape.vocabulary // mesh.vocab)
    parameters = layers * shape.layer_parameters
    if stage == 0:  # a tied embedding is sharded, another one is whole
        parameters += (rows if shape.tied else shape.vocabulary) * shape.hidden
    if is_last:
        shares = shape.tied and mesh.pipeline == 1
        parameters += shape.hidden + (0 if shares else rows * shape.hidden)
    waiting = job.microbatches
    if job.schedule == "1f1b":
        waiting = min(mesh.pipeline - stage, job.microbatches)
    whole = tokens * shape.activation_bytes(job.itemsize)  # of a layer and microbatch
    activations = waiting * layers * whole
    if job.recompute_layers:
        activations = waiting * layers * tokens * shape.hidden * job.itemsize + whole
    flops = layers * shape.layer_flops(tokens, job.sequence)
    forward = flops / (hardware.product_flops * LAYER_EFFICIENCY)
    loss = _Loss.none() if not is_last else _loss(job, mesh, hardware, rows, waiting)
    return StageEstimate(
        layers=layers,
        rows=rows if is_last else 0,
        classifier=rows * shape.hidden * (2 * job.itemsize + job.state_bytes) if is_last else 0.0,
        parameters=parameters,
        weights=parameters * job.itemsize,
        gradients=parameters * job.itemsize,
        optimizer=parameters * job.state_bytes,
        activations=activations,
        loss=loss.memory,
        forward_seconds=forward,
        backward_seconds=(3.0 if job.recompute_layers else 2.0) * forward,
        loss_seconds=loss.seconds,
        loss_way=loss.way,
        collective_bytes=loss.collective_bytes,
        collective_seconds=loss.collective_bytes / hardware.link_bytes,
    )


@dataclass(frozen=True)
class _Loss:
    memory: float
    seconds: float
    way: str
    collective_bytes: float

    @classmethod
    def none(cls) -> "_Loss":
        return cls(0.0, 0.0, "", 0.0)


def _loss(job: Job, mesh: Mesh, hardware: Hardware, rows: int, waiting: int) -> _Loss:
    """Estimate the loss of one microbatch of every column, on one rank's rows."""
    shape = job.shape
    tokens = job.tokens * mesh.vocab
    plan = plan_backward(
        tokens,
        rows,
        shape.hidden,
        {2: torch.bfloat16, 4: torch.float32}[job.itemsize],
        memory_budget=job.memory_budget,
        microbatches_in_flight=waiting,
        degree=mesh.vocab,
    )
    products = (8 if plan.backward == "recompute" else 6) * tokens * shape.hidden * rows
    moved = (4 if plan.backward == "recompute" else 3) * tokens * rows * job.itemsize
    seconds = products / hardware.product_flops + moved / hardware.copy_bytes
    gathered, memory = 0.0, float(plan.peak_bytes)
    if mesh.vocab > 1:
        # Hidden states gathered, statistics, and the float32 gradient scattered.
        gathered = tokens * (shape.hidden * (job.itemsize + 4) + 8) * (1 - 1 / mesh.vocab)
        memory += tokens * shape.hidden * job.itemsize
    return _Loss(memory, seconds * LOSS_OVERHEAD[plan.backward], plan.backward, gathered)
