"""The stages that one rank runs, their schedule and the loss at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.attention import refuse_to_look_across
from launch.command import raised_on_all
from launch.configs import config_of_sizes, load_config, model_without_memory, say_beyond_positions
from launch.data.batches import Batch, Batches
from launch.layers import compiles, prepare_layers
from launch.logit_settings import logit_settings
from launch.model import SpanningRows, Stage, build_stage, layers_of_stage
from launch.planning.schedules import SCHEDULES
from launch.planning.shape import ModelShape
from launch.sharded_body import StageOfShards, refuse_to_shard, shard_body
from launch.weights import FolderWeights, RandomWeights, WeightSource, say_random
from stage_groups import StageGroups, StageStyle, build_stage_groups
from stage_groups.placement import stages_of_rank
from vocab_parallel import (
    CCEPipelineLoss,
    LossMetrics,
    SpanningSchedule,
    TiedRows,
    VocabParallelClassifier,
    count_valid_tokens,
    filled_rows,
    no_loss,
    validate_pipeline_loss,
)
from vocab_parallel.pipeline.spanning.order import Costs


class StageList(nn.ModuleList):
    """A rank's stages under the names that their parameters have in the whole model."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names without the stage's place in this list."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.split(".", 1)[1], parameter


@dataclass(frozen=True)
class Pipeline:
    """One rank's part of the pipeline.

    Attributes:
        indices: of the stages that it runs.
        owners: the pipeline rank of each stage.
        stages: their modules, in that order.
        pipeline_stages: what the schedule runs them as.
        schedule: of torch.distributed.pipelining.
        loss: a CCEPipelineLoss on ranks with rows of the classifier.
        head: this rank's rows of the classifier, or None.
        has_last: whether this rank runs the last stage.
        groups: the mesh.
        config: of the model.
        tied: the two ends of a tied weight, or None.
        bytes_read: from the model's folder.
    """

    indices: list[int]
    owners: list[int]
    stages: StageList
    pipeline_stages: list[PipelineStage]
    schedule: Any
    loss: Any
    head: VocabParallelClassifier | None
    has_last: bool
    groups: StageGroups
    config: PretrainedConfig
    tied: TiedRows | None
    bytes_read: int

    @property
    def spans(self) -> bool:
        """Whether all stages carry the vocabulary."""
        return self.groups.message_groups is not None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all that this rank trains."""
        return self.stages.parameters()

    def shard_body(self, dtype: torch.dtype) -> None:
        """Shard the body, of a dtype, over the data axis; all ranks call, before the optimizer.

        The schedule is made already: of an FSDP2 module it could not know that nothing is gathered
        or reduced between its actions, and would refuse it where that is wrong.
        """
        assert self.groups.data_mesh is not None
        for stage in self.stages:
            assert isinstance(stage, Stage)
            shard_body(stage, self.groups.data_mesh, dtype)

    def column_of(self, batches: Batches, step: int) -> Batch:
        """Return this column's sequences of a step's batch, and read no other."""
        groups = self.groups
        column = groups.data_rank * groups.column_degree + groups.column_rank
        return batches.part(step, column, groups.data_degree * groups.column_degree)

    def accumulate(self, batch: Batch, pieces: int) -> Tensor | None:
        """Run forward and backward over this column's sequences [b, T], in schedule steps.

        Gradients are of the mean over all valid tokens of the mesh, however the sequences are cut,
        and add up over the columns and the data axis. The returned loss is its columns' part of
        it, and adds up over the data axis; None off the last stage. A sharded body's gradients are
        summed over the data axis already. Does not wait for a GPU.
        """
        if self.head is not None:
            columns = [self.groups.columns_group, self.groups.data_group]
            self.loss.num_valid_tokens = count_valid_tokens(batch.labels, columns, shift=1)
        losses: list[Tensor] = []
        for number, piece in enumerate(batch.chunk(pieces)):
            for stage in self.pipeline_stages:
                if isinstance(stage, StageOfShards):
                    stage.reduces = number + 1 == pieces
            of_piece: list[Tensor] = []
            self.schedule.step(
                *([piece.ids] if 0 in self.indices or self.spans else []),
                target=piece.labels if self.has_last or self.spans else None,
                losses=of_piece if self.has_last else None,
                return_outputs=False,
                **piece.for_stages(),
            )
            losses += [loss.detach() for loss in of_piece]
        return torch.stack(losses).sum() if losses else None

    def metrics(self) -> Tensor:
        """Return accuracy and mean entropy [2] of the tokens that were accumulated since.

        They are of all columns and of the data axis, whose ranks of the last stage all call; NaN
        where the implementation of the loss has none. Does not wait for a GPU.
        """
        if not self.loss.settings.return_metrics:
            return torch.full((2,), torch.nan)
        found: LossMetrics = self.loss.metrics()
        if self.groups.data_degree > 1:
            sums = found.sums()
            dist.all_reduce(sums, group=self.groups.data_group)
            found = LossMetrics.of_sums(sums, found.accuracy.dtype)
        return torch.stack([found.accuracy, found.entropy])


def model_of(arguments: TrainArguments) -> tuple[PretrainedConfig, WeightSource]:
    """Return the configuration of the model, and where its weights come from.

    Raises:
        ValueError: an unknown model, or a folder that is not a whole one.
    """
    folder = None
    if arguments.model is None:
        config = config_of_sizes(
            vocabulary=arguments.vocabulary,
            hidden=arguments.hidden,
            layers=arguments.layers,
            sequence=arguments.sequence,
        )
    else:
        config, folder = load_config(arguments.model)
        model_without_memory(config, torch.float32)  # or it is refused, with what it is built of
    if folder is None:
        return config, RandomWeights(arguments.seed, config.initializer_range)
    return config, FolderWeights(folder, config)


def open_pipeline(
    arguments: TrainArguments,
    config: PretrainedConfig,
    source: WeightSource,
    batches: Batches,
    device: torch.device,
) -> Pipeline:
    """Make the mesh, and build on it what runs these batches; all ranks call it.

    Raises:
        UserError: as `build_pipeline`, or a model that looks across packed documents.
    """
    if dist.get_rank() == 0:
        say_random(arguments.model, source)
        say_beyond_positions(config, batches.longest)
    groups = build_stage_groups(
        arguments.pipeline,
        arguments.vocab,
        data=arguments.data,
        device_type=device.type,
        vocab_over="all_stages" if arguments.vocab_over == "all-stages" else "last_stage",
    )
    with raised_on_all():
        pipeline = build_pipeline(arguments, config, source, groups, device)
        if batches.packed:
            refuse_to_look_across(pipeline.stages)
    return pipeline


def build_pipeline(
    arguments: TrainArguments,
    config: PretrainedConfig,
    source: WeightSource,
    groups: StageGroups,
    device: torch.device,
) -> Pipeline:
    """Build this rank's stages and their schedule; all ranks must call.

    Raises:
        ValueError: weights that cannot be read, more stages than layers, microbatches that the
            schedule cannot run, a model whose loss is not that of its logits alone, or a body that
            this torch cannot shard under the schedule.
    """
    settings = logit_settings(config)
    refuse_to_shard(arguments)
    named = SCHEDULES[arguments.schedule.lower()]
    style: StageStyle = "v" if named.v_shaped else "loop"
    num_stages = arguments.pipeline * named.stages
    indices = groups.stages(num_stages, style)
    spans = groups.message_groups is not None
    counts: list[int] | None = None
    costs: Costs | None = None
    if spans:
        fills = arguments.rows == "filled"
        counts, costs = _spanning_plan(config, groups, num_stages, style, fills=fills)
    with raised_on_all():  # a rank reads the files of its own stages
        stages = [
            build_stage(
                config,
                source,
                index,
                num_stages,
                groups.vocab_group,
                device=device,
                dtype=getattr(torch, arguments.dtype),
                spanning=SpanningRows(counts, index == indices[0]) if spans else None,
            )
            for index in indices
        ]
        compiled = compiles(arguments, device)
    for stage, index in zip(stages, indices, strict=True):
        recomputed = arguments.recompute == "all" or (arguments.recompute == "first" and index == 0)
        prepare_layers(stage.model, compiled=compiled, recomputed=recomputed)
    head = next((stage.lm_head for stage in stages if stage.lm_head is not None), None)
    tied = None
    if config.tie_word_embeddings and not spans:
        tied = _tie(stages, head, groups, named.v_shaped)
    options: dict[str, Any] = {**settings, "impl": arguments.impl}
    if arguments.impl in ("auto", "chunked"):
        options["memory_budget"] = arguments.loss_memory * 2**20
        options["return_metrics"] = True
    loss: Any = no_loss
    with raised_on_all():  # ranks without rows make none, and would go on
        if head is not None:
            loss = CCEPipelineLoss(head, hidden_layout="sharded", **options)
    kind = StageOfShards if arguments.shard_body else PipelineStage
    pipeline_stages = [
        kind(stage, index, num_stages, device, group=groups.pipeline_group)
        for stage, index in zip(stages, indices, strict=True)
    ]
    schedule = _schedule(arguments, groups, pipeline_stages, loss, stages, costs)
    validate_pipeline_loss(schedule, loss)
    owners = {
        stage: rank
        for rank in range(arguments.pipeline)
        for stage in stages_of_rank(rank, arguments.pipeline, num_stages, style)
    }
    return Pipeline(
        indices,
        [owners[stage] for stage in range(num_stages)],
        StageList(stages),
        pipeline_stages,
        schedule,
        loss,
        head,
        num_stages - 1 in indices,
        groups,
        config,
        tied,
        source.bytes_read,
    )


def _spanning_plan(
    config: PretrainedConfig,
    groups: StageGroups,
    num_stages: int,
    style: StageStyle,
    *,
    fills: bool,
) -> tuple[list[int] | None, Costs]:
    """Return the rows of each rank of the vocab group, and what orders a step; equal on all ranks.

    Costs are in units of one layer's products, forward, of a microbatch: what a layer and what a
    row cost follow from the model's sizes, and the order of a step needs their ratio alone. No rows
    are as many on each rank.

    Args:
        config: of the model.
        groups: whose vocab group is that of all stages.
        num_stages, style: of the pipeline.
        fills: whether ranks with fewer layers get more rows.
    """
    shape = ModelShape.of_config(config.model_type, config)
    ranks, columns = groups.pipeline_degree, groups.column_degree
    layers = [
        float(len(layers_of_stage(stage, num_stages, config, spans=True)))
        for stage in range(num_stages)
    ]
    loads = [
        sum(layers[stage] for stage in stages_of_rank(rank, ranks, num_stages, style))
        for rank in range(ranks)
        for _ in range(columns)
    ]
    # A rank's rows meet the tokens of all columns, its layers those of one.
    row = columns * shape.hidden / shape.layer_products
    counts = None
    if fills:
        counts = filled_rows(shape.vocabulary, loads, row)
    held = counts or [shape.vocabulary // (ranks * columns)] * (ranks * columns)
    most = [row * max(held[rank * columns : (rank + 1) * columns]) for rank in range(ranks)]
    costs = Costs(
        forward=layers.__getitem__,
        backward_input=layers.__getitem__,
        backward_weight=layers.__getitem__,
        statistics=[2.0 * cost for cost in most],
        gradients=[2.0 * cost for cost in most],  # the logits are made again
    )
    return counts, costs


def _schedule(
    arguments: TrainArguments,
    groups: StageGroups,
    pipeline_stages: list[PipelineStage],
    loss: Any,
    stages: list[Stage],
    costs: Costs | None,
) -> Any:
    """Return the schedule; the loss divides by the valid tokens of the whole step."""
    count = arguments.microbatches
    if costs is not None:
        return SpanningSchedule(
            pipeline_stages,
            count,
            loss,
            groups,
            arguments.schedule,
            embedding=stages[0].model.embed_tokens,
            costs=costs,
            scale_grads=False,
        )
    cls = get_schedule_class(arguments.schedule)
    own = pipeline_stages[0] if len(pipeline_stages) == 1 else pipeline_stages
    return cls(own, n_microbatches=count, loss_fn=loss, scale_grads=False)


def _tie(
    stages: list[Stage], head: VocabParallelClassifier | None, groups: StageGroups, v_shaped: bool
) -> TiedRows:
    embedding = next(
        (stage.model.embed_tokens for stage in stages if stage.model.embed_tokens is not None), None
    )
    last = 0 if v_shaped else groups.pipeline_degree - 1
    return TiedRows(embedding, head, groups.pipeline_group, first=0, last=last)
