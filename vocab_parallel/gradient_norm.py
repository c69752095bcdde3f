"""The gradient norm of a whole model that is spread over a data x pipeline x vocab mesh."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel import collectives

_MARK = "holds_vocab_rows"
_COPY = "is_tied_copy"


def mark_vocab_rows(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter whose rows are this vocab rank's alone; returns it."""
    setattr(parameter, _MARK, True)
    return parameter


def mark_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that is another rank's too, which counts it; returns it."""
    setattr(parameter, _COPY, True)
    return parameter


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[nn.Parameter],
    max_norm: float,
    groups: Any,
) -> Tensor:
    """Clip the gradients of the whole model to a norm, each parameter counted once.

    Every rank of the mesh calls it with the parameters of its own stages, after the gradients of
    replicated parameters have been summed or averaged over the ranks that share them. Counted are

        the classifier's rows               on every rank of the vocab group
        a DTensor's shards                  on every rank of the axes that it is sharded over
        what is replicated over an axis     on the first rank of that axis alone
        a weight tied over the pipeline     on the last stage alone (`TiedRows`)

    and the squares are summed over the vocab, the data and the pipeline group, one number each.
    Plain and DTensor parameters may be mixed. Does not wait for the GPU.

    Args:
        parameters: of this rank's stages: the modules' parameters, or a module. A plain
            parameter counts as rows where a `VocabParallelClassifier` owns it; give the module
            where a wrapper such as FSDP has put other parameters in their place.
        max_norm: the largest norm that is left unclipped.
        groups: `StageGroups`, or any object with vocab_group, data_group, pipeline_group,
            vocab_rank and data_rank.

    Returns:
        The norm before clipping, a float32 tensor (float64 where a gradient is), equal on every
        rank.

    Raises:
        ValueError: a max_norm that is not positive, or a gradient whose placement is partial: it
            has not been reduced.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm!r}")
    module_rows = _rows_of_modules(parameters) if isinstance(parameters, nn.Module) else set()
    every = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    with_grad = {id(p): p for p in every if p.grad is not None}  # a shared parameter once
    locals_: list[Tensor] = []
    squares: list[Tensor] = []
    for parameter in with_grad.values():
        gradient = parameter.grad
        assert gradient is not None
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        locals_.append(own)
        rows = id(parameter) in module_rows or getattr(parameter, _MARK, False)
        if not getattr(parameter, _COPY, False) and _counts_here(gradient, rows, groups):
            wide = torch.promote_types(own.dtype, torch.float32)
            squares.append(torch.linalg.vector_norm(own, dtype=wide).square())
    norm = _sum_over_mesh(squares, locals_, groups).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for own in locals_:
        own.mul_(factor.to(own.dtype))
    return norm


def _rows_of_modules(module: nn.Module) -> set[int]:
    """Find the parameters that modules with vocab-sharded rows own now, whatever wraps them."""
    return {
        id(parameter)
        for inner in module.modules()
        if getattr(inner, "owns_vocab_rows", False)
        for parameter in inner.parameters(recurse=False)
    }


def _counts_here(gradient: Tensor, rows: bool, groups: Any) -> bool:
    """Whether this rank is the one that counts what it holds of a gradient."""
    covered: list[ProcessGroup] = []
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        for axis, placement in enumerate(gradient.placements):
            covered.append(mesh.get_group(axis))
            if isinstance(placement, Replicate):
                if mesh.get_local_rank(axis) != 0:
                    return False
            elif not isinstance(placement, Shard):
                raise ValueError(
                    f"a gradient has the placement {placement}, which has not been reduced: "
                    f"redistribute it before clipping"
                )
    for group, rank, held_in_full in (
        (groups.vocab_group, groups.vocab_rank, not rows),
        (groups.data_group, groups.data_rank, True),
    ):
        if held_in_full and rank != 0 and not _covers(covered, group):
            return False
    return True


def _covers(covered: list[ProcessGroup], group: ProcessGroup | None) -> bool:
    """Whether one of the axes of a DTensor's mesh is this group."""
    if group is None:
        return True
    ranks = dist.get_process_group_ranks(group)
    return any(dist.get_process_group_ranks(axis) == ranks for axis in covered)


def _sum_over_mesh(squares: list[Tensor], locals_: list[Tensor], groups: Any) -> Tensor:
    """Sum over this rank's gradients and over all groups; a rank may have none to count."""
    device = locals_[0].device if locals_ else collectives.group_device(groups.vocab_group)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for square in squares:
        total += square
    for group in (groups.vocab_group, groups.data_group, groups.pipeline_group):
        if group is not None:
            total = collectives.sum_over_group(total, group, dist.get_world_size(group))
    double = any(own.dtype == torch.float64 for own in locals_)
    return total if double else total.float()
