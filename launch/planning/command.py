"""The planner's command: what its arguments ask for, and what it prints."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from launch.planning.arguments import PlanArguments
from launch.planning.estimate import Job
from launch.planning.hardware import Hardware
from launch.planning.meshes import MeshPlan, VocabOver, plan_meshes
from launch.planning.shape import ModelShape
from launch.planning.table import print_table, verdict

_UNITS = {"B": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}


def run(
    arguments: PlanArguments, start_command: Callable[[MeshPlan, Job, PlanArguments], str]
) -> None:
    """Plan and print; a user's mistake ends with a message and code 2.

    Args:
        arguments: of the command line.
        start_command: says how to start what was planned; of a trainer, which no planner knows.
    """
    try:
        job, plans, hardware = plan(arguments)
    except ValueError as error:
        print(f"launch.plan: {error}", file=sys.stderr)
        sys.exit(2)
    start = start_command(plans[0], job, arguments) if plans[0].fits else None
    if arguments.json:
        meshes = [_document(one) for one in plans]
        document = {"hardware": hardware.name, "verdict": verdict(plans), "command": start}
        print(json.dumps({**document, "meshes": meshes}))
    else:
        title = f"{arguments.model} on {arguments.gpus} x {hardware.name}"
        print_table(title, plans, hardware, arguments.show)
        # A command line is printed whole, whatever the width.
        print(f"\n{start or 'No mesh fits: give more GPUs, or more memory to each.'}")
    if arguments.plot is not None:
        from launch.planning.picture import plot_plan

        plot_plan(plans[0], arguments.plot)


def plan(arguments: PlanArguments) -> tuple[Job, list[MeshPlan], Hardware]:
    """Return what is to be done, every mesh's plan, the best first, and the hardware.

    Raises:
        ValueError: a value that cannot be.
    """
    if arguments.model is None or arguments.gpus is None:
        raise ValueError("--model and --gpus are needed to plan: give both, or --calibrate")
    for name in ("sequence", "microbatch", "microbatches", "show"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    memory = None
    if arguments.gpu_memory is not None:
        memory = parse_bytes("--gpu-memory", arguments.gpu_memory)
    hardware = _hardware(arguments.hardware, memory)
    itemsize = {"bfloat16": 2, "float32": 4}[arguments.dtype]
    budget = arguments.memory_budget
    job = Job(
        shape=ModelShape.load(arguments.model),
        sequence=arguments.sequence,
        microbatch=arguments.microbatch,
        microbatches=arguments.microbatches,
        schedule=arguments.schedule,
        itemsize=itemsize,
        state_bytes=_state_bytes(arguments, itemsize),
        memory_budget=None if budget is None else int(parse_bytes("--memory-budget", budget)),
    )
    memory = hardware.memory if memory is None else memory
    places: tuple[VocabOver, ...] = ("last-stage", "all-stages")
    if arguments.vocab_over != "both":
        places = (arguments.vocab_over,)
    return job, plan_meshes(job, arguments.gpus, hardware, memory, places), hardware


def _state_bytes(arguments: PlanArguments, itemsize: int) -> int:
    """Return the bytes of AdamW for each parameter: two moments, and a float32 copy with its."""
    if arguments.state_bytes is not None:
        return arguments.state_bytes
    copied = arguments.float32_weights and itemsize < 4
    return 3 * 4 if copied else 2 * itemsize


def _hardware(name: str | None, memory: float | None) -> Hardware:
    """Return what was asked for by name; else what has so much memory."""
    if name is None and memory is not None:
        return Hardware.with_memory(memory)
    return Hardware.load("h200" if name is None else name)


def parse_bytes(flag: str, text: str) -> float:
    """Read 80GB, 64MiB or 1000B.

    Raises:
        ValueError: anything else, and a number without a unit, which could mean GB or bytes.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", text)
    if found is not None and not found[2]:
        number = found[1]
        raise ValueError(f"{flag} {text} has no unit: give {number}GB, {number}MiB or {number}B")
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{flag} {text!r} is no size: give 80GB, 64MiB or 1000B")
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
