"""Gradients of what is replicated, summed over the ranks that share it."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

BUCKET_BYTES = 64 * 2**20
_IN_FLIGHT = 2  # buckets that exist at a time: one is filled while another is summed


def sum_gradients(
    parameters: Iterable[nn.Parameter], group: ProcessGroup, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """All-reduce every gradient over the group, in place, many of them in one collective.

    In the gathering layouts the loss that every rank of a vocab group returns is that of all its
    tokens; the exact gradient of a replicated parameter is therefore the sum of the ranks'. All
    ranks call it with the same parameters in the same order. Does not wait for a GPU.

    Args:
        parameters: those without a gradient are left out.
        group: whose ranks all call.
        bucket_bytes: of gradients that are copied into one buffer and summed together; two
            buffers exist at a time. A larger gradient is summed where it is.
    """
    if dist.get_world_size(group) == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pending: deque[tuple[list[Tensor], Tensor, Any]] = deque()
    for bucket in _buckets(gradients, bucket_bytes):
        if len(pending) == _IN_FLIGHT:
            _finish(*pending.popleft())
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if alone else torch.cat([gradient.reshape(-1) for gradient in bucket])
        pending.append(
            ([] if alone else bucket, flat, dist.all_reduce(flat, group=group, async_op=True))
        )
    for summed in pending:
        _finish(*summed)


def _buckets(gradients: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yield gradients of one dtype, in order, together at most so many bytes or a single one."""
    held: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        bucket = held.setdefault(gradient.dtype, [])
        if bucket and sum(own.nbytes for own in bucket) + gradient.nbytes > limit:
            yield bucket
            bucket = held[gradient.dtype] = []
        bucket.append(gradient)
    yield from held.values()


def _finish(bucket: list[Tensor], flat: Tensor, work: Any) -> None:
    """Wait, on a GPU in its stream alone, for a bucket's sum and put it where it belongs."""
    work.wait()
    if bucket:
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(
            bucket, [part.view(own.shape) for part, own in zip(parts, bucket, strict=True)]
        )


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient on the CPU, by the parameter's name."""
    return {
        name: parameter.grad.detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
