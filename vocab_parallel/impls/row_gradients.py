"""The gradients of classifier and bias, block of rows by block of rows."""

import torch
from torch import Tensor

from vocab_parallel.impls.base import BackwardTask, Shard
from vocab_parallel.impls.products import put_product


class RowGradients:
    """Adds up a block's gradients over tiles of tokens, and puts them where they belong.

    Where one tile has all tokens, the product itself writes or adds to the destination. Else a
    block [r, D] of float32 sums is held, and rounded once.
    """

    def __init__(
        self, shard: Shard, task: BackwardTask, unit: Tensor | None, *, one_tile: bool
    ) -> None:
        self._shard, self._unit = shard, unit
        self._adds = task.classifier_grad.add_to is not None
        self._direct = one_tile and unit is None
        self.classifier: Tensor | None = None
        if task.wanted.classifier:
            self.classifier = task.classifier_grad.add_to
            if self.classifier is None:
                self.classifier = torch.empty_like(
                    shard.classifier, dtype=task.classifier_grad.dtype
                )
        self.bias: Tensor | None = None
        if task.wanted.bias and shard.bias is not None:
            self.bias = shard.bias.new_zeros(shard.bias.shape, dtype=shard.statistics_dtype)
        self._rows = slice(0, 0)
        self._sums: Tensor | None = None  # of the block, where it is not written at once

    @property
    def found(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients [R, D] and [R]."""
        return self.classifier, self.bias

    def begin(self, rows: slice) -> None:
        """Turn to a block of rows."""
        self._rows, self._sums = rows, None

    def add(self, logits_grad: Tensor, hidden: Tensor, sums: Tensor | None) -> None:
        """Add what some tokens give: logits' gradient [n, r], hidden states [n, D], its sum [r]."""
        if self.bias is not None and sums is not None:
            self.bias[self._rows] += sums
        if self.classifier is None:
            return
        if self._direct:
            put_product(self.classifier[self._rows], logits_grad.T, hidden, add=self._adds)
            return
        fresh = self._sums is None
        if self._sums is None:
            shape = (logits_grad.shape[1], hidden.shape[1])
            self._sums = hidden.new_empty(shape, dtype=self._shard.statistics_dtype)
        put_product(self._sums, logits_grad.T, hidden, add=not fresh)

    def end(self) -> None:
        """Put a block's sums in their place."""
        if self.bias is not None and self._unit is not None:
            self.bias[self._rows] *= self._unit
        if self._sums is None or self.classifier is None:
            return
        if self._unit is not None:
            self._sums.mul_(self._unit)
        destination = self.classifier[self._rows]
        if self._adds:
            destination.add_(self._sums)
        else:
            destination.copy_(self._sums)
