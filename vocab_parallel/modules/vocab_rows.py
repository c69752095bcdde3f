"""Modules that own one rank's rows of the vocabulary, and the marks of their parameters.

`clip_grad_norm_` and others are given parameters without their modules, and read off each whether
it holds rows. A mark on the parameter alone would not last: ``to_empty``, FSDP2,
``load_state_dict(assign=True)``, a deep copy and an assignment put another object in its place. So
the module names its rows, and marks whatever takes their place.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.modules.checkpoint import OwnRows, mark_rows, rows_of
from vocab_parallel.modules.optimizer_state import watch_optimizers
from vocab_parallel.options import SharesGroup, group_rank_and_size
from vocab_parallel.partition import ceiling_rows, checked_rows, row_range


def holds_vocab_rows(parameter: Tensor) -> bool:
    """Whether a parameter's rows are this vocab rank's alone."""
    return rows_of(parameter) is not None


def mark_rows_of(module: nn.Module) -> None:
    """Mark the parameters that hold rows now, of all modules within one."""
    for part in module.modules():
        if isinstance(part, VocabRows):
            part.mark_rows()


class VocabRows(SharesGroup, nn.Module):
    """A module some of whose parameters are rows [start, stop) of a vocabulary.

    Any partition of the rows over the ranks will do, ranks without rows included. A deep copy is of
    the same group; a module is pickled where its group is None.

    The state dict names rows as parts of the whole [vocab_size, ...], without a copy: as DTensors
    over the vocab group, or as `rows_for_checkpoint` does in a partition that ``Shard(0)`` does not
    have. ``load_state_dict`` takes this rank's rows, all rows, or rows that say which they are; for
    others it raises a ValueError on the rank that got them, since it communicates nothing. The
    state dict of an optimizer does the same from its first step on.

    Args:
        hidden_size: D.
        vocab_size: rows of the whole vocabulary.
        group: the vocab group; None is the default group, or one rank alone where
            torch.distributed is not initialized.
        rows: how many rows each rank of the group holds, by rank. None are those of DTensor's
            ``Shard(0)``: ``ceil(vocab_size / V)`` a rank, so that the last ranks may hold fewer, or
            none.

    Attributes:
        row_names: the parameters that hold rows, this rank's alone; every other parameter of the
            module is taken for the same on all ranks.
        degree: V, the size of the group.
        row_counts: the rows of every rank, by rank.

    Raises:
        ValueError: a size that is not positive, counts that are no partition of the vocabulary over
            the group, or a rank outside of the group.
    """

    row_names: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        group: ProcessGroup | None,
        rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        rank, self.degree = group_rank_and_size(group)
        self.hidden_size, self.vocab_size, self.group = hidden_size, vocab_size, group
        counts = ceiling_rows(vocab_size, self.degree) if rows is None else rows
        self.row_counts = checked_rows(counts, vocab_size, self.degree)
        self.start, self.stop = row_range(self.row_counts, rank)
        self._is_tied_copy = False
        self.register_state_dict_post_hook(_name_rows)
        self.register_load_state_dict_post_hook(_mark_loaded)

    @property
    def own_rows(self) -> OwnRows:
        """Which rows these are, for state dicts."""
        return OwnRows(self.start, self.stop, self.row_counts, self.group, self._is_tied_copy)

    def row_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that hold rows now; of a parametrized one, what it is made from."""
        for _, parameter in self.named_row_parameters():
            yield parameter

    def named_row_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the same, each with the name that the module's state dict has for it."""
        for name in self.row_names:
            if parametrize.is_parametrized(self, name):
                prefix = f"parametrizations.{name}"
                made_from = self.get_submodule(prefix)
                yield from made_from.named_parameters(prefix, recurse=False)
            elif (parameter := self._parameters.get(name)) is not None:
                yield name, parameter

    def gather_rows(self, rows: Tensor) -> Tensor:  # (stop - start, ...) -> (vocab_size, ...)
        """Return the whole of which each rank gives its rows: weight, bias, a gradient, a moment.

        All ranks of the group call it, each with its own rows, and all get the whole, which has no
        gradient. Each rank sends its rows to the others, after a small exchange that the host
        waits for; no more memory than the whole is held.

        Raises:
            ValueError: on every rank of the group, where on one the tensor has other rows than the
                module, or the ranks' tensors or partitions are unlike.
        """
        group = VocabGroup.of(self.group)
        problem, alike = None, dict[str, Any]()
        shape = getattr(rows, "shape", ())
        is_plain = isinstance(rows, Tensor) and not isinstance(rows, DTensor)
        if is_plain and shape[:1] == (self.stop - self.start,):
            alike = {"row": list(shape[1:]), "dtype": rows.dtype, "partition": self.row_counts}
        else:
            problem = ValueError(
                f"expected a plain tensor of the rows [{self.start}, {self.stop}), got "
                f"{type(rows).__name__} {list(shape)}"
            )
        agree(problem, RankSummary(self.start, self.stop, self.vocab_size), alike, group)
        return group.gather_rows(rows.detach(), self.row_counts)

    def mark_rows(self) -> None:
        """Mark the parameters that hold rows now; whatever puts others in their place calls it."""
        if self.degree > 1:
            watch_optimizers()
        for parameter in self.row_parameters():
            mark_rows(parameter, self.own_rows)

    def become_tied_copy(self) -> None:
        """Leave it to another pipeline rank, which holds the same rows, to count them."""
        self._is_tied_copy = True
        self.mark_rows()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, by assignment too, and mark it where it holds rows."""
        super().register_parameter(name, param)
        self.mark_rows()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, parameter in self.named_row_parameters():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = self.own_rows.take(value, parameter)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 writes past `register_parameter` where a class has no method of this name.
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.mark_rows()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.mark_rows()


def _name_rows(module: VocabRows, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Name the rows in a module's state dict as parts of the whole."""
    for name, _parameter in module.named_row_parameters():
        rows = state_dict.get(prefix + name)
        # keep_vars=True asks for the parameters themselves.
        if isinstance(rows, Tensor) and not isinstance(rows, nn.Parameter):
            state_dict[prefix + name] = module.own_rows.name(rows)


def _mark_loaded(module: VocabRows, _: Any) -> None:
    """Mark what ``load_state_dict(assign=True)`` has put in place, in parametrizations too."""
    module.mark_rows()
