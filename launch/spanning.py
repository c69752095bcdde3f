"""How the vocabulary lies on all stages: rows of each rank, and how long everything takes.

In units of one layer's products, forward, of a microbatch: what a layer and what a row cost follow
from the model's sizes, and the order of a step needs their ratio alone.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from launch.model import layers_of_stage
from launch.planning.shape import ModelShape
from stage_groups import StageGroups
from stage_groups.placement import StageStyle, stages_of_rank
from vocab_parallel import filled_rows
from vocab_parallel.pipeline.spanning.order import Costs


@dataclass(frozen=True)
class SpanningPlan:
    """Attributes: rows of each rank of the vocab group, None for as many on each; costs."""

    rows: list[int] | None
    costs: Costs


def spanning_plan(
    config: PretrainedConfig,
    groups: StageGroups,
    num_stages: int,
    style: StageStyle,
    *,
    fills: bool,
) -> SpanningPlan:
    """Plan the rows and the order of a step from the model's sizes; equal on every rank.

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
    return SpanningPlan(counts, costs)
