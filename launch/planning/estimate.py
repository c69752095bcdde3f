"""Bytes and seconds of each stage on one mesh: arithmetic over the hardware file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from launch.planning.hardware import Hardware
from launch.planning.loss_time import loss_seconds
from launch.planning.orders import most_in_flight, stages_of, tasks_of
from launch.planning.schedules import SCHEDULES
from launch.planning.shape import ModelShape
from vocab_parallel import BackwardPlan, plan_backward


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
        shard_body: whether copies of the body hold a part of it each, outside of a step.
        compile: whether layers are compiled, where the schedule does not split their backward.
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
    shard_body: bool = False
    compile: bool = False

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled under its schedule."""
        return self.compile and not SCHEDULES[self.schedule].splits

    def layer_seconds(self, hardware: Hardware) -> float:
        """Return how long one layer's forward of a microbatch takes."""
        rate = hardware.layer_flops * (hardware.compiled_speed if self.compiled else 1.0)
        return self.shape.layer_flops(self.tokens, self.sequence) / rate

    def activation_bytes(self, hardware: Hardware, tensor: int = 1) -> float:
        """Return what a layer that runs once keeps of a microbatch for its backward.

        Args:
            tensor: degree of tensor parallelism.
        """
        kept = hardware.compiled_kept if self.compiled else 1.0
        return kept * self.tokens * self.shape.activation_bytes(self.itemsize, tensor)

    def layer_bytes(self, hardware: Hardware) -> float:
        """Return what a layer keeps of one microbatch from its forward to its backward."""
        if self.recompute_layers:
            return float(self.tokens * self.shape.hidden * self.itemsize)
        return self.activation_bytes(hardware)

    @property
    def tokens(self) -> int:
        """Of one microbatch of one column."""
        return self.sequence * self.microbatch

    def plan_loss(self, tokens: int, rows: int, degree: int, **given: Any) -> BackwardPlan:
        """Plan the loss on some rows of a group of so many ranks; see `plan_backward`."""
        return plan_backward(
            tokens,
            rows,
            self.shape.hidden,
            {2: torch.bfloat16, 4: torch.float32}[self.itemsize],
            memory_budget=self.memory_budget,
            degree=degree,
            **given,
        )


@dataclass(frozen=True)
class Mesh:
    """Degrees."""

    data: int
    pipeline: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.data} x {self.pipeline} x {self.vocab}"

    @property
    def columns(self) -> int:
        """Ranks of a stage, which follow one another."""
        return self.data * self.vocab

    @property
    def ranks(self) -> int:
        """Of the whole mesh."""
        return self.columns * self.pipeline


@dataclass(frozen=True, kw_only=True)
class LossShare:
    """What one rank does of a microbatch's loss, and holds for it.

    Attributes:
        rows: of the classifier.
        loss: bytes, beside the rows' weights, gradients and optimizer state.
        statistics_seconds, gradients_seconds: of S and T, the loss's forward and backward.
        loss_way: how backward finds the logits.
        collective_bytes: that the rank's link moves for the vocab group.
        collective_seconds: in which the stage waits for them.
    """

    rows: int = 0
    loss: float = 0.0
    statistics_seconds: float = 0.0
    gradients_seconds: float = 0.0
    loss_way: str = ""
    collective_bytes: float = 0.0
    collective_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StageEstimate(LossShare):
    """One rank's part of a stage: bytes, and seconds of a microbatch."""

    layers: int
    in_flight: int  # microbatches that wait for their backward at the rank's worst moment
    classifier: float  # weights, gradients and optimizer state of the rows, among those below
    parameters: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    forward_seconds: float
    backward_seconds: float

    @property
    def memory(self) -> float:
        """Bytes at the worst moment."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    @property
    def loss_seconds(self) -> float:
        """Seconds of this rank's loss."""
        return self.statistics_seconds + self.gradients_seconds

    @property
    def times(self) -> tuple[float, float, float]:
        """Seconds of a microbatch, as `orders.alone` has them; half of T is the weights' half."""
        forward = self.forward_seconds + self.statistics_seconds
        backward = self.backward_seconds + self.gradients_seconds + self.collective_seconds
        weights = self.forward_seconds + self.gradients_seconds / 2
        return forward, backward - weights, weights


def estimate_stages(job: Job, mesh: Mesh, hardware: Hardware) -> list[StageEstimate]:
    """Estimate every stage of a mesh whose columns have sequences of their own.

    The last stage has the vocabulary, and the first a whole embedding unless it is tied.

    Raises:
        ValueError: more stages than layers, or a schedule that cannot run.
    """
    shape = job.shape
    ranks = stages_of(job.schedule, mesh.pipeline)
    counts = shape.layer_counts(sum(map(len, ranks)))
    waiting: dict[int, int] = {}
    listed = tasks_of(job.schedule, mesh.pipeline, job.microbatches)
    for own, order in zip(ranks, listed, strict=True):
        waiting |= most_in_flight(order, {stage: float(counts[stage]) for stage in own})
    last = len(counts) - 1
    rows = -(-shape.vocabulary // mesh.vocab)
    vocabulary = {0: 0, last: 0}  # rows, by stage
    vocabulary[0] += rows if shape.tied else shape.vocabulary  # a tied embedding is sharded
    # Where one rank has both ends, a tied weight is one parameter.
    vocabulary[last] += 0 if shape.tied and last in ranks[0] else rows
    losses = {last: _loss(job, mesh, hardware, rows, waiting[last])}
    whole = 0 if shape.tied else shape.vocabulary
    return estimate_parts(job, mesh, hardware, counts, waiting, vocabulary, losses, whole)


def estimate_parts(
    job: Job,
    mesh: Mesh,
    hardware: Hardware,
    counts: list[int],
    waiting: Mapping[int, int],
    vocabulary: Mapping[int, int],
    losses: Mapping[int, LossShare],
    whole_rows: int = 0,
) -> list[StageEstimate]:
    """Estimate every stage, of which it is known what it has of the vocabulary.

    Args:
        job, mesh, hardware: as `estimate_stages` has them.
        counts: layers of every stage.
        waiting: of each stage, microbatches in flight.
        vocabulary: of stages that have some, rows of all parameters with the vocabulary's rows.
        losses: of stages that have one, their rank's share.
        whole_rows: of the first stage's rows those of an embedding that is not cut: of the body.
    """
    shape, found = job.shape, []
    for stage, layers in enumerate(counts):
        first = sum(counts[:stage])
        rows, loss = vocabulary.get(stage, 0), losses.get(stage, LossShare())
        parameters = sum(shape.layer_parameters[first : first + layers]) + rows * shape.hidden
        if stage == len(counts) - 1:
            parameters += shape.norm_parameters
        # While a step runs, all copies hold whole weights and gradients; their own part besides.
        body = parameters - (rows - (whole_rows if stage == 0 else 0)) * shape.hidden
        shared = body if job.shard_body and mesh.data > 1 else 0
        activations = waiting[stage] * layers * job.layer_bytes(hardware)
        if job.recompute_layers:  # the layer that runs again
            activations += job.activation_bytes(hardware)
        forward = layers * job.layer_seconds(hardware)
        found.append(
            StageEstimate(
                **vars(loss),
                layers=layers,
                in_flight=waiting[stage],
                classifier=loss.rows * shape.hidden * (2 * job.itemsize + job.state_bytes),
                parameters=parameters,
                weights=(parameters + shared / mesh.data) * job.itemsize,
                gradients=parameters * job.itemsize,
                optimizer=(parameters - shared * (1 - 1 / mesh.data)) * job.state_bytes,
                activations=activations,
                forward_seconds=forward,
                backward_seconds=(3.0 if job.recompute_layers else 2.0) * forward,
            )
        )
    return found


def _loss(job: Job, mesh: Mesh, hardware: Hardware, rows: int, waiting: int) -> LossShare:
    """Estimate the loss of one microbatch of every column, on one rank's rows."""
    tokens, hidden = job.tokens * mesh.vocab, job.shape.hidden
    backward_plan = job.plan_loss(tokens, rows, mesh.vocab, microbatches_in_flight=waiting)
    seconds = loss_seconds(backward_plan, tokens, rows, hidden, job.itemsize, hardware)
    gathered, memory = 0.0, float(backward_plan.peak_bytes)
    if mesh.vocab > 1:
        # Hidden states gathered, statistics, and the float32 gradient scattered.
        gathered = tokens * (hidden * (job.itemsize + 4) + 8) * (1 - 1 / mesh.vocab)
        memory += tokens * hidden * job.itemsize
    return LossShare(
        rows=rows,
        loss=memory,
        statistics_seconds=seconds / 3,
        gradients_seconds=2 * seconds / 3,
        loss_way=backward_plan.backward,
        collective_bytes=gathered,
        collective_seconds=gathered / hardware.link_of(mesh.vocab),
    )
