"""Train a Qwen3 model on a pipeline x vocab mesh: ``torchrun ... -m launch.train --help``."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from tqdm import tqdm

from launch.arguments import TrainArguments
from launch.check import compare_with_one_process
from launch.gradients import named_gradients, sum_gradients
from launch.model import Stage, build_model, cut_stage
from launch.report import RankReport, print_ranks, write_run
from launch.runtime import peak_memory, process_group
from launch.text import load_batches
from stage_groups import StageGroups, build_stage_groups
from vocab_parallel import CCEPipelineLoss, validate_pipeline_loss


@dataclass
class Trained:
    """What one rank knows after training."""

    stage: Stage
    losses: list[float] = field(default_factory=list)  # a step each; empty off the last stage
    seconds: list[float] = field(default_factory=list)  # a step each
    first_gradients: dict[str, Tensor] = field(default_factory=dict)  # of step 1, for --check


@record
def main() -> None:
    """Parse the command line and run; a user's mistake is a ValueError on every rank."""
    arguments = tyro.cli(TrainArguments)
    arguments.validate()
    with process_group(arguments.timeout) as device:
        passed = run(arguments, device)
    if not passed:
        sys.exit("the sharded run differs from one process: see the table above")


def run(arguments: TrainArguments, device: torch.device) -> bool:
    """Train, report, and where asked check; returns whether the check passed, on every rank."""
    groups = build_stage_groups(arguments.pipeline, arguments.vocab, device_type=device.type)
    batches = load_batches(
        arguments.text,
        steps=arguments.steps,
        batch=arguments.batch,
        sequence=arguments.sequence,
        vocabulary=arguments.vocabulary,
    )
    trained = train(arguments, groups, batches, device)
    reports = _gather_reports(groups, trained, device)
    passed = torch.ones((), dtype=torch.int32, device=device)
    joined = _gather_gradients(trained) if arguments.check else None
    if dist.get_rank() == 0:
        losses = next(report.losses for report in reports if report.losses)
        print_ranks(reports)
        comparison = None
        if joined is not None:
            comparison = compare_with_one_process(arguments, batches, losses, joined, device)
            passed.fill_(comparison.passed)
        write_run(arguments, reports, losses, comparison)
    dist.broadcast(passed, 0)
    return bool(passed)


def train(
    arguments: TrainArguments, groups: StageGroups, batches: Tensor, device: torch.device
) -> Trained:
    """Run the training loop of one rank."""
    num_stages = arguments.pipeline
    (index,) = groups.stages(num_stages)
    is_last = groups.has_last_stage(num_stages)
    stage = cut_stage(build_model(arguments), index, num_stages, groups.vocab_group).to(device)
    loss: Any = (
        CCEPipelineLoss(stage.lm_head, impl=arguments.impl, hidden_layout="sharded")
        if stage.lm_head is not None
        else _loss_of_another_stage
    )
    schedule = get_schedule_class(arguments.schedule)(
        PipelineStage(stage, index, num_stages, device, group=groups.pipeline_group),
        n_microbatches=arguments.microbatches,
        loss_fn=loss,
    )
    validate_pipeline_loss(schedule, loss)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=arguments.learning_rate, fused=True)
    body = [
        parameter for name, parameter in stage.named_parameters() if not name.startswith("lm_head.")
    ]
    trained = Trained(stage)
    with _progress(arguments, shown=is_last and groups.vocab_rank == 0) as progress:
        for step, batch in enumerate(batches):
            began = time.perf_counter()
            own = batch.chunk(groups.vocab_degree)[groups.vocab_rank].to(device)
            losses: list[Tensor] = []
            schedule.step(
                *([own] if index == 0 else []),
                target=own if is_last else None,
                losses=losses if is_last else None,
                return_outputs=False,
            )
            sum_gradients(body, groups.vocab_group)
            if step == 0 and arguments.check:
                trained.first_gradients = named_gradients(stage)
            optimizer.step()
            optimizer.zero_grad()
            if is_last:
                trained.losses.append(float(torch.stack(losses).mean()))
            trained.seconds.append(time.perf_counter() - began)
            if is_last:
                speed = batch.numel() / trained.seconds[-1]
                progress.set_postfix(loss=f"{trained.losses[-1]:.3f}", tokens_s=f"{speed:.0f}")
            progress.update()
    return trained


def _loss_of_another_stage(*_: Tensor) -> Tensor:
    """Stand for the loss on ranks without the last stage: a schedule without one would hang."""
    raise AssertionError("only the last stage computes the loss")


def _progress(arguments: TrainArguments, shown: bool) -> tqdm:
    return tqdm(total=arguments.steps, desc="training", unit="step", disable=not shown)


def _gather_reports(
    groups: StageGroups, trained: Trained, device: torch.device
) -> list[RankReport]:
    head = trained.stage.lm_head
    own = RankReport(
        rank=dist.get_rank(),
        stage=groups.pipeline_rank,
        vocab_rank=groups.vocab_rank,
        rows=(head.start, head.stop) if head is not None else (0, 0),
        parameters=sum(parameter.numel() for parameter in trained.stage.parameters()),
        peak_memory=peak_memory(device),
        losses=trained.losses,
        seconds=trained.seconds,
    )
    reports: list[RankReport] = [own] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    return reports


def _gather_gradients(trained: Trained) -> dict[str, Tensor] | None:
    """Join step 1's gradients on rank 0: the body's by name, the classifier's rows in order."""
    gathered: list[dict[str, Tensor]] | None = (
        [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    )
    dist.gather_object(trained.first_gradients, gathered)
    if gathered is None:
        return None
    joined: dict[str, Tensor] = {}
    heads: list[Tensor] = []
    for gradients in gathered:  # ranks of one stage follow one another, vocab rank by vocab rank
        for name, gradient in gradients.items():
            if name == "lm_head.weight":
                heads.append(gradient)
            else:
                joined[name] = gradient
    joined["lm_head.weight"] = torch.cat(heads)
    return joined


if __name__ == "__main__":
    main()
