"""The loss inside of torchtitan's trainer, by one of its own options.

    torchtitan ... --override.imports vocab_parallel.torchtitan.cut_cross_entropy

Nothing of torchtitan is changed, and the library imports this module nowhere: it loads torchtitan.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config.override import override
from torchtitan.distributed.spmd_types import current_spmd_mesh

from vocab_parallel.adapters import HiddenStatesLoss
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.partition import ceiling_rows, row_range


class CutCrossEntropyLoss(HiddenStatesLoss, ChunkedLossWrapper):
    """`HiddenStatesLoss` where torchtitan builds its chunked loss: the trainer skips the head.

    Under tensor parallelism the vocab group is the "tp" axis. With the backend partial_dtensor the
    classifier is a DTensor. With spmd_types, the default, it is a plain shard of the rows, whose
    place is read off the mesh that is active when the loss is called; hidden states are the same
    on the axis there, and torchtitan adds up their gradient once more, so that each rank gives its
    share of it, 1 / V.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """What torchtitan builds the loss of; the chunked loss's own fields count for nothing."""

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        HiddenStatesLoss.__init__(self)

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """See `HiddenStatesLoss.set_lm_head`.

        torchtitan sets the forward of its own Linear from outside, to place its operands: its
        logits are those of its weight all the same.
        """
        if isinstance(lm_head, nn.Linear) and type(lm_head).__module__.startswith("torchtitan."):
            lm_head.logits_are_linear = True  # type: ignore[assignment]
        self._head = lm_head
        super().set_lm_head(lm_head)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `HiddenStatesLoss.__call__`."""
        mesh = current_spmd_mesh()
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            group = mesh.get_group("tp")
            rank, degree = dist.get_rank(group), dist.get_world_size(group)
            vocab_size: Any = self._head.out_features
            start, stop = row_range(ceiling_rows(vocab_size, degree), rank)
            options = VocabParallelOptions(start, stop, group, vocab_size=vocab_size)
            self._head.options = options  # type: ignore[assignment]
            self._options["hidden_grad_scale"] = 1.0 / degree
        return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)


@override(target=ChunkedLossWrapper.Config, description="cut cross-entropy over the tp axis")
def cut_cross_entropy(config: Any) -> Any:
    """Return the configuration that takes the place of the chunked loss's."""
    return CutCrossEntropyLoss.Config()
