"""Rows of a sharded vocabulary as torch.distributed.checkpoint takes them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel.options import ceiling_rows


def rows_as_dtensor(rows: Tensor, vocab_size: int, mesh: DeviceMesh) -> DTensor:
    """View this rank's rows [stop - start, ...] as a DTensor [vocab_size, ...], without a copy.

    A checkpoint of it is that of the whole tensor, and loads on any number of ranks. Works for the
    optimizer's state of the rows as well. Communicates nothing.

    Args:
        rows: those of the ceiling partition, as `VocabParallelClassifier` has them.
        vocab_size: of all ranks.
        mesh: one axis, the vocab axis: ``groups.mesh["vocab"]``.

    Raises:
        ValueError: a mesh of several axes, or rows that are not this rank's of that partition.
    """
    if mesh.ndim != 1:
        raise ValueError(f"expected a mesh of the vocab axis alone, got {mesh.mesh_dim_names}")
    start, stop = ceiling_rows(vocab_size, mesh.get_local_rank(), mesh.size())
    if rows.shape[0] != stop - start:
        raise ValueError(
            f"rank {mesh.get_local_rank()} of {mesh.size()} holds rows [{start}, {stop}) of "
            f"{vocab_size}, but got {rows.shape[0]} rows"
        )
    shape = torch.Size((vocab_size, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows.detach(), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
    )
