"""The k largest logits of each token over one shard, tile by tile."""

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Shard
from vocab_parallel.backends.torch import TorchBackend, finish_logits_
from vocab_parallel.plan import blocks, tile_shape, tile_to_copy

NO_ROW = -1  # in the place of a row that a shard has not


def top_k_of_shard(shard: Shard, k: int, memory_budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scores [N, k], rows [N, k] int64, lse [N]) of a shard; scores in float32 or wider.

    Scores are in descending order and rows distinct; where the shard has fewer than k rows, -inf
    and `NO_ROW` fill up.
    Holds at most ``memory_budget`` bytes of logits at a time.
    """
    dtype = shard.dtype
    num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
    work = TorchBackend()
    scores = shard.hidden.new_full((num_tokens, k), -torch.inf, dtype=dtype)
    rows = torch.full((num_tokens, k), NO_ROW, dtype=torch.int64, device=shard.hidden.device)
    lse = shard.hidden.new_full((num_tokens,), -torch.inf, dtype=dtype)
    # The logits, and the temporary that logsumexp makes of them.
    tile = tile_shape(num_tokens, num_rows, 2 * dtype.itemsize, memory_budget, scores.device.type)
    if shard.mixed:  # a tile's operands are widened
        tile = tile_to_copy(tile)
    buffer = scores.new_empty(tile)
    for own_rows in blocks(num_rows, tile.rows):
        block = work.block(shard, own_rows)
        for tokens in blocks(num_tokens, tile.tokens):
            shape = slice(tokens.stop - tokens.start), slice(own_rows.stop - own_rows.start)
            logits = work.put_raw_logits(buffer[shape], block, tokens)
            finish_logits_(logits, block)
            lse[tokens] = torch.logaddexp(lse[tokens], torch.logsumexp(logits, 1))
            found, index = logits.topk(min(k, logits.shape[1]))
            # Of the rows until here alone: a row whose score is -inf comes before what fills up.
            before, now = slice(min(k, own_rows.start)), slice(min(k, own_rows.stop))
            scores[tokens, now], rows[tokens, now] = merge_top_k(
                torch.cat([scores[tokens, before], found], 1),
                torch.cat([rows[tokens, before], index + own_rows.start], 1),
                now.stop,
            )
    return scores, rows, lse


def merge_top_k(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k largest of some candidates [N, m >= k], in descending order.

    Of equal scores the candidate that stands first wins, and every row before `NO_ROW`.
    """
    rows_first = (ids == NO_ROW).to(torch.int8).argsort(dim=1, stable=True)
    scores, ids = scores.gather(1, rows_first), ids.gather(1, rows_first)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), ids.gather(1, order)
