"""How well hidden states predict their targets, without the logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.layout import HiddenLayout
from vocab_parallel.logprobs import token_logprobs
from vocab_parallel.predict import predict


@dataclass(frozen=True)
class TokenScores:
    """Sums over this rank's own tokens, float64 tensors without dimensions.

    Add the scores of many batches (and of ranks with other tokens), then take the ratios.
    """

    nll: Tensor
    correct: Tensor
    count: Tensor

    def __add__(self, other: "TokenScores") -> "TokenScores":
        return TokenScores(
            self.nll + other.nll, self.correct + other.correct, self.count + other.count
        )

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; 1 where there is no token. Waits for a GPU."""
        return float((self.nll / self.count.clamp(min=1)).exp())

    @property
    def accuracy(self) -> float:
        """The share of targets that are the likeliest token; 0 where there is none."""
        return float(self.correct / self.count.clamp(min=1))


@torch.no_grad()
def score_tokens(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T)
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    *,
    vocab_parallel_options: Any = None,
    hidden_layout: HiddenLayout = "replicated",
    memory_budget: int | None = None,
    validate: bool | None = None,
) -> TokenScores:
    """Sum negative log-likelihoods and right predictions over the valid tokens.

    Every rank of the vocab group calls it; arguments and layouts are those of
    `linear_cross_entropy`. Communicates what `token_logprobs` and `predict` with k = 1 do.

    Raises:
        ValueError: as `linear_cross_entropy`; in the "sequence" layout with a shift, whose targets
            lie on other ranks than their positions.
    """
    if hidden_layout == "sequence" and shift:
        raise ValueError(
            'score_tokens has no shift in the "sequence" layout: shift the targets, and fill with '
            "ignore_index"
        )
    given = {
        "vocab_parallel_options": vocab_parallel_options,
        "hidden_layout": hidden_layout,
        "memory_budget": memory_budget,
        "validate": validate,
    }
    logprobs = token_logprobs(e, c, targets, bias, ignore_index, softcap, shift, **given)
    assert isinstance(logprobs, Tensor)
    best = predict(e, c, bias, softcap=softcap, **given).ids[..., 0]
    length = logprobs.shape[-1]
    if hidden_layout == "sequence" and vocab_parallel_options is not None:
        from vocab_parallel.shard import VocabShard

        rank = VocabShard.from_options(vocab_parallel_options).rank
        targets = targets[..., rank * length : (rank + 1) * length]
    wanted = targets[..., shift:]
    valid = wanted != ignore_index
    right = (best[..., :length] == wanted) & valid
    return TokenScores(-logprobs.double().sum(), right.double().sum(), valid.double().sum())
