"""The options of ``launch.plan``: one dataclass, from which the command line is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class HardwareArguments:
    """What there is."""

    gpus: int | None = None
    """How many GPUs there are."""
    gpu_memory: str | None = None
    """Of each, such as 80GB; by default the hardware's."""
    hardware: str | None = None
    """h200, h100, a100, or a file of your own: see --calibrate. By default the one that has about
    --gpu-memory, and h200 without one."""
    node_bandwidth: str | None = None
    """That a GPU sends in a second to one in another node, such as 50GB; by default as within."""
    node_gpus: int | None = None
    """GPUs of a node; 8 by default."""
    calibrate: bool = False
    """Measure this device, and under torchrun the links of its ranks, write a hardware file to
    --out, and plan nothing."""
    out: Path = Path("hardware.json")
    """Where --calibrate writes."""


@dataclass(frozen=True)
class JobArguments:
    """What is to be trained, and how."""

    model: str | None = None
    """A published model, or a Hugging Face config.json or its folder."""
    sequence: int = 4096
    """Tokens of a sequence."""
    microbatch: int = 1
    """Sequences of a microbatch of one column."""
    batch: int | None = None
    """Sequences of a step over all columns, equal for every mesh, whose microbatches follow from
    it; meshes that it does not divide over are left out."""
    batch_tokens: int | None = None
    """The same in tokens, a multiple of --sequence."""
    microbatches: int | None = None
    """Microbatches of a column in a step, equal for every mesh; 8 where no batch is given."""
    schedule: str = "1f1b"
    """Pipeline schedule: 1F1B, GPipe, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble,
    ZBVZeroBubble or DualPipeV, in capitals or not; all but the first two run two stages on each
    rank."""
    vocab_over: Literal["both", "last-stage", "all-stages"] = "both"
    """Which ranks hold rows of the vocabulary: those of the last stage, whose layers are balanced
    against the loss, or those of all stages. GPipe and DualPipeV have it on the last stage."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, gradients and activations."""
    float32_weights: bool = True
    """With --dtype bfloat16, let AdamW train float32 copies of the weights, with float32 moments:
    12 bytes a parameter beside weight and gradient, and 4 without."""
    shard_body: bool = False
    """Let each copy of the pipeline hold its part alone of layers, norms and a plain embedding,
    with their optimizer state, as launch.train --shard-body does."""
    compile: Literal["auto", "no"] = "auto"
    """Plan decoder layers that torch.compile has compiled, which are faster and keep less for
    their backward; auto does under schedules that do not split it, as launch.train on a GPU."""
    state_bytes: int | None = None
    """Of another optimizer than launch.train's, for each parameter."""
    memory_budget: str | None = None
    """Of the loss, such as 64MiB; by default the loss's own, 64MiB."""


@dataclass(frozen=True)
class OutputArguments:
    """What is shown."""

    show: int = 8
    """Meshes in the table."""
    json: bool = False
    """Print one JSON document in place of the table."""
    plot: Path | None = None
    """Write a picture of the best mesh here: memory of each stage, and the simulated step."""


@dataclass(frozen=True)
class PlanArguments(JobArguments, HardwareArguments, OutputArguments):
    """Plan a data x pipeline x vocab mesh: memory and time of each stage, the best meshes first.

    Memory is that of weights, gradients and AdamW as launch.train has them, and of activations as
    transformers' compiled layers keep them; where that does not fit, each layer keeps its input
    alone and runs again in backward.
    Times are arithmetic over a hardware file; what is measured and what is assumed is said below
    the table. Starts no ranks and needs no GPU.
    """
