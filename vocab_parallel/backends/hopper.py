"""The product and what follows it in one kernel, for half precision on Hopper.

A logit is float32 in registers: nothing is rounded before its exponential, and nothing is moved.
What forward keeps of bfloat16 are exponentials, relative to a number of each token. With Q what was
kept, one row for each token, 0 in its target's place, s and o two numbers of a token, and y its
target (`kernels/kept_probabilities.py`), backward is products alone:

    dE = s (Q c) + o c[y]
    dC = Q^T (s e), and the sum of o e over each row's own tokens
    db = Q^T s, and that of o
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Gradients, Kept, Shard, Upstream
from vocab_parallel.backends.torch import (
    Block,
    allocate_bias_grad,
    allocate_classifier_grad,
    put_product,
    rows_to_keep,
)
from vocab_parallel.backends.triton import TritonBackend
from vocab_parallel.kernels.kept_probabilities import rescale_kept
from vocab_parallel.kernels.product import TOKENS
from vocab_parallel.kernels.product_gradient import product_gradient
from vocab_parallel.kernels.product_statistics import bytes_a_token, product_statistics
from vocab_parallel.kernels.reference import token_reference
from vocab_parallel.kernels.scaling import scale_tokens
from vocab_parallel.kernels.target_rows import add_to_target_rows
from vocab_parallel.plan import BackwardPlan, TileShape, blocks, budget_bytes, row_blocks
from vocab_parallel.statistics import count_lines, names_of


@dataclass(frozen=True)
class HopperBackend(TritonBackend):
    """Logits are float32 where they are made, whatever ``logits_dtype`` is; what is kept is not."""

    def tile_dtype(self, shard: Shard) -> torch.dtype:
        """Return the operands' dtype: they have one, and nothing is copied to another."""
        return shard.product_dtype

    def statistics(self, shard: Shard, plan: BackwardPlan) -> tuple[Tensor, Kept | None]:
        """See `Backend.statistics`."""
        num_tokens, num_kept = shard.hidden.shape[0], rows_to_keep(shard, plan)
        buffer = self.buffer(shard, TileShape(num_tokens, num_kept)) if num_kept else None
        found = shard.hidden.new_empty((count_lines(shard.columns), num_tokens), dtype=shard.dtype)
        has_reference = buffer is None or self.keeps_exponentials(shard)
        reference = self.reference(shard) if has_reference else None
        kept = None if buffer is None else buffer[:, :num_kept]
        self.put_statistics(found, shard, reference, kept, budget_bytes(self.memory_budget))
        return found, None if buffer is None else Kept(buffer, num_kept, reference)

    def reference(self, shard: Shard) -> Tensor | None:
        """Return a number near each token's largest logits [N], or None where none is of use.

        It is the largest of some of the shard's rows. Whatever it is the results are right; the
        farther it lies from a token's lse, the more of its logits are done twice.
        """
        if names_of(shard.grad_columns) != ("lse", "target"):
            return None
        return token_reference(shard.hidden, shard.classifier, shard.bias, shard.transform)

    def keeps_exponentials(self, shard: Shard) -> bool:
        """Tell whether forward keeps exponentials; float16 has no room for them."""
        return shard.hidden.dtype == torch.bfloat16

    def put_statistics(
        self,
        found: Tensor,
        shard: Shard,
        reference: Tensor | None,
        kept: Tensor | None,
        memory: int,
    ) -> None:
        """Write all tokens' statistics of all rows, within some bytes of memory.

        Args:
            found: [k, N], written.
            reference: [N], that of `reference`, for a dtype that keeps exponentials or where
                nothing is kept; with None what is kept are raw logits.
            kept: [N, r]; what is kept of the first rows, written; or None.
            memory: bytes for what is held of tokens until their statistics are joined.
        """
        names = names_of(shard.columns)
        most = memory // bytes_a_token(shard.classifier.shape[0], names)
        for tokens in _evenly(shard.hidden.shape[0], most, TOKENS.value):
            operands = (
                shard.hidden[tokens], shard.classifier, shard.bias, shard.targets[tokens],
            )  # fmt: skip
            product_statistics(
                *operands, None if reference is None else reference[tokens], found[:, tokens],
                names, None if kept is None else kept[tokens], shard.transform,
            )  # fmt: skip

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `Backend.gradients`."""
        kept: Kept | None = upstream.kept
        values = None
        if kept is not None and kept.num_rows == shard.classifier.shape[0]:
            # The weights' half is the last to come.
            last = upstream.wanted.classifier or upstream.wanted.bias
            values = kept.pop() if last and kept.reference is not None else kept.values
        if kept is None or kept.reference is None or values is None:
            return super().gradients(shard, plan, upstream)
        values = values[:, : kept.num_rows]
        scale, own = rescaled(values, kept.reference, shard, upstream)
        hidden_grad = None
        if upstream.wanted.hidden:
            hidden_grad = _hidden_grad(values, scale, own, shard)
            if upstream.when_hidden is not None:
                upstream.when_hidden(hidden_grad)
        classifier_grad = allocate_classifier_grad(shard, upstream)
        if classifier_grad is not None:
            adds = upstream.classifier_grad.add_to is not None
            scaled = scale_tokens(shard.hidden, scale, torch.empty_like(shard.hidden))
            for rows in row_blocks(values.shape[1], values.shape[1], aligned=True):
                put_product(classifier_grad[rows], values[:, rows].T, scaled, add=adds)
            add_to_target_rows(classifier_grad, shard.hidden, own, shard.targets)
        bias_grad = allocate_bias_grad(shard, upstream)
        if bias_grad is not None:
            bias_grad.copy_(_sums_over_tokens(values, scale, own, shard))
        return Gradients(hidden_grad, classifier_grad, bias_grad)

    def gradient_of_kept(
        self, values: Tensor, reference: Tensor, shard: Shard, upstream: Upstream
    ) -> Tensor | None:
        """Turn exponentials [N, r] of the first rows into their gradient, in place.

        Return its sum over tokens [r] where the bias wants one.
        """
        scale, own = rescaled(values, reference, shard, upstream)
        sums = None
        if upstream.wanted.bias:
            sums = _sums_over_tokens(values, scale, own, shard)
        scale_tokens(values, scale, values, targets=shard.targets, own=own)
        return sums

    def put_gradient(
        self, out: Tensor, block: Block, tokens: slice, upstream: Upstream, logits: Tensor | None
    ) -> Tensor | None:
        """See `TorchBackend.put_gradient`."""
        if logits is not None:
            return super().put_gradient(out, block, tokens, upstream, logits)
        shard = block.shard
        return product_gradient(
            shard.hidden[tokens], block.classifier, block.bias, shard.targets[tokens],
            block.rows.start, upstream.statistics[:, tokens], upstream.grads[:, tokens],
            names_of(shard.grad_columns), out, shard.transform, sum_tokens=upstream.wanted.bias,
        )  # fmt: skip


def rescaled(
    values: Tensor, reference: Tensor, shard: Shard, upstream: Upstream
) -> tuple[Tensor, Tensor]:
    """Make kept exponentials [N, r] of the first rows ready for products.

    Returns each token's scale [N], and what its target's entry receives [N], whose place becomes 0.
    """
    rows = slice(0, values.shape[1])
    bias = None if shard.bias is None else shard.bias[rows]
    return rescale_kept(
        values, shard.hidden, shard.classifier[rows], bias, shard.targets, reference,
        upstream.statistics, upstream.grads, shard.transform,
    )  # fmt: skip


def _hidden_grad(values: Tensor, scale: Tensor, own: Tensor, shard: Shard) -> Tensor:
    """Return dE = s (Q c) + o c[y] [N, D], the partial sum over this rank's rows."""
    found = shard.hidden.new_empty(shard.hidden.shape, dtype=shard.sum_dtype)
    sums = found if found.dtype == shard.dtype else torch.empty_like(found, dtype=shard.dtype)
    for rows in row_blocks(values.shape[1], values.shape[1], aligned=True):
        put_product(sums, values[:, rows], shard.classifier[rows], add=rows.start > 0)
    return scale_tokens(sums, scale, found, targets=shard.targets, own=own, rows=shard.classifier)


def _sums_over_tokens(values: Tensor, scale: Tensor, own: Tensor, shard: Shard) -> Tensor:
    """Return the gradient's sums over tokens [r] of the first rows: Q^T s, and the targets'.

    Args:
        values: Q [N, r], with 0 in the targets' places.
        scale, own: s and o [N].
    """
    # A weight goes as two numbers of the values' dtype, which together have its precision.
    high = scale.to(values.dtype)
    low = (scale - high).to(values.dtype)
    found = scale.new_empty((2, values.shape[1]))
    put_product(found, torch.stack((high, low)), values, add=False)
    sums = found.sum(0)
    add_to_target_rows(sums.unsqueeze(1), torch.ones_like(own).unsqueeze(1), own, shard.targets)
    return sums


def _evenly(length: int, most: int, grain: int) -> tuple[slice, ...]:
    """Cut tokens into as few parts as have at most so many, of about one length by the grain."""
    count = -(-length // max(most, grain))
    return blocks(length, -(-length // (grain * count)) * grain)
