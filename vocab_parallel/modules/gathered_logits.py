"""Whole logits from sharded rows, for a few tokens at a time.

    hidden -> replicated_input -> F.linear with own rows -> gather_logits -> [..., vocab_size]

Backward of the second takes this rank's columns of a gradient that every rank has in full;
backward of the first sums what the ranks' rows give the hidden states.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.local.statistics import accumulation_dtype


def replicated_input(hidden: Tensor, group: VocabGroup) -> Tensor:
    """Return hidden [..., D] unchanged; its gradient is summed over the group."""
    if group.degree == 1:
        return hidden
    return cast(Tensor, _ReplicatedInput.apply(hidden, group))


def gather_logits(
    logits: Tensor,  # (..., rows) of this rank, by the ceiling partition
    start: int,
    vocab_size: int,
    group: VocabGroup,
) -> Tensor:  # (..., vocab_size)
    """Gather the columns of every rank; all must call."""
    return cast(Tensor, _GatherLogits.apply(logits, start, vocab_size, group))


class _ReplicatedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: VocabGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: VocabGroup = ctx.group
        partial = grad.to(accumulation_dtype(grad.dtype), copy=True)
        return group.sum(partial).to(grad.dtype), None


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        start: int,
        vocab_size: int,
        group: VocabGroup,
    ) -> Tensor:
        share = -(-vocab_size // group.degree)
        own_rows = logits.shape[-1]
        ctx.own = slice(start, start + own_rows)
        padded = F.pad(logits, (0, share - own_rows)).unsqueeze(0)
        gathered = group.gather_tokens(padded)  # [V, ..., share]
        return gathered.movedim(0, -2).flatten(-2)[..., :vocab_size].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[..., ctx.own].contiguous(), None, None, None
