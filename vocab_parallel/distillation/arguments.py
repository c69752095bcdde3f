"""A distillation's arguments, beside those of the loss: checked, and agreed on in its exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vocab_parallel.arguments import Call, Operands, checked, prepare, rows_of
from vocab_parallel.distillation.comparison import Comparison
from vocab_parallel.distillation.divergences import Divergence
from vocab_parallel.distillation.hidden_teacher import HiddenTeacher
from vocab_parallel.distillation.top_k_teacher import ABSENT, TopKTeacher
from vocab_parallel.layout import target_digest
from vocab_parallel.settings import LossSettings
from vocab_parallel.statistics import accumulation_dtype


@dataclass(frozen=True)
class DistillationSettings:
    """What a distillation takes beside the settings of the loss; equal on every rank.

    Attributes:
        divergence: its name.
        beta: of "js".
        cross_entropy_weight: of the labels' cross-entropy.
        other: whether what a teacher's top-k leaves counts as one more token.
    """

    divergence: str
    beta: float | None = None
    cross_entropy_weight: float = 0.0
    other: bool = True

    def checked(self, has_targets: bool) -> Divergence:
        """Return the divergence.

        Raises:
            ValueError: a value that cannot be, or a weight of labels that are not there.
        """
        divergence = Divergence.of(self.divergence, self.beta)
        weight = self.cross_entropy_weight
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0.0 <= weight < 1.0):
            raise ValueError(
                f"cross_entropy_weight must lie in [0, 1), got {weight!r}; for the cross-entropy "
                f"alone call linear_cross_entropy"
            )
        if weight and not has_targets:
            raise ValueError(
                f"cross_entropy_weight={weight} mixes in the cross-entropy of labels, but targets "
                f"is None: pass them"
            )
        if not isinstance(self.other, bool):
            raise ValueError(f"other must be True or False, got {self.other!r}")
        if not self.other and divergence.name == "reverse_kl":
            raise ValueError(
                'divergence="reverse_kl" is infinite where the teacher has no probability, which '
                'other=False says of all tokens but its k: use other=True, "forward_kl" or "js"'
            )
        return divergence


class Student(NamedTuple):
    """The student's side of a call, whose arguments are known to be right.

    Attributes:
        call: of the loss, whose backend compares.
        comparison: that backend.
        has_targets: whether the caller gave labels.
        divergence: to be computed.
    """

    call: Call
    comparison: Any
    has_targets: bool
    divergence: Divergence

    def labels(self) -> Tensor:
        """Return the labels [N] in the loss's order; gathers those of a "sharded" layout."""
        call = self.call
        if self.has_targets or call.settings.hidden_layout != "sharded":
            return call.labels()
        # Without labels every rank marks the same positions.
        alone = call._replace(settings=replace(call.settings, hidden_layout="replicated"))
        return alone.labels().repeat(call.rows.group.degree)


def _compares(call: Call, comparison: Comparison, equal_rows: int | None) -> Call:
    """Return the call with its backend, plan and columns.

    Raises:
        ValueError: not even one logit fits in the budget.
    """
    columns = (*comparison.columns, *comparison.later_columns)
    shard = call.bound.shard._replace(columns=comparison.columns, grad_columns=columns)
    hidden, degree = call.operands.hidden, call.rows.group.degree
    plan = comparison.plan(
        shard,
        tokens=(degree if call.bound.gathers else 1) * hidden.shape[:-1].numel(),
        most_rows=equal_rows,
        degree=degree,
        backward="recompute",
    )
    return call._replace(
        bound=call.bound._replace(
            shard=shard,
            backend=comparison,
            plan=plan,
            later_columns=comparison.later_columns,
        )
    )


def targets_or_zeros(e: Any, c: Any, targets: Tensor | None, layout: str, options: Any) -> Any:
    """Return the targets, or such as ignore no position."""
    if targets is not None or not isinstance(e, Tensor) or e.dim() < 2:
        return targets
    shape = list(e.shape[:-1])
    if layout == "sequence":
        shape[-1] *= rows_of(c, options).group.degree
    return torch.zeros(shape, dtype=torch.int32, device=e.device)


def ignored_label(targets: Tensor | None, ignore_index: Any) -> Any:
    """Return which label is ignored: without targets none of the zeros that stand for them."""
    no_label = LossSettings.ignore_index
    return no_label if targets is None and ignore_index == 0 else ignore_index


def prepare_hidden(
    operands: Operands,
    teacher: Operands,
    settings: LossSettings,
    own: DistillationSettings,
    teacher_softcap: float | None,
    options: Any,
    *,
    has_targets: bool,
    validate: bool | None,
) -> tuple[Student, Call]:
    """Check and agree on a call whose teacher has hidden states; return both sides.

    Raises:
        ValueError: as `prepare`, or bad input of the teacher's.
    """
    found: list[tuple[Student, Call]] = []

    def also(call: Call, reads_values: bool) -> Mapping[str, Any]:
        divergence = own.checked(has_targets)
        teacher_call = _checked_teacher(call, teacher, teacher_softcap)
        comparison = HiddenTeacher(
            memory_budget=settings.memory_budget,
            with_labels=bool(own.cross_entropy_weight),
            divergence=divergence,
            teacher=teacher_call.bound.shard,
        )
        call = _compares(call, comparison, call.rows.most_rows)
        found.append((Student(call, comparison, has_targets, divergence), teacher_call))
        given = teacher_call.bound.equal
        # The teacher gets no gradient: what it requires need not be equal.
        compared = ("softcap", "tokens of e", "hidden size", "dtype of e", "bias given")
        return {**vars(own), **{f"teacher's {name}": given[name] for name in compared}}

    prepare(operands, settings, options, validate=validate, needs_targets=False, also=also)
    return found[0]


def prepare_top_k(
    operands: Operands,
    ids: Tensor,
    logprobs: Tensor,
    settings: LossSettings,
    own: DistillationSettings,
    options: Any,
    *,
    has_targets: bool,
    validate: bool | None,
) -> Student:
    """Check and agree on a call whose teacher is its top-k.

    Raises:
        ValueError: as `prepare`, or bad input of the teacher's.
    """
    found: list[Student] = []

    def also(call: Call, reads_values: bool) -> Mapping[str, Any]:
        divergence = own.checked(has_targets)
        _check_top_k(ids, logprobs, call)
        comparison = TopKTeacher(
            memory_budget=settings.memory_budget,
            with_labels=bool(own.cross_entropy_weight),
            k=ids.shape[-1],
            start=call.rows.start,
        )
        student = _compares(call, comparison, call.rows.most_rows)
        equal = {**vars(own), "k of the teacher": ids.shape[-1]}
        if reads_values:
            _check_top_k_values(ids, logprobs, call)
            if settings.hidden_layout == "replicated":
                equal["teacher_ids (a checksum)"] = target_digest(ids)
        found.append(Student(student, comparison, has_targets, divergence))
        return equal

    prepare(operands, settings, options, validate=validate, needs_targets=False, also=also)
    return found[0]


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
    settings = LossSettings(
        softcap=softcap,
        temperature=call.settings.temperature,
        hidden_layout=call.settings.hidden_layout,
        memory_budget=call.settings.memory_budget,
        backward="recompute",
        impl="chunked",
    )
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
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but e is on {hidden.device}: move one")
    shape = list(hidden.shape[:-1])
    if ids.dim() < 1 or ids.shape != logprobs.shape or list(ids.shape[:-1]) != shape:
        raise ValueError(
            f"teacher_ids and teacher_logprobs must be {[*shape, 'k']} for e "
            f"{list(hidden.shape)}, got {list(ids.shape)} and {list(logprobs.shape)}"
        )
    if ids.shape[-1] < 1:
        raise ValueError("teacher_ids must have at least one token a position, got k = 0")
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
