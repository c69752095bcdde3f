"""Products over tiles of the logits: exact, deterministic, any device, bounded memory.

The plane [N tokens, R rows] is cut into tiles. Rows are the outer loop and tokens the inner one,
so that a block of rows is read once and its gradient is written once, and only the [N, D] partial
gradient of the hidden states, which is summed over the group in float32 anyway, is accumulated at
full size. A GPU's tile has all tokens unless the budget is tiny.

    forward   for each tile   z = e c^T                        2 N D R flops, one pass over z
    backward  for each tile   z again, or the forward's        2 N D R, or none
                              g in place of z                  one pass
                              dE[tokens] += g c                2 N D R
                              dC_block   += g^T e              2 N D R

`plan.py` chooses between making z again and keeping it. Where `fused.py` works, one kernel makes z
and does the pass; forward then has no tiles.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import Tensor

from vocab_parallel.impls import fused, passes
from vocab_parallel.impls.base import (
    BackwardTask,
    Choice,
    Demand,
    Forward,
    ForwardTask,
    Gradients,
    KeptLogits,
    Progress,
    Shard,
)
from vocab_parallel.impls.gradient_tiles import GradientTiles
from vocab_parallel.impls.plan import DEFAULT_MEMORY_BUDGET, plan_backward, plan_of
from vocab_parallel.impls.products import put_product, widened
from vocab_parallel.impls.row_gradients import RowGradients
from vocab_parallel.impls.tile_buffer import corner, tile_buffer
from vocab_parallel.impls.tile_logits import raw_logits, rows_of
from vocab_parallel.impls.tiles import TileShape, blocks, row_blocks
from vocab_parallel.statistics import StatisticNames


@dataclass(frozen=True)
class ChunkedImpl:
    """Exact, in memory that does not grow with the vocabulary unless it may.

    Attributes:
        memory_budget: bytes; see `plan_backward`.
        chunk_tokens, chunk_rows: the tile's sides, in place of those that the budget gives; on a
            GPU rows go by 16.
        microbatches_in_flight: how many forwards may wait for their backward, for the choice.
        overlap: whether communication may run beside the products; False is a plain order, for
            debugging.
    """

    memory_budget: int | None = None
    chunk_tokens: int | None = None
    chunk_rows: int | None = None
    microbatches_in_flight: int = 1
    overlap: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "overlap":
                if not isinstance(value, bool):
                    raise ValueError(f"overlap must be True or False, got {value!r}")
            elif value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")

    def check(self, demand: Demand) -> None:
        """Accept every call; `way` refuses what cannot be planned."""

    def way(self, demand: Demand) -> Choice:
        """See `LocalImpl.way`; `plan_backward` raises ValueError where nothing can be planned."""
        plan = plan_of(
            demand,
            self.memory_budget,
            self.microbatches_in_flight,
            self.chunk_tokens,
            self.chunk_rows,
            triton=passes.has_triton(),
        )
        return Choice(plan.backward, plan.tile.tokens, plan.kept_rows)

    def forward(self, shard: Shard, task: ForwardTask) -> Forward:
        """See `LocalImpl.forward`."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        num_kept = min(task.keep_rows, num_rows)
        kept = tile_buffer(shard, TileShape(num_tokens, num_kept)) if num_kept else None
        shape = (len(task.names), num_tokens)
        statistics = shard.hidden.new_empty(shape, dtype=shard.statistics_dtype)
        if fused.works(shard):
            self._put_fused(statistics, shard, task, None if kept is None else kept[:, :num_kept])
        else:
            tile = self._tile(shard, task.names, num_kept == num_rows)
            row_slices = self._row_blocks(shard, tile, num_kept)
            # Rows that are not kept come first: what is kept may have the buffer after them.
            row_slices.sort(key=lambda rows: rows.stop <= num_kept)
            buffer = tile_buffer(shard, tile) if kept is None else kept
            _put_by_tiles(statistics, shard, task, buffer, num_kept, tile, row_slices)
        return Forward(statistics, kept=None if kept is None else KeptLogits(kept, num_kept))

    def _put_fused(
        self, statistics: Tensor, shard: Shard, task: ForwardTask, kept: Tensor | None
    ) -> None:
        memory = DEFAULT_MEMORY_BUDGET if self.memory_budget is None else self.memory_budget
        num_tokens = shard.hidden.shape[0]
        for tokens in _token_blocks(num_tokens, num_tokens, task.progress):
            fused.put_statistics(statistics, task.names, shard, tokens, kept, memory)
            if task.progress is not None:
                task.progress.complete(statistics, tokens.stop)

    def backward(self, shard: Shard, task: BackwardTask) -> Gradients:
        """See `LocalImpl.backward`."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        source = GradientTiles(shard, task, self._tile)
        tile = source.tile_shape
        num_kept = 0 if task.kept is None else task.kept.num_rows
        row_slices = self._row_blocks(shard, tile, num_kept)
        at_once = len(row_slices) == 1 and source.unit is None
        hidden_grad = _allocate_hidden_grad(shard, task, at_once)
        row_grads = RowGradients(shard, task, source.unit, one_tile=tile.tokens >= num_tokens)
        for rows in row_slices:
            block = rows_of(shard, rows)
            # Tokens are complete with the last rows, and where nothing is to be multiplied after.
            is_last = rows.stop == num_rows and source.unit is None
            row_grads.begin(rows)
            for tokens in blocks(num_tokens, tile.tokens):
                logits_grad, sums = source.tile(block, tokens, rows)
                if hidden_grad is not None:
                    _add_hidden_grad(
                        hidden_grad,
                        logits_grad,
                        block,
                        tokens,
                        task.progress if is_last else None,
                        add=rows.start > 0,
                    )
                hidden = widened(shard.hidden[tokens], shard.statistics_dtype)
                row_grads.add(logits_grad, hidden, sums)
            row_grads.end()
        if hidden_grad is not None and source.unit is not None:
            hidden_grad.mul_(source.unit)
        return Gradients(hidden_grad, *row_grads.found)

    def _row_blocks(self, shard: Shard, tile: TileShape, num_kept: int) -> list[slice]:
        """Cut the rows into tiles, those that are kept and the others apart."""
        aligned = passes.kernels_work(shard.hidden)
        num_rows = shard.classifier.shape[0]
        return list(row_blocks(num_rows, tile.rows, aligned=aligned, cut=num_kept))

    def _tile(self, shard: Shard, names: StatisticNames, keeps: bool) -> TileShape:
        """Choose the tile of this rank's own work; kernels take kept logits whole."""
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        if keeps and passes.kernels_work(shard.hidden):
            return TileShape(num_tokens, num_rows)
        return plan_backward(
            num_tokens,
            num_rows,
            shard.hidden.shape[1],
            shard.hidden.dtype,
            backward="recompute",
            memory_budget=self.memory_budget,
            device_type="cuda" if shard.hidden.is_cuda else "cpu",
            chunk_tokens=self.chunk_tokens,
            chunk_rows=self.chunk_rows,
            temporaries=2 + (shard.softcap is not None) + ("expected" in names),
            triton=passes.has_triton(),
        ).tile


def _put_by_tiles(
    statistics: Tensor,  # (k, N)
    shard: Shard,
    task: ForwardTask,
    buffer: Tensor,
    num_kept: int,
    tile: TileShape,
    row_slices: list[slice],
) -> None:
    """Go through the tiles, those of the first ``num_kept`` rows in a place of their own."""
    # Tokens are complete with the last rows: to cut small tiles would slow them and hide little.
    progress = task.progress if len(row_slices) == 1 else None
    for index, rows in enumerate(row_slices):
        block = rows_of(shard, rows)
        stays = rows.stop <= num_kept
        for tokens in _token_blocks(shard.hidden.shape[0], tile.tokens, progress):
            logits = buffer[tokens, rows] if stays else corner(buffer, tokens, rows)
            passes.add_statistics(
                statistics[:, tokens],
                task.names,
                raw_logits(block, tokens, logits),
                block,
                tokens,
                rows.start,
                first=index == 0,
                keep=stays,
            )
            if index == len(row_slices) - 1 and task.progress is not None:
                task.progress.complete(statistics, tokens.stop)


def _add_hidden_grad(
    hidden_grad: Tensor,  # (N, D)
    logits_grad: Tensor,  # (n, r)
    block: Shard,
    tokens: slice,
    progress: Progress | None,
    *,
    add: bool,
) -> None:
    """Put or add a tile's share, part by part where somebody waits for the parts."""
    ends = {tokens.stop}
    if progress is not None:
        ends |= {p.stop for p in progress.pieces if tokens.start < p.stop < tokens.stop}
    start = tokens.start
    for stop in sorted(ends):
        part = logits_grad[start - tokens.start : stop - tokens.start]
        put_product(hidden_grad[start:stop], part, block.classifier, add=add)
        if progress is not None:
            progress.complete(hidden_grad, stop)
        start = stop


def _token_blocks(num_tokens: int, size: int, progress: Progress | None) -> Iterator[slice]:
    """Cut the tokens into tiles, or into the parts that are communicated one by one."""
    if size >= num_tokens and progress is not None:
        return iter(progress.pieces)
    return blocks(num_tokens, size)


def _allocate_hidden_grad(shard: Shard, task: BackwardTask, at_once: bool) -> Tensor | None:
    """Allocate the partial gradient [N, D]: in its own dtype where one product finishes it."""
    if not task.wanted.hidden:
        return None
    dtype = shard.statistics_dtype
    if at_once and shard.hidden.is_cuda and shard.sum_dtype == shard.hidden.dtype:
        dtype = shard.sum_dtype
    return shard.hidden.new_empty(shard.hidden.shape, dtype=dtype)
