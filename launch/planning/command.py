"""The planner's command: what its arguments ask for, and what it prints."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from launch.planning.advice import (
    more_microbatches,
    other_schedule,
    rather_unpiped,
    way_to_fit,
)
from launch.planning.arguments import PlanArguments
from launch.planning.estimate import Job
from launch.planning.hardware import Hardware
from launch.planning.meshes import MeshPlan, VocabOver, plan_meshes
from launch.planning.schedules import SCHEDULES
from launch.planning.shape import ModelShape
from launch.planning.table import print_table, utilisation, verdict
from launch.planning.unpiped import without_pipeline

_UNITS = {"B": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}


def run(
    arguments: PlanArguments, start_command: Callable[[MeshPlan, Job, PlanArguments], str]
) -> None:
    """Plan and print; where no mesh fits the process ends with code 1.

    Args:
        arguments: of the command line.
        start_command: says how to start what was planned; of a trainer, which no planner knows.

    Raises:
        ValueError: as `plan`, or a picture that cannot be written.
    """
    job, plans, hardware = plan(arguments)
    best = plans[0]
    start = start_command(best, job, arguments) if best.fits else None
    batch, gpus = _batch(arguments), arguments.gpus or 1
    of_step = best.microbatches * job.microbatch * best.mesh.columns
    others = without_pipeline(job, gpus, of_step, hardware)
    if best.fits:
        advice = [
            more_microbatches(job, best, hardware) if batch is None else "",
            other_schedule(job, best, hardware),
        ]
    else:
        advice = [way_to_fit(job, hardware, _places(arguments), batch, gpus)]
    advice = [sentence for sentence in (*advice, rather_unpiped(best, others)) if sentence]
    if arguments.json:
        document = {
            "hardware": hardware.name,
            "verdict": verdict(plans),
            "command": start,
            "advice": advice,
            "meshes": [
                {**_document(one), "utilisation": utilisation(one, hardware)} for one in plans
            ],
            "without_pipeline": [
                {"name": one.name, **asdict(one), "utilisation": utilisation(one, hardware)}
                for one in others
            ],
        }
        print(json.dumps(document))
    else:
        title = f"{arguments.model} on {arguments.gpus} x {hardware.name}"
        if hardware.memory != _shipped(arguments).memory:
            title += f" with {hardware.memory / 1e9:.0f} GB each"
        shown = advice if best.fits else []
        print_table(title, plans, others, hardware, arguments.show, shown)
        # A command line is printed whole, whatever the width.
        print(f"\n{start or ' '.join(advice)}")
    if arguments.plot is not None:
        from launch.planning.picture import plot_plan

        try:
            plot_plan(best, arguments.plot, job.shape.name, hardware.memory)
        except (OSError, ValueError) as error:  # no such folder; no such format
            raise ValueError(f"--plot {arguments.plot}: {error}") from error
    if not best.fits:
        sys.exit(1)


def plan(arguments: PlanArguments) -> tuple[Job, list[MeshPlan], Hardware]:
    """Return what is to be done, every mesh's plan, the best first, and the hardware.

    Raises:
        ValueError: a value that cannot be.
    """
    if arguments.model is None or arguments.gpus is None:
        raise ValueError("--model and --gpus are needed to plan: give both, or --calibrate")
    names = ("sequence", "microbatch", "microbatches", "batch", "batch_tokens", "show", "node_gpus")
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.state_bytes is not None and arguments.state_bytes < 0:
        raise ValueError(f"--state-bytes must be at least 0, got {arguments.state_bytes}")
    schedule = arguments.schedule.lower()
    if schedule not in SCHEDULES:
        known = ", ".join(one.name for one in SCHEDULES.values())
        raise ValueError(f"--schedule {arguments.schedule} is unknown: give one of {known}")
    given: dict[str, Any] = {
        "memory": _bytes(arguments, "gpu_memory"),
        "node_bytes": _bytes(arguments, "node_bandwidth"),
        "node_gpus": arguments.node_gpus,
    }
    given = {name: value for name, value in given.items() if value is not None}
    hardware = replace(_shipped(arguments), **given)
    batch = _batch(arguments)
    itemsize = {"bfloat16": 2, "float32": 4}[arguments.dtype]
    budget = _bytes(arguments, "memory_budget")
    job = Job(
        shape=ModelShape.load(arguments.model),
        sequence=arguments.sequence,
        microbatch=arguments.microbatch,
        microbatches=arguments.microbatches or 8,
        schedule=schedule,
        itemsize=itemsize,
        state_bytes=_state_bytes(arguments, itemsize),
        memory_budget=None if budget is None else int(budget),
        shard_body=arguments.shard_body,
        compile=arguments.compile == "auto",
    )
    return job, plan_meshes(job, arguments.gpus, hardware, _places(arguments), batch), hardware


def _places(arguments: PlanArguments) -> tuple[VocabOver, ...]:
    if arguments.vocab_over == "both":
        return ("last-stage", "all-stages")
    return (arguments.vocab_over,)


def _bytes(arguments: PlanArguments, name: str) -> float | None:
    """Return the bytes that an option says; None where it is not given."""
    given = getattr(arguments, name)
    return None if given is None else parse_bytes(f"--{name.replace('_', '-')}", given)


def _batch(arguments: PlanArguments) -> int | None:
    """Return the sequences of a step over all columns; None where microbatches are equal.

    Raises:
        ValueError: more than one of the three that say it, or tokens that are no whole sequences.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("batch", "batch_tokens", "microbatches")
        if getattr(arguments, name) is not None
    ]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say the same in two ways: give one of them")
    if arguments.batch_tokens is None:
        return arguments.batch
    if arguments.batch_tokens % arguments.sequence:
        raise ValueError(
            f"--batch-tokens {arguments.batch_tokens} is no multiple of --sequence "
            f"{arguments.sequence}"
        )
    return arguments.batch_tokens // arguments.sequence


def _state_bytes(arguments: PlanArguments, itemsize: int) -> int:
    """Return the bytes of AdamW for each parameter: two moments, and a float32 copy with its."""
    if arguments.state_bytes is not None:
        return arguments.state_bytes
    copied = arguments.float32_weights and itemsize < 4
    return 3 * 4 if copied else 2 * itemsize


def _shipped(arguments: PlanArguments) -> Hardware:
    """Return what was asked for by name; else what has so much memory."""
    memory = _bytes(arguments, "gpu_memory")
    if arguments.hardware is None and memory is not None:
        return Hardware.with_memory(memory)
    return Hardware.load(arguments.hardware or "h200")


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
    size = float(found[1]) * _UNITS[found[2].upper()]
    if size == 0:
        raise ValueError(f"{flag} {text} is nothing: give 80GB, 64MiB or 1000B")
    return size


def _document(one: MeshPlan) -> dict[str, Any]:
    found = asdict(replace(one, passes=[]))  # there are thousands
    for name in ("passes", "drawn", "seconds"):
        del found[name]
    for estimate, stage in zip(found["stages"], one.stages, strict=True):
        estimate |= {"memory": stage.memory, "loss_seconds": stage.loss_seconds}
    return found | {name: getattr(one, name) for name in ("rank_memory", "fits", "imbalance")}
