"""What every loss of a schedule has: where its rows are, and what it is told of the schedule."""

import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vocab_parallel.backends.registry import create_backend
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.modules.heads import OutputWeight, Rows
from vocab_parallel.pipeline.problems import DIVIDED_TWICE
from vocab_parallel.settings import LossSettings, unknown_option
from vocab_parallel.split_backward import keep_graph, loses_nodes

_SCHEDULES = "torch.distributed.pipelining.schedules"
_OF_SETTINGS = {each.name for each in fields(LossSettings)}
# What a loss finds by itself at each call, and a result that a schedule does not take.
_NOT_OPTIONS = {
    "e", "c", "targets", "bias", "document_ids", "num_valid_tokens", "validate", "return_lse",
}  # fmt: skip


class ScheduledLoss:
    """A loss of the last stage's output, which `validate_pipeline_loss` takes.

    It only reads the classifier's weight, at each call, and must not own it.

    Args:
        output_weight, output_bias, vocab_parallel_options: as in `CCEPipelineLoss`.
        options: of the function that each call calls.
        known: names of what it takes.
        scaled_outside: whether somebody else divides what a microbatch gives.

    Attributes:
        output_weight: where the rows are found.
        scaled_by_schedule: whether the schedule divides gradients by the number of microbatches.
        reduction: of a microbatch's tokens; "mean" where a divisor of the whole step is missed.
        num_valid_tokens: that divisor, until it is set to another value.

    Raises:
        ValueError: an unknown option or a value that cannot be, or an ``output_weight`` whose
            logits may be more than its rows'.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        output_bias: Tensor | None,
        vocab_parallel_options: Any,
        options: Mapping[str, Any],
        known: Collection[str],
        *,
        scaled_outside: bool = False,
    ) -> None:
        self._known = frozenset(known) - _NOT_OPTIONS
        self._options = self._checked(options)
        self.output_weight = OutputWeight(output_weight, output_bias, vocab_parallel_options)
        self.reduction = options.get("reduction", "")
        self.num_valid_tokens: int | Tensor | None = None
        self.scaled_outside = scaled_outside
        self.scaled_by_schedule = False
        self._stage: Any = None
        self._validated = self._knows_of_outputs = False
        self._warns_of_validation = True
        self._nothing_divides = False
        self._keeps_graph = loses_nodes()
        self._was_sharded = self._is_sharded()

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of the loss, or raise ValueError for what they cannot be."""
        # Where the caller chooses no implementation, no option is its own.
        refused = {*_NOT_OPTIONS, *_OF_SETTINGS} if "impl" in self._known else options.keys()
        for name in sorted(options.keys() & (refused - self._known)):
            raise ValueError(
                f"{name} is not an option of a {type(self).__name__}: known are "
                f"{sorted(self._known)}"
            )
        settings = self._settings_of(options)
        settings.check()
        if options.get("reduction") == "none":
            raise ValueError('a schedule needs a scalar loss, "mean" or "sum", got "none"')
        problem = unknown_option(settings, self._known)
        if problem is not None:
            raise problem
        create_backend(settings.impl, settings.memory_budget, settings.impl_options)
        return dict(options)

    def _settings_of(self, options: Mapping[str, Any]) -> LossSettings:
        """Return all options that are not of the function alone, as a tensor of the tokens' is."""
        beside = self._known - _OF_SETTINGS
        return LossSettings.of({name: own for name, own in options.items() if name not in beside})

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

    def begin(
        self, num_valid_tokens: int | Tensor | None = None
    ) -> tuple[Rows, int | Tensor | None]:
        """Begin a call: return this rank's rows as they are now, and what divides the mean.

        Warns once of each thing that a schedule may do wrong.

        Args:
            num_valid_tokens: of this call, in place of the attribute.

        Raises:
            ValueError: a divisor where the schedule divides too; what `OutputWeight.read` raises,
                and rows that were a shard when the loss was made and are whole now, where the
                hidden layout gathers tokens.
        """
        divisor = self.num_valid_tokens if num_valid_tokens is None else num_valid_tokens
        if divisor is not None and self.scaled_by_schedule:
            raise ValueError(DIVIDED_TWICE)
        self._warn_of_missing_validation()
        self.warn_of_kept_outputs()
        if divisor is None and getattr(self._stage, "has_backward", False):
            self.warn_of_missing_divisor()
        rows, layout = self.output_weight.read(), self.hidden_layout
        if layout != "replicated" and rows.options is None and self._was_sharded:
            raise ValueError(
                f'hidden_layout="{layout}" says that the ranks share the rows of the classifier, '
                f"but its DTensor weight is whole when the loss is called, as FSDP2 gathers it: "
                f"leave hidden_layout out, or shard the rows by VocabParallelClassifier"
            )
        return rows, divisor

    def _warn_of_missing_validation(self) -> None:
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
            stacklevel=4,
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
