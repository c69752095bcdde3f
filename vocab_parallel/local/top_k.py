"""The k largest logits of each token over one shard, tile by tile."""

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import blocks, tile_shape, tile_to_copy
from vocab_parallel.local.interface import Shard
from vocab_parallel.local.tile_ops import finish_logits_


def top_k_of_shard(shard: Shard, k: int, memory_budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scores [N, k], rows [N, k] int64, lse [N]) of a shard; scores in float32 or wider.

    Scores are in descending order; where the shard has fewer than k rows, -inf and row 0 fill up.
    Holds at most ``memory_budget`` bytes of logits at a time.
    """
    dtype = shard.dtype
    num_tokens, num_rows = shard.num_tokens, shard.num_rows
    scores = shard.hidden.new_full((num_tokens, k), -torch.inf, dtype=dtype)
    rows = torch.zeros((num_tokens, k), dtype=torch.int64, device=shard.hidden.device)
    lse = shard.hidden.new_full((num_tokens,), -torch.inf, dtype=dtype)
    # The logits, and the temporary that logsumexp makes of them.
    tile = tile_shape(num_tokens, num_rows, 2 * dtype.itemsize, memory_budget, scores.device.type)
    if shard.mixed:  # a tile's operands are widened
        tile = tile_to_copy(tile)
    buffer = scores.new_empty(tile)
    for own_rows in blocks(num_rows, tile.rows):
        block = shard.ops.block(shard, own_rows)
        for tokens in blocks(num_tokens, tile.tokens):
            shape = slice(tokens.stop - tokens.start), slice(own_rows.stop - own_rows.start)
            logits = shard.ops.put_raw_logits(buffer[shape], block, tokens)
            finish_logits_(logits, block)
            lse[tokens] = torch.logaddexp(lse[tokens], torch.logsumexp(logits, 1))
            found, index = logits.topk(min(k, logits.shape[1]))
            scores[tokens], rows[tokens] = merge_top_k(
                torch.cat([scores[tokens], found], 1),
                torch.cat([rows[tokens], index + own_rows.start], 1),
                k,
            )
    return scores, rows, lse


def merge_top_k(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k largest of some candidates [N, m >= k], in descending order.

    Of equal scores the candidate that stands first wins.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
