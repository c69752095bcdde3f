"""Forgather's pipeline trainer on a pipeline x vocab mesh, and its checkpoint of the whole model.

    trainer: !singleton:vocab_parallel.forgather:VocabPipelineTrainer
        vocab_degree: 2

Nothing of Forgather is changed, and the library imports this module nowhere: it loads Forgather.
"""

import copy
import math
from typing import Any

import torch
from forgather.ml.trainer.checkpoint_manager import CheckpointManager
from forgather.ml.trainer.pipeline.pipeline_trainer import PipelineTrainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from stage_groups import build_stage_groups
from vocab_parallel.adapters import shard_output_embeddings
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.modules.gradient_norm import clip_grad_norm_
from vocab_parallel.pipeline import CCEPipelineLoss


class WholeCheckpoints(CheckpointManager):
    """Its manager, where the columns of a mesh hold rows each: one column writes for all.

    Its checkpoint has a file a stage and its optimizer, named by the stage, which each column
    would write with its own rows. Here the ranks of a stage gather the rows of weights and
    moments, one tensor after the other, and the first column writes them. So a checkpoint is that
    of a run without a vocab axis, and loads with any number of columns, or into its own trainer.

    Args:
        column: of this rank.
        **given: of its manager.
    """

    model_parts: Any

    def __init__(self, column: int, **given: Any) -> None:
        super().__init__(**given)
        self._writes = column == 0

    def _should_save_unique(self) -> bool:
        return self._writes and super()._should_save_unique()

    def _save_model(self, output_dir: str) -> None:
        parts = self.model_parts
        self.model_parts = [_Whole(part, self._writes) for part in parts]
        try:
            if self._writes:
                super()._save_model(output_dir)
        finally:
            self.model_parts = parts

    def _save_state_dict(self, key: str, obj: Any, output_dir: str) -> None:
        whole = _Whole(obj, self._writes)
        if self._writes:
            super()._save_state_dict(key, whole, output_dir)


class _Whole:
    """What has a state dict, seen with all rows: every rank of the vocab group makes one."""

    def __init__(self, part: Any, keep: bool) -> None:
        def whole(rows: DTensor) -> Tensor | None:
            gathered = rows.full_tensor()
            return gathered.cpu() if keep else None

        self._state = tree_map_only(DTensor, whole, part.state_dict())

    def state_dict(self) -> Any:
        return self._state


class VocabPipelineTrainer(PipelineTrainer):
    """Its pipeline trainer, with V ranks for each stage, which have the same sequences.

    The first rank's loader feeds all. The ranks of the last stage hold V-ths of the classifier's
    rows (`shard_output_embeddings`); those of another do the same work. Every rank makes the whole
    model of one seed on the CPU and takes its part of it, where its trainer sends whole weights.
    `WholeCheckpoints` says what is saved.

    Args:
        vocab_degree: V; the world is V times as many ranks as the pipeline has.
        **given: of its trainer; ``fused_loss_factory`` makes a `CCEPipelineLoss` of hidden states
            that are replicated over the columns.

    Raises:
        ValueError: on every rank: V does not divide the world, no loss of hidden states is given
            or the model returns none, another ``hidden_layout``, an optimizer within backward.
    """

    dist: Any
    model_splitter: Any

    def __init__(self, *, vocab_degree: int, **given: Any) -> None:
        self._vocab_degree = vocab_degree
        super().__init__(**given)

    def _post_init(self) -> None:
        self._check_loss()
        if self.args.fuse_optim_with_backward:
            raise ValueError(
                "fuse_optim_with_backward would count the body's gradients in each column: "
                "switch it off"
            )
        self._mesh = self.dist
        pipeline, rest = divmod(self.dist.world_size, self._vocab_degree)
        if rest:
            raise ValueError(
                f"vocab_degree={self._vocab_degree} does not divide {self.dist.world_size} ranks"
            )
        device = torch.device(self.dist.device).type
        groups = build_stage_groups(pipeline, self._vocab_degree, device_type=device)
        self.groups = groups
        self.dist = copy.copy(self.dist)  # as one column sees it
        self.dist.rank, self.dist.world_size = groups.pipeline_rank, groups.pipeline_degree
        self.model_splitter = shard_output_embeddings(
            self.model_splitter,
            pipeline_rank=groups.pipeline_rank,
            pipeline_group=groups.pipeline_group,
            vocab_group=groups.vocab_group,
        )
        super()._post_init()
        self.is_world_process_zero = self._mesh.rank == 0
        self.pp_group = groups.pipeline_group

    def _check_loss(self) -> None:
        """Refuse on every rank what the last stage alone would see, by a loss of no head."""
        factory: Any = self.fused_loss_factory
        loss = factory and factory(nn.Linear(1, 1, device="meta"))
        layout = loss.hidden_layout if isinstance(loss, CCEPipelineLoss) else None
        if layout != "replicated":
            raise ValueError(
                f"columns have the same sequences, and rows of the classifier each: expected a "
                f"fused_loss_factory of CCEPipelineLoss with hidden_layout='replicated', got "
                f"{type(loss).__name__} with {layout!r}: give it as "
                f"functools.partial(CCEPipelineLoss, scaled_outside=True)"
            )

    def _split_model(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._split_model(*args, **kwargs)
        last = found[0][-1]
        if not getattr(last, "can_return_hidden_states", False):
            raise ValueError(
                f"{type(last).__name__} does not say can_return_hidden_states = True, so that the "
                f"trainer would take its own loss, of logits that no rank has"
            )
        return found

    @torch.no_grad()
    def _initialize_params(
        self, all_modules: Any, modules: Any, stage_indices: Any, missing_buf_only: bool
    ) -> None:
        torch.manual_seed(self.args.seed)
        model = self._construct_model(device="cpu")
        # Buffers that are not persistent are in no state dict.
        whole = {**model.state_dict(), **dict(model.named_buffers(remove_duplicate=False))}
        for module in modules:
            module.load_state_dict({name: whole[name] for name in module.state_dict()})
            for name, buffer in module.named_buffers(remove_duplicate=False):
                buffer.copy_(whole[name])

    def _dataloader_iter(self, dataloader: Any) -> Any:
        mesh = copy.copy(self)
        mesh.dist = self._mesh  # whose first rank sends its batches to all
        return PipelineTrainer._dataloader_iter(mesh, dataloader)

    def _distributed_loss(self, loss: Tensor) -> Tensor:
        column = VocabGroup.of(self.groups.pipeline_group)
        return column.start_broadcast(loss, self.pp_last_stage_rank).wait()

    def _clip_grad_norm(self, max_grad_norm: float | None, norm_type: float = 2.0) -> Tensor:
        stages = nn.ModuleList(self.pipeline_modules)
        return clip_grad_norm_(stages, max_grad_norm or math.inf, self.groups)

    def _init_checkpoint_manager(self) -> WholeCheckpoints:
        manager = super()._init_checkpoint_manager()
        names = "config dist stateful_provider model model_parts model_preprocessor shard_index"
        given = {name: getattr(manager, name) for name in names.split()}
        return WholeCheckpoints(self.groups.vocab_rank, **given)
