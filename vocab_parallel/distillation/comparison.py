"""The backend of a distillation: what it makes of a tile of the student's logits.

The loop over tiles, their products and the sums are those of `backends/torch.py`; a comparison has
columns of its own, and their gradient. Nothing of [N, R] is kept between the two.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Shard
from vocab_parallel.backends.torch import Block, TorchBackend
from vocab_parallel.distillation.divergences import DistillationSettings
from vocab_parallel.distillation.labels import LABEL_COLUMNS, label_gradient, label_statistics
from vocab_parallel.plan import TileShape, padded
from vocab_parallel.statistics import Columns, Statistics


@dataclass(frozen=True, kw_only=True)
class Comparison(TorchBackend, ABC):
    """Compares the student's logits with a teacher.

    Attributes:
        settings: which divergence, and whether the labels' cross-entropy counts too.
    """

    settings: DistillationSettings

    peak: ClassVar[float] = 2.0**6  # log-ratios of a thousand fit above it
    spare: ClassVar[int] = 0  # columns beside a tile's logits

    @property
    def with_labels(self) -> bool:
        """Whether the labels' cross-entropy counts."""
        return self.settings.cross_entropy_weight > 0

    @property
    def columns(self) -> Columns:
        """The statistics of the first pass: those of the labels, then the comparison's."""
        return (*(LABEL_COLUMNS if self.with_labels else ()), *self.own_columns)

    @property
    @abstractmethod
    def own_columns(self) -> Columns:
        """The statistics that the comparison takes one pass for."""

    @property
    def later_columns(self) -> Columns:
        """What a second pass adds up, which knows those of the first; none where there is none."""
        return ()

    @property
    @abstractmethod
    def tiles(self) -> int:
        """How many tensors of a tile's shape are held at the worst moment, the logits included."""

    @abstractmethod
    def own_statistics(self, logits: Tensor, block: Block, tokens: slice) -> list[Tensor]:
        """Return the statistics [n] or [w, n] of a tile; may overwrite its logits [n, r]."""

    def later_statistics(self, logits: Tensor, block: Block, tokens: slice) -> list[Tensor]:
        """Return those of the second pass; `Shard.others` ends with the first one's, [N, k]."""
        raise AssertionError(f"{type(self).__name__} has no second pass")

    @abstractmethod
    def put_own_gradient(
        self, logits: Tensor, block: Block, tokens: slice, statistics: Tensor, grads: Tensor
    ) -> None:
        """Put the gradient of a tile's logits [n, r] in their place.

        Args:
            statistics, grads: [k, n], of both passes.
        """

    @abstractmethod
    def divergences(self, statistics: Statistics, others: tuple[Tensor, ...]) -> Tensor:
        """Return the divergence of each token [N], differentiable in the statistics.

        Args:
            statistics: of the whole vocabulary, of both passes.
            others: `Shard.others`, of all tokens.
        """

    def temporaries(self, shard: Shard) -> int:
        """See `TorchBackend.temporaries`: also masks, or a cast to the operands' dtype."""
        return self.tiles + self.with_labels + (shard.transform.softcap is not None)

    def buffer(self, shard: Shard, tile: TileShape) -> Tensor:
        """Allocate a tile's raw logits [tokens, rows], and the spare columns after them."""
        wide = tile.rows + self.spare
        # cuBLAS is slow where lines of the result are not aligned.
        wide = padded(wide) if shard.hidden.is_cuda else wide
        return shard.hidden.new_empty((tile.tokens, wide), dtype=shard.dtype)

    def tile_statistics(self, logits: Tensor, block: Block, tokens: slice) -> Tensor:
        """See `TorchBackend.tile_statistics`."""
        shard = block.shard
        if shard.columns == self.later_columns:
            found = self.later_statistics(logits, block, tokens)
        else:
            found = []
            if self.with_labels:
                targets = shard.targets[tokens] - block.rows.start
                found = label_statistics(logits * shard.transform.temperature, targets)
            found += self.own_statistics(logits, block, tokens)
        return torch.cat([torch.atleast_2d(each) for each in found])

    def put_logits_gradient(
        self, logits: Tensor, block: Block, tokens: slice, statistics: Tensor, grads: Tensor
    ) -> None:
        """See `TorchBackend.put_logits_gradient`."""
        if not self.with_labels:
            return self.put_own_gradient(logits, block, tokens, statistics, grads)
        shard, count = block.shard, len(LABEL_COLUMNS)
        temperature = shard.transform.temperature
        targets = shard.targets[tokens] - block.rows.start
        of_labels = label_gradient(logits * temperature, targets, statistics[:count], grads[:count])
        self.put_own_gradient(logits, block, tokens, statistics[count:], grads[count:])
        logits.add_(of_labels, alpha=temperature)
        return None
