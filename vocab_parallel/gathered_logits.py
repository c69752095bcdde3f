"""Whole logits from sharded rows, for a few tokens at a time.

    hidden -> replicated_input -> F.linear with own rows -> gather_logits -> [..., vocab_size]

Backward of the second takes this rank's columns of a gradient that every rank has in full;
backward of the first sums what the ranks' rows give the hidden states.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel import collectives


def replicated_input(hidden: Tensor, group: ProcessGroup | None, degree: int) -> Tensor:
    """Return hidden [..., D] unchanged; its gradient is summed over the group."""
    return cast(Tensor, _ReplicatedInput.apply(hidden, group, degree))


def gather_logits(
    logits: Tensor,  # (..., rows) of this rank, by the ceiling partition
    start: int,
    vocab_size: int,
    group: ProcessGroup | None,
    degree: int,
) -> Tensor:  # (..., vocab_size)
    """Gather the columns of every rank; all must call."""
    return cast(Tensor, _GatherLogits.apply(logits, start, vocab_size, group, degree))


class _ReplicatedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup | None, degree: int) -> Tensor:
        ctx.group, ctx.degree = group, degree
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        partial = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        return collectives.sum_over_group(partial, ctx.group, ctx.degree).to(grad.dtype), None, None


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        start: int,
        vocab_size: int,
        group: ProcessGroup | None,
        degree: int,
    ) -> Tensor:
        share = -(-vocab_size // degree)
        own_rows = logits.shape[-1]
        ctx.own = slice(start, start + own_rows)
        padded = F.pad(logits, (0, share - own_rows)).unsqueeze(0)
        gathered = collectives.gather_tokens(padded, group, degree)  # [V, ..., share]
        return gathered.movedim(0, -2).flatten(-2)[..., :vocab_size].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad[..., ctx.own].contiguous(), None, None, None, None
