"""Perplexity and accuracy of a model over a text, on every rank."""

import json

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from tqdm import trange

from launch.arguments import EvaluateArguments, TrainArguments
from launch.command import raised_on_all
from launch.configs import say_beyond_positions
from launch.data.load import load_batches_on_all
from launch.last_words import record
from launch.model import build_stage
from launch.packing import refuse_to_look_across
from launch.runtime import process_group
from launch.training_pipeline import model_of
from launch.weights import say_random
from stage_groups import build_stage_groups
from vocab_parallel import TokenScores, VocabParallelClassifier, score_tokens
from vocab_parallel.logit_settings import LogitSettings, logit_settings


@record
def start(arguments: EvaluateArguments) -> None:
    """Join the other ranks and score; a user's mistake is a `UserError` on every rank."""
    with process_group(arguments.timeout) as device:
        scores = evaluate(arguments, device)
        if dist.get_rank() == 0:
            _report(scores)


@torch.no_grad()
def evaluate(arguments: EvaluateArguments, device: torch.device) -> TokenScores:
    """Return the scores of all ranks' tokens, on every rank."""
    ranks = dist.get_world_size()
    groups = build_stage_groups(1, ranks, device_type=device.type)
    with raised_on_all():
        arguments.validate_paths()
        config, source = model_of(TrainArguments(model=arguments.model))
        settings = logit_settings(config)
    batches = load_batches_on_all(
        arguments,
        steps=arguments.batches,
        batch=arguments.batch,
        sequence=arguments.sequence,
        vocabulary=config.vocab_size,
        model=arguments.model,
    )
    with raised_on_all():
        dtype = getattr(torch, arguments.dtype)
        stage = build_stage(config, source, 0, 1, groups.vocab_group, device=device, dtype=dtype)
        if batches.packed:
            refuse_to_look_across([stage])
    if dist.get_rank() == 0:
        say_random(arguments.model, source)
        say_beyond_positions(config, batches.longest)
    stage.eval()
    head, total = stage.lm_head, None
    for step in trange(len(batches), desc="scoring", disable=dist.get_rank() != 0):
        own = batches.part(step, dist.get_rank(), ranks).to(device)
        hidden = stage.hidden_states(own.ids, own.position_ids)
        scores = score_hidden(hidden, own.labels, head, settings)
        total = scores if total is None else total + scores
    assert total is not None
    sums = torch.stack([total.nll, total.correct, total.count])
    dist.all_reduce(sums)
    return TokenScores(*sums.unbind())


def score_hidden(
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
