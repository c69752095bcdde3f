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

`backward_plan.py` chooses between making z again and keeping it, `tile_ops.py` who works on a
tile. Where one kernel makes z and its statistics, forward has no tiles.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import (
    BackwardPlan,
    Planner,
    TileShape,
    blocks,
    budget_bytes,
    chosen,
    row_blocks,
    span_tokens,
)
from vocab_parallel.local.exponentials import (
    gradients_of_exponentials,
    sums_of_exponentials,
    whole_exponentials,
)
from vocab_parallel.local.interface import Gradients, Kept, Shard, Upstream
from vocab_parallel.local.row_gradients import RowGradients
from vocab_parallel.local.statistics import Statistics
from vocab_parallel.local.tile_ops import Block, HopperOps, corner, put_product, well_scaled

# In how many parts the tokens go where a pass cannot work in place.
_PARTS = 4


@dataclass(frozen=True)
class ChunkedImpl:
    """Exact, in memory that does not grow with the vocabulary unless it may.

    Attributes:
        memory_budget: bytes; see `plan_backward`.
        chunk_tokens, chunk_rows: the tile's sides, in place of those that the budget gives; on a
            GPU rows go by 16.
        microbatches_in_flight: how many forwards may wait for their backward, for the choice.
    """

    memory_budget: int | None = None
    chunk_tokens: int | None = None
    chunk_rows: int | None = None
    microbatches_in_flight: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")

    def plan(
        self,
        shard: Shard,
        *,
        tokens: int,
        most_rows: int | None,
        degree: int,
        backward: str,
        has_main_grad: bool = False,
    ) -> BackwardPlan:
        """See `LocalImpl.plan`.

        Where the size of the vocabulary is not known, ranks cannot plan alike, and no call is
        long.
        """
        span = max(tokens, 1)
        if most_rows is not None:
            span = span_tokens(span, most_rows, shard.hidden.dtype, has_main_grad)
        if not _may_keep(shard):
            if backward == "probs":
                raise ValueError(
                    f'logits_dtype="float32" with backward="probs" keeps logits in '
                    f"{shard.hidden.dtype} on a GPU, unless they are bfloat16 and the loss has "
                    f'neither label_smoothing nor an entropy: use "recompute" or "auto"'
                )
            backward = "recompute"
        return chosen(self._planner(shard, max(tokens, 1), degree, span, has_main_grad), backward)

    def plan_chunks(self, shard: Shard, tokens: int) -> BackwardPlan:
        """Plan for logits of all rows that live for a span of the tokens at a time.

        Whoever needs statistics and gradient of some tokens before the next ones, as
        `pipeline/spanning` does, makes their logits once.
        """
        alone = replace(self, microbatches_in_flight=1)
        return alone._planner(shard, max(tokens, 1), 1, max(tokens, 1), False).chunks()

    def _planner(
        self, shard: Shard, tokens: int, degree: int, span: int, has_main_grad: bool
    ) -> Planner:
        hopper = isinstance(shard.ops, HopperOps)
        return Planner(
            tokens=tokens,
            rows=max(shard.num_rows, 1),
            hidden_size=shard.hidden.shape[1],
            dtype=shard.product_dtype,
            # No logit that Hopper's kernels do not keep is in memory.
            logits_dtype=shard.product_dtype if hopper else shard.logits_dtype,
            mixed=shard.mixed,
            device_type=shard.hidden.device.type,
            kernels=shard.ops.kernels,
            degree=degree,
            microbatches_in_flight=self.microbatches_in_flight,
            budget=budget_bytes(self.memory_budget),
            chunk_tokens=self.chunk_tokens,
            chunk_rows=self.chunk_rows,
            temporaries=2 + (shard.transform.softcap is not None) + ("expected" in shard.names),
            span=span,
            has_main_grad=has_main_grad,
        )

    def forward(self, shard: Shard, plan: BackwardPlan) -> tuple[Statistics, Kept | None]:
        """See `LocalImpl.forward`."""
        num_kept = _rows_to_keep(shard, plan)
        kept: Tensor | None = None
        if num_kept:
            kept = shard.ops.buffer(shard, TileShape(shard.num_tokens, num_kept))
        found = Statistics.empty(shard.names, shard.num_tokens, shard.hidden)
        reference: Tensor | None = None
        if isinstance(shard.ops, HopperOps):
            reference = shard.ops.reference(shard)
            own = None if kept is None else kept[:, :num_kept]
            shard.ops.put_statistics(found, shard, reference, own, budget_bytes(self.memory_budget))
            if not shard.ops.keeps_probabilities(shard):
                reference = None
        else:
            _put_by_tiles(found, shard, plan, kept, num_kept)
        return found, None if kept is None else Kept(kept, num_kept, reference)

    def backward(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `LocalImpl.backward`."""
        exponentials = whole_exponentials(shard, upstream)
        if exponentials is not None:
            return gradients_of_exponentials(exponentials, shard, upstream)
        source = _GradientTiles(shard, plan, upstream)
        tile = source.tile
        row_slices = _row_slices(shard, tile, source.num_kept)
        at_once = len(row_slices) == 1 and source.unit is None
        hidden_grad = _allocate_hidden_grad(shard, upstream, at_once)
        one_tile = tile.tokens >= shard.num_tokens and not shard.mixed
        row_grads = RowGradients(shard, upstream, source.unit, one_tile=one_tile)
        for rows in row_slices:
            block = shard.ops.block(shard, rows)
            row_grads.begin(rows)
            for tokens in blocks(shard.num_tokens, tile.tokens):
                logits_grad, sums = source.make(block, tokens, rows)
                if hidden_grad is not None:
                    put_product(
                        hidden_grad[tokens], logits_grad, block.classifier, add=rows.start > 0
                    )
                    is_last = rows.stop == shard.num_rows and tokens.stop == shard.num_tokens
                    if is_last and upstream.when_hidden is not None and source.unit is None:
                        upstream.when_hidden(hidden_grad)
                hidden = shard.ops.widened(shard.hidden[tokens], shard)
                row_grads.add(logits_grad, hidden, sums)
            row_grads.end()
        if hidden_grad is not None and source.unit is not None:
            hidden_grad.mul_(source.unit)
        return Gradients(hidden_grad, row_grads.classifier, row_grads.bias)


class _GradientTiles:
    """Makes the gradient of one tile of raw logits after the other.

    The forward's logits are turned into it in place, where they were kept. The inputs' half of a
    split backward must leave them to the weights' half, and works in parts of the tokens, beside
    them. Where there are none, the product makes them again; where there are those of the first
    rows alone, in the place of those, once they are done.
    """

    def __init__(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> None:
        kept: Kept | None = upstream.kept
        wanted = upstream.wanted
        self._shard, self._upstream = shard, upstream
        self.num_kept = 0 if kept is None else kept.num_rows
        whole = self.num_kept == shard.num_rows
        # A part of the logits saves one half of a split backward its product: the first to come.
        self._pops = wanted.classifier or wanted.bias or not whole
        self._kept: Tensor | None = None
        if kept is not None:
            self._kept = kept.pop() if self._pops else kept.peek()
        self.tile = _tile(shard, plan, whole and self._kept is not None)
        self._scratch: Tensor | None = None
        if self._kept is None or not self._pops:
            if self._kept is not None:
                most = min(-(-shard.num_tokens // _PARTS), self.tile.tokens)
                self.tile = TileShape(most, self.tile.rows)
            self._scratch = shard.ops.buffer(shard, self.tile)
        elif not whole:
            self._scratch = self._kept
        self._grads, self.unit = well_scaled(upstream.grads, shard.product_dtype, peak=2.0**10)
        self._sums_tokens = wanted.bias and shard.bias is not None
        # Exponentials of some rows become gradients at once: all others are made as such.
        self._is_gradient = False
        self._kept_sums: Tensor | None = None  # [r], of tokens
        if kept is not None and self._kept is not None and kept.reference is not None:
            assert isinstance(shard.ops, HopperOps)
            values = self._kept[:, : self.num_kept]
            scale, own = shard.ops.settle(
                values, kept.reference, shard, upstream.statistics, upstream.grads
            )
            if self._sums_tokens:
                self._kept_sums = sums_of_exponentials(values, scale, own, shard)
            shard.ops.scale_tokens(values, scale, values, (shard.targets, own))
            self._is_gradient = True

    def make(self, block: Block, tokens: slice, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Return a tile's gradient [n, r], until the next call, and its sum over tokens [r]."""
        logits = None
        if self._kept is not None and rows.stop <= self.num_kept:
            logits = self._kept[tokens, rows]
        if logits is not None and self._is_gradient:
            # The sums are over all tokens already: they go with the first of them.
            if self._kept_sums is None or tokens.start > 0:
                return logits, None
            return logits, self._kept_sums[rows]
        if logits is not None and self._pops:
            out = logits
        else:
            assert self._scratch is not None
            out = corner(self._scratch, tokens, rows)
        sums = self._shard.ops.put_gradient(
            out, block, tokens, self._upstream.statistics, self._grads,
            logits=logits, sum_tokens=self._sums_tokens,
        )  # fmt: skip
        # The logits may be wider than the operands, as they are where no kernel works.
        return out.to(block.classifier.dtype), sums


def _may_keep(shard: Shard) -> bool:
    """Tell whether what forward keeps is as exact as the logits are asked to be.

    It is equal on all ranks, so that it does not ask which kernels work: Hopper's keep exponentials
    of float32 logits where they can, else logits in the operands' dtype.
    """
    if shard.mixed or shard.logits_dtype == shard.product_dtype or not shard.ops.kernels:
        return True
    return shard.hidden.dtype == torch.bfloat16 and shard.grad_names == ("lse", "target")


def _rows_to_keep(shard: Shard, plan: BackwardPlan) -> int:
    """Return of how many of the first rows forward keeps the logits, at most as planned."""
    if not shard.needs_grad:
        return 0
    whole = plan.backward == "probs"
    return shard.num_rows if whole else min(plan.kept_rows, shard.num_rows)


def _tile(shard: Shard, plan: BackwardPlan, keeps: bool) -> TileShape:
    """Return the tile of this rank's own work; kernels take kept logits whole if they can."""
    if keeps and shard.ops.kernels and not shard.ops.copies(shard):
        return TileShape(shard.num_tokens, shard.num_rows)
    tile = plan.tile
    return TileShape(min(tile.tokens, shard.num_tokens), min(tile.rows, shard.num_rows))


def _row_slices(shard: Shard, tile: TileShape, num_kept: int) -> list[slice]:
    """Cut the rows into tiles, those that are kept and the others apart."""
    return list(row_blocks(shard.num_rows, tile.rows, aligned=shard.ops.kernels, cut=num_kept))


def _put_by_tiles(
    found: Statistics,  # (k, N)
    shard: Shard,
    plan: BackwardPlan,
    kept: Tensor | None,
    num_kept: int,
) -> None:
    """Go through the tiles, those of the first ``num_kept`` rows in a place of their own."""
    ops = shard.ops
    tile = _tile(shard, plan, num_kept == shard.num_rows)
    row_slices = _row_slices(shard, tile, num_kept)
    # Rows that are not kept come first: what is kept may have the buffer after them.
    row_slices.sort(key=lambda rows: rows.stop <= num_kept)
    buffer = ops.buffer(shard, tile) if kept is None else kept
    for index, rows in enumerate(row_slices):
        block = ops.block(shard, rows)
        stays = rows.stop <= num_kept
        for tokens in blocks(shard.num_tokens, tile.tokens):
            logits = buffer[tokens, rows] if stays else corner(buffer, tokens, rows)
            ops.put_raw_logits(logits, block, tokens)
            ops.add_statistics(
                found.of(tokens), logits, block, tokens, first=index == 0, keep=stays
            )


def _allocate_hidden_grad(shard: Shard, upstream: Upstream, at_once: bool) -> Tensor | None:
    """Allocate the partial gradient [N, D]: in its own dtype where one product finishes it."""
    if not upstream.wanted.hidden:
        return None
    dtype = shard.dtype
    one_dtype = shard.sum_dtype == shard.hidden.dtype == shard.product_dtype
    if at_once and shard.hidden.is_cuda and one_dtype:
        dtype = shard.sum_dtype
    return shard.hidden.new_empty(shard.hidden.shape, dtype=dtype)
