"""StageGroups: a device mesh read as data x pipeline x vocab."""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, Self, get_args

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from stage_groups.placement import StageStyle, stages_of_rank

VocabOver = Literal["last_stage", "all_stages"]


class MessageGroups(NamedTuple):
    """The vocab group's ranks three times, where they are those of all stages.

    A group runs its collectives one after the other. With a group for each kind, one message need
    not wait for another of an unlike kind, nor for the pipeline's sends and receives.
    """

    broadcast: ProcessGroup
    gather: ProcessGroup
    reduce: ProcessGroup


@dataclass(frozen=True)
class StageGroups:
    """The process groups of one rank and where the rank stands in each.

    The vocab group is either the ranks of one row of the mesh, of which those of the last stage
    share the vocabulary; or the ranks of all stages and columns, which all do. Rows and columns
    are the mesh's in both cases.

    Attributes:
        mesh: the device mesh that the groups belong to.
        pipeline_group: the ranks of this column, one for each pipeline rank.
        data_group: the ranks that hold the same part of the model for other data; None
            when the mesh has no data axis.
        data_mesh: the mesh of one axis whose group is ``data_group``, or None.
        vocab_group: the ranks that share the rows of the vocabulary: those of this row of the
            mesh, or of all stages, pipeline rank by pipeline rank.
        columns_group: the ranks of this row, one for each column, which replicate the body.
        vocab_mesh: the mesh of one axis whose group is ``vocab_group``.
        message_groups: where all stages share the vocabulary, groups of the same ranks as
            ``vocab_group`` for their schedule's messages; None where the last stage alone does.
        pipeline_rank, data_rank, vocab_rank, column_rank: this rank's place in each group.
        pipeline_degree, data_degree, vocab_degree, column_degree: how many ranks each has.
    """

    mesh: DeviceMesh
    pipeline_group: ProcessGroup
    data_group: ProcessGroup | None
    data_mesh: DeviceMesh | None
    vocab_group: ProcessGroup
    columns_group: ProcessGroup
    vocab_mesh: DeviceMesh
    message_groups: MessageGroups | None
    pipeline_rank: int
    data_rank: int
    vocab_rank: int
    column_rank: int
    pipeline_degree: int
    data_degree: int
    vocab_degree: int
    column_degree: int

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        *,
        pipeline_dim: str = "pp",
        vocab_dim: str = "vocab",
        vocab_over: VocabOver = "last_stage",
        timeout: timedelta | None = None,
    ) -> Self:
        """Read the groups off an existing mesh; torchtitan's wants ``vocab_dim="tp"``.

        Every axis other than the two named is a data axis. Several of them are flattened into
        one group, and ``vocab_over="all_stages"`` makes groups of its own, which all ranks of the
        mesh must create together: call it on every rank.

        Args:
            mesh: of at least the two axes.
            pipeline_dim, vocab_dim: their names.
            vocab_over: which ranks share the rows of the vocabulary; see `build_stage_groups`.
            timeout: of all that waits on the groups of ``vocab_over="all_stages"``; None means
                torch's own. The groups of the mesh keep theirs.

        Raises:
            ValueError: an axis that the mesh does not have, or one named twice; an unknown
                ``vocab_over``; "all_stages" of a mesh whose ranks do not ascend along the pipeline.
        """
        names = mesh.mesh_dim_names or ()
        for role, name in (("pipeline_dim", pipeline_dim), ("vocab_dim", vocab_dim)):
            if name not in names:
                raise ValueError(
                    f"{role}={name!r} is not an axis of the mesh, whose axes are {list(names)}"
                )
        if pipeline_dim == vocab_dim:
            raise ValueError(
                f"pipeline_dim and vocab_dim are both {vocab_dim!r}: they must be two axes"
            )
        if vocab_over not in get_args(VocabOver):
            raise ValueError(f'vocab_over must be "last_stage" or "all_stages", got {vocab_over!r}')
        data_mesh = _axes(
            mesh, tuple(name for name in names if name not in (pipeline_dim, vocab_dim))
        )
        spans = vocab_over == "all_stages"
        both = names.index(pipeline_dim), names.index(vocab_dim)
        vocab_mesh = mesh[vocab_dim]
        if spans:
            if (mesh.mesh.movedim(both, (-2, -1)).flatten(-2).diff() < 0).any():
                raise ValueError(
                    f'vocab_over="all_stages" needs a mesh whose ranks ascend along '
                    f"{pipeline_dim!r} and within it along {vocab_dim!r}, as those of a process "
                    f"group do, got the axes {list(names)}: name the pipeline first"
                )
            # Not the two axes flattened: of all ranks of the world that is the default group.
            vocab_mesh = DeviceMesh.from_group(
                groups_along(mesh.mesh, both, timeout),
                mesh.device_type,
                mesh_dim_names=(f"{pipeline_dim}_{vocab_dim}",),
            )
        return cls(
            mesh=mesh,
            pipeline_group=mesh.get_group(pipeline_dim),
            data_group=None if data_mesh is None else data_mesh.get_group(),
            data_mesh=data_mesh,
            vocab_group=vocab_mesh.get_group(),
            columns_group=mesh.get_group(vocab_dim),
            vocab_mesh=vocab_mesh,
            message_groups=_message_groups(mesh, both, timeout) if spans else None,
            pipeline_rank=mesh.get_local_rank(pipeline_dim),
            data_rank=0 if data_mesh is None else data_mesh.get_local_rank(),
            vocab_rank=vocab_mesh.get_local_rank(),
            column_rank=mesh.get_local_rank(vocab_dim),
            pipeline_degree=mesh.size(names.index(pipeline_dim)),
            data_degree=1 if data_mesh is None else data_mesh.size(),
            vocab_degree=vocab_mesh.size(),
            column_degree=mesh.size(names.index(vocab_dim)),
        )

    def stages(self, num_stages: int, style: StageStyle = "loop") -> list[int]:
        """Return the stages that this rank runs; see `placement.stages_of_rank`.

        Raises:
            ValueError: an unknown style, or stages that the pipeline degree does not divide.
        """
        return stages_of_rank(self.pipeline_rank, self.pipeline_degree, num_stages, style)

    def has_last_stage(self, num_stages: int, style: StageStyle = "loop") -> bool:
        """Tell whether this rank runs the last stage, and so the classifier and the loss.

        Under a V-shaped schedule that is pipeline rank 0.

        Raises:
            ValueError: as `stages`.
        """
        return num_stages - 1 in self.stages(num_stages, style)


def _axes(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh | None:
    """Return the mesh of one axis, or of several flattened into one; None for no axis."""
    if not names:
        return None
    selected = mesh[names if len(names) > 1 else names[0]]
    return selected._flatten("_".join(names)) if len(names) > 1 else selected


def groups_along(ranks: Tensor, axes: tuple[int, ...], timeout: timedelta | None) -> ProcessGroup:
    """Create the groups of ranks that share some axes, and return this rank's; all ranks call.

    Args:
        ranks: of the mesh, int64 of its shape.
        axes: along which a group's ranks lie.
        timeout: of every collective, send and receive; None means torch's own.
    """
    moved = ranks.movedim(axes, tuple(range(-len(axes), 0)))
    size = math.prod(moved.shape[-len(axes) :])
    own: ProcessGroup | None = None
    for members in moved.reshape(-1, size).tolist():
        group = dist.new_group(members, timeout=timeout)  # every rank takes part in every group
        if dist.get_rank() in members:
            own = group
    assert own is not None, "a rank of the mesh is in one group"
    return own


def _message_groups(
    mesh: DeviceMesh, axes: tuple[int, int], timeout: timedelta | None
) -> MessageGroups:
    """Create three more groups of the ranks that share both axes, and return this rank's."""
    return MessageGroups(*(groups_along(mesh.mesh, axes, timeout) for _ in MessageGroups._fields))
