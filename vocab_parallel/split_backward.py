"""Which gradients the running backward asks for.

Zero-bubble schedules run one Function's backward twice for each microbatch: once for the
hidden states, once for the weights. ``ctx.needs_input_grad`` is all True both times, so that a
Function that trusts it does all of its work, and its collective, twice. Autograd's engine knows
better.
"""

import warnings
from typing import Any

import torch


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
        wanted.append(needed and node is not None and (ask is None or _will_run(ask, node)))
    return tuple(wanted)


def _will_run(ask: Any, node: Any) -> bool:
    try:
        return bool(ask(node))
    except RuntimeError:
        # A leaf of torch.autograd.grad: the engine cannot say, and asks for it.
        return True
