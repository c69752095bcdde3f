"""Which rows of the classifier a rank holds: integers and a group, nothing else."""

import copy
from dataclasses import dataclass
from typing import Any, Self, SupportsIndex

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class SharesGroup:
    """A base of classes whose attribute ``group`` is a process group or None.

    A shallow and a deep copy hold the same group: another one would have to be made by all of its
    ranks together. A pickle cannot hold a group, which does not exist where the pickle is read.
    With ``group=None``, the default group, an object is pickled as usual.

    Raises:
        ValueError: on being pickled, by torch.save for instance, while it holds a group.
    """

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__(super().__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        group: Any = getattr(self, "group", None)
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(group)] = copied, group
        copied.__setstate__(copy.deepcopy(super().__getstate__(), memo))
        return copied

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        if getattr(self, "group", None) is not None:
            raise ValueError(
                f"{type(self).__name__} holds a process group, which cannot be pickled: save the "
                f"state_dict() of a module; or use group=None, the default group"
            )
        return super().__reduce_ex__(protocol)


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
