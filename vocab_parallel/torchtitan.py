"""The loss inside of torchtitan's trainer, by one of its own options.

    torchtitan ... --override.imports vocab_parallel.torchtitan.cut_cross_entropy
    torchtitan ... --override.imports 'vocab_parallel.torchtitan.cut_cross_entropy={"z_loss": 1e-4}'

Nothing of torchtitan is changed, and the library imports this module nowhere: it loads torchtitan.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config.override import override
from torchtitan.distributed.spmd_types import current_spmd_mesh

from vocab_parallel.adapters import HiddenStatesLoss
from vocab_parallel.modules.heads import OutputWeight
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.partition import ceiling_rows, row_range


class CutCrossEntropyLoss(HiddenStatesLoss, ChunkedLossWrapper):
    """`HiddenStatesLoss` where torchtitan builds its chunked loss: the trainer skips the head.

    Under tensor parallelism the vocab group is the "tp" axis. With the backend partial_dtensor the
    classifier is a DTensor. With spmd_types, the default, it is a plain shard of the rows, whose
    place is read off the mesh that is active when the loss is called; hidden states are the same
    on the axis there, and torchtitan adds up their gradient once more, so that each rank gives its
    share of it, 1 / V times the ``hidden_grad_scale`` that was asked for.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        """What torchtitan builds the loss of; the chunked loss's own fields count for nothing."""

        options: dict[str, Any] = field(default_factory=dict)  # of `linear_cross_entropy`

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        HiddenStatesLoss.__init__(self, **config.options)
        self._scale = float(config.options.get("hidden_grad_scale", 1.0))

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Take the classifier, whose forward torchtitan may have set to place its operands.

        Raises:
            ValueError: logits that are more than the classifier's product, as an adapter's or
                those of a softcap in the module.
        """
        placed: Any = vars(lm_head).get("forward")
        if getattr(placed, "__module__", "").startswith("torchtitan."):
            del lm_head.forward
            OutputWeight(lm_head)  # its class's own forward, and hooks, are refused as ever
            lm_head.forward = placed
            lm_head.logits_are_linear = True  # type: ignore[assignment]
        self._head: Any = lm_head
        super().set_lm_head(lm_head)

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `HiddenStatesLoss.__call__`."""
        if isinstance(self._head, FSDPModule):  # the model skips the classifier, and so its hooks
            self._head.unshard()
        mesh = current_spmd_mesh()
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            group = mesh.get_group("tp")
            rank, degree = dist.get_rank(group), dist.get_world_size(group)
            vocab_size = self._head.out_features
            start, stop = row_range(ceiling_rows(vocab_size, degree), rank)
            self._head.options = VocabParallelOptions(start, stop, group, vocab_size=vocab_size)
            self._options["hidden_grad_scale"] = self._scale / degree
        return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)


@override(
    target=ChunkedLossWrapper.Config,
    exact=True,
    description="cut cross-entropy over the tp axis",
)
def cut_cross_entropy(config: Any, **options: Any) -> Any:
    """Return the configuration that takes the place of the chunked loss's.

    Args:
        config: of the chunked loss.
        **options: of `linear_cross_entropy`.

    Raises:
        ValueError: the chunked loss is of another loss than cross-entropy.
    """
    if type(config.loss_fn) is not CrossEntropyLoss.Config:
        raise ValueError(
            f"cut_cross_entropy takes the place of a chunked cross-entropy, and this chunked loss "
            f"is of {type(config.loss_fn).__qualname__}: leave the override out"
        )
    return CutCrossEntropyLoss.Config(options=options)
