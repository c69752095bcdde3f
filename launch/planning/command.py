"""The planner's command: its arguments, what they ask for, and what it prints."""

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.planning.estimate import Job
from launch.planning.hardware import Hardware
from launch.planning.meshes import MeshPlan, VocabOver, plan_meshes
from launch.planning.shape import ModelShape
from launch.planning.table import print_table, verdict

_UNITS = {"": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}


@dataclass(frozen=True)
class PlanArguments:
    """Plan a data x pipeline x vocab mesh: memory and time of each stage, the best meshes first.

    Memory is that of plain weights, gradients and AdamW, and of activations as transformers keeps
    them; where that does not fit, each layer keeps its input alone and runs again in backward.
    Times are arithmetic over a hardware file; what is measured and what is assumed is said below
    the table. Starts no ranks and needs no GPU.
    """

    model: str | None = None
    """A published model, or a Hugging Face config.json or its folder."""
    gpus: int | None = None
    """How many GPUs there are."""
    gpu_memory: str | None = None
    """Of each, such as 80GB; by default the hardware's."""
    hardware: str = "h200"
    """h200, h100, a100, or a file of your own: see --calibrate."""
    calibrate: bool = False
    """Measure this device, and under torchrun the links of its ranks, write a hardware file to
    --out, and plan nothing."""
    out: Path = Path("hardware.json")
    """Where --calibrate writes."""
    sequence: int = 4096
    """Tokens of a sequence."""
    microbatch: int = 1
    """Sequences of a microbatch of one column."""
    microbatches: int = 8
    """Microbatches of a column in a step."""
    schedule: Literal[
        "1f1b",
        "gpipe",
        "interleaved1f1b",
        "loopedbfs",
        "interleavedzerobubble",
        "zbvzerobubble",
        "dualpipev",
    ] = "1f1b"
    """Pipeline schedule; all but the first two run two stages on each rank."""
    vocab_over: Literal["both", "last-stage", "all-stages"] = "both"
    """Which ranks hold rows of the vocabulary: those of the last stage, whose layers are balanced
    against the loss, or those of all stages. GPipe and DualPipeV have it on the last stage."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights, gradients and activations."""
    state_bytes: int | None = None
    """Of the optimizer for each parameter: 2 moments in dtype by default, 12 with float32 moments
    and master weights."""
    memory_budget: str | None = None
    """Of the loss, such as 64MiB; by default the loss's own, 64MiB."""
    show: int = 8
    """Meshes in the table."""
    json: bool = False
    """Print one JSON document in place of the table."""
    plot: Path | None = None
    """Write a picture of the best mesh here: memory of each stage, and the simulated step."""


def run(arguments: PlanArguments) -> None:
    """Plan and print; a user's mistake ends with a message and code 2."""
    try:
        plans, hardware = plan(arguments)
    except ValueError as error:
        print(f"launch.plan: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        meshes = [_document(one) for one in plans]
        print(json.dumps({"verdict": verdict(plans), "meshes": meshes}))
    else:
        title = f"{arguments.model} on {arguments.gpus} x {hardware.name}"
        print_table(title, plans, hardware, arguments.show)
    if arguments.plot is not None:
        from launch.planning.picture import plot_plan

        plot_plan(plans[0], arguments.plot)


def plan(arguments: PlanArguments) -> tuple[list[MeshPlan], Hardware]:
    """Return every mesh's plan, the best first, and the hardware.

    Raises:
        ValueError: a value that cannot be.
    """
    if arguments.model is None or arguments.gpus is None:
        raise ValueError("--model and --gpus are needed to plan: give both, or --calibrate")
    for name in ("sequence", "microbatch", "microbatches", "show"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    hardware = Hardware.load(arguments.hardware)
    itemsize = {"bfloat16": 2, "float32": 4}[arguments.dtype]
    budget = arguments.memory_budget
    job = Job(
        shape=ModelShape.load(arguments.model),
        sequence=arguments.sequence,
        microbatch=arguments.microbatch,
        microbatches=arguments.microbatches,
        schedule=arguments.schedule,
        itemsize=itemsize,
        state_bytes=2 * itemsize if arguments.state_bytes is None else arguments.state_bytes,
        memory_budget=None if budget is None else int(parse_bytes("--memory-budget", budget)),
    )
    memory = hardware.memory
    if arguments.gpu_memory is not None:
        memory = parse_bytes("--gpu-memory", arguments.gpu_memory)
    places: tuple[VocabOver, ...] = ("last-stage", "all-stages")
    if arguments.vocab_over != "both":
        places = (arguments.vocab_over,)
    return plan_meshes(job, arguments.gpus, hardware, memory, places), hardware


def parse_bytes(flag: str, text: str) -> float:
    """Read 80GB, 64MiB or a number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{flag} {text!r} is no size: give 80GB or 64MiB, or bytes")
    return float(found[1]) * _UNITS[found[2].upper()]


def _document(one: MeshPlan) -> dict[str, Any]:
    found = asdict(one)
    step = found.pop("step")
    for name in ("spans", "drawn", "microbatches", "seconds"):
        del step[name]
    for estimate, stage in zip(step["stages"], one.stages, strict=True):
        estimate["memory"] = stage.memory
        estimate["loss_seconds"] = stage.loss_seconds
    return {
        **found,
        **step,
        "rank_memory": one.rank_memory,
        "fits": one.fits,
        "imbalance": one.imbalance,
    }
