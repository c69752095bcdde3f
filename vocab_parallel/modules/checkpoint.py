"""Rows of a sharded vocabulary as torch.distributed.checkpoint takes them.

    rows_for_checkpoint    any partition, no mesh; good for torch.distributed.checkpoint alone
    rows_as_dtensor        the ceiling partition, which a DTensor can have

A checkpoint of either is that of the whole tensor, and loads into either, into a DTensor of another
placement, and into a plain tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel.partition import ceiling_rows, row_range

_aten = torch.ops.aten


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


class _RowsOfWhole(Tensor):
    """Rows [start, start + n) of a tensor [vocab_size, ...], of which nothing else is here.

    torch.distributed.checkpoint asks a tensor by three methods, which DTensor has too, what there
    is to write and where to read to. A save in the background copies it first, by its attributes
    or by a few operations.
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
        """Copy it for a save in the background; refuse to compute."""
        self, *rest = args
        kwargs = kwargs or {}
        if func is _aten.new_empty.default and rest == [list(self.shape)]:
            return self._of(self._rows.new_empty(self._rows.shape, **kwargs))
        if func in (_aten.clone.default, _aten.zeros_like.default):
            return self._of(func(self._rows, **kwargs))
        if func is _aten.copy_.default and isinstance(rest[0], cls):
            self._rows.copy_(rest[0]._rows, *rest[1:], **kwargs)
            return self
        raise ValueError(
            f"{func} of what rows_for_checkpoint returned, which is for "
            f"torch.distributed.checkpoint alone: compute with the rows that it was given"
        )

    def _of(self, rows: Tensor) -> "_RowsOfWhole":
        """Name other rows in the same way."""
        return _RowsOfWhole(rows, self._start, self.shape[0])

    def _chunk(self) -> ChunkStorageMetadata:
        offsets = (self._start, *[0] * (self._rows.dim() - 1))
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=self._rows.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        # A chunk is known by where it begins: an empty one would be taken for the next rank's.
        return [self._chunk()] if self._rows.shape[0] > 0 else []

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

    def __repr__(self) -> str:  # type: ignore[override]
        stop = self._start + self._rows.shape[0]
        return f"rows [{self._start}, {stop}) of {list(self.shape)}"
