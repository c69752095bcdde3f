"""The logits of one tile: a block of a shard's rows against some tokens."""

from dataclasses import replace

from torch import Tensor

from vocab_parallel.impls.base import Shard
from vocab_parallel.impls.products import product, widened


def rows_of(shard: Shard, rows: slice) -> Shard:
    """Cut a block of rows out of a shard; its targets still count from the shard's first row."""
    return replace(
        shard,
        classifier=widened(shard.classifier[rows], shard.statistics_dtype),
        bias=None if shard.bias is None else shard.bias[rows].to(shard.statistics_dtype),
    )


def tile_logits(block: Shard, tokens: slice, buffer: Tensor) -> Tensor:
    """Compute a tile of logits into the buffer."""
    hidden = widened(block.hidden[tokens], block.statistics_dtype)
    num_tokens, num_rows = hidden.shape[0], block.classifier.shape[0]
    logits = buffer[: num_tokens * num_rows].view(num_tokens, num_rows)
    product(hidden, block.classifier.T, out=logits)
    if block.bias is not None:
        logits.add_(block.bias)
    if block.softcap is not None:
        logits.div_(block.softcap).tanh_().mul_(block.softcap)
    if block.temperature != 1.0:
        logits.div_(block.temperature)
    return logits
