"""What an evaluation asks: the likeliest tokens, how well targets are predicted, their number.

None of it holds the logits, and none has a gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel.arguments import Call, Operands, prepare
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.engine import gathered_hidden, shard_of
from vocab_parallel.entry import entry
from vocab_parallel.functional import reduced_loss, token_losses
from vocab_parallel.layout import IGNORED, HiddenLayout, crosses_documents, is_ignored
from vocab_parallel.metrics import right_predictions
from vocab_parallel.plan import budget_bytes
from vocab_parallel.settings import LossSettings
from vocab_parallel.statistics import Statistics
from vocab_parallel.top_k import NO_ROW, merge_top_k, top_k_of_shard


class Prediction(NamedTuple):
    """The k most probable tokens of each position, the first one the argmax.

    Attributes:
        ids: [..., T, k] int64, distinct tokens of the whole vocabulary, also where their logits are
            -inf.
        scores: [..., T, k], their logits (after softcap and temperature), descending.
        lse: [..., T]; ``scores - lse[..., None]`` are log-probabilities.
    """

    ids: Tensor
    scores: Tensor
    lse: Tensor


@torch.no_grad()
@entry
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
        also=partial(_with_k, k),
    )
    if call.rows.vocab_size is None:  # options without it
        own = torch.tensor(call.rows.num_token_rows, device=call.operands.hidden.device)
        _check_k(k, int(call.rows.group.sum(own)))
    hidden = gathered_hidden(call, call.operands.flat_hidden)
    targets = torch.full((hidden.shape[0],), -1, device=hidden.device)
    shard = shard_of(call, hidden, call.operands.classifier, bias, targets, needs_grad=False)
    if 0 in (shard.classifier.shape[0], hidden.shape[0]):
        scores = hidden.new_full((hidden.shape[0], k), -torch.inf, dtype=shard.dtype)
        rows, lse = torch.full_like(scores, NO_ROW, dtype=torch.int64), scores[:, 0].clone()
    else:
        scores, rows, lse = top_k_of_shard(shard, k, budget_bytes(memory_budget))
    ids = torch.where(rows == NO_ROW, NO_ROW, rows + call.rows.start)
    return _join(call, scores, ids, lse)


def _join(call: Call, scores: Tensor, ids: Tensor, lse: Tensor) -> Prediction:
    """Merge the shards' candidates and keep this rank's tokens."""
    k = scores.shape[1]
    every_score, every_id, every_lse = (
        call.rows.group.gather_shards(part) for part in (scores, ids, lse)
    )
    # Candidates rank by rank: of equal scores the one of the lower rank stands first and wins.
    scores, ids = merge_top_k(
        every_score.movedim(0, 1).flatten(1), every_id.movedim(0, 1).flatten(1), k
    )
    lse = torch.logsumexp(every_lse, 0)
    own = [call.own(column) for column in (*ids.unbind(1), *scores.unbind(1), lse)]
    return Prediction(torch.stack(own[:k], -1), torch.stack(own[k:-1], -1), own[-1])


def _with_k(k: Any, call: Call, reads_values: bool) -> tuple[Call, Mapping[str, Any]]:
    _check_k(k, call.rows.vocab_size)
    return call, {"k": k}


def _check_k(k: Any, vocab_size: int | None) -> None:
    if not isinstance(k, int) or k < 1 or (vocab_size is not None and k > vocab_size):
        raise ValueError(f"k must be an integer in [1, {vocab_size or 'vocabulary'}], got {k!r}")


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
@entry
def score_tokens(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T)
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    *,
    document_ids: Tensor | None = None,
    vocab_parallel_options: Any = None,
    hidden_layout: HiddenLayout = "replicated",
    memory_budget: int | None = None,
    validate: bool | None = None,
) -> TokenScores:
    """Sum negative log-likelihoods and right predictions over the valid tokens.

    Every rank of the vocab group calls it; arguments and layouts are those of
    `linear_cross_entropy`, and so is what it communicates with metrics. A target that has the
    largest logit is right; ties count, as in `LossMetrics`.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        shift=int(shift) if isinstance(shift, bool) else shift,
        return_metrics=True,
        hidden_layout=hidden_layout,
        memory_budget=memory_budget,
    )
    operands = Operands.of(e, c, targets, bias, document_ids=document_ids)
    call = prepare(operands, settings, vocab_parallel_options, validate=validate)
    labels = call.labels()
    nll, values = reduced_loss(call, labels, token_losses(call, labels))
    statistics, counted = Statistics(values, call.bound.shard.columns), labels != IGNORED
    sums = [nll, call.own(right_predictions(statistics, counted)), call.own(counted)]
    return TokenScores(*(each.double().sum() for each in sums))


def count_valid_tokens(
    labels: Tensor | Iterable[Tensor],  # (..., T), each
    groups: Iterable[ProcessGroup | None] = (),
    shift: int | Sequence[int] = 0,
    ignore_index: int = -100,
    document_ids: Tensor | Iterable[Tensor] | None = None,
) -> Tensor:
    """Count the valid labels of a step over its microbatches and over groups of ranks.

    Divide by it with ``num_valid_tokens``, and the loss and its gradients do not depend on how
    the batch was cut into microbatches or spread over ranks:

        count = count_valid_tokens(labels, [groups.data_group], shift=1)

    In the "sharded" layout the ranks of the vocab group have other labels too: name its group as
    well. Waits for nothing: the count stays on the device. Communicates one int64 a group.

    Args:
        labels: this rank's labels of the step, whole or as microbatches.
        groups: sum over the ranks of each of these, which must all call; None is skipped.
        shift: as the loss has it; the first ``shift`` labels of a sequence count for nothing.
            Several, as `multi_token_cross_entropy` has them, give one count for each, [H].
        ignore_index: labels that count for nothing.
        document_ids: as the loss has them, given as the labels are.

    Returns:
        An int64 tensor without dimensions, or [H], on the labels' device, equal on all ranks of
        the groups.

    Raises:
        ValueError: no tensors of labels, no several groups, or a shift that cannot be.
    """
    parts = _tensors("labels", labels)
    shifts = list(shift) if isinstance(shift, Sequence) else [shift]
    if not all(isinstance(each, int) and each >= 0 for each in shifts):
        raise ValueError(f"shift must be an integer of at least 0, or several, got {shift!r}")
    if not isinstance(groups, Iterable):
        raise ValueError(f"groups must be several, such as [groups.data_group], got {groups!r}")
    documents: list[Tensor] | list[None] = [None] * len(parts)
    if document_ids is not None:
        documents = _tensors("document_ids", document_ids)
    if [d.shape for d in documents if d is not None] not in ([], [part.shape for part in parts]):
        raise ValueError("document_ids must be given as the labels are, in tensors of their shapes")

    def valid(part: Tensor, ids: Tensor | None, own: int) -> Tensor:
        found = ~is_ignored(part[..., own:], ignore_index)
        return found if ids is None or not own else found & ~crosses_documents(ids, own)

    pairs = list(zip(parts, documents, strict=True))
    count = torch.stack(
        [torch.stack([valid(*pair, each).sum() for pair in pairs]).sum() for each in shifts]
    )
    if isinstance(shift, int):
        count = count.squeeze(0)
    for group in groups:
        if group is not None:
            count = VocabGroup.of(group).sum(count)
    return count


def _tensors(name: str, given: Any) -> list[Tensor]:
    """Return one tensor or several as a list."""
    found = [given] if isinstance(given, Tensor) else given
    found = list(found) if isinstance(found, Iterable) else []
    if not found or not all(isinstance(each, Tensor) for each in found):
        raise ValueError(
            f"count_valid_tokens needs {name} as a tensor or several, got {type(given).__name__}"
        )
    return found
