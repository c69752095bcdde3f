"""What every loss of a schedule has: where its rows are, and what it is told of the schedule."""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vocab_parallel.modules.heads import OutputWeight
from vocab_parallel.split_backward import keep_graph, loses_nodes


class ScheduledLoss:
    """A loss of the last stage's output, which `validate_pipeline_loss` takes.

    It only reads the classifier's weight, at each call, and must not own it.

    Attributes:
        output_weight: where the rows are found.
        scaled_by_schedule: whether the schedule divides gradients by the number of microbatches.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        output_bias: Tensor | None,
        vocab_parallel_options: Any,
        options: dict[str, Any],
    ) -> None:
        self.output_weight = OutputWeight(output_weight, output_bias, vocab_parallel_options)
        self.scaled_by_schedule = False
        self._options = options
        self._last_stage: Any = None
        self._stage: Any = None
        self._validated = False
        self._keeps_graph = loses_nodes()
        self._was_sharded = self._is_sharded()

    def bind(self, last_stage: Any, *, scale_grads: bool, microbatches_in_flight: int) -> None:
        """Tell the loss in which schedule it is; `validate_pipeline_loss` does.

        Args:
            last_stage: the schedule's, whose outputs the loss is given.
            scale_grads: whether the schedule divides gradients by the number of microbatches, so
                that a divisor of the whole step is refused.
            microbatches_in_flight: how many wait between forward and backward on the last stage,
                which ``backward="auto"`` counts on.
        """
        self._last_stage = self._stage = last_stage
        self._was_sharded = self._was_sharded or self._is_sharded()
        self.scaled_by_schedule = scale_grads
        if self._options["impl"] in ("auto", "chunked"):
            self._options.setdefault("microbatches_in_flight", microbatches_in_flight)

    def _is_sharded(self) -> bool:
        """Tell whether the rows are a DTensor's now: FSDP2 gathers such before a stage runs."""
        return any(isinstance(tensor, DTensor) for tensor in self.output_weight.tensors)

    def infers_shapes(self) -> bool:
        """Tell whether a call of a schedule is none of a microbatch, but infers shapes.

        Then the last stage, which `bind` has told of, holds no microbatch that is under way.
        """
        return self._stage is not None and not getattr(self._stage, "fwd_cache", True)

    def warn_of_kept_outputs(self) -> None:
        """Warn once where the schedule keeps the last stage's outputs; see `bind`."""
        stage, self._last_stage = self._last_stage, None
        if stage is None:
            return
        if not getattr(stage, "fwd_cache", True):  # shapes are being inferred: ask again
            self._last_stage = stage
        elif getattr(stage, "output_chunks", None):
            warnings.warn(
                "the schedule keeps the last stage's hidden states of every microbatch alive: "
                "call its step with return_outputs=False",
                stacklevel=3,
            )

    def validates(self) -> bool | None:
        """Tell the loss whether to agree over the group: at the first call, on any device."""
        return None if self._validated else True

    def finished(self, loss: Tensor) -> Tensor:
        """Return the loss of a call that went well, in the way that a schedule needs it."""
        self._validated = True
        if self._keeps_graph:
            keep_graph(loss)
        return loss
