"""Perplexity and accuracy of a model over a text, on every rank."""

import json
import sys

import torch
import torch.distributed as dist
from rich.console import Console

from launch.arguments import EvaluateArguments
from launch.command import raised_on_all
from launch.configs import say_beyond_positions
from launch.data.load import load_batches_on_all
from launch.held_out import score_pipeline
from launch.last_words import record
from launch.packing import refuse_to_look_across
from launch.runtime import process_group
from launch.training_pipeline import build_pipeline, model_of
from launch.weights import say_random
from stage_groups import build_stage_groups
from vocab_parallel import TokenScores


@record
def start(arguments: EvaluateArguments) -> None:
    """Join the other ranks and score; a user's mistake is a `UserError` on every rank."""
    with process_group(arguments.timeout) as device:
        scores = evaluate(arguments, device)
        if dist.get_rank() == 0:
            _report(scores)


def evaluate(arguments: EvaluateArguments, device: torch.device) -> TokenScores:
    """Return the scores of all columns' tokens, on every rank."""
    meshed = arguments.as_trained(dist.get_world_size())
    groups = build_stage_groups(
        meshed.pipeline,
        meshed.vocab,
        device_type=device.type,
        vocab_over="all_stages" if meshed.vocab_over == "all-stages" else "last_stage",
    )
    with raised_on_all():
        arguments.validate_paths()
        config, source = model_of(meshed)
    batches = load_batches_on_all(
        arguments,
        steps=arguments.batches,
        batch=arguments.batch,
        sequence=arguments.sequence,
        vocabulary=config.vocab_size,
        model=arguments.model,
        once=True,
    )
    with raised_on_all():
        pipeline = build_pipeline(meshed, config, source, groups, device)
    with raised_on_all():
        if batches.packed:
            refuse_to_look_across(pipeline.stages)
    if dist.get_rank() == 0:
        say_random(arguments.model, source)
        say_beyond_positions(config, batches.longest)
        tokens = len(batches) * arguments.batch * arguments.sequence
        print(f"launch.evaluate: {tokens:,} tokens, {meshed.mesh}", file=sys.stderr, flush=True)
    scores = score_pipeline(pipeline, batches, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    if scores is not None:
        sums = torch.stack([scores.nll, scores.correct, scores.count]).to(sums)
    dist.broadcast(sums, pipeline.owners[-1] * meshed.vocab)
    return TokenScores(*sums.unbind())


def _report(scores: TokenScores) -> None:
    document = {
        "perplexity": scores.perplexity,
        "accuracy": scores.accuracy,
        "tokens": int(scores.count),
    }
    Console().print(
        f"perplexity {scores.perplexity:.3f}, accuracy {scores.accuracy:.2%} over "
        f"{int(scores.count):,} tokens"
    )
    print(json.dumps(document))
