"""Scores of a pipeline on text that it does not train on."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.data.batches import IGNORED, Batch, Batches
from launch.sharded_body import reshard_body
from launch.training_pipeline import Pipeline
from vocab_parallel import TokenScores, VocabParallelClassifier, score_tokens
from vocab_parallel.logit_settings import LogitSettings


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
    """Run one microbatch through this rank's stages, and score it where the last one ends."""
    hidden, head, settings = _last_hidden(pipeline, piece), pipeline.head, pipeline.settings
    if hidden is not None:
        assert head is not None
        return _score_hidden(hidden, piece.labels, head, settings)
    if pipeline.spans:
        # Every rank has rows for all tokens, and must give as many of its own: of padding.
        assert head is not None
        like = head.weight
        padding = like.new_zeros((*piece.ids.shape, like.shape[1]))
        _score_hidden(padding, torch.full_like(piece.labels, IGNORED), head, settings)
    return None


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


def _score_hidden(
    hidden: Tensor, labels: Tensor, head: VocabParallelClassifier, settings: LogitSettings
) -> TokenScores:
    """Score hidden states [b, T, D] against labels [b, T], other ones on every rank.

    All ranks of the classifier's group call it, with equally many tokens.
    """
    return score_tokens(
        # logit_settings never gives both, and the classifier has no bias: without a softcap
        # the scale of the logits is that of the hidden states.
        hidden / settings["temperature"],
        head.weight,
        labels,
        softcap=settings["softcap"],
        shift=1,
        vocab_parallel_options=head.options,
        hidden_layout="sharded",
    )
