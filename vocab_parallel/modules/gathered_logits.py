"""Whole logits from sharded rows, for a few tokens at a time.

    hidden -> replicated_input -> F.linear with own rows -> gather_logits -> [..., vocab_size]

Backward of the second takes this rank's columns of a gradient that every rank has in full;
backward of the first sums what the ranks' rows give the hidden states.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.partition import row_range
from vocab_parallel.statistics import accumulation_dtype


def replicated_input(hidden: Tensor, group: VocabGroup) -> Tensor:
    """Return hidden [..., D] unchanged; its gradient is summed over the group."""
    if group.degree == 1:
        return hidden
    return cast(Tensor, _ReplicatedInput.apply(hidden, group))


def gather_logits(
    logits: Tensor,  # (..., rows) of this rank
    row_counts: Sequence[int],
    group: VocabGroup,
) -> Tensor:  # (..., vocab_size)
    """Gather the columns of every rank; all must call, with the rows of each."""
    return cast(Tensor, _GatherLogits.apply(logits, row_counts, group))


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
    def forward(ctx: Any, logits: Tensor, row_counts: Sequence[int], group: VocabGroup) -> Tensor:
        ctx.own = slice(*row_range(row_counts, group.rank))
        padding = max(row_counts) - logits.shape[-1]
        gathered = group.gather_tokens(F.pad(logits, (0, padding)).unsqueeze(0))  # [V, ..., most]
        columns = [of_rank[..., :n] for of_rank, n in zip(gathered, row_counts, strict=True)]
        return torch.cat(columns, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., ctx.own].contiguous(), None, None
