"""Distillation over a vocabulary whose rows are spread over a group of ranks, without logits.

With q the softmax of the teacher's logits and p that of the student's, neither held as a whole,

    loss = reduce(token_weight ((1 - w) D(q, p) + w nll))      w = cross_entropy_weight

Sources: arXiv 1503.02531, section 2, for the mixture; arXiv 2306.13649, section 2, for the
divergences; the sharding is that of `vocab_parallel.functional`.
"""

from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel.arguments import Call, Operands
from vocab_parallel.distillation.arguments import (
    compare_hidden,
    compare_top_k,
    marked_ids,
    prepare_student,
)
from vocab_parallel.distillation.comparison import Comparison
from vocab_parallel.distillation.divergences import DistillationSettings
from vocab_parallel.engine import gathered_hidden, vocab_statistics
from vocab_parallel.entry import entry
from vocab_parallel.functional import token_losses
from vocab_parallel.layout import IGNORED, OUT_OF_RANGE, HiddenLayout
from vocab_parallel.settings import LossSettings
from vocab_parallel.statistics import Statistics


@entry
def linear_distillation(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    teacher_e: Tensor,  # (..., T, D')
    teacher_c: Tensor,  # (stop - start, D')
    bias: Tensor | None = None,  # (stop - start,)
    teacher_bias: Tensor | None = None,  # (stop - start,)
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    targets: Tensor | None = None,  # (..., T) global ids
    cross_entropy_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_valid_tokens: int | Tensor | None = None,
    vocab_parallel_options: Any = None,
    hidden_layout: HiddenLayout = "replicated",
    hidden_grad_scale: float = 1.0,
    memory_budget: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Return the divergence of a student's softmax from a teacher's, without either's logits.

    Every rank of the vocab group calls it, with its own rows of both classifiers, and every rank
    returns the same loss. Gradients go to e, c and bias; the teacher gets none, and may require
    none. It communicates 3 float32 for each token in forward (2 more with labels; 2 without the
    mean for "js", whose second pass over the tiles then exchanges 2 more), and the gradient of the
    hidden states in backward. The gathering layouts also gather ``teacher_e``.

    Args:
        e, c, bias: the student's hidden states, this rank's rows and their bias, as in
            `linear_cross_entropy`.
        teacher_e: hidden states [..., T, D'] of the same tokens, laid out as e is; another width
            and dtype are right.
        teacher_c, teacher_bias: this rank's rows [stop - start, D'] of the teacher's classifier,
            for the same entries of the vocabulary.
        divergence: from the teacher's distribution q and the student's p, in nats:
            "forward_kl"  KL(q || p), the cross-entropy with the teacher less its entropy;
            "reverse_kl"  KL(p || q), which seeks q's modes;
            "js"          beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p.
        beta: the teacher's share of the mixture, between 0 and 1; None means 0.5.
        temperature: divides both models' logits, after their softcaps. The loss is not multiplied
            by its square, which keeps the gradients' size: scale ``token_weight`` for that.
        softcap, teacher_softcap: s in s tanh(x / s) of each model's logits, or None.
        targets: int32 or int64 ids [..., T], or None. Where they are ``ignore_index`` the position
            counts for nothing.
        cross_entropy_weight: w in [0, 1) mixes in the cross-entropy of the targets, of the logits
            at temperature 1: (1 - w) divergence + w nll.
        ignore_index: a target that counts for nothing.
        shift: position t goes with ``targets[..., t + shift]`` and that token's weight; the last
            ``shift`` positions count for nothing, with or without targets.
        token_weight: [..., T], aligned with targets; multiplies each token's loss. No gradient.
        reduction: "mean" over the valid tokens of the whole group (0 where there are none), "sum",
            or "none" for [..., T - shift] values of this rank's own tokens.
        num_valid_tokens, vocab_parallel_options, hidden_layout, hidden_grad_scale,
            validate: as in `linear_cross_entropy`.
        memory_budget: bytes of what has the shape of a tile of logits, of both models; None means
            64 MiB. Backward makes the tiles again: nothing of their size is kept.

    Returns:
        The loss in float32 (float64 for float64 inputs), a scalar or [..., T - shift]; per-token
        results are laid out as those of `linear_cross_entropy`. A token of which the teacher gives
        probability to an entry whose student's logit is -inf has an infinite forward divergence.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds.

    Source: the divergences, arXiv 2306.13649, section 2 ("js" is its generalised
    Jensen-Shannon divergence); the mixture with labels, arXiv 1503.02531, section 2.
    """
    own = DistillationSettings(divergence, beta, cross_entropy_weight)
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        temperature=temperature,
        hidden_layout=hidden_layout,
        hidden_grad_scale=hidden_grad_scale,
        backward="recompute",
        memory_budget=memory_budget,
        num_valid_tokens=num_valid_tokens,
        impl="chunked",
    )
    teacher = Operands.of(teacher_e, teacher_c, None, teacher_bias)
    call = prepare_student(
        Operands.of(e, c, targets, bias, token_weight),
        settings,
        own,
        vocab_parallel_options,
        validate=validate,
        compare=compare_hidden(teacher, teacher_softcap, own),
    )
    hidden = gathered_hidden(call, teacher.flat_hidden.detach())
    row_bias = None if teacher.bias is None else call.rows.tokens_alone(teacher.bias.detach())
    beside = call.rows.tokens_alone(teacher.classifier.detach()), row_bias
    return _distilled(call, (hidden,), beside)


@entry
def linear_distillation_from_top_k(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    teacher_ids: Tensor,  # (..., T, k) global ids
    teacher_logprobs: Tensor,  # (..., T, k)
    bias: Tensor | None = None,  # (stop - start,)
    *,
    other: bool = True,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    targets: Tensor | None = None,  # (..., T) global ids
    cross_entropy_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_valid_tokens: int | Tensor | None = None,
    vocab_parallel_options: Any = None,
    hidden_layout: HiddenLayout = "replicated",
    hidden_grad_scale: float = 1.0,
    memory_budget: int | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Return the divergence of a student's softmax from the k likeliest tokens of a teacher.

    As `linear_distillation`, for a teacher that was run before, or elsewhere. It communicates
    k + 1 float32 for each token in forward (2 more with labels),
    once, for every divergence; the gathering layouts also gather ids and log-probabilities.

    Args:
        teacher_ids: int32 or int64 ids [..., T, k] of the whole vocabulary, laid out as e is, each
            once at a position. They need be neither sorted nor the likeliest.
        teacher_logprobs: [..., T, k], the teacher's log-probabilities over the whole vocabulary at
            the temperature that is to be compared at; -inf for an entry that is none, whose id
            does not count.
        other: True compares k + 1 outcomes: the k tokens, and all others as one, to which the
            teacher gives what its k leave. False scales the teacher's k up to a probability of 1
            and gives it none elsewhere, while the student keeps its whole softmax; there
            "reverse_kl" is infinite and refused.
        temperature: divides the student's logits, after its softcap.
        e, c, bias, divergence, beta, softcap, targets, cross_entropy_weight, ignore_index, shift,
            token_weight, reduction, num_valid_tokens, vocab_parallel_options, hidden_layout,
            hidden_grad_scale, validate: as in `linear_distillation`.
        memory_budget: bytes of what has the shape of a tile of the student's logits; a few tensors
            [N, k] are held beside.

    Returns:
        As `linear_distillation`. An id outside of the vocabulary that nobody checked makes the
        loss NaN.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds.
    """
    own = DistillationSettings(divergence, beta, cross_entropy_weight, other)
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=shift,
        temperature=temperature,
        hidden_layout=hidden_layout,
        hidden_grad_scale=hidden_grad_scale,
        backward="recompute",
        memory_budget=memory_budget,
        num_valid_tokens=num_valid_tokens,
        impl="chunked",
    )
    call = prepare_student(
        Operands.of(e, c, targets, bias, token_weight),
        settings,
        own,
        vocab_parallel_options,
        validate=validate,
        compare=compare_top_k(teacher_ids, teacher_logprobs, own),
    )
    ids, log_q = marked_ids(teacher_ids, teacher_logprobs, call.rows.vocab_size)
    log_q = gathered_hidden(call, log_q.to(call.bound.shard.dtype))
    return _distilled(call, (gathered_hidden(call, ids), log_q))


def _distilled(
    call: Call, others: tuple[Tensor, ...], beside: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """Return the loss of a student's call; ``others`` and ``beside`` are what `Shard` has."""
    labels = call.labels()
    values = vocab_statistics(call, labels, others, beside)
    statistics = Statistics(values, call.bound.shard.grad_columns)
    comparison = cast(Comparison, call.bound.backend)
    losses = comparison.divergences(statistics, others)
    weight = comparison.settings.cross_entropy_weight
    if weight:
        nll = statistics["label_lse"] - statistics["label_target"]
        losses = (1.0 - weight) * losses + weight * nll
    tokens = token_losses(call, labels)  # for the weight and the divisor that it has
    if tokens.weight is not None:
        losses = losses * tokens.weight
    losses = losses.masked_fill(labels == IGNORED, 0.0)
    losses = losses.masked_fill(labels == OUT_OF_RANGE, torch.nan)
    if call.settings.reduction == "none":
        return call.own(losses)
    return tokens.divided(losses.sum())
