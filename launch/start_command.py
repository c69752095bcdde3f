"""The command that trains on the mesh of a plan."""

from pathlib import Path

from launch.arguments import TrainArguments
from launch.planning.arguments import PlanArguments
from launch.planning.estimate import Job
from launch.planning.meshes import MeshPlan
from launch.planning.schedules import SCHEDULES

_PER_MACHINE = 8  # GPUs; as many, or fewer alone, as most machines have


def start_command(plan: MeshPlan, job: Job, arguments: PlanArguments) -> str:
    """Return a command line to paste, or why there is none."""
    assert arguments.model is not None
    path = Path(arguments.model)
    mesh = plan.mesh
    trained = TrainArguments(
        model=str(path.parent) if path.is_file() else arguments.model,
        pipeline=mesh.pipeline,
        vocab=mesh.vocab,
        data=mesh.data,
        shard_body=job.shard_body and mesh.data > 1,
        vocab_over=plan.vocab_over,
        rows=plan.rows,
        schedule=SCHEDULES[job.schedule].name,
        recompute="all" if plan.recompute_layers else "none",
        loss_memory=64 if job.memory_budget is None else max(1, job.memory_budget // 2**20),
        batch=mesh.data * mesh.vocab * plan.microbatches * job.microbatch,
        sequence=job.sequence,
        microbatches=plan.microbatches,
        dtype=arguments.dtype,
        float32_weights=arguments.float32_weights,
    )
    try:
        trained.validate()
    except ValueError as error:
        return f"launch.train does not do this: {error}"
    left_out = TrainArguments()
    options = [
        f"--{name.replace('_', '-')} {getattr(trained, name)}"
        for name in (
            *("model", "pipeline", "vocab", "data", "vocab_over", "rows", "schedule", "recompute"),
            *("loss_memory", "batch", "sequence", "microbatches", "dtype"),
        )
        if name in ("model", "pipeline", "vocab")
        or getattr(trained, name) != getattr(left_out, name)
    ]
    if trained.shard_body:
        options.append("--shard-body")
    if not trained.float32_weights:
        options.append("--no-float32-weights")
    return " ".join([*_torchrun(trained.world), "-m launch.train", *options])


def _torchrun(ranks: int) -> list[str]:
    """Return what starts so many ranks; on several machines every one runs it."""
    if ranks <= _PER_MACHINE or ranks % _PER_MACHINE:
        return [f"torchrun --nproc-per-node {ranks}"]
    return [
        f"torchrun --nnodes {ranks // _PER_MACHINE} --nproc-per-node {_PER_MACHINE}",
        "--rdzv-backend c10d --rdzv-endpoint machine-0:29400",
    ]
