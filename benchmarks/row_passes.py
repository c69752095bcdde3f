"""S and T of one rank's rows, as it runs them where all stages carry the vocabulary.

The one place of the benchmarks that drives the library's passes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier
from vocab_parallel.pipeline.spanning.owners import Owners, VocabMessages
from vocab_parallel.pipeline.spanning.passes import LossInputs, LossPasses


class RowPasses:
    """The passes of a rank that is alone in its vocab group: messages take no time.

    Args:
        tokens: N, of all columns.
        hidden: D.
        rows: R.
        dtype: of hidden states and rows; logits have a deviation of 1.
        softcap: of the model.
        backward, memory_budget: of the loss.

    Attributes:
        weight: Parameter [R, D], with its gradient.
    """

    def __init__(
        self,
        tokens: int,
        hidden: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        softcap: float | None = None,
        backward: str = "auto",
        memory_budget: int | None = None,
    ) -> None:
        torch.manual_seed(0)
        classifier = VocabParallelClassifier(hidden, rows, group=None, device=device, dtype=dtype)
        self.weight = classifier.weight
        with torch.no_grad():
            self.weight.copy_(torch.randn(rows, hidden, device=device) / hidden**0.5)
        self.weight.grad = torch.zeros_like(self.weight)
        self._labels = torch.randint(rows, (1, tokens), device=device)
        loss = CCEPipelineLoss(
            classifier, shift=0, softcap=softcap, backward=backward, memory_budget=memory_budget
        )
        alone = Owners(VocabMessages(), 0, True)
        self._loss = LossPasses(loss, alone, barriers=1)

    def statistics(self, microbatch: int, hidden: Tensor) -> Tensor:
        """Do S of hidden states [1, N, D], and what follows when all ranks have; returns dE."""
        labels = [self._labels] * (microbatch + 1)
        self._loss.begin(LossInputs(labels), hidden, trains=True)
        self._loss.deferred(hidden, microbatch)
        self._loss.broadcast(microbatch)
        self._loss.statistics(microbatch)
        self._loss.exchange(microbatch)
        return self._loss.hidden_grad(microbatch).view(hidden.shape)

    def gradients(self, microbatch: int) -> None:
        """Do T: add to the gradient of the rows."""
        self._loss.gradients(microbatch)

    def finish(self) -> None:
        """Forget the microbatches."""
        self._loss.finish()

    def calls(self, hidden: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
        """Return what is timed: S of one microbatch, and S and T of it."""

        def only_statistics() -> None:
            self.statistics(0, hidden)
            self.finish()

        def both() -> None:
            self.statistics(0, hidden)
            self.gradients(0)
            self.finish()

        return only_statistics, both
