"""Communication behind the products: a result goes out piece by piece, as it becomes complete.

Every rank of a group cuts the same number of tokens in the same way, whatever rows it holds: the
pieces are the calls that it makes, and all must make the same.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vocab_parallel.collectives import Pending, VocabGroup
from vocab_parallel.local.backward_plan import blocks
from vocab_parallel.local.statistics import StatisticNames, join

# Below so many tokens a piece the products would slow down by more than the wait that it hides.
_FEWEST_TOKENS = 2048
_STATISTICS_PIECES, _GRADIENT_PIECES = 2, 4

Start = Callable[[Tensor, slice], Pending]


def even_pieces(num_tokens: int, most: int) -> list[slice]:
    """Cut [0, N) into at most so many slices of about equal length, none of few tokens."""
    count = max(1, min(most, num_tokens // _FEWEST_TOKENS))
    size = max(1, -(-num_tokens // count))
    return list(blocks(num_tokens, size)) or [slice(0, 0)]


class Pieces:
    """A `Progress` that starts a collective for each piece that is complete.

    Args:
        pieces: consecutive slices of the tokens [0, N).
        start: starts the collective of one piece of a result.
        overlap: False waits for each before anything else is done.
    """

    def __init__(self, pieces: Sequence[slice], start: Start, *, overlap: bool) -> None:
        self.pieces = pieces
        self._start, self._overlap = start, overlap
        self._pending: list[Pending] = []

    def complete(self, result: Tensor, stop: int) -> None:
        """See `Progress.complete`."""
        while len(self._pending) < len(self.pieces):
            piece = self.pieces[len(self._pending)]
            if piece.stop > stop:
                return
            self._pending.append(self._start(result, piece))
            if not self._overlap:
                self._pending[-1].wait()

    def finish(self, result: Tensor) -> list[Tensor]:
        """Start what has not been, wait for all, and return the pieces' results in order."""
        self.complete(result, self.pieces[-1].stop)
        return [pending.wait() for pending in self._pending]


class StatisticsExchange(Pieces):
    """Gathers the statistics [k, N] of all shards and joins them."""

    def __init__(
        self,
        num_tokens: int,
        names: StatisticNames,
        group: VocabGroup,
        *,
        overlap: bool,
    ) -> None:
        def start(statistics: Tensor, piece: slice) -> Pending:
            return group.start_gather_shards(statistics[:, piece])

        most = _STATISTICS_PIECES if group.degree > 1 else 1
        super().__init__(even_pieces(num_tokens, most), start, overlap=overlap)
        self._names = names

    def join(self, own: Tensor) -> Tensor:
        """Return the statistics [k, N] of the whole vocabulary."""
        joined = [join(gathered, self._names) for gathered in self.finish(own)]
        return joined[0] if len(joined) == 1 else torch.cat(joined, 1)


class HiddenGradSum(Pieces):
    """Sums the shards' partial gradients [N, D] of the hidden states.

    Where every rank wants all tokens the pieces are all-reduced, in place. Where each wants its
    own, a piece has tokens of one rank and is summed there; one of all tokens is reduce-scattered.
    """

    def __init__(
        self,
        num_tokens: int,
        group: VocabGroup,
        *,
        scatters: bool,
        dtype: torch.dtype,
        overlap: bool,
        pieces: Sequence[slice] | None = None,
    ) -> None:
        self._own_tokens = num_tokens // group.degree if scatters else num_tokens
        self._owner_here = group.rank if scatters else 0
        if pieces is None:
            pieces = even_pieces(num_tokens, group.degree if scatters else _GRADIENT_PIECES)
        if scatters:
            few = self._own_tokens < _FEWEST_TOKENS
            pieces = [slice(0, num_tokens)] if few else _cut_at(pieces, self._own_tokens)
        in_one = len(pieces) == 1

        def start(partial: Tensor, piece: slice) -> Pending:
            own = partial[piece].to(dtype)
            if not scatters:
                return group.start_sum(own)
            if in_one:
                return group.start_scatter_sum(own)
            return group.start_sum_at(own, self._owner(piece))

        super().__init__(pieces, start, overlap=overlap)

    def total(self, partial: Tensor, out_dtype: torch.dtype) -> Tensor:
        """Return the summed gradient, of this rank's own tokens where it is scattered."""
        sums = self.finish(partial)
        if len(sums) == 1:
            return sums[0].to(out_dtype)
        total = partial.new_empty((self._own_tokens, *partial.shape[1:]), dtype=out_dtype)
        first = self._owner_here * self._own_tokens
        for piece, part in zip(self.pieces, sums, strict=True):
            if self._owner(piece) == self._owner_here:
                total[piece.start - first : piece.stop - first] = part
        return total

    def _owner(self, piece: slice) -> int:
        return int(piece.start) // self._own_tokens


def _cut_at(pieces: Sequence[slice], length: int) -> list[slice]:
    """Cut pieces where they cross a multiple of ``length``."""
    ends = {piece.stop for piece in pieces} | {*range(length, pieces[-1].stop, length)}
    starts = [0, *sorted(ends)]
    return [slice(start, stop) for start, stop in pairwise(starts)]
