"""Which rows of the classifier a rank holds: integers and a group, nothing else."""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from vocab_parallel.shares_group import SharesGroup


@dataclass(frozen=True)
class VocabParallelOptions(SharesGroup):
    """Rows [start, stop) of the classifier lie on this rank of the vocab group.

    The first four fields are those of cut-cross-entropy's class of the same name: an object of
    this class works there, and any object with those four attributes works here. A deep copy is of
    the same group; an object is pickled where its group is None.

    Attributes:
        start, stop: this rank's rows of the whole classifier. The ranges of a group's ranks
            follow one another in any order, without overlap or gap; a range may be empty.
        group: the vocab group. None is the default group, or one rank alone where
            torch.distributed is not initialized.
        reduce_e_grad: sum the gradient of the hidden states over the group. False leaves each
            rank its own partial sum, for callers that reduce it themselves.
        vocab_size: the true vocabulary. Rows at or beyond it are padding: no probability, no
            smoothing, zero gradient. None means that every row is a token.
        largest_shard: rows of the rank that has the most, equal on all ranks, where they are not
            cut evenly: what ``backward="auto"`` does alike on all ranks fits ``memory_budget``
            there too. None takes ceil(vocab_size / V).
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    reduce_e_grad: bool = True
    vocab_size: int | None = None
    largest_shard: int | None = None

    @classmethod
    def from_vocab(
        cls,
        vocab_size: int,
        group: ProcessGroup | None = None,
        reduce_e_grad: bool = True,
        *,
        num_rows: int | None = None,
    ) -> Self:
        """Split a vocabulary evenly: the first ``num_rows % V`` ranks hold one row more.

        This is cut-cross-entropy's partition. A `VocabParallelClassifier` uses another one, the
        ceiling partition of DTensor's ``Shard(0)``: take ``classifier.options`` there.

        Args:
            vocab_size: the true vocabulary, how many rows are tokens.
            group, reduce_e_grad: see the attributes.
            num_rows: rows of the classifier, where it is padded to more than the vocabulary: the
                rows from ``vocab_size`` on are padding. None means that every row is a token.

        Raises:
            ValueError: sizes that are not positive integers, or fewer rows than tokens.
        """
        count = vocab_size if num_rows is None else num_rows
        sizes = (("vocab_size", vocab_size), ("num_rows", count))
        for name, size in sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if count < vocab_size:
            raise ValueError(
                f"a classifier of num_rows={count} rows has no place for vocab_size={vocab_size} "
                f"tokens: num_rows counts the padding too"
            )
        rank, degree = group_rank_and_size(group)
        share, remainder = divmod(count, degree)
        start = rank * share + min(rank, remainder)
        stop = start + share + (rank < remainder)
        largest = None if num_rows is None else -(-count // degree)
        return cls(start, stop, group, reduce_e_grad, vocab_size, largest)


def generator_of_rows(device: torch.device, start: int) -> torch.Generator:
    """Return a generator for the rows from ``start`` on.

    Each rank draws its own numbers, also where all have the same default seed, which this advances
    equally on every rank.
    """
    seed = int(torch.randint(2**62, ()))
    return torch.Generator(device).manual_seed(seed + start)


def group_rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return (rank in the group, size); (0, 1) where torch.distributed is not initialized.

    Raises:
        ValueError: this rank is not a member of the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            "this rank is not in the vocab group of its VocabParallelOptions: pass the group "
            "that this rank belongs to, StageGroups.vocab_group for instance"
        )
    return rank, dist.get_world_size(group)
