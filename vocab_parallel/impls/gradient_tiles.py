"""The raw logits' gradient, tile by tile, from what forward kept or from the product again."""

from collections.abc import Callable

from torch import Tensor

from vocab_parallel.impls import fused, passes
from vocab_parallel.impls.base import BackwardTask, Shard
from vocab_parallel.impls.products import well_scaled
from vocab_parallel.impls.tile_buffer import corner, tile_buffer
from vocab_parallel.impls.tile_logits import raw_logits
from vocab_parallel.impls.tiles import TileShape
from vocab_parallel.statistics import StatisticNames

# In how many parts the tokens go where a pass cannot work in place.
_PARTS = 4


class GradientTiles:
    """Makes the gradient of one tile of raw logits after the other.

    The forward's logits are turned into it in place, where they were kept. The inputs' half of a
    split backward must leave them to the weights' half, and works in parts of the tokens, beside
    them. Where there are none, the product makes them again; where there are those of the first
    rows alone, in the place of those, once they are done.
    """

    def __init__(
        self,
        shard: Shard,
        task: BackwardTask,
        choose_tile: Callable[[Shard, StatisticNames, bool], TileShape],
    ) -> None:
        self._task = task
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        self._kept: Tensor | None = None
        self._kept_rows = 0 if task.kept is None else task.kept.num_rows
        whole = self._kept_rows == num_rows
        # A part of the logits saves one half of a split backward its product: the first to come.
        takes = task.wanted.classifier or task.wanted.bias or not whole
        if task.kept is not None:
            self._kept = task.kept.take() if takes else task.kept.look()
        self.tile_shape = choose_tile(shard, task.names, whole and self._kept is not None)
        self._takes = takes
        self._fused = fused.works(shard)
        self._scratch: Tensor | None = None
        if self._kept is None or not takes:
            if self._kept is not None:
                self.tile_shape = TileShape(-(-num_tokens // _PARTS), self.tile_shape.rows)
            self._scratch = tile_buffer(shard, self.tile_shape)
        elif not whole:
            self._scratch = self._kept
        self._grads, self.unit = well_scaled(
            task.grads.contiguous(), shard.classifier, peak=2.0**10
        )

    def tile(self, block: Shard, tokens: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return a tile's gradient [n, r], until the next call, and its sum over tokens [r]."""
        if self._kept is not None and rows.stop <= self._kept_rows:
            logits = self._kept[tokens, rows]
            out = logits if self._takes else self._corner(tokens, rows)
        else:
            out = self._corner(tokens, rows)
            if self._fused:
                return out, fused.put_gradient(
                    out, block, tokens, rows.start, self._task, self._grads
                )
            logits = raw_logits(block, tokens, out)
        sums = passes.put_gradient(logits, out, block, tokens, rows.start, self._task, self._grads)
        # Where no kernel works the logits may be wider than the operands.
        return out.to(block.classifier.dtype), sums

    def _corner(self, tokens: slice, rows: slice) -> Tensor:
        assert self._scratch is not None
        return corner(self._scratch, tokens, rows)
