"""The sum over the group of the shards' partial gradients of the hidden states.

One call each way is all that the loss communicates: its statistics are gathered once, and this sum
is started as soon as the partial gradient is complete, so that it runs beside the classifier's
product. A long call sums a span of its tokens at a time, beside the next span's products.
"""

from itertools import pairwise

import torch
from torch import Tensor

from vocab_parallel.collectives import Pending, VocabGroup


class HiddenGradSum:
    """Sums the shards' partial gradients of the hidden states, some tokens at a time.

    Every rank adds the same tokens in the same order. Where every rank wants all tokens, each sums
    its share of them, and the sums are gathered in the dtype that is wanted: as an all-reduce does
    it, with fewer bytes. What is not rounded after its sum, or does not divide, is all-reduced.
    Where each wants its own tokens, all are reduce-scattered; some of them are summed at the rank
    that has them.

    Args:
        hidden: [N, D], of all tokens; the result has its dtype.
        group: of the ranks that sum, two or more.
        scatters: whether each rank wants its own tokens.
        dtype: in which they are summed.
    """

    def __init__(
        self, hidden: Tensor, group: VocabGroup, *, scatters: bool, dtype: torch.dtype
    ) -> None:
        self._hidden, self._group, self._dtype = hidden, group, dtype
        self._scatters = scatters
        self._length = hidden.shape[0] // (group.degree if self._scatters else 1)
        self._first = group.rank * self._length if self._scatters else 0
        self._rounds = hidden.element_size() < dtype.itemsize
        self._total: Tensor | None = None
        self._under_way: list[tuple[slice, Pending]] = []
        self._added = -1  # where the tokens end that were added

    def add(self, partial: Tensor | None, tokens: slice) -> None:
        """Start the sum of some tokens' partial gradients, unless they were added already.

        Args:
            partial: [n, D], which may be overwritten; None where this rank has none.
            tokens: which they are.
        """
        if tokens.stop <= self._added:
            return
        self._added = tokens.stop
        self._finish_sums()  # so that one part is under way at a time
        if partial is None:
            shape = (tokens.stop - tokens.start, self._hidden.shape[1])
            partial = self._hidden.new_zeros(shape, dtype=self._dtype)
        partial = partial.to(self._dtype)
        for part in self._parts(tokens):
            own = partial[part.start - tokens.start : part.stop - tokens.start]
            self._under_way.append((part, self._start(own, part)))

    def total(self) -> Tensor:
        """Return the summed gradient [N, D], or of this rank's own tokens, in hidden's dtype."""
        self._finish_sums()
        assert self._total is not None, "every token is added before the total is asked for"
        return self._total

    def _is_whole(self, part: slice) -> bool:
        return bool(part.stop - part.start == self._hidden.shape[0])

    def _parts(self, tokens: slice) -> list[slice]:
        """Cut some of the tokens where they are another rank's."""
        if not self._scatters or self._is_whole(tokens):
            return [tokens]
        start, stop, length = tokens.start, tokens.stop, self._length
        first = (start // length + 1) * length
        edges = [start, *range(first, stop, length), stop]
        return [slice(*edge) for edge in pairwise(edges)]

    def _start(self, partial: Tensor, part: slice) -> Pending:
        if self._scatters and not self._is_whole(part):
            return self._group.start_sum_at(partial, part.start // self._length)
        if self._scatters or self._shares(part):
            return self._group.start_scatter_sum(partial)
        return self._group.start_sum(partial)

    def _shares(self, part: slice) -> bool:
        """Tell whether each rank sums its share of some tokens, which are rounded and gathered."""
        count, degree = part.stop - part.start, self._group.degree
        divides = count > 0 and count % degree == 0
        return not self._scatters and self._rounds and divides

    def _finish_sums(self) -> None:
        """Wait for what is under way, and put what is wanted of it in its place."""
        for part, pending in self._under_way:
            found = pending.wait().to(self._hidden.dtype)
            if self._shares(part):
                found = self._group.gather_tokens(found)
            if self._is_whole(part):
                self._total = found
                continue
            if self._total is None:
                self._total = self._hidden.new_empty((self._length, self._hidden.shape[1]))
            start, stop = part.start - self._first, part.stop - self._first
            if 0 <= start < self._length:
                self._total[start:stop] = found
        self._under_way.clear()
