"""The passes of an embedding whose rows lie on the ranks of all stages.

    lookup           every rank adds its rows' part of a microbatch's embeddings; the sum goes to
                     the first stage, some microbatches before it is needed
    arrival          the first stage's input is there
    embedding_grad   the first stage's gradient of its input goes to every rank, which adds it to
                     its rows' gradient

Under a schedule that splits the backward, the first stage's gradient of its input comes with the
weights' half. Where the embedding's weight is the classifier's, both gradients add into the same
rows of the same rank, and nothing else ties the two ends.
"""

import functools

import torch
from torch import Tensor

from vocab_parallel.collectives import Pending
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.pipeline.spanning.owners import Owners


class EmbeddingPasses:
    """The embedding of a step; each rank makes one, all alike.

    Args:
        embedding: this rank's rows.
        first: the ranks that run the first stage.

    Attributes:
        inputs: the first stage's inputs [b, T, D] of this column, of each microbatch: leaves whose
            values come with `arrival`, and which take no memory until then.
    """

    def __init__(self, embedding: VocabParallelEmbedding, first: Owners) -> None:
        self._embedding, self._first = embedding, first
        self._ids: list[Tensor] = []  # [n b, T] of all columns, of each microbatch
        self.inputs: list[Tensor] = []
        self._arriving: dict[int, Pending] = {}
        self._leaving: dict[int, Pending] = {}
        self._gradients: dict[int, Tensor] = {}  # of the first stage's inputs, scaled
        self._trains = False

    def begin(self, ids: list[Tensor], *, trains: bool) -> None:
        """Take the ids [n b, T] of a step's microbatches."""
        weight = self._embedding.weight
        nothing = weight.detach().new_zeros((1, 1, 1))
        self._ids, self._trains = ids, trains and weight.requires_grad
        self.inputs = [
            nothing.expand(*self._first.of_column(own).shape, weight.shape[1])
            .detach()
            .requires_grad_(self._trains)
            for own in ids
        ]
        for microbatch, leaf in enumerate(self.inputs if self._trains else ()):
            # torch takes the gradient off its stages' inputs as soon as it is there.
            leaf.register_hook(functools.partial(self._gradients.__setitem__, microbatch))

    @torch.no_grad()
    def lookup(self, microbatch: int) -> None:
        """Sum the ranks' parts of a microbatch's embeddings at the first stage; all ranks call."""
        ids = self._ids[microbatch]
        found = self._embedding.own_part(ids.reshape(-1)).view(*ids.shape, -1)
        self._arriving[microbatch] = self._first.start_sum(found)
        if not self._first.here:  # a buffer stays until its sum is done
            before = self._arriving.pop(microbatch - 1, None)
            if before is not None:
                before.wait()

    @torch.no_grad()
    def arrival(self, microbatch: int) -> None:
        """Give the first stage its input; its ranks alone call."""
        own = self._first.of_column(self._arriving.pop(microbatch).wait())
        if self._embedding.scale != 1.0:
            own = own * self._embedding.scale
        self.inputs[microbatch].data = own
        if microbatch > 0 and not self._trains:
            self._forget(microbatch - 1)

    @torch.no_grad()
    def gradient(self, microbatch: int) -> None:
        """Send the first stage's gradient to every rank, to add it later; all ranks call."""
        if not self._trains:
            return
        own = self._own_gradient(microbatch) if self._first.here else None
        self._leaving[microbatch] = self._first.start_to_all(own, self.inputs[microbatch])
        if self._first.here:
            self._forget(microbatch)
        for earlier in [number for number in self._leaving if number != microbatch]:
            self._add(earlier)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for all that is under way, and add what has not been added."""
        for pending in self._arriving.values():
            pending.wait()
        for microbatch in list(self._leaving):
            self._add(microbatch)
        self._arriving.clear()
        self.inputs, self._ids = [], []

    def _own_gradient(self, microbatch: int) -> Tensor:
        found = self._gradients.pop(microbatch, None)
        if found is None:  # the first stage does not use its input
            found = torch.zeros_like(self.inputs[microbatch])
        scale = self._embedding.scale
        return found if scale == 1.0 else found * scale

    def _add(self, microbatch: int) -> None:
        grad = self._leaving.pop(microbatch).wait()
        weight = self._embedding.weight
        found = self._embedding.rows_grad(
            self._ids[microbatch].reshape(-1), grad.view(-1, grad.shape[-1])
        )
        weight.grad = found if weight.grad is None else weight.grad.add_(found)

    def _forget(self, microbatch: int) -> None:
        """Free a microbatch's input, which the schedule refers to until the step's end."""
        leaf = self.inputs[microbatch]
        leaf.data = leaf.new_empty(0)
