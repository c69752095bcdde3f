"""Where one rank's rows stand in the vocabulary: options of any kind, read once."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from vocab_parallel.collectives import VocabGroup


@dataclass(frozen=True)
class RankRows:
    """Rows [start, stop) of this rank, as `VocabParallelOptions` describes them, and its group.

    ``largest_shard`` is what the options tell; who plans asks for `most_rows`.
    """

    start: int
    stop: int
    vocab_size: int | None
    reduce_e_grad: bool
    group: VocabGroup
    largest_shard: int | None = None

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
        group = VocabGroup.of(options.group)
        if vocab_size is None and group.degree == 1:
            vocab_size = options.stop
        return cls(
            options.start,
            options.stop,
            vocab_size,
            bool(options.reduce_e_grad),
            group,
            getattr(options, "largest_shard", None),
        )

    @property
    def most_rows(self) -> int | None:
        """How many rows the group's largest shard has, equal on all ranks.

        As the options tell, else as of an even cut; None where the vocabulary is not known.
        """
        if self.group.degree == 1:
            return self.num_token_rows
        if self.largest_shard is not None:
            return self.largest_shard
        return None if self.vocab_size is None else -(-self.vocab_size // self.group.degree)

    @property
    def num_token_rows(self) -> int:
        """How many of this rank's rows, the first ones, are tokens and not padding."""
        if self.vocab_size is None:
            return self.stop - self.start
        return min(max(self.vocab_size - self.start, 0), self.stop - self.start)

    def sums_hidden_grad(self, hidden_layout: str) -> bool:
        """Tell whether the gradient of the hidden states is summed over the group."""
        gathers = hidden_layout != "replicated"
        return self.group.degree > 1 and (gathers or self.reduce_e_grad)

    def tokens_alone(self, parameter: Tensor) -> Tensor:
        """Return the rows of a parameter [rows, ...] that are tokens, without padding."""
        count = self.num_token_rows
        return parameter if count == parameter.shape[0] else parameter[:count]
