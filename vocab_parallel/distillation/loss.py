"""Distillation over a vocabulary whose rows are spread over a group of ranks, without logits.

With q the softmax of the teacher's logits and p that of the student's, neither held as a whole,

    loss = reduce(token_weight ((1 - w) D(q, p) + w nll))      w = cross_entropy_weight

Sources: arXiv 1503.02531, section 2, for the mixture; arXiv 2306.13649, section 2, for the
divergences; the sharding is that of `vocab_parallel.functional`.
"""

from typing import Any

import torch
from torch import Tensor

from vocab_parallel.arguments import Operands
from vocab_parallel.distillation.arguments import (
    DistillationSettings,
    Student,
    ignored_label,
    marked_ids,
    prepare_hidden,
    prepare_top_k,
    targets_or_zeros,
)
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
        ignore_index=ignored_label(targets, ignore_index),
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
    labels = targets_or_zeros(e, c, targets, hidden_layout, vocab_parallel_options)
    student, teacher = prepare_hidden(
        Operands.of(e, c, labels, bias, token_weight),
        Operands.of(teacher_e, teacher_c, None, teacher_bias),
        settings,
        own,
        teacher_softcap,
        vocab_parallel_options,
        has_targets=targets is not None,
        validate=validate,
    )
    marked, num_rows = student.labels(), student.call.rows.num_token_rows
    hidden = gathered_hidden(teacher, teacher.operands.flat_hidden.detach())
    rows, row_bias = teacher.operands.classifier.detach()[:num_rows], teacher.operands.bias
    beside = rows, None if row_bias is None else row_bias.detach()[:num_rows]
    values = vocab_statistics(student.call, marked, (hidden,), beside)
    statistics = Statistics(values, student.call.bound.shard.grad_columns)
    divergences = student.comparison.divergences(statistics)
    return _reduced(student, marked, divergences, statistics, cross_entropy_weight)


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
        ignore_index=ignored_label(targets, ignore_index),
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
    labels = targets_or_zeros(e, c, targets, hidden_layout, vocab_parallel_options)
    student = prepare_top_k(
        Operands.of(e, c, labels, bias, token_weight),
        teacher_ids,
        teacher_logprobs,
        settings,
        own,
        vocab_parallel_options,
        has_targets=targets is not None,
        validate=validate,
    )
    call, marked = student.call, student.labels()
    ids, log_q = marked_ids(teacher_ids, teacher_logprobs, call.rows.vocab_size)
    ids = gathered_hidden(call, ids)
    log_q = gathered_hidden(call, log_q.to(call.bound.shard.dtype)).T
    values = vocab_statistics(call, marked, (ids,))
    statistics = Statistics(values, call.bound.shard.grad_columns)
    divergences = student.comparison.divergences(
        statistics,
        ids,
        log_q,
        student.divergence,
        other=other,
        vocab_size=call.rows.vocab_size,
        given_dtype=teacher_logprobs.dtype,
    )
    return _reduced(student, marked, divergences, statistics, cross_entropy_weight)


def _reduced(
    student: Student, labels: Tensor, divergences: Tensor, statistics: Statistics, weight: float
) -> Tensor:
    """Return the loss of the tokens' divergences [N], mixed with their labels' by a weight."""
    call, losses = student.call, divergences
    if weight:
        nll = statistics["label_lse"] - statistics["label_target"]
        losses = (1.0 - weight) * divergences + weight * nll
    tokens = token_losses(call, labels)  # for the weight and the divisor that it has
    if tokens.weight is not None:
        losses = losses * tokens.weight
    losses = losses.masked_fill(labels == IGNORED, 0.0)
    losses = losses.masked_fill(labels == OUT_OF_RANGE, torch.nan)
    if call.settings.reduction == "none":
        return call.own(losses)
    return tokens.divided(losses.sum())
