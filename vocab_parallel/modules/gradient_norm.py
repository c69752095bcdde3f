"""The gradient norm of a whole model that is spread over a data x pipeline x vocab mesh."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel.collectives import VocabGroup, group_device
from vocab_parallel.modules.checkpoint import rows_of
from vocab_parallel.modules.columns import columns_of, is_spread_over
from vocab_parallel.modules.gradient_sums import local_part
from vocab_parallel.modules.vocab_rows import mark_rows_of
from vocab_parallel.statistics import accumulation_dtype


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

    and the squares are summed over the columns', the data and the pipeline group, one number each.
    Plain and DTensor parameters may be mixed. Does not wait for the GPU.

    Args:
        parameters: of this rank's stages: the modules' parameters, or a module. A parameter
            counts as rows where a `VocabParallelClassifier` or a `VocabParallelEmbedding` owns it
            and names it so, whatever has replaced it since: ``to_empty``, a deep copy, FSDP2. In a
            list nobody knows one that was copied by itself, nor what `weight_norm` has just made
            of one: give the module, which knows its own.
        max_norm: the largest norm that is left unclipped; math.inf measures alone.
        groups: `StageGroups`, or any object with vocab_group, data_group, pipeline_group,
            vocab_rank and data_rank, whose vocab group is a row of the mesh.

    Returns:
        The norm before clipping, a float32 tensor (float64 where a gradient is), equal on every
        rank.

    Raises:
        ValueError: a max_norm that is no positive number; a gradient whose placement is partial:
            it has not been reduced; or a parameter that FSDP1 has flattened. That of one rank is
            raised on every rank of the mesh where it is of CPUs. On GPUs, which nobody waits for,
            the other ranks' norm and gradients are NaN.
    """
    if isinstance(parameters, nn.Module):
        mark_rows_of(parameters)
        parameters = parameters.parameters()
    every = list({id(p): p for p in parameters}.values())  # a shared parameter once
    problem = next(filter(None, map(_problem_of, every)), None)
    if not isinstance(max_norm, int | float | Tensor) or not max_norm > 0:
        problem = f"max_norm must be a positive number, got {max_norm!r}"
    with_grad = [(p, p.grad) for p in every if p.grad is not None]
    here = [grad for p, grad in with_grad if problem is None and _counts_here(p, grad, groups)]
    held = _by_dtype(grad for _, grad in with_grad)
    device = with_grad[0][1].device if with_grad else group_device(groups.pipeline_group)
    # The second number tells of problems, so that nobody waits for a rank that raises.
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for dtype, own in _by_dtype(here).items():
        norms = torch._foreach_norm(own, 2, dtype=accumulation_dtype(dtype))
        total[0] += torch.stack(norms).double().square().sum()
    total[1] += problem is not None
    norm = _sum_over_mesh(total, problem, groups).sqrt()
    norm = norm if torch.float64 in held else norm.float()
    if not math.isinf(max_norm):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for dtype, own in held.items():
            torch._foreach_mul_(own, factor.to(dtype))
    return norm


def _problem_of(parameter: nn.Parameter) -> str | None:
    """Say why nobody can tell where a parameter's gradient is to be counted, or None."""
    # FSDP1 so marks its flat parameters, and what it cut from them where it shows the original.
    if getattr(parameter, "_fsdp_flattened", False):
        return (
            f"a parameter {list(parameter.shape)} is a part of FSDP1's flat parameter, which does "
            f"not tell rows of the vocabulary from others, nor over which ranks it is spread: use "
            f"fully_shard, whose DTensors do"
        )
    placements = parameter.grad.placements if isinstance(parameter.grad, DTensor) else ()
    for placement in placements:
        if not isinstance(placement, Replicate | Shard):
            return (
                f"a gradient has the placement {placement}, which has not been reduced: "
                f"redistribute it before clipping"
            )
    return None


def _by_dtype(gradients: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Return what this rank holds of gradients, of each dtype together: few kernels."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        found.setdefault(gradient.dtype, []).append(local_part(gradient))
    return found


def _counts_here(parameter: nn.Parameter, gradient: Tensor, groups: Any) -> bool:
    """Whether this rank is the one that counts what it holds of a gradient."""
    rows = rows_of(parameter)
    if rows is not None and rows.is_tied_copy:
        return False
    if isinstance(gradient, DTensor):
        for axis, placement in enumerate(gradient.placements):
            replicated = isinstance(placement, Replicate)
            if replicated and gradient.device_mesh.get_local_rank(axis) != 0:
                return False
    shared_over = [(groups.data_group, groups.data_rank)]
    if rows is None:
        shared_over.append(columns_of(groups))
    return all(rank == 0 or is_spread_over(gradient, group) for group, rank in shared_over)


def _sum_over_mesh(total: Tensor, problem: str | None, groups: Any) -> Tensor:
    """Sum squares and the number of problems [2] over all groups; return the squares' sum.

    Raises:
        ValueError: a rank has a problem; see `clip_grad_norm_`.
    """
    over = [
        VocabGroup.of(group)
        for group in (columns_of(groups)[0], groups.data_group, groups.pipeline_group)
        if group is not None
    ]
    for group in over:
        total = group.sum(total)
    problems = set() if problem is None else {problem}
    if total.is_cpu and total[1] > 0:
        for group in over:
            problems.update(*group.exchange_objects(problems))
    if problems:
        raise ValueError("; ".join(sorted(problems)))
    return torch.where(total[1] > 0, torch.nan, total[0])
