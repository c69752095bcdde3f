"""A distillation's arguments, beside those of the loss: checked, and agreed on in its exchange."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.arguments import Call, Operands, checked, plan_of, prepare
from vocab_parallel.distillation.comparison import Comparison
from vocab_parallel.distillation.divergences import DistillationSettings
from vocab_parallel.distillation.hidden_teacher import HiddenTeacher
from vocab_parallel.distillation.top_k_teacher import ABSENT, TopKTeacher
from vocab_parallel.layout import target_digest
from vocab_parallel.settings import LossSettings, check_plain_tensor
from vocab_parallel.statistics import accumulation_dtype

# Of the student's call, and whether values may be read: the comparison with the teacher, whose
# arguments it checks, and what must be equal on all ranks.
Compare = Callable[[Call, bool], tuple[Comparison, Mapping[str, Any]]]


def prepare_student(
    operands: Operands,
    settings: LossSettings,
    own: DistillationSettings,
    options: Any,
    *,
    validate: bool | None,
    compare: Compare,
) -> Call:
    """Check and agree on a call whose backend compares the student's logits with the teacher's.

    Raises:
        ValueError: as `prepare`, or bad input of the teacher's.
    """

    def also(call: Call, reads_values: bool) -> tuple[Call, Mapping[str, Any]]:
        own.check(operands.targets is not None)
        if settings.num_heads is not None:
            raise ValueError(
                f"shift of a distillation must be one integer, got {settings.shift!r}: call "
                f"it once for each prediction"
            )
        comparison, equal = compare(call, reads_values)
        return _compares(call, comparison), {**vars(own), **equal}

    return prepare(operands, settings, options, validate=validate, needs_targets=False, also=also)


def _compares(call: Call, comparison: Comparison) -> Call:
    """Return the call with its backend, plan and columns.

    Raises:
        ValueError: not even one logit fits in the budget.
    """
    columns = (*comparison.columns, *comparison.later_columns)
    shard = call.bound.shard._replace(columns=comparison.columns, grad_columns=columns)
    plan = plan_of(comparison, shard, call.operands, call.settings, call.rows)
    later = comparison.later_columns
    bound = call.bound._replace(shard=shard, backend=comparison, plan=plan, later_columns=later)
    return call._replace(bound=bound)


def compare_hidden(teacher: Operands, softcap: float | None, own: DistillationSettings) -> Compare:
    """Compare with a teacher that has hidden states and rows."""

    def compare(call: Call, reads_values: bool) -> tuple[Comparison, Mapping[str, Any]]:
        bound = _checked_teacher(call, teacher, softcap).bound
        # The teacher gets no gradient: what it requires need not be equal.
        compared = ("softcap", "tokens of e", "hidden size", "dtype of e", "bias given")
        equal = {f"teacher's {name}": bound.equal[name] for name in compared}
        budget = call.settings.memory_budget
        return HiddenTeacher(memory_budget=budget, settings=own, teacher=bound.shard), equal

    return compare


def compare_top_k(ids: Tensor, logprobs: Tensor, own: DistillationSettings) -> Compare:
    """Compare with a teacher of whom the k likeliest tokens are known."""

    def compare(call: Call, reads_values: bool) -> tuple[Comparison, Mapping[str, Any]]:
        _check_top_k(ids, logprobs, call)
        comparison = TopKTeacher(
            memory_budget=call.settings.memory_budget,
            settings=own,
            k=ids.shape[-1],
            start=call.rows.start,
            vocab_size=call.rows.vocab_size,
            given_dtype=logprobs.dtype,
        )
        equal: dict[str, Any] = {"k of the teacher": ids.shape[-1]}
        if reads_values:
            _check_top_k_values(ids, logprobs, call)
            if call.settings.hidden_layout == "replicated":
                equal["teacher_ids (a checksum)"] = target_digest(ids)
        return comparison, equal

    return compare


def marked_ids(
    ids: Tensor, logprobs: Tensor, vocab_size: int | None
) -> tuple[Tensor, Tensor]:  # (..., k) twice -> (n, k) twice
    """Return ids as int32, `ABSENT` where the log-probability is -inf, and log-probabilities.

    An id that is no token gets NaN: the loss becomes NaN instead of silently wrong.
    """
    flat = ids.reshape(-1, ids.shape[-1])
    log_q = logprobs.detach().reshape(flat.shape)
    absent = log_q == -torch.inf
    outside = flat < 0
    if vocab_size is not None:
        outside |= flat >= vocab_size
    log_q = log_q.masked_fill(outside & ~absent, torch.nan)
    return flat.to(torch.int32).masked_fill_(absent, ABSENT), log_q


def _checked_teacher(call: Call, teacher: Operands, softcap: float | None) -> Call:
    """Check what the teacher's own arguments are, and that they fit the student's."""
    settings = replace(call.settings, softcap=softcap, shift=0, num_valid_tokens=None)
    try:
        found = checked(teacher, settings, call.rows, reads_values=False)
    except ValueError as error:
        raise ValueError(f"of the teacher's e, c, bias and softcap: {error}") from error
    hidden, other = call.operands.hidden, teacher.hidden
    if other.shape[:-1] != hidden.shape[:-1] or other.device != hidden.device:
        raise ValueError(
            f"teacher_e must be {list(hidden.shape[:-1])} tokens on {hidden.device} as e is, got "
            f"{list(other.shape[:-1])} on {other.device}: give both models the same batch"
        )
    if accumulation_dtype(other.dtype) != accumulation_dtype(hidden.dtype):
        raise ValueError(
            f"student and teacher must both be float64 or neither, got {hidden.dtype} and "
            f"{other.dtype}: cast one"
        )
    return found


def _check_top_k(ids: Any, logprobs: Any, call: Call) -> None:
    """Check what can be told of a teacher's top-k without its values."""
    hidden = call.operands.hidden
    check_plain_tensor("teacher_ids", ids, hidden)
    check_plain_tensor("teacher_logprobs", logprobs, hidden)
    shape = list(hidden.shape[:-1])
    if ids.shape != logprobs.shape or list(ids.shape[:-1]) != shape or ids.shape[-1] < 1:
        raise ValueError(
            f"teacher_ids and teacher_logprobs must be {[*shape, 'k']} for e "
            f"{list(hidden.shape)}, k at least 1, got {list(ids.shape)} and {list(logprobs.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64) or not logprobs.is_floating_point():
        raise ValueError(
            f"teacher_ids must be int32 or int64 and teacher_logprobs floating, got {ids.dtype} "
            f"and {logprobs.dtype}"
        )


def _check_top_k_values(ids: Tensor, logprobs: Tensor, call: Call) -> None:
    """Check ids and log-probabilities themselves; waits for a GPU: for validation alone."""
    flat, log_q = marked_ids(ids, logprobs, None)
    vocab_size = call.rows.vocab_size
    present = ids[logprobs != -torch.inf]
    lowest, highest = (int(present.min()), int(present.max())) if present.numel() else (0, 0)
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        raise ValueError(
            f"teacher_ids must lie in [0, {vocab_size}), got {lowest} to {highest}: they are ids "
            f"of the whole vocabulary, not of one rank's rows"
        )
    ordered = flat.sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT)).any()):
        raise ValueError(
            "teacher_ids names a token twice at one position: give each once, and -inf as the "
            "log-probability of entries that are none"
        )
    total = float(torch.logsumexp(log_q.double(), 1).exp().max()) if log_q.shape[0] else 0.0
    if not total <= 1.01:  # what bfloat16 rounds
        raise ValueError(
            f"teacher_logprobs must be log-probabilities over the whole vocabulary, but those of a "
            f"position sum to {total:.4g}: pass log_softmax(logits) at the ids, not the logits"
        )
