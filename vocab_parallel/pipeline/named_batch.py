"""A pipeline loss whose microbatches hold several tensors, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.pipeline.scheduled_loss import ScheduledLoss
from vocab_parallel.rank_rows import RankRows


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
        self._agree_on_batch(batch)
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

    def _agree_on_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse on every rank of the group what cannot be a batch."""
        rows = RankRows.whole(0)
        options = self.output_weight.read().options
        if options is not None:
            rows = RankRows.from_options(options)
        problem = _problem_of_batch(batch)
        on_gpu = self.output_weight.tensors[0].is_cuda
        if rows.group.degree == 1 or (self._validated and on_gpu):
            if problem is not None:
                raise problem
            return
        vocab_size = -1 if rows.vocab_size is None else rows.vocab_size
        shapes = {
            name: (list(tensor.shape), tensor.dtype) if isinstance(tensor, Tensor) else None
            for name, tensor in batch.items()
        }
        agree(
            problem, RankSummary(rows.start, rows.stop, vocab_size), {"batch": shapes}, rows.group
        )


def _problem_of_batch(batch: Mapping[str, Any]) -> ValueError | None:
    targets = batch["targets"]
    if not isinstance(targets, Tensor) or targets.dim() < 2:
        kind = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        return ValueError(f"targets must be a tensor [B, T] of ids, got {kind}")
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            return ValueError(
                f"{name} must be a tensor [B, ...] of a value a sequence, got "
                f"{type(tensor).__name__}: bind what is no tensor to the function"
            )
        if tensor.dim() == 0 or tensor.shape[0] != targets.shape[0]:
            return ValueError(
                f"{name} must have the {targets.shape[0]} sequences of the targets on its first "
                f"axis, got {list(tensor.shape)}"
            )
        if tensor.device != targets.device or tensor.requires_grad:
            return ValueError(
                f"{name} must be on {targets.device} as the targets are, and require no gradient, "
                f"got one on {tensor.device} with requires_grad={tensor.requires_grad}"
            )
    return None
