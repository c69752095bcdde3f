"""A pipeline loss that is the user's own function of log-probabilities and entropies."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.functional import token_logprobs
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.pipeline.named_batch import NamedBatchLoss
from vocab_parallel.settings import parameters_of

# Of log-probabilities, entropies or None, and the microbatch by name.
LogprobsFunction = Callable[[Tensor, Tensor | None, dict[str, Tensor]], Tensor]


class LogprobsPipelineLoss(NamedBatchLoss):
    """``loss_fn`` of a pipeline schedule: a function of the targets' log-probabilities.

    What reinforcement learning minimises, under any schedule that takes a `CCEPipelineLoss`; every
    rank of the last stage's vocab group makes it and calls it alike. A schedule of torch's splits
    one tensor, its ``target``, into microbatches, and a function may need several (advantages,
    older log-probabilities), of any shape and dtype. So `load` takes them by name before each step
    and returns the target to give to it: the positions of the sequences, by which each microbatch
    finds its own.

        def policy_loss(logprobs, entropy, batch):
            ratio = (logprobs - batch["old"]).exp()
            return -(ratio * batch["advantage"]).sum() / number_of_tokens

        loss = LogprobsPipelineLoss(last_stage_module.classifier, policy_loss, shift=1)
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss, scale_grads=False)
        validate_pipeline_loss(schedule, loss)
        target = loss.load(targets, old=old, advantage=advantage)
        schedule.step(target=target, losses=losses, return_outputs=False)

    Args:
        output_weight, output_bias, vocab_parallel_options: as in `CCEPipelineLoss`.
        function: called as ``function(logprobs, entropy, batch)`` for each microbatch, with this
            rank's log-probabilities [b, T - shift] ([b, T / V] in the "sequence" layout), 0 where
            the target is ignored; its entropies in nats, likewise, or None; and its sequences'
            part of what `load` was given, with "targets" [b, T] among it; ``document_ids`` there
            are those of `token_logprobs`, too. It returns a scalar that is differentiable in the
            first two, and adds up over microbatches (with ``scale_grads=True`` the schedule
            averages it). It must not communicate over the pipeline's group, and may be called on
            uninitialised hidden states.
        return_entropy: whether it is given entropies.
        **loss_options: of `token_logprobs`: hidden_layout, softcap, temperature, backward, ...

    In the gathering layouts each rank's function sees its own tokens: the loss is the sum over the
    group of what they return, so divide by counts of the whole group. That sum is one number, one
    all-reduce for each microbatch. In the "replicated" layout all functions see the same tokens and
    must return the same.

    Raises:
        ValueError: an unknown option or a value that cannot be, or an ``output_weight`` whose
            logits may be more than its rows'.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        function: LogprobsFunction,
        *,
        output_bias: Tensor | None = None,
        vocab_parallel_options: Any = None,
        return_entropy: bool = False,
        impl: str = "auto",
        hidden_layout: HiddenLayout = "replicated",
        **loss_options: Any,
    ) -> None:
        if not callable(function):
            raise ValueError(
                f"function must be callable as function(logprobs, entropy, batch), got {function!r}"
            )
        options = {
            "return_entropy": bool(return_entropy),
            "impl": impl,
            "hidden_layout": hidden_layout,
            **loss_options,
        }
        known = parameters_of(token_logprobs)
        super().__init__(output_weight, output_bias, vocab_parallel_options, options, known)
        self._function = function

    def __call__(self, hidden_states: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of one microbatch, equal on every rank of the vocab group.

        Args:
            hidden_states: [b, T, D], or [b, T / V, D] in the "sequence" layout.
            target: what the schedule has split off what `load` returned, [b].

        Raises:
            ValueError: another target, a function that returns no scalar, or rows that are whole
                when it is called although the layout says that the ranks share them.
        """
        batch = self.microbatch(target)
        rows, _ = self.begin()
        e, c = rows.operands(hidden_states)
        found = token_logprobs(
            e,
            c,
            batch["targets"],
            rows.bias,
            document_ids=batch.get("document_ids"),
            vocab_parallel_options=rows.options,
            validate=self.validates(),
            **self._options,
        )
        logprobs, entropy = found if isinstance(found, tuple) else (found, None)
        loss = self._function(logprobs, entropy, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"function must return a scalar tensor, got {kind}: reduce it")
        group = VocabGroup()
        if rows.options is not None and self._options["hidden_layout"] != "replicated":
            group = VocabGroup.of(rows.options.group)
        return self.finished(_SumOfRanks.apply(loss.reshape(()), group))


class _SumOfRanks(torch.autograd.Function):
    """Add up a number of each rank; each rank's own receives what the sum does."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: VocabGroup) -> Tensor:
        return group.sum(own.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
