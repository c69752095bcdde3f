"""The loss as a pipeline schedule calls it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vocab_parallel.functional import linear_cross_entropy
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.metrics import LossMetrics
from vocab_parallel.modules.heads import Rows
from vocab_parallel.multi_token import as_tuple, multi_token_cross_entropy, stacked
from vocab_parallel.pipeline.scheduled_loss import ScheduledLoss
from vocab_parallel.settings import LossSettings, parameters_of


class CCEPipelineLoss(ScheduledLoss):
    """``loss_fn`` of a pipeline schedule: the linear cross-entropy of the last stage's output.

    Every rank of the last stage's vocab group calls it, once for each microbatch. It only reads
    the classifier's weight, at each call, and must not own it: the weight is a parameter of the
    last stage's module, or training goes wrong (`validate_pipeline_loss` says how).

        loss = CCEPipelineLoss(last_stage_module.classifier, hidden_layout="sharded")
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss)
        validate_pipeline_loss(schedule, loss)
        schedule.step(target=labels, losses=losses, return_outputs=False)

    Args:
        output_weight: the classifier [rows, D]: the module that owns it (`VocabParallelClassifier`,
            nn.Linear, a LoRA layer of PEFT's over one; see `OutputWeight`), a Parameter, or a
            DTensor sharded over its rows.
        output_bias: its bias; None takes the module's own, if it has one.
        impl: "auto", or a name of `available_impls`.
        vocab_parallel_options: which rows these are. None: the module's ``.options``, or the
            DTensor's placement; a plain tensor is the whole vocabulary.
        ignore_index, softcap, shift, reduction, hidden_layout, **loss_options: as in
            `linear_cross_entropy`; ``shift`` is 1 by default, since a schedule's labels are
            usually its inputs. Several, such as (1, 2, 3), are those of
            `multi_token_cross_entropy`: the last stage returns a tuple of as many hidden states,
            or one tensor of them [H, ..., T, D], and **loss_options may have ``head_weights``.
            With ``return_metrics=True`` it still returns the loss alone, and `metrics` the rest.
        scaled_outside: whether a trainer divides the losses or gradients of a step's microbatches
            by itself. Otherwise, where nothing divides (a schedule with ``scale_grads=False``,
            several microbatches, a mean, no ``num_valid_tokens``), the first step that trains warns
            once: losses and gradients are the sum of as many means.

    Attributes:
        num_valid_tokens: divides the mean in place of each microbatch's own count, until it is set
            to another value: the tokens of the whole step, from `count_valid_tokens`, set before
            each step of a schedule that was built with ``scale_grads=False``; of several
            predictions one number, or a tensor of one for each. A schedule that
            knows ``step(loss_kwargs={"num_valid_tokens": ...})`` may pass it so instead.
        settings: all that is asked of the loss beside its tensors and rows, but for the divisor.
        head_weights: of several predictions, or None; may be set between two steps.

    Raises:
        ValueError: an unknown option or a value that cannot be, a reduction that gives no scalar,
            or an ``output_weight`` whose logits may be more than its rows'.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        output_bias: Tensor | None = None,
        impl: str = "auto",
        *,
        vocab_parallel_options: Any = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        shift: int | Sequence[int] = 1,
        reduction: str = "mean",
        hidden_layout: HiddenLayout = "replicated",
        scaled_outside: bool = False,
        **loss_options: Any,
    ) -> None:
        self.accumulate_into = loss_options.get("accumulate_into")
        self._metric_sums: Tensor | None = None  # (3,), of the microbatches so far
        self._metrics_dtype = torch.float32
        options: dict[str, Any] = {
            "impl": impl,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "shift": as_tuple(shift) if isinstance(shift, Sequence) else shift,
            "reduction": reduction,
            "hidden_layout": hidden_layout,
            **loss_options,
        }
        weights = options.pop("head_weights", None)
        if weights is not None:
            options["head_weights"] = as_tuple(weights)
        super().__init__(
            output_weight,
            output_bias,
            vocab_parallel_options,
            options,
            parameters_of(linear_cross_entropy) | {"head_weights"},
            scaled_outside=scaled_outside,
        )

    def __call__(
        self,
        hidden_states: Tensor | tuple[Tensor, ...],  # (..., T, D); "sequence": (..., T / V, D)
        labels: Tensor,  # (..., T), or (..., 2, T) with document ids
        *,
        num_valid_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """Return the scalar loss of one microbatch, equal on every rank of the vocab group.

        A schedule splits one target into microbatches. Where sequences have several documents, it
        holds the labels and ``document_ids`` of `linear_cross_entropy`, one under the other:

            schedule.step(target=torch.stack((labels, document_ids), -2), ...)

        The first call agrees over the group that the arguments are right, on any device; the
        later ones as `linear_cross_entropy` does by default. A schedule may call it on
        uninitialised hidden states to infer shapes: nothing is kept of such a call.
        """
        rows, divisor = self.begin(num_valid_tokens)
        e, c = _operands(rows, hidden_states)
        several = isinstance(self._options["shift"], tuple)
        labels, document_ids = _labels_and_documents(labels, hidden_states, several)
        found: Any = (multi_token_cross_entropy if several else linear_cross_entropy)(
            e,
            c,
            labels,
            rows.bias,
            vocab_parallel_options=rows.options,
            document_ids=document_ids,
            num_valid_tokens=divisor,
            validate=self.validates(),
            **self._options,
        )
        if not self._options.get("return_metrics"):
            return self.finished(found)
        loss, metrics = found
        if not self.infers_shapes():
            self.add_metrics(metrics)
        return self.finished(loss)

    def metrics(self) -> LossMetrics:
        """Return the metrics of all microbatches since it was last called: of a step, at its end.

        Every rank whose loss was called may call it, or not: it communicates nothing, and waits for
        no device before a number is read. The microbatches of a validated schedule count, and not
        the call by which it infers shapes. They are those of this rank's vocab group; over all
        stages, of all columns' tokens.

        Raises:
            ValueError: made without ``return_metrics=True``, or no microbatch since.
        """
        sums, self._metric_sums = self._metric_sums, None
        if not self._options.get("return_metrics"):
            raise ValueError("make the CCEPipelineLoss with return_metrics=True for its metrics")
        if sums is None:
            raise ValueError(
                "metrics are of the microbatches since they were last asked for, and there was "
                "none: ask once a step, after it, on the ranks of the last stage"
            )
        return LossMetrics.of_sums(sums, self._metrics_dtype)

    def add_metrics(self, found: LossMetrics) -> None:
        """Add a microbatch's metrics to those that `metrics` will return."""
        sums, before = found.sums(), self._metric_sums
        self._metric_sums = sums if before is None else before + sums
        self._metrics_dtype = found.accuracy.dtype

    @property
    def settings(self) -> LossSettings:
        """See above."""
        return self._settings_of(self._options)

    @property
    def head_weights(self) -> tuple[float, ...] | None:
        """See above."""
        return self._options.get("head_weights")

    @head_weights.setter
    def head_weights(self, weights: Sequence[float]) -> None:
        self._options = self._checked({**self._options, "head_weights": as_tuple(weights)})

    @property
    def token_weight(self) -> Tensor | None:
        """The weights [..., T] of every microbatch's tokens."""
        return self._options.get("token_weight")


def no_loss(*_: Any, **__: Any) -> Tensor:
    """``loss_fn`` of the ranks without the last stage, which never call it.

    A schedule that has no ``loss_fn`` on some rank hangs, so every rank passes a callable.

    Raises:
        ValueError: it was called.
    """
    raise ValueError("only the last stage computes the loss: give its ranks a CCEPipelineLoss")


def _labels_and_documents(
    labels: Any, hidden_states: Any, several: bool
) -> tuple[Any, Tensor | None]:
    """Return labels [..., T], and the document ids where these lie under them in [..., 2, T]."""
    of_one = hidden_states[0] if isinstance(hidden_states, tuple | list) else hidden_states
    if isinstance(of_one, Tensor) and isinstance(labels, Tensor):
        dims = of_one.dim() - (several and of_one is hidden_states)  # of [..., T, D]
        if labels.dim() == dims and labels.shape[-2] == 2:
            return labels[..., 0, :], labels[..., 1, :]
    return labels, None


def _operands(rows: Rows, hidden_states: Any) -> tuple[Any, Tensor]:
    """Return hidden states, or several of them, and the rows that they are multiplied by."""
    hidden = stacked(hidden_states) if rows.adapters else hidden_states
    # What is no tensor the loss refuses, on every rank.
    return rows.operands(hidden) if isinstance(hidden, Tensor) else (hidden, rows.weight)
