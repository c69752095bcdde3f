"""Bytes and seconds of each stage on one mesh: arithmetic over the hardware file."""

from dataclasses import dataclass

import torch

from launch.planning.hardware import Hardware
from launch.planning.orders import most_in_flight, orders, stages_of
from launch.planning.shape import ModelShape
from launch.planning.timeline import StageTimes
from vocab_parallel import BackwardPlan, plan_backward

# Seconds of a microbatch's kernel launches, and what the products of less than 128 rows cost, in
# bytes for each number of the hidden states; as benchmarks.loss and benchmarks.scaling found them.
LAUNCHES = 1e-4
TAIL_BYTES = 56


@dataclass(frozen=True)
class Job:
    """What is to be trained.

    Attributes:
        sequence, microbatch, microbatches: tokens, sequences, and how many a column has a step.
        itemsize: bytes of weights, gradients and activations.
        state_bytes: of the optimizer, for each parameter.
        schedule: one of `orders.SCHEDULES`.
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
    """One rank's part of a stage: bytes, and seconds of a microbatch."""

    layers: int
    in_flight: int  # microbatches that wait for their backward at the rank's worst moment
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

    @property
    def times(self) -> StageTimes:
        """Seconds of a microbatch; a third of the loss is forward, a third the weights' half."""
        third = self.loss_seconds / 3
        backward = self.backward_seconds + 2 * third + self.collective_seconds
        return StageTimes(self.forward_seconds + third, backward, self.forward_seconds + third)


def estimate_stages(job: Job, mesh: Mesh, hardware: Hardware) -> list[StageEstimate]:
    """Estimate every stage of a mesh whose columns have sequences of their own.

    Raises:
        ValueError: more stages than layers, or a schedule that cannot run.
    """
    ranks = stages_of(job.schedule, mesh.pipeline)
    counts = job.shape.layer_counts(sum(map(len, ranks)))
    waiting: dict[int, int] = {}
    for own, order in zip(
        ranks, orders(job.schedule, mesh.pipeline, job.microbatches), strict=True
    ):
        waiting |= most_in_flight(order, {stage: float(counts[stage]) for stage in own})
    # Where one rank has both ends, a tied weight is one parameter.
    shares = job.shape.tied and len(counts) - 1 in ranks[0]
    return [
        _estimate(job, mesh, hardware, stage, counts, waiting[stage], shares)
        for stage in range(len(counts))
    ]


def _estimate(
    job: Job,
    mesh: Mesh,
    hardware: Hardware,
    stage: int,
    counts: list[int],
    waiting: int,
    shares: bool,
) -> StageEstimate:
    shape, tokens, layers = job.shape, job.tokens, counts[stage]
    is_last = stage == len(counts) - 1
    rows = -(-shape.vocabulary // mesh.vocab)
    parameters = layers * shape.layer_parameters
    if stage == 0:  # a tied embedding is sharded, another one is whole
        parameters += (rows if shape.tied else shape.vocabulary) * shape.hidden
    if is_last:
        parameters += shape.hidden + (0 if shares else rows * shape.hidden)
    whole = tokens * shape.activation_bytes(job.itemsize)  # of a layer and microbatch
    activations = waiting * layers * whole
    if job.recompute_layers:
        activations = waiting * layers * tokens * shape.hidden * job.itemsize + whole
    flops = layers * shape.layer_flops(tokens, job.sequence)
    forward = flops / hardware.layer_flops
    loss = _Loss.none() if not is_last else _loss(job, mesh, hardware, rows, waiting)
    return StageEstimate(
        layers=layers,
        in_flight=waiting,
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


def loss_seconds(
    backward_plan: BackwardPlan,
    tokens: int,
    rows: int,
    hidden: int,
    itemsize: int,
    hardware: Hardware,
) -> float:
    """Estimate forward and backward of the loss on one rank's rows.

    The products at the hardware's rate; the passes over logits that are kept, and those over
    float32 sums that tiles are added to, at its copy's; what was measured above that; the launches
    of kernels; and where rows are no multiple of 8 the last few, whose products go by themselves.
    """
    kept = backward_plan.kept_rows if backward_plan.backward == "recompute" else rows
    products = tokens * hidden * (6 * rows + 2 * (rows - kept))
    # Read once in forward and in backward, and written there; those of a part in backward alone.
    # (On Hopper forward reads none; its time was found the same.)
    moved = (2 if kept < rows else 3) * tokens * kept * itemsize
    tile = backward_plan.tile
    row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
    if row_tiles > 1:
        moved += row_tiles * tokens * hidden * 8  # float32, read and written
    if token_tiles > 1:
        moved += token_tiles * rows * hidden * 8
    ideal = products / hardware.product_flops + moved / hardware.copy_bytes
    if rows % 8:
        ideal += TAIL_BYTES * tokens * hidden / hardware.copy_bytes
    return LAUNCHES + ideal * hardware.loss_overhead[backward_plan.backward]


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
    backward_plan = plan_backward(
        tokens,
        rows,
        shape.hidden,
        {2: torch.bfloat16, 4: torch.float32}[job.itemsize],
        memory_budget=job.memory_budget,
        microbatches_in_flight=waiting,
        degree=mesh.vocab,
    )
    seconds = loss_seconds(backward_plan, tokens, rows, shape.hidden, job.itemsize, hardware)
    gathered, memory = 0.0, float(backward_plan.peak_bytes)
    if mesh.vocab > 1:
        # Hidden states gathered, statistics, and the float32 gradient scattered.
        gathered = tokens * (shape.hidden * (job.itemsize + 4) + 8) * (1 - 1 / mesh.vocab)
        memory += tokens * shape.hidden * job.itemsize
    return _Loss(memory, seconds, backward_plan.backward, gathered)
