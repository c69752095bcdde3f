"""Gradients, by name."""

from torch import Tensor, nn

from launch.sharded_body import whole


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient on the CPU, by the parameter's name.

    Sharded ones are gathered: all ranks of their mesh call.
    """
    return {
        name: whole(parameter.grad.detach()).to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
