"""Token ids as the batches of a run: what is read, what is predicted, and where documents begin."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launch.data.tokenizers import Document

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

    def chunk(self, pieces: int) -> "list[Batch]":
        """Cut the sequences into equal pieces, in order."""
        ids, labels = self.ids.chunk(pieces), self.labels.chunk(pieces)
        if self.position_ids is None:
            return [Batch(*parts) for parts in zip(ids, labels, strict=True)]
        positions = self.position_ids.chunk(pieces)
        return [Batch(*parts) for parts in zip(ids, labels, positions, strict=True)]

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device; the host does not wait for a GPU."""
        if device.type == "cpu":
            return self
        # A copy from memory that can be paged out waits for what is queued before it.
        ids, labels = (
            own.pin_memory().to(device, non_blocking=True) for own in (self.ids, self.labels)
        )
        positions = self.position_ids
        if positions is not None:
            positions = positions.pin_memory().to(device, non_blocking=True)
        return Batch(ids, labels, positions)

    def for_stages(self) -> dict[str, Tensor]:
        """Return what every stage of the model takes beside ids or hidden states."""
        return {} if self.position_ids is None else {"position_ids": self.position_ids}


@dataclass(frozen=True)
class Batches:
    """All steps of a run.

    Attributes:
        ids: [steps, batch, T] int64.
        starts: [steps, batch, T] bool, the first token of each document; None where sequences are
            not packed.
        counted: [steps, batch, T] bool, what the loss counts; None: all tokens.
        read: tokens that the text had, as far as it was read; None where that is not known.
    """

    ids: Tensor
    starts: Tensor | None = None
    counted: Tensor | None = None
    read: int | None = None

    @property
    def counts_any(self) -> bool:
        """Whether a token counts for the loss at all."""
        return any(bool((batch.labels[:, 1:] != IGNORED).any()) for batch in self)

    @property
    def longest(self) -> int:
        """Of how many tokens the longest document is, or sequence where they are not packed."""
        if self.starts is None:
            return self.ids.shape[-1]
        positions = (batch.position_ids for batch in self)
        return 1 + max(int(each.max()) for each in positions if each is not None)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        """Return one step's batch."""
        ids = self.ids[step]
        labels, positions = ids, None
        if self.counted is not None:
            labels = labels.masked_fill(~self.counted[step], IGNORED)
        if self.starts is not None:
            starts = self.starts[step]
            labels = labels.masked_fill(starts, IGNORED)
            index = torch.arange(ids.shape[-1]).expand_as(ids)
            positions = index - index.masked_fill(~starts, 0).cummax(-1).values
        return Batch(ids, labels, positions)


def batches_of_documents(
    documents: Iterable[Document], *, steps: int, batch: int, sequence: int, packed: bool
) -> Batches:
    """Lay documents end to end and cut them into sequences, reading no more than is needed.

    A document that a sequence's end cuts goes on in the next one, as a document of its own. What is
    too short for all steps is repeated.

    Raises:
        ValueError: fewer tokens than one batch.
    """
    wanted = steps * batch * sequence
    ids: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    begins: list[int] = []
    held = 0
    for document in documents:
        if not document.ids:
            continue
        begins.append(held)
        ids.append(np.asarray(document.ids, dtype=np.int64))
        masked = document.counted
        counted.append(np.ones(len(ids[-1]), bool) if masked is None else np.asarray(masked, bool))
        held += len(ids[-1])
        if held >= wanted:
            break
    if held < batch * sequence:
        raise ValueError(_too_short(held, batch, sequence))
    shape = (steps, batch, sequence)
    every = np.concatenate(counted)
    starts = None
    if packed:
        flat = np.zeros(held, bool)
        flat[begins] = True
        starts = _cut(flat, shape)
        starts[..., 0] = True
    return Batches(
        _cut(np.concatenate(ids), shape),
        starts,
        None if every.all() else _cut(every, shape),
        held,
    )


def batches_of_ids(ids: np.ndarray, *, steps: int, batch: int, sequence: int) -> Batches:
    """Cut a stream of token ids [n] into sequences, or take rows [n, T] as they are.

    Raises:
        ValueError: another shape or dtype, fewer tokens than one batch, or rows of another length.
    """
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ValueError(
            f"expected integers [tokens] or [sequences, T], got {ids.dtype} {list(ids.shape)}"
        )
    if ids.ndim == 2 and ids.shape[1] != sequence:
        raise ValueError(
            f"its rows have {ids.shape[1]} ids, but --sequence is {sequence}: give --sequence "
            f"{ids.shape[1]}"
        )
    if ids.size < batch * sequence:
        raise ValueError(_too_short(ids.size, batch, sequence))
    needed = np.array(ids.reshape(-1)[: steps * batch * sequence], dtype=np.int64)
    return Batches(_cut(needed, (steps, batch, sequence)), read=len(needed))


def _too_short(tokens: int, batch: int, sequence: int) -> str:
    return (
        f"the text has {tokens} tokens, fewer than one batch of {batch} x {sequence} = "
        f"{batch * sequence}: give more text, or a smaller --batch or --sequence"
    )


def _cut(flat: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Return the first tokens [steps, batch, T]; whole batches are repeated where there are few."""
    steps, batch, sequence = shape
    whole = len(flat) // (batch * sequence) * batch * sequence
    wanted = steps * batch * sequence
    kept = torch.from_numpy(flat[: min(whole, wanted)])
    return kept.repeat(-(-wanted // len(kept)))[:wanted].view(shape)
