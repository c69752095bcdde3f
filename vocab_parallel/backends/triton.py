"""cuBLAS products, and Triton kernels that read or rewrite a tile of logits once between them.

A tile is raw and in the operands' dtype; kernels do the rest where they read it, once, holding
nothing of its size.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vocab_parallel.backends.interface import Shard, Upstream
from vocab_parallel.backends.torch import Block, TorchBackend
from vocab_parallel.kernels.logits_gradient import logits_gradient
from vocab_parallel.kernels.logits_statistics import logits_statistics
from vocab_parallel.plan import TileShape, padded
from vocab_parallel.statistics import names_of


@dataclass(frozen=True)
class TritonBackend(TorchBackend):
    """CUDA, at most float32."""

    kernels: ClassVar[bool] = True

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """Allocate raw logits [tokens, at least rows], tokens a whole number of lines apart."""
        return shard.hidden.new_empty(
            (tile.tokens, padded(tile.rows)), dtype=self.tile_dtype(shard)
        )

    def add_statistics(
        self, found: Tensor, logits: Tensor, block: Block, tokens: slice, *, first: bool
    ) -> None:
        """See `TorchBackend.add_statistics`."""
        shard = block.shard
        logits_statistics(
            logits, block.bias, shard.targets[tokens], block.rows.start, found,
            names_of(shard.columns), shard.transform, first=first,
        )  # fmt: skip

    def put_gradient(
        self, out: Tensor, block: Block, tokens: slice, upstream: Upstream, logits: Tensor | None
    ) -> Tensor | None:
        """See `TorchBackend.put_gradient`."""
        if logits is None:
            logits = self.put_raw_logits(out, block, tokens)
        shard = block.shard
        return logits_gradient(
            logits, block.bias, shard.targets[tokens], block.rows.start,
            upstream.statistics[:, tokens], upstream.grads[:, tokens],
            names_of(shard.grad_columns), out, shard.transform, sum_tokens=upstream.wanted.bias,
        )  # fmt: skip
