"""What every loss of a schedule has: where its rows are, and what it is told of the schedule."""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vocab_parallel.layout import HiddenLayout
from vocab_parallel.modules.heads import OutputWeight, Rows
from vocab_parallel.split_backward import keep_graph, loses_nodes

_SCHEDULES = "torch.distributed.pipelining.schedules"


class ScheduledLoss:
    """A loss of the last stage's output, which `validate_pipeline_loss` takes.

    It only reads the classifier's weight, at each call, and must not own it.

    Attributes:
        output_weight: where the rows are found.
        scaled_by_schedule: whether the schedule divides gradients by the number of microbatches.
        reduction: of a microbatch's tokens; "mean" where a divisor of the whole step is missed.
        scaled_outside: whether somebody else divides what a microbatch gives.
    """

    reduction = ""
    scaled_outside = False

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
        self._stage: Any = None
        self._validated = self._knows_of_outputs = False
        self._warns_of_validation = True
        self._nothing_divides = False
        self._keeps_graph = loses_nodes()
        self._was_sharded = self._is_sharded()

    @property
    def hidden_layout(self) -> HiddenLayout:
        """Whose tokens the loss is given."""
        return self._options["hidden_layout"]

    def bind(
        self,
        last_stage: Any,
        *,
        scale_grads: bool,
        num_microbatches: int,
        microbatches_in_flight: int,
    ) -> None:
        """Tell the loss in which schedule it is; `validate_pipeline_loss` does.

        Args:
            last_stage: the schedule's, whose outputs the loss is given.
            scale_grads: whether the schedule divides gradients by the number of microbatches, so
                that a divisor of the whole step is refused.
            num_microbatches: of a step.
            microbatches_in_flight: how many wait between forward and backward on the last stage,
                which ``backward="auto"`` counts on.
        """
        self._stage = last_stage
        self._warns_of_validation = self._knows_of_outputs = False
        divided = scale_grads or self.scaled_outside or self.reduction != "mean"
        self._nothing_divides = num_microbatches > 1 and not divided
        self._was_sharded = self._was_sharded or self._is_sharded()
        self.scaled_by_schedule = scale_grads
        if self._options.get("impl") in ("auto", "chunked"):
            self._options.setdefault("microbatches_in_flight", microbatches_in_flight)

    def warn_of_missing_divisor(self) -> None:
        """Warn once where a step that trains has no divisor, and nothing else divides."""
        if not self._nothing_divides:
            return
        self._nothing_divides = False  # said once
        warnings.warn(
            "the schedule has scale_grads=False and the loss no num_valid_tokens, so that losses "
            "and gradients are as many times too large as there are microbatches: before each step "
            "set loss.num_valid_tokens = count_valid_tokens(labels, groups, shift=...), or build "
            "the schedule with scale_grads=True, or say scaled_outside=True if a trainer divides",
            stacklevel=3,
        )

    def _is_sharded(self) -> bool:
        """Tell whether the rows are a DTensor's now: FSDP2 gathers such before a stage runs."""
        return any(isinstance(tensor, DTensor) for tensor in self.output_weight.tensors)

    def read_rows(self) -> Rows:
        """Return this rank's rows as they are now.

        Raises:
            ValueError: what `OutputWeight.read` raises, and rows that were a shard when the loss
                was made and are whole now, where the hidden layout gathers tokens.
        """
        rows, layout = self.output_weight.read(), self.hidden_layout
        if layout != "replicated" and rows.options is None and self._was_sharded:
            raise ValueError(
                f'hidden_layout="{layout}" says that the ranks share the rows of the classifier, '
                f"but its DTensor weight is whole when the loss is called, as FSDP2 gathers it: "
                f"leave hidden_layout out, or shard the rows by VocabParallelClassifier"
            )
        return rows

    def warn_of_missing_validation(self) -> None:
        """Warn once where one of torch's schedules trains with a loss that nobody has validated.

        A call outside of a schedule, and an evaluation, is right without.
        """
        compiles = torch.compiler.is_compiling()
        if not self._warns_of_validation or compiles or not _schedule_trains():
            return
        self._warns_of_validation = False
        warnings.warn(
            f"a schedule runs the backward of a {type(self).__name__} that was never validated: "
            f"call validate_pipeline_loss(schedule, loss) on every rank before the first step, "
            f"which refuses what would train wrongly without a word",
            stacklevel=3,
        )

    def infers_shapes(self) -> bool:
        """Tell whether a call of a schedule is none of a microbatch, but infers shapes.

        Then the last stage, which `bind` has told of, holds no microbatch that is under way.
        """
        return self._stage is not None and not getattr(self._stage, "fwd_cache", True)

    def warn_of_kept_outputs(self) -> None:
        """Warn once where the schedule keeps the last stage's outputs; see `bind`."""
        if self._stage is None or self._knows_of_outputs or self.infers_shapes():
            return
        self._knows_of_outputs = True
        if getattr(self._stage, "output_chunks", None):
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
        if self._keeps_graph and not torch.compiler.is_compiling():
            keep_graph(loss)
        return loss


def _schedule_trains() -> bool:
    """Tell by the stack whether a schedule of torch's that runs a backward is calling."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != _SCHEDULES:
        frame = frame.f_back
    return frame is not None and getattr(frame.f_locals.get("self"), "_has_backward", False)
