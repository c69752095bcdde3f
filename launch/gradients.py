"""Gradients of the replicated body, summed over the ranks that share it."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def sum_gradients(parameters: Iterable[nn.Parameter], group: ProcessGroup) -> None:
    """All-reduce every gradient over the group, in place.

    In the gathering layouts the loss that every rank of a vocab group returns is that of all its
    tokens; the exact gradient of a replicated parameter is therefore the sum of the ranks'. All
    ranks call it with the same parameters in the same order.
    """
    if dist.get_world_size(group) == 1:
        return
    pending = [
        dist.all_reduce(parameter.grad, group=group, async_op=True)
        for parameter in parameters
        if parameter.grad is not None
    ]
    for work in pending:
        work.wait()


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient on the CPU, by the parameter's name."""
    return {
        name: parameter.grad.detach().to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
