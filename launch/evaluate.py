"""Perplexity and accuracy of a model over a text: ``torchrun ... -m launch.evaluate --help``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from launch.arguments import TrainArguments
from launch.model import build_stage
from launch.runtime import process_group
from launch.text import load_batches
from launch.training_pipeline import model_of
from stage_groups import build_stage_groups
from vocab_parallel import TokenScores, score_tokens
from vocab_parallel.logit_settings import logit_settings


@dataclass(frozen=True)
class EvaluateArguments:
    """Score a model on text, its classifier's rows over all ranks that torchrun started.

        torchrun --nproc-per-node 2 -m launch.evaluate --model FOLDER --text FILE

    Each rank runs the whole body on its own sequences; the logits never exist. The last line of
    the output is one JSON document.
    """

    model: str
    """A Hugging Face folder, or a published model with random weights, as in launch.train."""
    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE_OR_FOLDER")] = None
    """Text to score; by default the Python standard library's own sources."""
    batches: int = 8
    """Batches to score."""
    batch: int = 4
    """Sequences of one batch over all ranks; a multiple of their number."""
    sequence: int = 512
    """Tokens of one sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    timeout: float = 300.0
    """Seconds after which a rank gives up waiting for another."""

    def validate(self, ranks: int) -> None:
        """Raise ValueError for values that cannot be combined; the same on every rank."""
        for name in ("batches", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.sequence < 2:
            raise ValueError(f"--sequence must be at least 2, got {self.sequence}")
        if self.batch % ranks:
            raise ValueError(f"--batch must be a multiple of {ranks} ranks, got {self.batch}")


@record
def main() -> None:
    """Parse the command line and score."""
    arguments = tyro.cli(EvaluateArguments)
    with process_group(arguments.timeout) as device:
        arguments.validate(dist.get_world_size())
        scores = evaluate(arguments, device)
        if dist.get_rank() == 0:
            _report(scores)


@torch.no_grad()
def evaluate(arguments: EvaluateArguments, device: torch.device) -> TokenScores:
    """Return the scores of all ranks' tokens, on every rank."""
    ranks = dist.get_world_size()
    groups = build_stage_groups(1, ranks, device_type=device.type)
    config, source = model_of(TrainArguments(model=arguments.model))
    settings = logit_settings(config)
    dtype = getattr(torch, arguments.dtype)
    stage = build_stage(config, source, 0, 1, groups.vocab_group, device=device, dtype=dtype)
    stage.eval()
    batches = load_batches(
        arguments.text,
        steps=arguments.batches,
        batch=arguments.batch,
        sequence=arguments.sequence,
        vocabulary=config.vocab_size,
    )
    head, total = stage.lm_head, None
    for batch in tqdm(batches, desc="scoring", disable=dist.get_rank() != 0):
        tokens = batch.chunk(ranks)[dist.get_rank()].to(device)
        scores = score_tokens(
            # logit_settings never gives both, and the classifier has no bias: without a softcap
            # the scale of the logits is that of the hidden states.
            stage.hidden_states(tokens) / settings["temperature"],
            head.weight,
            tokens,
            softcap=settings["softcap"],
            shift=1,
            vocab_parallel_options=head.options,
            hidden_layout="sharded",
        )
        total = scores if total is None else total + scores
    assert total is not None
    sums = torch.stack([total.nll, total.correct, total.count])
    dist.all_reduce(sums)
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


if __name__ == "__main__":
    main()
