"""Gradients of what several ranks replicate, summed over them in few collectives."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from vocab_parallel.collectives import VocabGroup, group_device

BUCKET_BYTES = 64 * 2**20


@torch.no_grad()
def sum_gradients(
    parameters: Iterable[nn.Parameter],
    group: ProcessGroup | None,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """All-reduce the gradient of every trained parameter over a group, in place, in its dtype.

    All ranks of the group call it with the same parameters in the same order; of a DTensor each
    sums its own shard. Whether a parameter has a gradient may differ between ranks (an expert that
    no token of a rank reached): it takes part as zeros where it has none, and gets the sum. Where
    the group communicates from the CPU the ranks tell each other first, in one small collective,
    and what has a gradient on none of them stays without. On a GPU, where that would make the host
    wait, it gets zeros, which weight decay reaches: freeze what never takes part. Does not wait for
    a GPU.

    Args:
        parameters: those that are not trained (``requires_grad=False``) are left out.
        group: whose ranks all call.
        bucket_bytes: of gradients that are copied into one buffer and summed together; one
            buffer exists at a time. A larger gradient is summed where it is.
    """
    over = VocabGroup.of(group)
    if over.degree == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    _agree_on_gradients(trained, over)
    gradients = [local_part(p.grad) for p in trained if p.grad is not None]
    for bucket in _buckets(gradients, bucket_bytes):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            over.sum(bucket[0])
            continue
        flat = over.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(
            bucket, [part.view(own.shape) for part, own in zip(parts, bucket, strict=True)]
        )


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _agree_on_gradients(trained: list[nn.Parameter], over: VocabGroup) -> None:
    """Give zeros to parameters without a gradient, so that all ranks have the same ones."""
    ranks = [1] * len(trained)  # that have a gradient of each, for all that is known
    if trained and group_device(over.group).type == "cpu":
        own = [parameter.grad is not None for parameter in trained]
        ranks = over.sum(torch.tensor(own, dtype=torch.int32)).tolist()
    for parameter, count in zip(trained, ranks, strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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
