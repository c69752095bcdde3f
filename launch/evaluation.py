"""Perplexity and accuracy of a model over a text, on every rank."""

import json
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.arguments import EvaluateArguments
from launch.command import raised_on_all, say
from launch.data.batches import IGNORED, Batch, Batches
from launch.data.load import load_batches_on_all
from launch.runtime import process_group, record
from launch.sharded_body import reshard_body
from launch.training_pipeline import Pipeline, model_of, open_pipeline
from vocab_parallel import TokenScores, score_tokens


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
    pipeline = open_pipeline(meshed, config, source, batches, device)
    if dist.get_rank() == 0:
        tokens = len(batches) * arguments.batch * arguments.sequence
        say(f"launch.evaluate: {tokens:,} tokens, {meshed.mesh}")
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
    print(
        f"perplexity {scores.perplexity:.3f}, accuracy {scores.accuracy:.2%} over "
        f"{int(scores.count):,} tokens"
    )
    print(json.dumps(document))


@torch.no_grad()
def score_pipeline(pipeline: Pipeline, batches: Batches, microbatches: int) -> TokenScores | None:
    """Return the scores of all columns' tokens, on the ranks of the last stage; None elsewhere.

    All ranks call it. Microbatches go through the stages one after the other, forward alone: it
    uses no schedule of torch's, of which not all can evaluate.

    Args:
        pipeline: as it is being trained.
        batches: of as many sequences as a step has.
        microbatches: into how many a column cuts its sequences.
    """
    groups, device = pipeline.groups, next(pipeline.parameters()).device
    pipeline.stages.eval()
    total = None
    for step in range(len(batches)):
        for piece in pipeline.column_of(batches, step).chunk(microbatches):
            scores = _score(pipeline, piece.to(device))
            if scores is not None:
                total = scores if total is None else total + scores
    pipeline.stages.train()
    reshard_body(pipeline.stages)
    if total is None:
        return None
    sums = torch.stack([total.nll, total.correct, total.count])
    for group in filter(None, (groups.columns_group, groups.data_group)):
        dist.all_reduce(sums, group=group)
    return TokenScores(*sums.unbind())


def mean_loss(scores: TokenScores) -> float:
    """Return the mean negative log-likelihood; waits for a GPU."""
    return math.log(scores.perplexity)


def _score(pipeline: Pipeline, piece: Batch) -> TokenScores | None:
    """Run one microbatch through this rank's stages, and score it where the last one ends.

    All ranks of the classifier's group score, with equally many tokens.
    """
    hidden, labels, head = _last_hidden(pipeline, piece), piece.labels, pipeline.head
    if hidden is None and not pipeline.spans:
        return None
    assert head is not None
    if hidden is None:  # with rows for all ranks' tokens, and padding for its own
        hidden = head.weight.new_zeros((*piece.ids.shape, head.weight.shape[1]))
        labels = torch.full_like(labels, IGNORED)
    settings = pipeline.loss.settings
    scores = score_tokens(
        # A model has one of both at most, and its classifier no bias: without a softcap the
        # scale of the logits is that of the hidden states.
        hidden / settings.temperature,
        head.weight,
        labels,
        softcap=settings.softcap,
        shift=1,
        vocab_parallel_options=head.options,
        hidden_layout="sharded",
    )
    return scores if pipeline.has_last else None


def _last_hidden(pipeline: Pipeline, piece: Batch) -> Tensor | None:
    """Return the last stage's hidden states [b, T, D] where this rank runs it."""
    own, owners, group = pipeline.indices, pipeline.owners, pipeline.groups.pipeline_group
    stages: list[Any] = list(pipeline.stages)
    first = piece.ids
    if pipeline.spans:  # all ranks look up together, each the ids of its column
        embeddings = [stage.model.embed_tokens for stage in stages]
        first = next(one for one in embeddings if one is not None)(first)
    hidden = first
    for index, stage in zip(own, stages, strict=True):
        if index == 0:
            hidden = first
        elif index - 1 not in own:
            hidden = _receive(pipeline, piece, owners[index - 1])
        hidden = stage(hidden, piece.position_ids)
        if index + 1 < len(owners) and index + 1 not in own:
            dist.send(hidden.contiguous(), group=group, group_dst=owners[index + 1])
    return hidden if pipeline.has_last else None


def _receive(pipeline: Pipeline, piece: Batch, source: int) -> Tensor:
    like = next(pipeline.parameters())
    shape = (*piece.ids.shape, pipeline.config.hidden_size)
    hidden = torch.empty(shape, dtype=like.dtype, device=like.device)
    dist.recv(hidden, group=pipeline.groups.pipeline_group, group_src=source)
    return hidden
