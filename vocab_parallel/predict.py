"""The most probable tokens, over all shards, without the logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vocab_parallel import collectives
from vocab_parallel.arguments import LossSettings
from vocab_parallel.call import Call, Operands, prepare
from vocab_parallel.impls.plan import DEFAULT_MEMORY_BUDGET
from vocab_parallel.impls.top_k import merge_top_k, top_k_of_shard
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.uncompiled import uncompiled


class Prediction(NamedTuple):
    """The k most probable tokens of each position, the first one the argmax.

    Attributes:
        ids: [..., T, k] int64, of the whole vocabulary.
        scores: [..., T, k], their logits (after softcap and temperature), descending.
        lse: [..., T]; ``scores - lse[..., None]`` are log-probabilities.
    """

    ids: Tensor
    scores: Tensor
    lse: Tensor


@torch.no_grad()
@uncompiled
def predict(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    bias: Tensor | None = None,  # (stop - start,)
    softcap: float | None = None,
    *,
    k: int = 1,
    vocab_parallel_options: Any = None,
    temperature: float = 1.0,
    hidden_layout: HiddenLayout = "replicated",
    memory_budget: int | None = None,
    validate: bool | None = None,
) -> Prediction:
    """Find the k largest logits of each position over the whole vocabulary.

    For evaluation: accuracy is ``(predict(e, c).ids[..., 0] == targets).mean()``. Every rank of
    the vocab group calls it with its own rows and gets the result of its own tokens, [..., T] as
    its hidden states are. Communicates k scores and ids and one lse for each token; the gathering
    layouts also hidden states. No gradient.

    Args:
        e, c, bias, softcap, temperature, vocab_parallel_options, hidden_layout, validate: as in
            `linear_cross_entropy`.
        k: how many tokens; at most the vocabulary.
        memory_budget: bytes of logits at a time; None means 64 MiB.

    Raises:
        ValueError: as `linear_cross_entropy`, or a k that is not in [1, vocabulary].
    """
    settings = LossSettings(
        softcap=softcap,
        temperature=temperature,
        hidden_layout=hidden_layout,
        memory_budget=memory_budget,
        impl="chunked",
    )
    call = prepare(
        Operands.of(e, c, None, bias),
        settings,
        vocab_parallel_options,
        validate=validate,
        needs_targets=False,
    )
    _check_k(k, call)
    shard, layout = call.problem.shard, call.problem.layout
    operands = call.operands
    hidden = operands.hidden.reshape(-1, operands.hidden.shape[-1])
    if layout.gathers:
        hidden = collectives.gather_tokens(hidden, shard.group, shard.degree)
    targets = torch.full((hidden.shape[0],), -1, device=hidden.device)
    local = call.problem.local(hidden, operands.classifier, bias, targets, needs_grad=False)
    if local is None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = hidden.new_full((hidden.shape[0], k), -torch.inf, dtype=dtype)
        rows, lse = torch.zeros_like(scores, dtype=torch.int64), scores[:, 0].clone()
    else:
        scores, rows, lse = top_k_of_shard(local, k, memory_budget or DEFAULT_MEMORY_BUDGET)
    return _join(call, scores, rows + shard.start, lse)


def _join(call: Call, scores: Tensor, ids: Tensor, lse: Tensor) -> Prediction:
    """Merge the shards' candidates and keep this rank's tokens."""
    shard, k = call.problem.shard, scores.shape[1]
    every_score, every_id, every_lse = (
        collectives.gather_shards(part, shard.group, shard.degree) for part in (scores, ids, lse)
    )
    # Candidates rank by rank: of equal scores the one of the lower rank stands first and wins.
    scores, ids = merge_top_k(
        every_score.movedim(0, 1).flatten(1), every_id.movedim(0, 1).flatten(1), k
    )
    lse = torch.logsumexp(every_lse, 0)
    own = [call.own(column) for column in (*ids.unbind(1), *scores.unbind(1), lse)]
    return Prediction(torch.stack(own[:k], -1), torch.stack(own[k:-1], -1), own[-1])


def _check_k(k: Any, call: Call) -> None:
    vocab_size = call.problem.shard.vocab_size
    if not isinstance(k, int) or k < 1 or (vocab_size is not None and k > vocab_size):
        raise ValueError(f"k must be an integer in [1, {vocab_size}], got {k!r}")
