"""Where one rank's rows stand in the vocabulary: options of any kind, read once."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel.options import group_rank_and_size


@dataclass(frozen=True)
class VocabShard:
    """Attributes: rows [start, stop), the group and this rank's place in it."""

    start: int
    stop: int
    vocab_size: int | None
    group: ProcessGroup | None
    rank: int
    degree: int
    reduce_e_grad: bool

    @classmethod
    def whole(cls, num_rows: int) -> Self:
        """One rank that holds the whole vocabulary and communicates with nobody."""
        return cls(0, num_rows, num_rows, None, 0, 1, True)

    @classmethod
    def from_options(cls, options: Any) -> Self:
        """Read `VocabParallelOptions`, or any object with cut-cross-entropy's attributes.

        Raises:
            ValueError: an attribute is missing or of the wrong type, or this rank is not in the
                group.
        """
        for name in ("start", "stop", "group", "reduce_e_grad"):
            if not hasattr(options, name):
                raise ValueError(
                    f"vocab_parallel_options must have start, stop, group and reduce_e_grad, but "
                    f"{type(options).__name__} has no {name}: pass VocabParallelOptions"
                )
        vocab_size = getattr(options, "vocab_size", None)
        for name, value in (("start", options.start), ("stop", options.stop)):
            if not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        if vocab_size is not None and not (isinstance(vocab_size, int) and vocab_size >= 1):
            raise ValueError(f"vocab_size must be a positive integer or None, got {vocab_size!r}")
        rank, degree = group_rank_and_size(options.group)
        if vocab_size is None and degree == 1:
            vocab_size = options.stop
        return cls(
            options.start,
            options.stop,
            vocab_size,
            options.group,
            rank,
            degree,
            bool(options.reduce_e_grad),
        )

    @property
    def num_token_rows(self) -> int:
        """How many of this rank's rows, the first ones, are tokens and not padding."""
        if self.vocab_size is None:
            return self.stop - self.start
        return min(max(self.vocab_size - self.start, 0), self.stop - self.start)

    def local_targets(self, labels: Tensor) -> Tensor:
        """Count marked labels [N] from this shard's first row; see `Shard.targets`."""
        return labels - self.start if self.start else labels
