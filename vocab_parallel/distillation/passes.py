"""The passes over tiles of the student's logits, on one rank's rows: statistics, then gradients.

    S   for each tile   z = e c^T, u = e' c'^T      2 N D R + 2 N D' R flops, joined online
        again for "js", once S has been joined over the group
    T   for each tile   z and u again               2 N D R + 2 N D' R
                        g in place of z
                        dE[tokens] += g c           2 N D R
                        dC_block   += g^T e         2 N D R

A teacher's top-k has no u. Nothing of [N, R] is kept between the two.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vocab_parallel.distillation.columns import Columns, TokenStatistics, join
from vocab_parallel.distillation.hidden_teacher import logits_of
from vocab_parallel.distillation.labels import LabelTerm
from vocab_parallel.local.backward_plan import (
    TileShape,
    blocks,
    budget_bytes,
    check_budget,
    row_blocks,
    tile_shape,
)
from vocab_parallel.local.interface import Gradients, Shard, Wanted
from vocab_parallel.local.statistics import Statistics
from vocab_parallel.local.tile_ops import put_product, well_scaled

# Float16 keeps entries down to 1e-9 of this, and log-ratios of a thousand fit above it.
_PEAK = 2.0**6


class Comparison(Protocol):
    """What the student is compared with; `HiddenTeacher` says what each method gives.

    Attributes:
        spare: columns beside a tile's logits.
        columns: the statistics of the first pass.
        later_columns: those that a second pass sums; none where there is no second pass.
        tiles: tensors of a tile's shape at the worst moment, the student's logits included.
    """

    @property
    def spare(self) -> int:
        """See above."""
        ...

    @property
    def columns(self) -> Columns:
        """See above."""
        ...

    @property
    def later_columns(self) -> Columns:
        """See above."""
        ...

    @property
    def tiles(self) -> int:
        """See above."""
        ...

    def statistics(self, logits: Tensor, tokens: slice, rows: slice) -> list[Tensor]:
        """Return the statistics of a tile; may overwrite its logits."""
        ...

    def later_statistics(
        self, logits: Tensor, statistics: TokenStatistics, tokens: slice, rows: slice
    ) -> list[Tensor]:
        """Return those of the second pass."""
        ...

    def gradient(
        self, logits: Tensor, statistics: TokenStatistics, grads: Tensor, tokens: slice, rows: slice
    ) -> Tensor:
        """Return the gradient of a tile's logits; may overwrite these."""
        ...

    def student_lse(self, statistics: TokenStatistics) -> Tensor:
        """Return the logsumexp [N] of the student's logits."""
        ...

    def values(self, statistics: TokenStatistics) -> Tensor:
        """Return what is differentiated, [m, N]."""
        ...


@dataclass(frozen=True)
class Passes:
    """One rank's share of the work.

    Attributes:
        student: its shard, with the loss's tokens; its targets are those of the labels.
        comparison: with what.
        labels: what their cross-entropy asks, or None.
        memory_budget: bytes of what has a tile's shape; None means 64 MiB.
    """

    student: Shard
    comparison: Comparison
    labels: LabelTerm | None
    memory_budget: int | None

    def statistics(self) -> TokenStatistics:
        """Return those of this rank's rows, [k, N]."""
        columns = all_columns(self.comparison, self.labels)
        return self._accumulated(columns, self._tile_statistics)

    def later_statistics(self, statistics: TokenStatistics) -> Tensor:
        """Return what this rank's rows add to the second pass's sums, [k, N].

        Args:
            statistics: of the first pass, of the whole vocabulary.
        """

        def of_tile(logits: Tensor, tokens: slice, rows: slice) -> list[Tensor]:
            found = statistics.of(tokens)
            return self.comparison.later_statistics(logits, found, tokens, rows)

        return self._accumulated(self.comparison.later_columns, of_tile).values

    def gradients(self, statistics: TokenStatistics, grads: Tensor, wanted: Wanted) -> Gradients:
        """Return the wanted gradients: that of the hidden states is the sum over these rows.

        Args:
            statistics: of all passes, of the whole vocabulary.
            grads: what each value [m, N] receives; one line more where there are labels.
            wanted: the gradients to produce.
        """
        shard, tile = self.student, self._tile
        lse = None if self.labels is None else self.comparison.student_lse(statistics)
        scaled, unit = well_scaled(Statistics(grads, ()), shard.product_dtype, peak=_PEAK)
        hidden_grad = _zeros(wanted.hidden, shard.hidden, shard.dtype)
        row_grad = _zeros(wanted.classifier, shard.classifier, shard.classifier.dtype)
        bias_grad = None if shard.bias is None else _zeros(wanted.bias, shard.bias, shard.dtype)
        for rows in self._row_slices():
            block = shard.ops.block(shard, rows)
            sums = None
            if row_grad is not None:
                sums = row_grad.new_zeros(row_grad[rows].shape, dtype=shard.dtype)
            for tokens in blocks(shard.num_tokens, tile.tokens):
                wide = self._gradient(statistics, lse, scaled.values, tokens, rows)
                if bias_grad is not None:
                    bias_grad[rows] += wide.sum(0)
                found = wide.to(block.classifier.dtype)
                if hidden_grad is not None:
                    put_product(hidden_grad[tokens], found, block.classifier, add=True)
                if sums is not None:
                    hidden = shard.ops.widened(shard.hidden[tokens], shard)
                    put_product(sums, found.T, hidden, add=True)
            if row_grad is not None and sums is not None:
                row_grad[rows] = sums if unit is None else sums.mul_(unit)
        if unit is not None:
            for gradient in (hidden_grad, bias_grad):
                if gradient is not None:
                    gradient.mul_(unit)
        return Gradients(hidden_grad, row_grad, bias_grad)

    def _tile_statistics(self, logits: Tensor, tokens: slice, rows: slice) -> list[Tensor]:
        found = []
        if self.labels is not None:
            own = logits[:, : rows.stop - rows.start]
            found = self.labels.statistics(own, self.student.targets[tokens] - rows.start)
        return [*found, *self.comparison.statistics(logits, tokens, rows)]

    def _gradient(
        self,
        statistics: TokenStatistics,
        lse: Tensor | None,
        grads: Tensor,
        tokens: slice,
        rows: slice,
    ) -> Tensor:
        """Return the gradient [n, r] of a tile's product, before bias, softcap and temperature."""
        shard = self.student
        statistics, grads = statistics.of(tokens), grads[:, tokens]
        cap, temperature = shard.transform
        logits = logits_of(shard, tokens, rows, self.comparison.spare)
        own = logits[:, : rows.stop - rows.start]
        capped = None if cap is None else own * (temperature / cap)
        of_labels = None
        if self.labels is not None:
            assert lse is not None
            targets = shard.targets[tokens] - rows.start
            of_labels = self.labels.gradient(own, targets, statistics, lse[tokens], grads[-1])
            grads = grads[:-1]
        found = self.comparison.gradient(logits, statistics, grads, tokens, rows)
        if temperature != 1.0:
            found.div_(temperature)
        if of_labels is not None:
            found.add_(of_labels)
        if capped is not None:  # d tanh = 1 - tanh^2
            found.addcmul_(found, capped.square_(), value=-1.0)
        return found

    def _accumulated(
        self, columns: Columns, of_tile: Callable[[Tensor, slice, slice], list[Tensor]]
    ) -> TokenStatistics:
        """Join the statistics of all tiles, one after the other."""
        shard = self.student
        num_tokens = shard.num_tokens
        found = TokenStatistics.of_no_rows(columns, num_tokens, shard.dtype, shard.hidden)
        for rows in self._row_slices():
            for tokens in blocks(num_tokens, self._tile.tokens):
                logits = logits_of(shard, tokens, rows, self.comparison.spare)
                lines = [torch.atleast_2d(each) for each in of_tile(logits, tokens, rows)]
                before = found.values[:, tokens]
                found.values[:, tokens] = join(torch.stack([before, torch.cat(lines)]), columns)
        return found

    def _row_slices(self) -> Iterator[slice]:
        shard = self.student
        return row_blocks(shard.num_rows, self._tile.rows, aligned=shard.ops.kernels)

    @property
    def _tile(self) -> TileShape:
        """Return a tile of which all that has its shape fits in the budget."""
        shard = self.student
        each = bytes_per_logit(shard, self.comparison, self.labels)
        budget = budget_bytes(self.memory_budget)
        return tile_shape(shard.num_tokens, shard.num_rows, each, budget, shard.hidden.device.type)


def all_columns(comparison: Comparison, labels: LabelTerm | None) -> Columns:
    """Return the statistics of the first pass: those of the labels, then the comparison's."""
    return (*(() if labels is None else labels.columns), *comparison.columns)


def bytes_per_logit(shard: Shard, comparison: Comparison, labels: LabelTerm | None) -> int:
    """Return the bytes that a tile takes for each of its logits."""
    tiles = comparison.tiles + (labels is not None) + (shard.transform.softcap is not None)
    return (
        tiles + 1
    ) * shard.dtype.itemsize  # one for masks, and for a cast to the operands' dtype


def check_memory(
    shard: Shard, comparison: Comparison, labels: LabelTerm | None, memory_budget: int | None
) -> None:
    """Raise ValueError where not even one logit fits in the budget."""
    check_budget(budget_bytes(memory_budget), bytes_per_logit(shard, comparison, labels))


def _zeros(wanted: bool, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    return (
        torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if wanted
        else None
    )
