"""The columns of a mesh replicate the body: they add up its gradients, and must stay equal."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.modules.gradient_sums import local_part, sum_gradients
from vocab_parallel.modules.vocab_rows import holds_vocab_rows, mark_rows_of


def columns_of(groups: Any) -> tuple[ProcessGroup, int]:
    """Return the group of the ranks that replicate the body, and this rank's place in it."""
    if hasattr(groups, "columns_group"):
        return groups.columns_group, groups.column_rank
    return groups.vocab_group, groups.vocab_rank


def is_spread_over(tensor: Tensor, group: ProcessGroup) -> bool:
    """Whether a tensor is a DTensor whose mesh has this group as an axis."""
    if not isinstance(tensor, DTensor):
        return False
    ranks, axes = dist.get_process_group_ranks(group), tensor.device_mesh.get_all_groups()
    return any(dist.get_process_group_ranks(axis) == ranks for axis in axes)


def sum_over_columns(module: nn.Module, groups: Any) -> None:
    """Sum the gradients of what the columns replicate over them, in place.

    For columns that have their own tokens (``hidden_layout="sharded"`` or ``"sequence"``): the loss
    is that of all their tokens, so that the body's gradient is the sum of the columns'. Without it
    every column trains a body of its own. Call it on every rank once a step, after the schedule's
    last backward and before `clip_grad_norm_`. Not where the hidden states are replicated, whose
    gradients are equal already, nor where DDP or FSDP2 reduce over the columns.

    Communicates every gradient of a parameter that is trained, in its dtype, over the columns'
    group, but for rows of the vocabulary, which are one rank's alone: in buckets of 64 MiB, of
    which one exists at a time, and what is larger by itself. A parameter may have no gradient on
    some ranks (an expert that no token of the column reached): it takes part as zeros and gets the
    sum. One that has none on any rank stays without where the group communicates from the CPU; on a
    GPU, where asking would make the host wait, it gets zeros, which weight decay reaches: freeze
    what never takes part. Does not wait for the GPU.

    Args:
        module: this rank's stages, alike on the ranks of the columns' group.
        groups: `StageGroups`, or any object with vocab_group and vocab_rank, whose vocab group is a
            row of the mesh.
    """
    parameters = [parameter for _, parameter in _replicated(module, groups)]
    sum_gradients(parameters, columns_of(groups)[0])


@torch.no_grad()
def validate_columns(module: nn.Module, groups: Any, *, tolerance: float = 1e-5) -> None:
    """Refuse columns that have drifted apart: compare the norm of each parameter over them.

    Columns whose gradients were not summed train on, each alone, with a loss that looks well. Call
    it on every rank every so often, after the optimizer's step: it waits for the GPU. Communicates
    one number a parameter over the columns' group.

    Args:
        module: this rank's stages, alike on the ranks of the columns' group.
        groups: as for `sum_over_columns`.
        tolerance: the largest relative difference of two norms. Columns that were built and
            stepped alike are equal to the last bit.

    Raises:
        ValueError: on every rank of the columns' group, where a parameter's norm differs, or is
            NaN on some of them; or where they have unlike parameters.
    """
    group = VocabGroup.of(columns_of(groups)[0])
    named = list(_replicated(module, groups))
    norms = [
        torch.linalg.vector_norm(local_part(parameter), dtype=torch.float64)
        for _, parameter in named
    ]
    own = torch.stack(norms).tolist() if norms else []
    told = group.exchange_objects({name: norm for (name, _), norm in zip(named, own, strict=True)})
    if any(other.keys() != told[0].keys() for other in told):
        counts = [len(other) for other in told]
        raise ValueError(f"the columns have unlike parameters: {counts} of them, by column")
    spreads = {name: _spread([other[name] for other in told]) for name in told[0]}
    where = max(spreads, key=lambda name: spreads[name], default="")
    if where and spreads[where] > tolerance:
        raise ValueError(
            f"the columns have drifted apart: the norm of {where} is "
            f"{[other[where] for other in told]} on them, a relative difference of "
            f"{spreads[where]:.1e}; build them from one seed, and call sum_over_columns(module, "
            f"groups) once a step, before clip_grad_norm_ and the optimizer's step"
        )


def _spread(values: list[float]) -> float:
    """Return the relative difference of the largest and the smallest; infinite for NaN."""
    if not all(map(math.isfinite, values)):
        return math.inf
    largest = max(values)
    return (largest - min(values)) / largest if largest > 0 else 0.0


def _replicated(module: nn.Module, groups: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that every column has in full, or sharded over other axes alone."""
    mark_rows_of(module)
    columns = columns_of(groups)[0]
    for name, parameter in module.named_parameters():
        # Whoever spread a parameter over the columns reduces its gradient.
        if not holds_vocab_rows(parameter) and not is_spread_over(parameter, columns):
            yield name, parameter
