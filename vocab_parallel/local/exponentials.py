"""Both gradients from the exponentials that forward kept of a shard's logits.

With Q what was kept, one row for each token, 0 in its target's place, s and o two numbers of a
token, and y its target (`kernels/kept_probabilities.py`):

    dE = s (Q c) + o c[y]
    dC = Q^T (s e), and the sum of o e over each row's own tokens
    db = Q^T s, and that of o
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import row_blocks
from vocab_parallel.local.interface import Gradients, Kept, Shard, Upstream
from vocab_parallel.local.row_gradients import RowGradients
from vocab_parallel.local.tile_ops import HopperOps, put_product


class Exponentials(NamedTuple):
    """Of all of a shard's logits [N, R], relative to each token's reference [N]."""

    values: Tensor
    reference: Tensor


def whole_exponentials(shard: Shard, upstream: Upstream) -> Exponentials | None:
    """Return what forward kept of all rows, where it is exponentials and still there.

    The weights' half is the last to come.
    """
    kept: Kept | None = upstream.kept
    if kept is None or kept.reference is None or kept.num_rows < shard.num_rows:
        return None
    last = upstream.wanted.classifier or upstream.wanted.bias
    values = kept.pop() if last else kept.peek()
    return None if values is None else Exponentials(values[:, : shard.num_rows], kept.reference)


def gradients_of_exponentials(kept: Exponentials, shard: Shard, upstream: Upstream) -> Gradients:
    """Multiply what forward kept as it is, and scale what goes in or comes out."""
    ops = shard.ops
    assert isinstance(ops, HopperOps)
    scale, own = ops.settle(kept.values, kept.reference, shard, upstream.statistics, upstream.grads)
    row_grads = RowGradients(shard, upstream, None, one_tile=True)
    hidden_grad = None
    if upstream.wanted.hidden:
        hidden_grad = _hidden_grad(kept.values, scale, own, shard)
        if upstream.when_hidden is not None:
            upstream.when_hidden(hidden_grad)
    if row_grads.classifier is not None:
        _put_classifier_grad(row_grads, kept.values, scale, own, shard)
    if row_grads.bias is not None:
        row_grads.bias.copy_(sums_of_exponentials(kept.values, scale, own, shard))
    return Gradients(hidden_grad, row_grads.classifier, row_grads.bias)


def _hidden_grad(values: Tensor, scale: Tensor, own: Tensor, shard: Shard) -> Tensor:
    """Return dE = s (Q c) + o c[y] [N, D], the partial sum over this rank's rows."""
    ops = shard.ops
    assert isinstance(ops, HopperOps)
    found = shard.hidden.new_empty(shard.hidden.shape, dtype=shard.sum_dtype)
    sums = found if found.dtype == shard.dtype else torch.empty_like(found, dtype=shard.dtype)
    for rows in row_blocks(shard.num_rows, shard.num_rows, aligned=True):
        put_product(sums, values[:, rows], shard.classifier[rows], add=rows.start > 0)
    ops.add_target_rows(sums, scale, shard.classifier, own, shard.targets, found)
    return found


def _put_classifier_grad(
    row_grads: RowGradients, values: Tensor, scale: Tensor, own: Tensor, shard: Shard
) -> None:
    """Put dC = Q^T (s e), and to it what the targets receive."""
    ops = shard.ops
    assert isinstance(ops, HopperOps)
    assert row_grads.classifier is not None
    scaled = ops.scale_tokens(shard.hidden, scale, torch.empty_like(shard.hidden))
    for rows in row_blocks(shard.num_rows, shard.num_rows, aligned=True):
        row_grads.begin(rows)
        row_grads.add(values[:, rows], scaled, None)
    ops.add_to_target_rows(row_grads.classifier, shard.hidden, own, shard.targets)


def sums_of_exponentials(values: Tensor, scale: Tensor, own: Tensor, shard: Shard) -> Tensor:
    """Return the gradient's sums over tokens [r] of the first rows: Q^T s, and the targets'.

    Args:
        values: Q [N, r], with 0 in the targets' places.
        scale, own: s and o [N].
    """
    assert isinstance(shard.ops, HopperOps)
    sums = _weighted_sum(values, scale)
    ones = torch.ones_like(own).unsqueeze(1)
    shard.ops.add_to_target_rows(sums.unsqueeze(1), ones, own, shard.targets)
    return sums


def _weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Return the sum [R] of bfloat16 values [N, R] by float32 weights [N], as a product.

    A weight goes as two numbers of the values' dtype, which together have its precision.
    """
    high = weight.to(values.dtype)
    low = (weight - high).to(values.dtype)
    found = weight.new_empty((2, values.shape[1]))
    put_product(found, torch.stack((high, low)), values, add=False)
    return found.sum(0)
