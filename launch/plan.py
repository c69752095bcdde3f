"""Which mesh for how many GPUs: ``python -m launch.plan --model qwen3-32b --gpus 64``.

The planner is `launch.planning`, which knows no trainer: here is what starts it, the process group
that it measures, and the command that trains on a plan's mesh.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.arguments import TrainArguments
from launch.options import parse
from launch.planning.arguments import PlanArguments
from launch.planning.schedules import SCHEDULES

if TYPE_CHECKING:  # --help need not wait for torch
    from launch.planning.estimate import Job
    from launch.planning.meshes import MeshPlan

_PER_MACHINE = 8  # GPUs; as many, or fewer alone, as most machines have


def main() -> None:
    """Parse the command line and plan; a user's mistake ends with a message and code 2."""
    try:
        arguments = parse(PlanArguments, "launch.plan")
        if arguments.calibrate:
            _calibrate(arguments.out)
        else:
            from launch.planning.command import run  # after --help, as above

            run(arguments, start_command)
    except ValueError as error:
        print(f"launch.plan: {error}", file=sys.stderr)
        sys.exit(2)


def start_command(plan: "MeshPlan", job: "Job", arguments: PlanArguments) -> str:
    """Return a command line that trains on a plan's mesh, or why there is none."""
    assert arguments.model is not None
    path = Path(arguments.model)
    mesh = plan.mesh
    given: dict[str, Any] = {
        "model": str(path.parent) if path.is_file() else arguments.model,
        "pipeline": mesh.pipeline,
        "vocab": mesh.vocab,
        "data": mesh.data,
        "vocab_over": plan.vocab_over,
        "rows": plan.rows,
        "schedule": SCHEDULES[job.schedule].name,
        "recompute": "all" if plan.recompute_layers else "none",
        "loss_memory": 64 if job.memory_budget is None else max(1, job.memory_budget // 2**20),
        "batch": mesh.data * mesh.vocab * plan.microbatches * job.microbatch,
        "sequence": job.sequence,
        "microbatches": plan.microbatches,
        "dtype": arguments.dtype,
        "shard_body": job.shard_body and mesh.data > 1,
        "float32_weights": arguments.float32_weights,
        "compile": arguments.compile,
    }
    trained = TrainArguments(**given)
    try:
        trained.validate()
    except ValueError as error:
        return f"launch.train does not do this: {error}"
    options = [
        _option(name, value)
        for name, value in given.items()
        if name in ("pipeline", "vocab") or value != getattr(TrainArguments, name)
    ]
    return " ".join([*_torchrun(trained.world), "-m launch.train", *options])


def _option(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {value}"


def _torchrun(ranks: int) -> list[str]:
    """Return what starts so many ranks; on several machines every one runs it."""
    if ranks <= _PER_MACHINE or ranks % _PER_MACHINE:
        return [f"torchrun --nproc-per-node {ranks}"]
    return [
        f"torchrun --nnodes {ranks // _PER_MACHINE} --nproc-per-node {_PER_MACHINE}",
        "--rdzv-backend c10d --rdzv-endpoint machine-0:29400",
    ]


def _calibrate(path: Path) -> None:
    """Write the hardware file of this rank's device; of several ranks, the first one's.

    Raises:
        ValueError: its folder takes no file.
    """
    import torch

    from launch.disk import try_to_write
    from launch.planning.calibrate import calibrate
    from launch.runtime import process_group

    try_to_write(path.parent, "--out")
    alone = nullcontext(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with process_group(timeout=60.0) if "RANK" in os.environ else alone as device:
        found = calibrate(device)
    if os.environ.get("RANK", "0") == "0":
        found.save(path)
        print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
