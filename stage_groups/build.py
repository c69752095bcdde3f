"""Create the process groups. The only place in the project that does."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from stage_groups.groups import StageGroups, VocabOver, groups_along

MESH_AXES = ("pp", "data", "vocab")


def build_stage_groups(
    pipeline: int,
    vocab: int,
    *,
    data: int = 1,
    device_type: str | None = None,
    timeout: timedelta | None = None,
    vocab_over: VocabOver = "last_stage",
) -> StageGroups:
    """Create the data x pipeline x vocab mesh and its groups.

    The pipeline axis is outermost and the vocab axis innermost, so that the ranks of a vocab
    group, which exchange the most, are neighbours on one machine:

        rank = (pipeline_rank * data + data_rank) * vocab + vocab_rank

    Call it on every rank, after ``torch.distributed.init_process_group``.

    Args:
        pipeline: pipeline degree P.
        vocab: vocab degree V: over how many ranks a classifier's rows are split.
        data: data degree.
        device_type: "cpu" or "cuda"; None means the accelerator where there is one.
        timeout: of every collective, send and receive on the new groups. None means that of the
            default group, which a mesh would not inherit on its own: a dead peer would be noticed
            only after half an hour.
        vocab_over: which ranks share the rows of the vocabulary. "last_stage": the V ranks of a
            row of the mesh, each row a vocab group, of which the last stage's computes the loss.
            "all_stages": the P x V ranks of all stages and columns, which need a schedule that
            lets them compute their share of it between their own layers (`SpanningSchedule`).

    Raises:
        ValueError: on every rank, where data x pipeline x vocab is not the world, a degree is not
            a positive integer, or ``vocab_over`` is unknown.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialized: call init_process_group first, "
            "under torchrun for instance"
        )
    world = dist.get_world_size()
    degrees = {"data": data, "pipeline": pipeline, "vocab": vocab}
    for name, degree in degrees.items():
        if not isinstance(degree, int) or degree < 1:
            raise ValueError(f"{name} must be a positive integer, got {degree!r}")
    if data * pipeline * vocab != world:
        raise ValueError(
            f"data x pipeline x vocab must be the world size: {data} x {pipeline} x {vocab} = "
            f"{data * pipeline * vocab}, but the world has {world} ranks; start "
            f"{data * pipeline * vocab} ranks or change a degree"
        )
    device_type = device_type or _default_device_type()
    _choose_device(device_type)
    timeout = timeout or _default_group_timeout(device_type)
    ranks = torch.arange(world).view(pipeline, data, vocab)
    # The timeout is given where a group is made: gloo's sends and receives keep that one, whatever
    # `set_timeout` says later.
    groups = [groups_along(ranks, (axis,), timeout) for axis in range(ranks.dim())]
    mesh = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=MESH_AXES)
    return StageGroups.from_mesh(mesh, vocab_over=vocab_over, timeout=timeout)


def build_host_group(timeout: timedelta | None = None) -> ProcessGroup:
    """Create a group of all ranks that talks over the CPU, for work in the background.

    Nothing else uses it, so that what a thread says over it cannot be mistaken for the training's.
    Call it on every rank.

    Args:
        timeout: of every collective; None means that of the default group.
    """
    # torch's own default is half an hour, whatever the default group has.
    timeout = timeout or _default_group_timeout(_default_device_type())
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    return group


def _default_device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_device(device_type: str) -> None:
    """Make torchrun's local rank this process's GPU where the program has not chosen one.

    As `init_device_mesh` does, and a mesh of groups that are there does not.
    """
    if device_type == "cuda" and not torch.cuda.is_initialized() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def _default_group_timeout(device_type: str) -> timedelta | None:
    """Return the timeout of the default group, or None for a backend that keeps none."""
    world = dist.group.WORLD
    assert world is not None  # is_initialized was asked
    backend = world._get_backend(torch.device(device_type))
    return getattr(getattr(backend, "options", None), "_timeout", None)
