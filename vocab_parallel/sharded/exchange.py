"""When the loss communicates: at once, beside the products that follow, or in pieces behind them.

    WAITING   one call, waited for before anything else is done
    BESIDE    one call, waited for where its result is read: the sum of the hidden states' gradient
              runs beside the classifier's product
    PIECES    piece by piece, as tokens become complete: beside the product that makes them, too

Over NVLink the sum takes a few percent of the loss in any order, since it takes from the products
what it saves them; pieces make these slower and the calls more. Over a slow link they hide most of
it. `rates.py` measures which it is.

Every rank of a group cuts the same number of tokens in the same way, whatever rows it holds: the
pieces are the calls that it makes, and all must make the same. So are the spans of a long call,
whose sums go one by one, beside the next span's products unless each is waited for.
"""

from collections.abc import Callable, Sequence
from enum import Enum
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


class Order(Enum):
    """See above."""

    WAITING = "waiting"
    BESIDE = "beside"
    PIECES = "pieces"


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
        waits: whether each is waited for before anything else is done.
    """

    def __init__(self, pieces: Sequence[slice], start: Start, *, waits: bool) -> None:
        self.pieces = pieces
        self._start, self._waits = start, waits
        self._pending: list[Pending] = []

    def complete(self, result: Tensor, stop: int) -> None:
        """See `Progress.complete`."""
        while len(self._pending) < len(self.pieces):
            piece = self.pieces[len(self._pending)]
            if piece.stop > stop:
                return
            self._pending.append(self._start(result, piece))
            if self._waits:
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
        order: Order,
    ) -> None:
        def start(statistics: Tensor, piece: slice) -> Pending:
            return group.start_gather_shards(statistics[:, piece])

        pieces = even_pieces(num_tokens, _STATISTICS_PIECES if order is Order.PIECES else 1)
        super().__init__(pieces, start, waits=order is Order.WAITING)
        self._names = names

    def join(self, own: Tensor) -> Tensor:
        """Return the statistics [k, N] of the whole vocabulary."""
        joined = [join(gathered, self._names) for gathered in self.finish(own)]
        return joined[0] if len(joined) == 1 else torch.cat(joined, 1)


class HiddenGradSum(Pieces):
    """Sums the shards' partial gradients [N, D] of the hidden states.

    Where every rank wants all tokens, each sums its share of them, and the sums are gathered in the
    dtype that is wanted: as an all-reduce does it, with fewer bytes. Pieces, and what is not
    rounded after its sum, are all-reduced, in place. Where each wants its own tokens, a piece has
    those of one rank and is summed there; one of all tokens is reduce-scattered.

    Args:
        scatters: whether each rank wants its own tokens.
        dtype: in which they are summed.
        out_dtype: of the result.
        pieces: consecutive slices of [0, N), in place of those that the order cuts.
    """

    def __init__(
        self,
        num_tokens: int,
        group: VocabGroup,
        order: Order,
        *,
        scatters: bool,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        pieces: Sequence[slice] | None = None,
    ) -> None:
        self._group, self._out_dtype = group, out_dtype
        self._own_tokens = num_tokens // group.degree if scatters else num_tokens
        self._owner_here = group.rank if scatters else 0
        if pieces is None:
            most = group.degree if scatters else _GRADIENT_PIECES
            pieces = even_pieces(num_tokens, most if order is Order.PIECES else 1)
        if scatters and self._own_tokens < _FEWEST_TOKENS:
            pieces = [slice(0, num_tokens)]
        elif scatters and len(pieces) > 1:
            pieces = _cut_at(pieces, self._own_tokens)
        in_one = len(pieces) == 1
        rounds = out_dtype.itemsize < dtype.itemsize
        shares = num_tokens > 0 and num_tokens % group.degree == 0
        self._gathers = not scatters and in_one and rounds and shares

        def start(partial: Tensor, piece: slice) -> Pending:
            own = partial[piece].to(dtype)
            if self._gathers or (scatters and in_one):
                return group.start_scatter_sum(own)
            return group.start_sum_at(own, self._owner(piece)) if scatters else group.start_sum(own)

        super().__init__(pieces, start, waits=order is Order.WAITING)

    def total(self, partial: Tensor) -> Tensor:
        """Return the summed gradient, of this rank's own tokens where it is scattered."""
        sums = self.finish(partial)
        if len(sums) == 1:
            total = sums[0].to(self._out_dtype)
            return self._group.gather_tokens(total) if self._gathers else total
        shape = (self._own_tokens, *partial.shape[1:])
        total = partial.new_empty(shape, dtype=self._out_dtype)
        first = self._owner_here * self._own_tokens
        for piece, part in zip(self.pieces, sums, strict=True):
            if self._owner(piece) == self._owner_here:
                total[piece.start - first : piece.stop - first] = part
        return total

    def _owner(self, piece: slice) -> int:
        return int(piece.start) // self._own_tokens


class HiddenGradSpans:
    """Sums the shards' partial gradients of the hidden states, a span of the tokens at a time.

    Of all tokens the result alone exists. A span is reduced as `HiddenGradSum` reduces one piece,
    or where each rank wants its own tokens, at the ranks that have the span's.

    Args:
        hidden: [N, D], of all tokens.
        group: of the ranks that sum; one rank alone where nothing is to be summed.
        scatters: whether each rank wants its own tokens.
        dtype: in which they are summed.
        waits: whether a sum is waited for before anything else is done.
    """

    def __init__(
        self,
        hidden: Tensor,
        group: VocabGroup,
        *,
        scatters: bool,
        dtype: torch.dtype,
        waits: bool,
    ) -> None:
        self._group, self._scatters, self._dtype = group, scatters, dtype
        # With one rank there is nothing to wait for, and one span's sum is enough.
        self._waits = waits or group.degree == 1
        self._length = hidden.shape[0] // group.degree if scatters else hidden.shape[0]
        self._total = hidden.new_empty((self._length, hidden.shape[1]))
        self._rounds = hidden.element_size() < dtype.itemsize
        self._under_way: list[tuple[slice, Pending]] = []

    def add(self, partial: Tensor | None, tokens: slice) -> None:
        """Start the sum of some tokens' partial gradients, and end that of those before.

        Args:
            partial: [n, D], which may be overwritten; None where this rank has none.
            tokens: which they are; every rank gives the same, each token once.
        """
        self._settle()
        if partial is None:
            shape = (tokens.stop - tokens.start, self._total.shape[1])
            partial = self._total.new_zeros(shape, dtype=self._dtype)
        partial = partial.to(self._dtype)
        for piece in self._pieces(tokens):
            own = partial[piece.start - tokens.start : piece.stop - tokens.start]
            self._under_way.append((piece, self._start(own, piece)))
        if self._waits:
            self._settle()

    def total(self) -> Tensor:
        """Return the summed gradient [N, D], or of this rank's own tokens, in their dtype."""
        self._settle()
        return self._total

    def _pieces(self, tokens: slice) -> list[slice]:
        """Cut a span where its tokens are another rank's."""
        start, stop, length = tokens.start, tokens.stop, self._length
        first = (start // length + 1) * length
        edges = [start, *range(first, stop, length), stop]
        return [slice(*edge) for edge in pairwise(edges)]

    def _start(self, partial: Tensor, piece: slice) -> Pending:
        if self._scatters:
            return self._group.start_sum_at(partial, piece.start // self._length)
        if self._shares(piece):
            return self._group.start_scatter_sum(partial)
        return self._group.start_sum(partial)

    def _shares(self, piece: slice) -> bool:
        """Tell whether each rank sums its share of a piece, which are rounded and gathered."""
        degree = self._group.degree
        whole = (piece.stop - piece.start) % degree == 0
        return not self._scatters and self._rounds and degree > 1 and whole

    def _settle(self) -> None:
        """Wait for what is under way, and put what is wanted of it in its place."""
        first = self._group.rank * self._length if self._scatters else 0
        for piece, pending in self._under_way:
            found = pending.wait()
            if self._shares(piece):
                found = self._group.gather_tokens(found.to(self._total.dtype))
            start, stop = piece.start - first, piece.stop - first
            if 0 <= start < self._length:
                self._total[start:stop] = found
        self._under_way.clear()


def _cut_at(pieces: Sequence[slice], length: int) -> list[slice]:
    """Cut pieces where they cross a multiple of ``length``."""
    ends = {piece.stop for piece in pieces} | {*range(length, pieces[-1].stop, length)}
    starts = [0, *sorted(ends)]
    return [slice(start, stop) for start, stop in pairwise(starts)]
