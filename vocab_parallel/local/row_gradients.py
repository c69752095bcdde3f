"""Where the gradients of a shard's rows are added up, block by block."""

from torch import Tensor

from vocab_parallel.local.interface import Shard, Upstream
from vocab_parallel.local.tile_ops import put_product


class RowGradients:
    """Adds up a block's gradients over tiles of tokens, and puts them where they belong.

    Where one tile has all tokens, the product itself writes or adds to the destination. Else a
    block [r, D] of float32 sums is held, and rounded once.
    """

    def __init__(
        self, shard: Shard, upstream: Upstream, unit: Tensor | None, *, one_tile: bool
    ) -> None:
        target = upstream.classifier_grad
        self._dtype, self._unit = shard.dtype, unit
        self._adds = target.add_to is not None
        self._direct = one_tile and unit is None
        self.classifier: Tensor | None = None  # [R, D]
        if upstream.wanted.classifier:
            self.classifier = target.add_to
            if self.classifier is None:
                self.classifier = shard.classifier.new_empty(
                    shard.classifier.shape, dtype=target.dtype
                )
        self.bias: Tensor | None = None  # [R]
        if upstream.wanted.bias and shard.bias is not None:
            self.bias = shard.bias.new_zeros(shard.bias.shape, dtype=shard.dtype)
        self._rows = slice(0, 0)
        self._sums: Tensor | None = None  # of the block, where it is not written at once

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
            self._sums = hidden.new_empty(shape, dtype=self._dtype)
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
