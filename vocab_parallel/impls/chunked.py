"""Plain torch over tiles of the logits: exact, deterministic, any device, bounded memory.

The plane [N tokens, R rows] is cut into tiles. Rows are the outer loop and tokens the inner one,
so that a block of rows is read once, its gradient is accumulated in float32 while it is small and
written once, and only the [N, D] partial gradient of the hidden states, which is summed over the
group in float32 anyway, is accumulated at full size.

    forward   for each tile   z = e c^T                        2 N D R flops
    backward  for each tile   z again, then g in place of z    2 N D R
                              dE[tokens] += g c                2 N D R
                              dC_block   += g^T e              2 N D R
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vocab_parallel.impls.base import Demand, Forward, Gradients, Shard, Wanted
from vocab_parallel.impls.products import add_product, well_scaled, widened
from vocab_parallel.impls.tile_logits import rows_of, tile_logits
from vocab_parallel.impls.tiles import DEFAULT_MEMORY_BUDGET, TileShape, blocks, tile_shape
from vocab_parallel.statistics import StatisticNames


@dataclass(frozen=True)
class ChunkedImpl:
    """Exact, in memory that does not grow with the vocabulary.

    Attributes:
        memory_budget: bytes of logits at a time, all buffers of their shape together.
        chunk_tokens, chunk_rows: the tile's sides, in place of those that the budget gives.
    """

    memory_budget: int = DEFAULT_MEMORY_BUDGET
    chunk_tokens: int | None = None
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")

    def check(self, demand: Demand) -> None:
        """Refuse a budget below one logit; everything else can be done."""
        size = torch.promote_types(demand.dtype, torch.float32).itemsize
        buffers = _num_buffers(demand.softcap, demand.names)
        tile_shape(1, 1, buffers * size, self.memory_budget, torch.device(demand.device_type))

    def forward(self, shard: Shard, names: StatisticNames) -> Forward:
        """See `LocalImpl.forward`."""
        dtype = shard.statistics_dtype
        statistics = shard.hidden.new_zeros((len(names), shard.hidden.shape[0]), dtype=dtype)
        statistics[names.index("lse")] = -torch.inf
        tile = self._tile_shape(shard, names)
        buffer = shard.hidden.new_empty(tile.tokens * tile.rows, dtype=dtype)
        for rows in blocks(shard.classifier.shape[0], tile.rows):
            block = rows_of(shard, rows)
            for tokens in blocks(shard.hidden.shape[0], tile.tokens):
                logits = tile_logits(block, tokens, buffer)
                _accumulate_statistics(
                    statistics[:, tokens], names, logits, block.targets[tokens] - rows.start
                )
        return Forward(statistics)

    def backward(
        self,
        shard: Shard,
        names: StatisticNames,
        saved: tuple[Tensor, ...],
        statistics: Tensor,
        grads: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        """See `LocalImpl.backward`."""
        dtype = shard.statistics_dtype
        found = _allocate(shard, wanted)
        tile = self._tile_shape(shard, names)
        buffer = shard.hidden.new_empty(tile.tokens * tile.rows, dtype=dtype)
        grads, unit = well_scaled(grads, shard.classifier, peak=2.0**10)
        for rows in blocks(shard.classifier.shape[0], tile.rows):
            block = rows_of(shard, rows)
            block_grad = block.classifier.new_zeros(block.classifier.shape, dtype=dtype)
            bias_grad = block_grad.new_zeros(block_grad.shape[0])
            for tokens in blocks(shard.hidden.shape[0], tile.tokens):
                logits_grad = _logits_gradient(
                    tile_logits(block, tokens, buffer),
                    block,
                    names,
                    statistics[:, tokens],
                    grads[:, tokens],
                    block.targets[tokens] - rows.start,
                )
                if found.bias is not None:
                    bias_grad += logits_grad.sum(0)
                logits_grad = logits_grad.to(block.classifier.dtype)
                if found.hidden is not None:
                    add_product(found.hidden[tokens], logits_grad, block.classifier)
                if found.classifier is not None:
                    hidden = widened(shard.hidden[tokens], dtype)
                    add_product(block_grad, logits_grad.T, hidden)
            if found.classifier is not None:
                found.classifier[rows] = block_grad if unit is None else block_grad.mul_(unit)
            if found.bias is not None:
                found.bias[rows] = bias_grad if unit is None else bias_grad.mul_(unit)
        if found.hidden is not None and unit is not None:
            found.hidden.mul_(unit)
        return found

    def _tile_shape(self, shard: Shard, names: StatisticNames) -> TileShape:
        size = shard.statistics_dtype.itemsize
        buffers = _num_buffers(shard.softcap is not None, names)
        num_tokens, num_rows = shard.hidden.shape[0], shard.classifier.shape[0]
        shape = tile_shape(
            num_tokens, num_rows, buffers * size, self.memory_budget, shard.hidden.device
        )
        return TileShape(
            min(self.chunk_tokens or shape.tokens, num_tokens),
            min(self.chunk_rows or shape.rows, num_rows),
        )


def _num_buffers(softcap: bool, names: StatisticNames) -> int:
    """Count the buffers of a tile's shape that exist at a time.

    The logits, one pass's temporary, and a copy in the operands' dtype; a softcap and the entropy
    each need a factor beside the logits.
    """
    return 3 + softcap + ("expected" in names)


def _allocate(shard: Shard, wanted: Wanted) -> Gradients:
    """Allocate the wanted gradients: the hidden states' as zeros to add to, in float32."""
    hidden = shard.hidden
    return Gradients(
        hidden.new_zeros(hidden.shape, dtype=shard.statistics_dtype) if wanted.hidden else None,
        torch.empty_like(shard.classifier) if wanted.classifier else None,
        torch.empty_like(shard.bias) if wanted.bias and shard.bias is not None else None,
    )


def _in_tile(targets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Return which targets lie in a tile [n], and an index [n, 1] that is safe for all."""
    inside = (targets >= 0) & (targets < num_rows)
    return inside, targets.clamp(0, num_rows - 1).unsqueeze(1)


def _accumulate_statistics(
    statistics: Tensor,  # (k, n), of the rows before this tile; updated in place
    names: StatisticNames,
    logits: Tensor,  # (n, r), overwritten
    targets: Tensor,  # (n,), counted from the tile's first row
) -> None:
    rows = dict(zip(names, statistics, strict=True))
    inside, index = _in_tile(targets, logits.shape[1])
    rows["target"] += torch.where(inside, logits.gather(1, index).squeeze(1), 0.0)
    if "sum" in rows:
        rows["sum"] += logits.sum(1)

    # A row of -inf alone (a bias may mask rows so) must not give -inf - -inf.
    largest = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)
    values = logits.clone() if "expected" in rows else None
    exponentials = logits.sub_(largest.unsqueeze(1)).exp_()
    total = exponentials.sum(1)
    lse = total.log().add_(largest)
    joined = torch.logaddexp(rows["lse"], lse)
    if values is not None:
        expected = values.mul_(exponentials).sum(1).div_(total)
        rows["expected"].mul_((rows["lse"] - joined).exp()).add_((lse - joined).exp() * expected)
    rows["lse"].copy_(joined)


def _logits_gradient(
    logits: Tensor,  # (n, r), overwritten
    block: Shard,
    names: StatisticNames,
    statistics: Tensor,  # (k, n)
    grads: Tensor,  # (k, n)
    targets: Tensor,  # (n,), counted from the tile's first row
) -> Tensor:
    """Put the gradient of e c^T + b in the logits' place; `base.py` has the formula."""
    stat = dict(zip(names, statistics.unsqueeze(-1), strict=True))
    grad = dict(zip(names, grads.unsqueeze(-1), strict=True))

    scaled = None if block.softcap is None else logits * (block.temperature / block.softcap)
    factor = grad["lse"]
    at_target = factor * torch.expm1(stat["target"] - stat["lse"]) + (factor + grad["target"])
    if "expected" in names:
        factor = (logits - (stat["expected"] - 1.0)).mul_(grad["expected"]).add_(factor)
        at_target += (
            grad["expected"]
            * (stat["target"] - stat["lse"]).exp()
            * (1.0 + stat["target"] - stat["expected"])
        )
    gradient = logits.sub_(stat["lse"]).exp_().mul_(factor)
    inside, index = _in_tile(targets, gradient.shape[1])
    gradient.scatter_(
        1, index, torch.where(inside.unsqueeze(1), at_target, gradient.gather(1, index))
    )
    if "sum" in names:
        gradient.add_(grad["sum"])
    if scaled is not None:  # d tanh = 1 - tanh^2
        gradient.addcmul_(gradient, scaled.square_(), value=-1.0)
    if block.temperature != 1.0:
        gradient.div_(block.temperature)
    return gradient
