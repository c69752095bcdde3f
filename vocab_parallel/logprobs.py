"""Log-probabilities and entropies of tokens, for objectives of reinforcement learning."""

from typing import Any

import torch
from torch import Tensor

from vocab_parallel.arguments import LossSettings
from vocab_parallel.call import Operands, prepare
from vocab_parallel.layout import IGNORED, OUT_OF_RANGE, HiddenLayout
from vocab_parallel.uncompiled import uncompiled


@uncompiled
def token_logprobs(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T) global ids
    bias: Tensor | None = None,  # (stop - start,)
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    *,
    return_entropy: bool = False,
    vocab_parallel_options: Any = None,
    temperature: float = 1.0,
    hidden_layout: HiddenLayout = "replicated",
    hidden_grad_scale: float = 1.0,
    e_grad_reduce_dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    backward: str = "auto",
    memory_budget: int | None = None,
    validate: bool | None = None,
    **impl_options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target and, where asked, the entropy of its position.

    Both are differentiable with any gradient, in e, c and bias, and need one backward pass over
    the logits together. Every rank of the vocab group calls it; it communicates 2 float32 for each
    token in forward, 3 with the entropy, and the gradient of the hidden states in backward. In
    the gathering layouts results are this rank's own tokens, and their gradients are gathered in
    backward: all ranks must use them or none.

    Args:
        return_entropy: also return -sum p log p, in nats, of each position.
        Everything else is as in `linear_cross_entropy`.

    Returns:
        log-probabilities [..., T - shift] in float32 (float64 for float64 inputs), 0 where the
        target is ignored; with return_entropy (log-probabilities, entropies), both so.

    Raises:
        ValueError: bad input, as `linear_cross_entropy`; an entropy from an implementation that
            has none.
    """
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        shift=int(shift) if isinstance(shift, bool) else shift,
        return_entropy=return_entropy,
        temperature=temperature,
        hidden_layout=hidden_layout,
        hidden_grad_scale=hidden_grad_scale,
        e_grad_reduce_dtype=e_grad_reduce_dtype,
        backward=backward,
        memory_budget=memory_budget,
        impl=impl,
        impl_options=impl_options,
    )
    operands = Operands.of(e, c, targets, bias)
    call = prepare(operands, settings, vocab_parallel_options, validate=validate)
    labels = call.labels()
    statistics = call.statistics(labels)
    ignored = labels == IGNORED
    logprobs = (statistics[1] - statistics[0]).masked_fill(ignored, 0.0)
    logprobs = call.own(logprobs.masked_fill(labels == OUT_OF_RANGE, torch.nan))
    if not return_entropy:
        return logprobs
    entropy = (statistics[0] - statistics[2]).masked_fill(ignored, 0.0)
    return logprobs, call.own(entropy)
