"""Train a model on a data x pipeline x vocab mesh, on every rank."""

import math
import sys
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from launch.arguments import TrainArguments
from launch.check import compare_with_one_process, join_gradients
from launch.checkpoint import Checkpoints
from launch.command import raised_on_all
from launch.data.batches import Batch, Batches
from launch.data.load import load_batches_on_all
from launch.disk import try_to_write
from launch.evaluation import score_pipeline
from launch.export import export_model
from launch.layers import compiles, warm_up
from launch.optimizer import AdamW, LearningRate, settled
from launch.progress import Progress
from launch.readings import Reading, Readings, traced
from launch.report import (
    RankReport,
    Trained,
    count_parameters,
    print_ranks,
    say_opening,
    say_resumed,
    write_run,
)
from launch.runtime import peak_memory, process_group, record
from launch.sharded_body import named_gradients, replicated_parameters
from launch.stopping import StoppedError, StopRequest, said_of
from launch.training_pipeline import Pipeline, model_of, open_pipeline
from launch.weights import FolderWeights
from stage_groups import build_host_group
from vocab_parallel import clip_grad_norm_, sum_over_columns
from vocab_parallel.modules.gradient_sums import local_part, sum_gradients


@record
def start(arguments: TrainArguments) -> None:
    """Join the other ranks and run; a user's mistake is a `UserError` on every rank."""
    with process_group(arguments.timeout) as device:
        passed = run(arguments, device)
    if not passed:
        sys.exit("the sharded run differs from one process: see the table above")


def run(arguments: TrainArguments, device: torch.device) -> bool:
    """Train, report, and where asked check; returns whether the check passed, on every rank."""
    with raised_on_all():
        arguments.validate_paths()
        config, source = model_of(arguments)
        given, pretrained = arguments, None
        if isinstance(source, FolderWeights):
            pretrained = count_parameters(config)
        arguments = settled(given, pretrained)
    shape = {"batch": arguments.batch, "sequence": arguments.sequence}
    of_model = {"vocabulary": config.vocab_size, "model": arguments.model}
    seed = arguments.seed if arguments.shuffle else None
    batches = load_batches_on_all(arguments, steps=arguments.steps, **shape, **of_model, seed=seed)
    held_out = None
    if arguments.eval_text is not None:
        held_out = load_batches_on_all(
            replace(arguments, text=arguments.eval_text),
            steps=arguments.eval_batches,
            once=True,
            **shape,
            **of_model,
            option="--eval-text",
        )
    if dist.get_rank() == 0:
        say_opening(given, arguments, config, batches, device)
    pipeline = open_pipeline(arguments, config, source, batches, device)
    if arguments.shard_body:
        pipeline.shard_body(getattr(torch, arguments.dtype))
    if compiles(arguments, device):
        pieces = arguments.columns * arguments.accumulate * arguments.microbatches
        warm_up(pipeline.stages, batches.part(0, 0, pieces))
    with raised_on_all():
        for option, folder in arguments.written_folders.items():
            try_to_write(folder, option)
    trained = train(arguments, pipeline, batches, held_out, device)
    reports = _share(pipeline, trained, device)
    passed = torch.ones((), dtype=torch.int32, device=device)
    checks = arguments.check and not trained.stopped
    joined = join_gradients(pipeline, trained.first_gradients) if checks else None
    if dist.get_rank() == 0:
        print_ranks(reports)
        comparison = None
        if joined is not None:
            comparison = compare_with_one_process(
                arguments, batches, trained.losses, joined, device
            )
            passed.fill_(comparison.passed)
        if trained.first_step < len(trained.seconds):
            write_run(arguments, config, device, reports, trained, comparison)
        elif not trained.stopped:  # of a checkpoint that had done them all
            print(f"no step was left of --steps {arguments.steps}: exported {arguments.export}")
    dist.broadcast(passed, 0)
    if trained.stopped:
        words = said_of(arguments, trained.stopped, len(trained.seconds))
        raise StoppedError(words, trained.stopped)
    return bool(passed)


def train(
    arguments: TrainArguments,
    pipeline: Pipeline,
    batches: Batches,
    held_out: Batches | None,
    device: torch.device,
) -> Trained:
    """Run the training loop of one rank; the host waits for no step but the one before.

    A signal ends it after a step, the same on all ranks, with a last checkpoint where one is asked
    for.
    """
    groups = pipeline.groups
    optimizer = AdamW.of(arguments, pipeline.parameters())
    learning_rate = LearningRate(arguments)
    trained = Trained()
    checkpoints = None
    if arguments.checkpoint is not None:
        host = build_host_group(timedelta(seconds=arguments.timeout))
        checkpoints = Checkpoints(arguments, pipeline, optimizer, batches, host)
        history = checkpoints.resume() if arguments.resume else checkpoints.begin()
        trained.first_step, trained.seconds = history.step, history.seconds
        trained.losses = history.losses if pipeline.has_last else []
        batches = replace(batches, begins=(history.step, history.tokens))
        if arguments.resume and dist.get_rank() == 0:
            say_resumed(arguments, history)
    progress = None
    with raised_on_all():
        if pipeline.has_last and groups.column_rank == 0 and groups.data_rank == 0:
            progress = Progress(arguments, pipeline.config, trained.first_step, device)
    readings = Readings(device)
    saved, every = trained.first_step, arguments.checkpoint_every or arguments.steps
    # The fifth: by then everything is compiled, and allocated.
    traced_step = min(trained.first_step + 5, arguments.steps) - 1

    def told(reading: Reading | None) -> None:
        if reading is None:
            return
        trained.seconds.append(reading.seconds)
        if pipeline.has_last:
            trained.losses.append(reading.values[0])
        if progress is not None:
            progress.show(reading, learning_rate(reading.step - 1))

    group = build_host_group(timedelta(seconds=arguments.timeout))
    with StopRequest(group) as signals:
        for step in range(trained.first_step, arguments.steps):
            trained.stopped = signals.agreed()
            if trained.stopped:
                break
            own = pipeline.column_of(batches, step)
            done, last = step + 1, step + 1 == arguments.steps
            scores_now = held_out is not None and (last or done % arguments.eval_every == 0)
            saves_now = checkpoints is not None and (last or done % every == 0)
            learning_rate.set(optimizer, step)
            with traced(arguments.profile if step == traced_step else None, device):
                readings.begin()
                numbers = _run_step(arguments, pipeline, trained, optimizer, own.to(device), step)
                told(readings.end(done, numbers))
            if last or scores_now or saves_now:  # a checkpoint has the losses of all its steps
                told(readings.finish())
            if scores_now:
                assert held_out is not None
                scores = score_pipeline(pipeline, held_out, arguments.microbatches)
                if progress is not None and scores is not None:
                    progress.show_scores(done, scores)
            if saves_now:
                assert checkpoints is not None
                checkpoints.save(trained.losses, trained.seconds, batches.read_before(done))
                saved = done
        signals.last()
        told(readings.finish())  # of a run that was stopped
        if trained.stopped and checkpoints is not None and saved < len(trained.seconds):
            done = len(trained.seconds)
            checkpoints.save(trained.losses, trained.seconds, batches.read_before(done))
        if progress is not None:
            trained.scores = progress.scores
            progress.close()
        if checkpoints is not None:
            checkpoints.finish()
    if arguments.export is not None and not trained.stopped:
        export_model(pipeline, arguments)
    return trained


def _run_step(
    arguments: TrainArguments,
    pipeline: Pipeline,
    trained: Trained,
    optimizer: AdamW,
    batch: Batch,
    step: int,
) -> Tensor:
    """Queue one optimizer step over this column's batch; return its numbers.

    They are the gradient's norm; on the last stage loss, norm, accuracy and entropy.
    """
    groups = pipeline.groups
    loss = pipeline.accumulate(batch, arguments.accumulate)
    metrics = torch.empty(0)
    if loss is not None:
        metrics = pipeline.metrics()
        if groups.data_degree > 1:
            dist.all_reduce(loss, group=groups.data_group)
    sum_over_columns(pipeline.stages, groups)
    if groups.data_group is not None:
        sum_gradients(replicated_parameters(pipeline.parameters()), groups.data_group)
    if pipeline.tied is not None:
        pipeline.tied.sum_gradients()
    if step == 0 and arguments.check:
        gradients = named_gradients(pipeline.stages)
        trained.first_gradients = gradients if groups.data_rank == 0 else {}
    norm = clip_grad_norm_(pipeline.stages, arguments.clip_norm or math.inf, groups)
    optimizer.step()
    optimizer.zero_grad()
    if loss is None:
        return norm.reshape(1)
    return torch.cat([torch.stack([loss.float(), norm]), metrics.to(norm)])


def _share(pipeline: Pipeline, trained: Trained, device: torch.device) -> list[RankReport]:
    """Return a report of each rank, and tell every one the losses and scores that one knows."""
    head = pipeline.head
    own = RankReport(
        rank=dist.get_rank(),
        stages=pipeline.indices,
        vocab_rank=pipeline.groups.vocab_rank,
        rows=(head.start, head.stop) if head is not None else (0, 0),
        parameters=sum(local_part(own).numel() for own in pipeline.parameters()),
        peak_memory=peak_memory(device),
        bytes_read=pipeline.bytes_read,
    )
    told = [(own, trained.losses, trained.scores)] * dist.get_world_size()
    dist.all_gather_object(told, told[0])
    trained.losses = max((losses for _, losses, _ in told), key=len)
    trained.scores = max((scores for _, _, scores in told), key=len)
    return [report for report, _, _ in told]
