"""What happens to a tile of raw logits between two products: by a kernel, or by plain torch.

Both do the same, and a test compares them. The kernels need a CUDA device and a dtype of at most
float32; they read a tile once, and hold nothing of its size.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from vocab_parallel.impls.base import BackwardTask, Shard
from vocab_parallel.impls.tile_logits import finish_logits_
from vocab_parallel.statistics import StatisticNames, share_of


def kernels_work(tensor: Tensor) -> bool:
    """Tell whether the Triton kernels take a tensor's device and dtype."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and has_triton()


@functools.cache
def has_triton() -> bool:
    """Tell whether triton is installed; it is not for every system that has CUDA."""
    return importlib.util.find_spec("triton") is not None


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of raw logits: the operands' where a kernel reads them, else wider."""
    if kernels_work(hidden):
        return hidden.dtype
    return torch.promote_types(hidden.dtype, torch.float32)


def add_statistics(
    statistics: Tensor,  # (k, n), of the rows before this tile; updated
    names: StatisticNames,
    logits: Tensor,  # (n, r), raw
    block: Shard,
    tokens: slice,
    row_start: int,
    *,
    first: bool,
    keep: bool,
) -> None:
    """Join the statistics of a tile with those of the tiles before it, if there are any.

    Args:
        row_start: the tile's first row in the shard.
        first: whether nothing that ``statistics`` holds counts.
        keep: whether the logits must stay as they are.
    """
    targets = block.targets[tokens]
    if kernels_work(block.hidden):
        from vocab_parallel.kernels.row_statistics import row_statistics

        row_statistics(
            logits,
            block.bias,
            targets,
            row_start,
            statistics,
            names,
            softcap=block.softcap,
            temperature=block.temperature,
            first=first,
        )
        return
    if first:
        statistics.zero_()
        statistics[names.index("lse")] = -torch.inf
    _join_statistics(
        statistics, names, logits.clone() if keep else logits, block, targets - row_start
    )


def put_gradient(
    logits: Tensor,  # (n, r), raw
    out: Tensor,  # (n, r), may be the logits
    block: Shard,
    tokens: slice,
    row_start: int,
    task: BackwardTask,
    grads: Tensor,  # (k, N), in place of the task's
) -> Tensor | None:  # (r,)
    """Write the gradient of a tile of raw logits; return its sum over tokens if a bias wants it."""
    sum_tokens = task.wanted.bias and block.bias is not None
    targets = block.targets[tokens]
    statistics, grads = task.statistics[:, tokens], grads[:, tokens]
    if kernels_work(block.hidden):
        from vocab_parallel.kernels.logits_gradient import logits_gradient

        return logits_gradient(
            logits,
            block.bias,
            targets,
            row_start,
            statistics,
            grads,
            task.names,
            out,
            softcap=block.softcap,
            temperature=block.temperature,
            sum_tokens=sum_tokens,
        )
    if out is not logits:
        out.copy_(logits)
    _gradient_in_place(out, block, task.names, statistics, grads, targets - row_start)
    return out.sum(0) if sum_tokens else None


def scale_(tensor: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place by a number of the device; a kernel does nothing where it is 1."""
    if kernels_work(tensor) and tensor.is_contiguous():
        from vocab_parallel.kernels.scale import scale_ as launch

        return launch(tensor, factor)
    return tensor.mul_(factor)


def _in_tile(targets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return which targets lie in a tile [n], and an index [n, 1] that is safe for all."""
    inside = (targets >= 0) & (targets < num_rows)
    return inside, targets.long().clamp(0, num_rows - 1).unsqueeze(1)


def _join_statistics(
    statistics: Tensor,  # (k, n)
    names: StatisticNames,
    logits: Tensor,  # (n, r), raw; overwritten
    block: Shard,
    targets: Tensor,  # (n,), counted from the tile's first row
) -> None:
    finish_logits_(logits, block)
    rows = dict(zip(names, statistics, strict=True))
    inside, index = _in_tile(targets, logits.shape[1])
    rows["target"] += torch.where(inside, logits.gather(1, index).squeeze(1), 0.0)
    if "sum" in rows:
        rows["sum"] += logits.sum(1)

    # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
    largest = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    # A logit of -inf has no probability, and adds nothing to the mean: not 0 times -inf.
    values = logits.masked_fill(logits == -torch.inf, 0.0) if "expected" in rows else None
    exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
    total = exponentials.sum(1)
    lse = total.log().add_(largest)
    joined = torch.logaddexp(rows["lse"], lse)
    if values is not None:
        expected = values.mul_(exponentials).sum(1).div_(total.masked_fill(total == 0.0, 1.0))
        rows["expected"].mul_(share_of(rows["lse"], joined)).add_(share_of(lse, joined) * expected)
    rows["lse"].copy_(joined)


def _gradient_in_place(
    logits: Tensor,  # (n, r), raw; overwritten
    block: Shard,
    names: StatisticNames,
    statistics: Tensor,  # (k, n)
    grads: Tensor,  # (k, n)
    targets: Tensor,  # (n,), counted from the tile's first row
) -> None:
    """Put the gradient of the product in its place; `base.py` has the formula."""
    finish_logits_(logits, block)
    stat = dict(zip(names, statistics.unsqueeze(-1), strict=True))
    grad = dict(zip(names, grads.unsqueeze(-1), strict=True))

    scaled = None if block.softcap is None else logits * (block.temperature / block.softcap)
    factor = grad["lse"]
    target = stat["target"]
    at_target = factor * torch.expm1(target - stat["lse"]) + (factor + grad["target"])
    if "expected" in names:
        # No probability, no gradient: not 0 times -inf.
        finite = logits.masked_fill(logits == -torch.inf, 0.0)
        factor = finite.sub_(stat["expected"] - 1.0).mul_(grad["expected"]).add_(factor)
        finite_target = target.masked_fill(target == -torch.inf, 0.0)
        at_target += (
            grad["expected"]
            * (target - stat["lse"]).exp()
            * (1.0 + finite_target - stat["expected"])
        )
    gradient = logits.sub_(stat["lse"]).exp_().mul_(factor)
    inside, index = _in_tile(targets, gradient.shape[1])
    gradient.scatter_(
        1, index, torch.where(inside.unsqueeze(1), at_target, gradient.gather(1, index))
    )
    if "sum" in names:
        gradient.add_(grad["sum"])
    if scaled is not None:  # d tanh = 1 - tanh^2
        gradient.addcmul_(gradient, scaled.square_(), value=-1.0)
    if block.temperature != 1.0:
        gradient.div_(block.temperature)
