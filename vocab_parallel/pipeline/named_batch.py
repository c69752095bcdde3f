"""A pipeline loss whose microbatches hold several tensors, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.arguments import rows_of
from vocab_parallel.pipeline.scheduled_loss import ScheduledLoss


class NamedBatchLoss(ScheduledLoss):
    """Base of losses that need more of a microbatch than the one tensor that a schedule splits.

    `load` takes all tensors of a step by name and returns the target to give to the schedule: the
    positions of the sequences, by which each microbatch finds its own.
    """

    _batch: Mapping[str, Tensor] = MappingProxyType({})

    def load(self, targets: Tensor, **extras: Tensor) -> Tensor:
        """Keep the batch of the next steps, and return the ``target`` to give to them.

        Every rank of the vocab group calls it. The first call, and each with tensors on the CPU,
        agrees over the group that the arguments are right. The tensors are read at the step, not
        copied here.

        Args:
            targets: [B, T] ids of the whole vocabulary, as the loss takes them.
            **extras: tensors [B, ...] on the targets' device, without a gradient, by the names
                that the loss finds them under; its class says which.

        Returns:
            the positions [B] of the sequences, int64 on the targets' device.

        Raises:
            ValueError: no tensor, or not B sequences of each; on every rank of the group.
        """
        batch = {"targets": targets, **extras}
        shapes: dict[str, Any] = {}
        problem: ValueError | None = None
        try:
            shapes = _checked_shapes(batch)
        except ValueError as error:
            problem = error
        read = self.output_weight.read()
        if not (self._validated and read.weight.is_cuda):
            rows = rows_of(read.weight, read.options)
            vocab_size = -1 if rows.vocab_size is None else rows.vocab_size
            claim = RankSummary(rows.start, rows.stop, vocab_size)
            agree(problem, claim, {"batch": shapes}, rows.group)
        elif problem is not None:
            raise problem
        self._batch = batch
        return torch.arange(targets.shape[0], device=targets.device)

    def microbatch(self, target: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a microbatch by name.

        Args:
            target: what the schedule has split off what `load` returned, [b].

        Raises:
            ValueError: nothing was loaded, or another target.
        """
        if not self._batch or target.dim() != 1:
            raise ValueError(
                f"a {type(self).__name__} finds its microbatch by what load(targets, ...) returns: "
                f"call it before the step, and give the step its result as target"
            )
        return {name: tensor.index_select(0, target) for name, tensor in self._batch.items()}


def _checked_shapes(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes and dtypes of a batch, or raise ValueError for what cannot be one."""
    targets = batch["targets"]
    if not isinstance(targets, Tensor) or targets.dim() < 2:
        kind = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a tensor [B, T] of ids, got {kind}")
    count, device = targets.shape[0], targets.device
    for name, tensor in batch.items():
        got = type(tensor).__name__
        if isinstance(tensor, Tensor):
            grad = tensor.requires_grad
            if tensor.shape[:1] == (count,) and tensor.device == device and not grad:
                continue
            got = f"{list(tensor.shape)} on {tensor.device} with requires_grad={grad}"
        raise ValueError(
            f"{name} must be a tensor [{count}, ...], a value for each sequence of the targets, on "
            f"{device} and without a gradient (bind what is no tensor to the function), got {got}"
        )
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
