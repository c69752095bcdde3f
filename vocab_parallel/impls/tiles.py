"""How the [tokens, rows] plane of logits is cut into tiles that fit a memory budget."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

# On a CPU a tile should stay in the cache between its product and the passes over it.
_CPU_TOKENS, _CPU_ROWS = 512, 2048
# A GPU's products have lost nothing to tiling at 128 MiB of bfloat16; 64 MiB are 5 to 12% slower.
_GPU_LOGITS = 2**26
# Products of whole multiples of it lose nothing at their edges.
_GPU_GRAIN = 128
# Tiles of even length would leave multiprocessors idle at the end of each product: 3840 rows of
# 8192 tokens take as long as 4096. So all tiles but the last are as long as they may be.
_GPU_TILE_GRAIN = 256


class TileShape(NamedTuple):
    """A tile is at most this many tokens by this many rows."""

    tokens: int
    rows: int


def tile_shape(
    num_tokens: int, num_rows: int, bytes_per_logit: int, memory_budget: int, device_type: str
) -> TileShape:
    """Choose a tile whose buffers fit in the budget.

    Args:
        num_tokens, num_rows: the plane's size.
        bytes_per_logit: of all the buffers that have a tile's shape, together.
        memory_budget: bytes.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: not even one logit fits in the budget.
    """
    check_budget(memory_budget, bytes_per_logit)
    if device_type != "cpu":
        return _gpu_tile(num_tokens, num_rows, min(memory_budget // bytes_per_logit, _GPU_LOGITS))
    tokens, rows = min(num_tokens, _CPU_TOKENS), min(num_rows, _CPU_ROWS)
    while tokens * rows * bytes_per_logit > memory_budget:
        if tokens >= rows:
            tokens = -(-tokens // 2)
        else:
            rows = -(-rows // 2)
    return TileShape(tokens, rows)


def check_budget(memory_budget: int, bytes_per_logit: int) -> None:
    """Raise ValueError where not even one logit fits in the budget."""
    if memory_budget < bytes_per_logit:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, less than the {bytes_per_logit} bytes of "
            f"one logit's buffers: give some MiB, or None for the default"
        )


def _gpu_tile(num_tokens: int, num_rows: int, logits: int) -> TileShape:
    """Choose the tile of at most so many logits that moves the fewest bytes of accumulators.

    A tile of n tokens by r rows costs 6 n r D flops, and reads and writes the float32 sums
    [n, D] of the hidden states' gradient unless it has all rows, and those [r, D] of the
    classifier's unless it has all tokens: bytes over flops go with 1 / r and 1 / n.
    """
    if num_tokens * num_rows <= logits:
        return TileShape(num_tokens, num_rows)
    side = math.isqrt(logits)
    candidates = (
        (num_tokens, logits // num_tokens),
        (logits // num_rows, num_rows),
        (side, side),
    )
    fitting = [
        TileShape(min(n, num_tokens), min(r, num_rows)) for n, r in candidates if min(n, r) > 0
    ]
    tile = min(
        fitting,
        key=lambda tile: (
            (tile.tokens < num_tokens) / tile.tokens + (tile.rows < num_rows) / tile.rows
        ),
    )
    return TileShape(_whole(num_tokens, tile.tokens), _whole(num_rows, tile.rows))


def _whole(length: int, size: int) -> int:
    """Shrink a tile's side to whole tiles of the products, unless it is all or less than one."""
    if size >= length:
        return length
    return whole_tiles(size) or size


def blocks(length: int, size: int) -> Iterator[slice]:
    """Cut [0, length) into slices of at most ``size``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def row_blocks(num_rows: int, size: int, *, aligned: bool, cut: int = 0) -> Iterator[slice]:
    """Cut the rows into slices of at most ``size``, none of them across ``cut``.

    cuBLAS is 2 to 3 times slower where a side of a product is no multiple of 8: where ``aligned``
    is asked for, the rows that are too many go by themselves, at the end.
    """
    main = num_rows
    if aligned and num_rows % 8:
        main = num_rows // _GPU_GRAIN * _GPU_GRAIN
    edges = sorted({0, min(cut, num_rows), main, num_rows})
    for start, stop in pairwise(edges):
        for part in blocks(stop - start, size):
            yield slice(start + part.start, start + part.stop)


def whole_tiles(num_rows: int) -> int:
    """Return the largest number of rows, at most so many, that a GPU's products take whole."""
    return num_rows // _GPU_TILE_GRAIN * _GPU_TILE_GRAIN
