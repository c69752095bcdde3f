"""The stages that one rank runs, their schedule and the loss at its end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleDualPipeV,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)

from launch.arguments import TrainArguments
from launch.model import Stage, build_model, cut_stage
from stage_groups import StageGroups, StageStyle
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    count_valid_tokens,
    validate_pipeline_loss,
)


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
        stages: their modules, in that order.
        schedule: of torch.distributed.pipelining.
        loss: a CCEPipelineLoss on ranks with the last stage.
        head: this rank's rows of the classifier, or None.
        groups: the mesh.
    """

    indices: list[int]
    stages: StageList
    schedule: Any
    loss: Any
    head: VocabParallelClassifier | None
    groups: StageGroups

    @property
    def has_last(self) -> bool:
        """Whether this rank runs the last stage, and so the loss."""
        return self.head is not None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all that this rank trains."""
        return self.stages.parameters()

    def body(self) -> list[nn.Parameter]:
        """Return what every column has a replica of: all but the classifier's rows."""
        rows = set() if self.head is None else set(self.head.parameters())
        return [parameter for parameter in self.parameters() if parameter not in rows]

    def accumulate(self, tokens: Tensor, pieces: int) -> float | None:
        """Run forward and backward over this column's sequences [b, T], in schedule steps.

        Gradients and the returned loss are those of the mean over all valid tokens of all
        columns, however the sequences are cut; the loss is None off the last stage.
        """
        if self.has_last:
            self.loss.num_valid_tokens = count_valid_tokens(
                tokens, [self.groups.vocab_group], shift=1
            )
        losses: list[Tensor] = []
        for piece in tokens.chunk(pieces):
            of_piece: list[Tensor] = []
            self.schedule.step(
                *([piece] if 0 in self.indices else []),
                target=piece if self.has_last else None,
                losses=of_piece if self.has_last else None,
                return_outputs=False,
            )
            losses += [loss.detach() for loss in of_piece]
        return float(torch.stack(losses).sum()) if losses else None


def build_pipeline(
    arguments: TrainArguments, groups: StageGroups, device: torch.device
) -> Pipeline:
    """Build this rank's stages and their schedule; all ranks must call.

    Raises:
        ValueError: more stages than layers, or microbatches that the schedule cannot run.
    """
    cls = get_schedule_class(arguments.schedule)
    single = issubclass(cls, PipelineScheduleSingle)
    v_shaped = issubclass(cls, ScheduleZBVZeroBubble | ScheduleDualPipeV)
    style: StageStyle = "v" if v_shaped else "loop"
    num_stages = arguments.pipeline * (1 if single else 2)
    indices = groups.stages(num_stages, style)
    whole = build_model(arguments)
    stages: list[Stage] = [
        cut_stage(whole, index, num_stages, groups.vocab_group).to(device) for index in indices
    ]
    head = next((stage.lm_head for stage in stages if stage.lm_head is not None), None)
    loss = (
        _loss_of_another_stage
        if head is None
        else CCEPipelineLoss(head, impl=arguments.impl, hidden_layout="sharded")
    )
    pipeline_stages = [
        PipelineStage(stage, index, num_stages, device, group=groups.pipeline_group)
        for stage, index in zip(stages, indices, strict=True)
    ]
    schedule = cls(
        pipeline_stages[0] if single else pipeline_stages,
        n_microbatches=arguments.microbatches,
        loss_fn=loss,
        scale_grads=False,  # the loss divides by the valid tokens of the whole step
    )
    validate_pipeline_loss(schedule, loss)
    return Pipeline(indices, StageList(stages), schedule, loss, head, groups)


def _loss_of_another_stage(*_: Tensor) -> Tensor:
    """Stand for the loss on ranks without the last stage: a schedule without one would hang."""
    raise AssertionError("only the last stage computes the loss")
