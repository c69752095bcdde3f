"""The logits of one tile: a block of a shard's rows against some tokens.

A raw logit is the product's entry; with the bias added, capped and divided it is a logit. On a GPU
tiles are raw and in the operands' dtype, and the kernels do the rest where they read them.
"""

from dataclasses import replace

from torch import Tensor

from vocab_parallel.impls.base import Shard
from vocab_parallel.impls.products import put_product, widened


def rows_of(shard: Shard, rows: slice) -> Shard:
    """Cut a block of rows out of a shard; its targets still count from the shard's first row."""
    return replace(
        shard,
        classifier=widened(shard.classifier[rows], shard.statistics_dtype),
        bias=None if shard.bias is None else shard.bias[rows].to(shard.statistics_dtype),
    )


def raw_logits(block: Shard, tokens: slice, out: Tensor) -> Tensor:
    """Compute a tile of raw logits into ``out`` [n, r]."""
    put_product(
        out, widened(block.hidden[tokens], block.statistics_dtype), block.classifier.T, add=False
    )
    return out


def finish_logits_(logits: Tensor, block: Shard) -> Tensor:
    """Turn a tile of raw logits into logits, in place."""
    if block.bias is not None:
        logits.add_(block.bias)
    if block.softcap is not None:
        logits.div_(block.softcap).tanh_().mul_(block.softcap)
    if block.temperature != 1.0:
        logits.div_(block.temperature)
    return logits
