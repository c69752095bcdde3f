"""Rows of a sharded vocabulary as state dicts and checkpoints name them: parts of a whole tensor.

    rows_as_dtensor        the ceiling partition, which a DTensor can have
    rows_for_checkpoint    any partition, no mesh; good for torch.distributed.checkpoint alone

A checkpoint of either is that of the whole tensor, and loads into either, into a DTensor of another
placement, and into a plain tensor. `OwnRows` chooses one of them for the state dicts of modules and
optimizers, and takes a rank's rows from what such a dict has.
"""

from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.serialization import DEFAULT_PROTOCOL

from vocab_parallel.collectives import group_device
from vocab_parallel.modules.gradient_sums import local_part
from vocab_parallel.options import SharesGroup
from vocab_parallel.partition import ceiling_rows, row_range

_aten = torch.ops.aten
_COPIES = (
    _aten.clone.default,
    _aten.detach.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten._to_copy.default,
)
_MARK = "vocab_rows"


def mark_rows(parameter: Tensor, rows: "OwnRows") -> None:
    """Let a parameter tell, without its module, which rows it holds."""
    setattr(parameter, _MARK, rows)


def rows_of(parameter: Tensor) -> "OwnRows | None":
    """Return which rows a parameter holds; None of one that is the same on every rank."""
    return getattr(parameter, _MARK, None)


def rows_for_checkpoint(rows: Tensor, start: int, vocab_size: int) -> Tensor:
    """Name this rank's rows [n, ...] as those from ``start`` on of a tensor [vocab_size, ...].

    The result stands for the whole tensor in what torch.distributed.checkpoint saves and loads; a
    checkpoint of it loads on any number of ranks that share the rows in any way:

        head = VocabParallelClassifier(D, vocab_size, group=group, rows=counts)
        moments = optimizer.state[head.weight]
        state = {
            name: rows_for_checkpoint(tensor, head.start, vocab_size)
            for name, tensor in {"head": head.weight, "exp_avg": moments["exp_avg"]}.items()
        }
        dcp.save(state, checkpoint_id=folder)  # async_save, load

    A load writes to the given rows in place; neither makes a copy of the whole. Communicates
    nothing by itself. Ranks that give the same rows of one name are replicas, of which one writes.

    Args:
        rows: of a module's parameter, its gradient or its optimizer's state, on any device.
        start: the first of them, ``module.start``.
        vocab_size: of all ranks, ``module.vocab_size``.

    Returns:
        A tensor of the whole's size and without memory of its own, good for nothing else: an
        operation on it is a ValueError.

    Raises:
        ValueError: rows that are not within the vocabulary, a DTensor, or one on the meta device.
    """
    if isinstance(rows, DTensor) or rows.is_meta:
        kind = "a DTensor" if isinstance(rows, DTensor) else "on the meta device"
        raise ValueError(
            f"expected a plain tensor of rows with memory, got one that is {kind}: pass its "
            f"to_local() with the row of the vocabulary that this begins with, or give it memory"
        )
    if rows.dim() == 0 or not 0 <= start <= start + rows.shape[0] <= vocab_size:
        raise ValueError(
            f"expected rows [n, ...] from start={start} on of a vocabulary of {vocab_size}, got "
            f"{list(rows.shape)}: pass the start and the vocab_size of the module that owns them"
        )
    return _RowsOfWhole(rows.detach(), start, vocab_size)


def rows_as_dtensor(rows: Tensor, vocab_size: int, mesh: DeviceMesh) -> DTensor:
    """View this rank's rows [stop - start, ...] as a DTensor [vocab_size, ...], without a copy.

    A checkpoint of it is that of the whole tensor, and loads on any number of ranks. Works for the
    optimizer's state of the rows as well. Communicates nothing.

    Args:
        rows: those of the ceiling partition, as `VocabParallelClassifier` has them by default.
        vocab_size: of all ranks.
        mesh: one axis, the vocab axis: ``groups.mesh["vocab"]``.

    Raises:
        ValueError: a mesh of several axes, or rows that are not this rank's of that partition.
    """
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of the vocab axis alone, got {mesh.mesh_dim_names}")
    start, stop = row_range(ceiling_rows(vocab_size, mesh.size()), mesh.get_local_rank())
    if rows.shape[0] != stop - start:
        raise ValueError(
            f"rank {mesh.get_local_rank()} of {mesh.size()} holds rows [{start}, {stop}) of "
            f"{vocab_size}, but got {rows.shape[0]} rows: those of another partition are for "
            f"rows_for_checkpoint"
        )
    shape = torch.Size((vocab_size, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )


@dataclass(frozen=True)
class OwnRows(SharesGroup):
    """Which rows of the vocabulary this rank holds, and what a state dict calls them.

    Neither method communicates.

    Attributes:
        start, stop: this rank's rows.
        row_counts: the rows of every rank of the group, by rank.
        group: the vocab group; None is the default group.
        is_tied_copy: whether another pipeline rank has the same rows of a tied weight, and counts
            them in norms.
    """

    start: int
    stop: int
    row_counts: tuple[int, ...]
    group: ProcessGroup | None
    is_tied_copy: bool = False

    @property
    def vocab_size(self) -> int:
        """Rows of all ranks."""
        return sum(self.row_counts)

    def name(self, rows: Tensor) -> Tensor:
        """Return this rank's rows [stop - start, ...] as a part of [vocab_size, ...], not copied.

        That is a DTensor over the vocab group where `Shard(0)` has this partition, and otherwise
        what `rows_for_checkpoint` returns. Rows that FSDP2 has cut further are the latter too, and
        rows of one rank alone are themselves.

        Raises:
            ValueError: a tensor of other rows.
        """
        degree = len(self.row_counts)
        if degree == 1:
            return rows
        is_ceiling = self.row_counts == tuple(ceiling_rows(self.vocab_size, degree))
        if isinstance(rows, DTensor) or not is_ceiling:
            start, _ = self._wanted(rows)
            return _RowsOfWhole(local_part(rows).detach(), start, self.vocab_size)
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None  # there are several ranks
        device = group_device(group) if rows.is_meta else rows.device
        mesh = DeviceMesh.from_group(group, device.type)
        return rows_as_dtensor(rows, self.vocab_size, mesh)

    def take(self, value: Tensor, place: Tensor) -> Tensor:
        """Return what belongs in the place of a tensor of this rank's rows.

        Args:
            value: this rank's rows, named by `name` or a plain tensor [stop - start, ...], whose
                giver vouches for them; or more rows than that: all of them, or a part that a
                DTensor or `name` tells. Of more rows a copy is made.
            place: [stop - start, ...], a plain tensor or cut further by FSDP2; what is returned is
                as this is. All rows as FSDP2 has cut them are torch's alone to load.

        Raises:
            ValueError: rows of another rank, or none that are known to be this rank's.
        """
        if len(self.row_counts) == 1 and isinstance(place, DTensor):
            return value
        start, stop = self._wanted(place)
        length = value.shape[0] if value.dim() > 0 else -1
        if isinstance(value, _RowsOfWhole):
            rows, first, is_own = value._rows, value._start, False
        else:
            is_own = length == self.stop - self.start
            rows, first = local_part(value).detach(), self.start if is_own else 0
        if isinstance(value, DTensor):
            first += rows_of_dtensor(value)[0]
        is_known = is_own or length == self.vocab_size
        if not is_known or not first <= start <= stop <= first + rows.shape[0]:
            raise ValueError(
                f"this rank needs rows [{start}, {stop}) of {self.vocab_size}, or all of them, but "
                f"was given rows from {first} on, {list(rows.shape)} of {list(value.shape)}: load "
                f"what this rank has saved, and what another number of ranks has saved as all rows "
                f"(StateDictOptions(full_state_dict=True)), or by torch.distributed.checkpoint"
            )
        if rows.shape[0] > stop - start:
            rows = rows[start - first : stop - first].clone()
        if not isinstance(place, DTensor):
            return rows
        shape, stride = place.shape, place.stride()
        return DTensor.from_local(
            rows, place.device_mesh, place.placements, run_check=False, shape=shape, stride=stride
        )

    def _wanted(self, place: Tensor) -> tuple[int, int]:
        """Return the rows of the vocabulary that a tensor [stop - start, ...] has here."""
        if place.dim() == 0 or place.shape[0] != self.stop - self.start:
            raise ValueError(
                f"expected the rows [{self.start}, {self.stop}), got {list(place.shape)}"
            )
        if not isinstance(place, DTensor):
            return self.start, self.stop
        first, last, _ = rows_of_dtensor(place)
        return self.start + first, self.start + last


def rows_of_dtensor(tensor: DTensor) -> tuple[int, int, int | None]:
    """Return [start, stop) of the rows of a DTensor that lie here, and the axis that cuts them.

    One that was read from another rank's file has that rank's, and its mesh that rank's place. The
    axis is None where every rank has all rows.

    Raises:
        ValueError: a DTensor that is cut otherwise than by Shard(0) over one axis.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    cut = [axis for axis, own in enumerate(placements) if not isinstance(own, Replicate)]
    if not cut:
        return 0, tensor.shape[0], None
    (axis, *more), coordinate = cut, mesh.get_coordinate()
    if more or placements[axis] != Shard(0) or coordinate is None:
        raise ValueError(
            f"expected a DTensor that is cut by Shard(0) over one axis of a mesh that this rank is "
            f"in, got {placements} over {mesh}: redistribute it, or pass vocab_parallel_options "
            f"where it is a classifier, and its full_tensor() where it is in a state dict"
        )
    counts = ceiling_rows(tensor.shape[0], mesh.size(axis))
    return *row_range(counts, coordinate[axis]), axis


class _RowsOfWhole(Tensor):
    """Rows [start, start + n) of a tensor [vocab_size, ...], of which nothing else is here.

    torch.distributed.checkpoint asks a tensor by three methods, which DTensor has too, what there
    is to write and where to read to. A save in the background copies it first, by its attributes
    or by a few operations; a load makes memory for one on the meta device.
    """

    _rows: Tensor
    _start: int

    @staticmethod
    def __new__(cls, rows: Tensor, start: int, vocab_size: int) -> "_RowsOfWhole":
        shape = (vocab_size, *rows.shape[1:])
        self: _RowsOfWhole = Tensor._make_wrapper_subclass(
            cls, shape, dtype=rows.dtype, device=rows.device
        )
        self._rows, self._start = rows, start
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Copy it, to another device too; refuse to compute."""
        self, *rest = args
        kwargs = kwargs or {}
        if isinstance(self, cls):
            if func is _aten.new_empty.default and rest == [list(self.shape)]:
                return self._of(self._rows.new_empty(self._rows.shape, **kwargs))
            if func in _COPIES:
                return self._of(func(self._rows, **kwargs))
            if func is _aten.copy_.default and isinstance(rest[0], cls):
                self._rows.copy_(rest[0]._rows, *rest[1:], **kwargs)
                return self
        raise ValueError(
            f"{func} of rows that stand for the whole: they are for torch.distributed.checkpoint "
            f"alone: compute with the module's own rows, or with all rows, which gather_rows "
            f"returns"
        )

    def _of(self, rows: Tensor) -> "_RowsOfWhole":
        """Name other rows in the same way."""
        return _RowsOfWhole(rows, self._start, self.shape[0])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        # A chunk is known by where it begins: an empty one would be taken for the next rank's.
        if self._rows.shape[0] == 0:
            return []
        offsets = torch.Size((self._start, *[0] * (self._rows.dim() - 1)))
        return [ChunkStorageMetadata(offsets, self._rows.shape)]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self._rows),
                    size=self.shape,
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self._rows

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # torch.save's protocol; what sends a state dict to another process takes a newer one.
        if int(protocol) == DEFAULT_PROTOCOL:
            raise ValueError(
                f"torch.save would keep {self!r} for the whole: no DTensor has this partition, so "
                f"that a full state dict lacks the other ranks' rows. Save it by "
                f"torch.distributed.checkpoint, or what gather_rows returns"
            )
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        stop = self._start + self._rows.shape[0]
        return f"rows [{self._start}, {stop}) of {list(self.shape)}"
