"""Token ids as the batches of a run: what is read, what is predicted, and where documents begin."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launch.data.order import shuffled
from launch.data.store import Tokens

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Sequences of one step, or some of them.

    Attributes:
        ids: [b, T] int64.
        labels: [b, T] int64, aligned with ids; the loss compares position t with label t + 1.
            `IGNORED` where nothing is predicted: the first token of a document, and what a
            conversation's mask leaves out.
        position_ids: [b, T] int64, from 0 in each document of a packed sequence; None where every
            sequence is one document. Attention does not look across a restart.
    """

    ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @property
    def _tensors(self) -> list[Tensor]:
        every = (self.ids, self.labels, self.position_ids)
        return [tensor for tensor in every if tensor is not None]

    def chunk(self, pieces: int) -> "list[Batch]":
        """Cut the sequences into equal pieces, in order."""
        cut = (tensor.chunk(pieces) for tensor in self._tensors)
        return [Batch(*parts) for parts in zip(*cut, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device; the host does not wait for a GPU."""
        if device.type == "cpu":
            return self
        # A copy from memory that can be paged out waits for what is queued before it.
        return Batch(*(one.pin_memory().to(device, non_blocking=True) for one in self._tensors))

    def for_stages(self) -> dict[str, Tensor]:
        """Return what every stage of the model takes beside ids or hidden states."""
        return {} if self.position_ids is None else {"position_ids": self.position_ids}


@dataclass(frozen=True)
class Batches:
    """The steps of a run: sequence by sequence the whole text, and again from its first step on.

    A step's sequences hang on nothing but how many were read before it: on no mesh, and on no
    other step's batch.

    Attributes:
        tokens: of the text, cut into sequences; the last ones that fill none are left out.
        steps: how many there are.
        batch: sequences of a step.
        sequence: tokens of a sequence.
        packed: whether documents in a sequence are kept apart.
        seed: of the order, another one in each epoch; None is the text's own order.
        begins: a step, and how many tokens all steps before it have read.
    """

    tokens: Tokens
    steps: int
    batch: int
    sequence: int
    packed: bool = False
    seed: int | None = None
    begins: tuple[int, int] = (0, 0)

    @property
    def sequences(self) -> int:
        """How many an epoch has, in which each is read once."""
        return len(self.tokens) // self.sequence

    @property
    def counts_any(self) -> bool:
        """Whether a token counts for the loss at all; looks no further than at the first one."""
        every = range(self.sequences)
        labels = (self._read(np.array([number])).labels for number in every)
        return any(bool((one[:, 1:] != IGNORED).any()) for one in labels)

    @property
    def longest(self) -> int:
        """Of how many tokens the longest document is, or sequence where they are not packed."""
        return min(self.sequence, self.tokens.longest) if self.packed else self.sequence

    def read_before(self, step: int) -> int:
        """Return how many tokens all steps before one have read."""
        first, tokens = self.begins
        return tokens + (step - first) * self.batch * self.sequence

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        """Return one step's batch."""
        return self.part(step, 0, 1)

    def part(self, step: int, piece: int, pieces: int) -> Batch:
        """Return one of equal pieces of a step's batch, and read no other."""
        own = self.batch // pieces
        first = self.read_before(step) // self.sequence + piece * own
        epochs, places = np.divmod(np.arange(first, first + own), self.sequences)
        if self.seed is not None:
            for epoch in set(epochs.tolist()):
                of_epoch = epochs == epoch
                places[of_epoch] = shuffled(places[of_epoch], self.sequences, self.seed, epoch)
        return self._read(places)

    def _read(self, numbers: np.ndarray) -> Batch:
        """Return some sequences, by their numbers in the text."""
        read = [self.tokens.read(n * self.sequence, self.sequence) for n in numbers.tolist()]
        ids, starts, counted = (
            torch.from_numpy(np.stack(column)) for column in zip(*read, strict=True)
        )
        labels, positions = ids.masked_fill(~counted, IGNORED), None
        if self.packed:
            starts[:, 0] = True
            labels = labels.masked_fill(starts, IGNORED)
            index = torch.arange(self.sequence).expand_as(ids)
            positions = index - index.masked_fill(~starts, 0).cummax(-1).values
        return Batch(ids, labels, positions)
