"""StageGroups: a device mesh read as data x pipeline x vocab."""

from dataclasses import dataclass
from typing import Self

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from stage_groups.placement import StageStyle, stages_of_rank


@dataclass(frozen=True)
class StageGroups:
    """The process groups of one rank and where the rank stands in each.

    Attributes:
        mesh: the device mesh that the groups belong to.
        pipeline_group: the ranks of this column, one for each pipeline rank.
        data_group: the ranks that hold the same part of the model for other data; None
            when the mesh has no data axis.
        vocab_group: the ranks of this row, which share the classifier's rows on the last
            stage.
        pipeline_rank, data_rank, vocab_rank: this rank's coordinate on each axis.
        pipeline_degree, data_degree, vocab_degree: the length of each axis.
    """

    mesh: DeviceMesh
    pipeline_group: ProcessGroup
    data_group: ProcessGroup | None
    vocab_group: ProcessGroup
    pipeline_rank: int
    data_rank: int
    vocab_rank: int
    pipeline_degree: int
    data_degree: int
    vocab_degree: int

    @classmethod
    def from_mesh(
        cls, mesh: DeviceMesh, *, pipeline_dim: str = "pp", vocab_dim: str = "vocab"
    ) -> Self:
        """Read the groups off an existing mesh; torchtitan's wants ``vocab_dim="tp"``.

        Every axis other than the two named is a data axis. Several of them are flattened into
        one group, which all ranks of the mesh must then create together: call it on every rank.

        Raises:
            ValueError: an axis that the mesh does not have, or one named twice.
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
        data_mesh = _data_mesh(
            mesh, tuple(name for name in names if name not in (pipeline_dim, vocab_dim))
        )
        return cls(
            mesh=mesh,
            pipeline_group=mesh.get_group(pipeline_dim),
            data_group=None if data_mesh is None else data_mesh.get_group(),
            vocab_group=mesh.get_group(vocab_dim),
            pipeline_rank=mesh.get_local_rank(pipeline_dim),
            data_rank=0 if data_mesh is None else data_mesh.get_local_rank(),
            vocab_rank=mesh.get_local_rank(vocab_dim),
            pipeline_degree=mesh.size(names.index(pipeline_dim)),
            data_degree=1 if data_mesh is None else data_mesh.size(),
            vocab_degree=mesh.size(names.index(vocab_dim)),
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


def _data_mesh(mesh: DeviceMesh, names: tuple[str, ...]) -> DeviceMesh | None:
    if not names:
        return None
    selected = mesh[names if len(names) > 1 else names[0]]
    return selected._flatten("_".join(names)) if len(names) > 1 else selected
