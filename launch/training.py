"""Train a model on a pipeline x vocab mesh, on every rank."""

import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from launch.arguments import TrainArguments
from launch.check import compare_with_one_process
from launch.checkpoint import Checkpoints
from launch.command import raised_on_all
from launch.data.batches import Batches
from launch.data.load import load_batches
from launch.data.tokenizers import save_tokenizer
from launch.export import export_model
from launch.gradients import named_gradients
from launch.model import CLASSIFIER, EMBEDDING
from launch.packing import refuse_to_look_across
from launch.report import RankReport, print_ranks, write_run
from launch.runtime import peak_memory, process_group
from launch.training_pipeline import Pipeline, build_pipeline, model_of
from launch.weights import say_random
from stage_groups import StageGroups, build_host_group, build_stage_groups
from vocab_parallel import clip_grad_norm_, sum_over_columns


@dataclass
class Trained:
    """What one rank knows after training."""

    pipeline: Pipeline
    first_step: int = 0  # of those that this start did; a checkpoint had those before
    losses: list[float] = field(default_factory=list)  # of every step; empty off the last stage
    seconds: list[float] = field(default_factory=list)  # of every step
    first_gradients: dict[str, Tensor] = field(default_factory=dict)  # of step 1, for --check


@record
def start(arguments: TrainArguments) -> None:
    """Join the other ranks and run; a user's mistake is a `UserError` on every rank."""
    with process_group(arguments.timeout) as device:
        passed = run(arguments, device)
    if not passed:
        sys.exit("the sharded run differs from one process: see the table above")


def run(arguments: TrainArguments, device: torch.device) -> bool:
    """Train, report, and where asked check; returns whether the check passed, on every rank."""
    groups = build_stage_groups(
        arguments.pipeline,
        arguments.vocab,
        device_type=device.type,
        vocab_over="all_stages" if arguments.vocab_over == "all-stages" else "last_stage",
    )
    with raised_on_all():
        arguments.validate_paths()
        config, source = model_of(arguments)
        batches = load_batches(
            arguments,
            steps=arguments.steps,
            batch=arguments.batch,
            sequence=arguments.sequence,
            vocabulary=config.vocab_size,
            model=arguments.model,
        )
    if dist.get_rank() == 0:
        say_random(arguments.model, source)
    with raised_on_all():
        pipeline = build_pipeline(arguments, config, source, groups, device)
    with raised_on_all():
        if batches.starts is not None:
            refuse_to_look_across(pipeline.stages)
    trained = train(arguments, pipeline, batches, device)
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
        write_run(arguments, reports, losses, comparison, trained.first_step)
    dist.broadcast(passed, 0)
    return bool(passed)


def train(
    arguments: TrainArguments, pipeline: Pipeline, batches: Batches, device: torch.device
) -> Trained:
    """Run the training loop of one rank."""
    groups = pipeline.groups
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=arguments.learning_rate, fused=True)
    trained = Trained(pipeline)
    checkpoints = None
    if arguments.checkpoint is not None:
        checkpoints = Checkpoints(arguments, pipeline, optimizer, batches, build_host_group())
        history = checkpoints.resume() if arguments.resume else checkpoints.begin()
        trained.first_step, trained.seconds = history.step, history.seconds
        trained.losses = history.losses if pipeline.has_last else []
    shown = pipeline.has_last and groups.column_rank == 0
    with tqdm(
        total=arguments.steps,
        initial=trained.first_step,
        desc="training",
        unit="step",
        disable=not shown,
    ) as progress:
        for step in range(trained.first_step, arguments.steps):
            batch = batches[step]
            began = time.perf_counter()
            own = batch.chunk(groups.column_degree)[groups.column_rank].to(device)
            loss = pipeline.accumulate(own, arguments.accumulate)
            sum_over_columns(pipeline.stages, groups)
            if pipeline.tied is not None:
                pipeline.tied.sum_gradients()
            if step == 0 and arguments.check:
                trained.first_gradients = named_gradients(pipeline.stages)
            if arguments.clip_norm is not None:
                clip_grad_norm_(pipeline.stages, arguments.clip_norm, groups)
            optimizer.step()
            optimizer.zero_grad()
            trained.seconds.append(time.perf_counter() - began)
            if loss is not None:
                trained.losses.append(loss)
                speed = batch.ids.numel() / trained.seconds[-1]
                progress.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{speed:.0f}")
            progress.update()
            if checkpoints is not None and _saves(arguments, step + 1):
                checkpoints.save(trained.losses, trained.seconds)
    if checkpoints is not None:
        checkpoints.finish()
    if arguments.export is not None:
        export_model(
            pipeline,
            arguments.export,
            lambda folder: save_tokenizer(arguments.tokenizer, arguments.model, folder),
        )
    return trained


def _saves(arguments: TrainArguments, step: int) -> bool:
    """Tell whether a checkpoint is saved after so many steps."""
    every = arguments.checkpoint_every
    return step == arguments.steps or (every > 0 and step % every == 0)


def _gather_reports(
    groups: StageGroups, trained: Trained, device: torch.device
) -> list[RankReport]:
    head = trained.pipeline.head
    own = RankReport(
        rank=dist.get_rank(),
        stages=trained.pipeline.indices,
        vocab_rank=groups.vocab_rank,
        rows=(head.start, head.stop) if head is not None else (0, 0),
        parameters=sum(parameter.numel() for parameter in trained.pipeline.parameters()),
        peak_memory=peak_memory(device),
        bytes_read=trained.pipeline.bytes_read,
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
    pipeline = trained.pipeline
    rows: dict[str, list[Tensor]] = {EMBEDDING: [], CLASSIFIER: []}
    of_rows = {CLASSIFIER}
    if pipeline.tied is not None or pipeline.spans:
        of_rows.add(EMBEDDING)
    for gradients in gathered:  # ranks of one stage follow one another, vocab rank by vocab rank
        for name, gradient in gradients.items():
            if name in of_rows:
                rows[name].append(gradient)
            else:
                joined[name] = gradient
    if pipeline.tied is not None:  # both ends have the same sum
        joined[EMBEDDING] = torch.cat(rows[EMBEDDING] or rows[CLASSIFIER])
    else:  # a shared parameter has one name alone
        joined |= {name: torch.cat(own) for name, own in rows.items() if own}
    return joined
