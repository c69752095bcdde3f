"""Where a tile's raw logits lie."""

from torch import Tensor

from vocab_parallel.impls import passes
from vocab_parallel.impls.base import Shard
from vocab_parallel.impls.plan import padded
from vocab_parallel.impls.tiles import TileShape


def tile_buffer(shard: Shard, tile: TileShape) -> Tensor:
    """Allocate a tile's logits [tokens, at least rows], tokens a whole number of lines apart."""
    rows = padded(tile.rows) if passes.kernels_work(shard.hidden) else tile.rows
    return shard.hidden.new_empty((tile.tokens, rows), dtype=passes.logits_dtype(shard.hidden))


def corner(buffer: Tensor, tokens: slice, rows: slice) -> Tensor:
    """Return the part of a tile's buffer that some tokens and rows need."""
    return buffer[: tokens.stop - tokens.start, : rows.stop - rows.start]
