"""What autograd's engine asks of our backward: one half of it or the other, once and not twice.

Zero-bubble schedules run one Function's backward twice for each microbatch: once for the
hidden states, once for the weights. ``ctx.needs_input_grad`` is all True both times, so that a
Function that trusts it does all of its work, and its collective, twice. Autograd's engine knows
better (`wanted_inputs`), and an older torch forgets the graph between the halves (`keep_graph`).

A second derivative is what none of our Functions has (`first_derivative_only`).
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

Gradients = tuple[Tensor | None, ...]


def wanted_inputs(ctx: Any, tensor_inputs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Tell for each leading input of a Function whether this backward needs its gradient.

    Call it inside ``backward``. The engine is asked by a private function of torch; where that
    is missing, ``needs_input_grad`` is the answer: right, but twice the work under a split
    backward, which a warning says once.

    Args:
        ctx: the context of the Function.
        tensor_inputs: for each leading input, whether it was a tensor (None is not).
    """
    ask = getattr(torch._C, "_will_engine_execute_node", None)
    edges = iter(ctx.next_functions)  # one for each tensor input, in order
    if ask is None:
        warnings.warn(
            "this torch does not tell which half of a split backward is running: zero-bubble "
            "schedules will do the loss's backward twice, with the right result",
            stacklevel=2,
        )
    wanted = []
    for is_tensor, needed in zip(tensor_inputs, ctx.needs_input_grad, strict=False):
        node = next(edges)[0] if is_tensor else None
        runs = needed and node is not None
        if runs and ask is not None:
            # It is an error of a leaf of torch.autograd.grad, whose gradient is asked for.
            with contextlib.suppress(RuntimeError):
                runs = bool(ask(node))
        wanted.append(runs)
    return tuple(wanted)


def loses_nodes() -> bool:
    """Tell whether this torch forgets an autograd.Function between the halves of a backward.

    A schedule that splits the backward keeps a node of the graph for the weights' half, and
    detaches the loss. Before torch 2.13 that frees the node of an autograd.Function, and the half
    fails (pytorch issue 166577). `keep_graph` prevents it.
    """
    return TorchVersion(torch.__version__) < "2.13"


def keep_graph(loss: Tensor) -> None:
    """Let a loss keep its graph when it is detached in place, for as long as it is referenced.

    A schedule holds the loss of a microbatch until the weights' half is done.
    """
    if loss.requires_grad:
        loss.kept_graph = loss.view_as(loss).grad_fn  # type: ignore[attr-defined]


def first_derivative_only(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Let gradients of a Function's ``backward`` refuse to be differentiated.

    torch's own ``once_differentiable`` refuses only where the incoming gradient requires one: with
    the 1 that a loss starts from, ``create_graph=True`` would give gradients that count as
    constants, and a gradient penalty that is silently without its effect.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Gradients:
        if not torch.is_grad_enabled():  # no create_graph: the usual case
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        asked = torch.empty((), requires_grad=True)
        return tuple(
            gradient if gradient is None else _Refusing.apply(gradient, asked) for gradient in found
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
