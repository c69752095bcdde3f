"""The refusal of a second derivative, which none of our Functions has."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Let gradients of a Function's ``backward`` refuse to be differentiated.

    torch's own ``once_differentiable`` refuses only where the incoming gradient requires one: with
    the 1 that a loss starts from, ``create_graph=True`` would give gradients that count as
    constants, and a gradient penalty that is silently without its effect.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph: the usual case
            return found
        asked = torch.empty((), requires_grad=True)
        return tuple(
            gradient if gradient is None else _Refusing.apply(gradient, asked)
            for gradient in found
        )

    return run


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, asked: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise ValueError(
            "the loss has no second derivative, and a gradient that was taken with "
            "create_graph=True was differentiated: leave the loss out of the penalty, or compute "
            "it from materialised logits"
        )
