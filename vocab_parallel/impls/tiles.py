"""How the [tokens, rows] plane of logits is cut into tiles that fit a memory budget."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

# Logits that exist at a time, all buffers of that shape together.
DEFAULT_MEMORY_BUDGET = 256 * 2**20  # bytes

# On a CPU a tile should stay in the cache between its product and the passes over it; on a GPU
# the products should be large and nearly square.
_PREFERRED_TOKENS = {"cpu": 512, "cuda": 8192}
_PREFERRED_ROWS = {"cpu": 2048, "cuda": 8192}


class TileShape(NamedTuple):
    """A tile is at most this many tokens by this many rows."""

    tokens: int
    rows: int


def tile_shape(
    num_tokens: int, num_rows: int, bytes_per_logit: int, memory_budget: int, device: torch.device
) -> TileShape:
    """Choose a tile whose buffers fit in the budget.

    Args:
        num_tokens, num_rows: the plane's size.
        bytes_per_logit: of all the buffers that have a tile's shape, together.
        memory_budget: bytes.
        device: where the tile lives.

    Returns:
        The preferred tile of the device, its longer side halved until it fits.

    Raises:
        ValueError: not even one logit fits in the budget.
    """
    if memory_budget < bytes_per_logit:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, less than the {bytes_per_logit} bytes of "
            f"one logit's buffers: give some MiB, or None for {DEFAULT_MEMORY_BUDGET} bytes"
        )
    kind = "cpu" if device.type == "cpu" else "cuda"
    tokens = min(num_tokens, _PREFERRED_TOKENS[kind])
    rows = min(num_rows, _PREFERRED_ROWS[kind])
    while tokens * rows * bytes_per_logit > memory_budget:
        if tokens >= rows:
            tokens = -(-tokens // 2)
        else:
            rows = -(-rows // 2)
    return TileShape(tokens, rows)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Cut [0, length) into slices of at most ``size``."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
