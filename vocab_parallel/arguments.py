"""From what a caller gives to a call that is known to be right: checked, planned, agreed on.

What holds for every call of a shape is found once and kept by a key: that its arguments are right,
which backend works, its plan, and which statistics it makes. A training step calls the loss with
the shapes, dtypes and options of the step before. Nothing of a microbatch is kept, no parameter and
no process group. What ranks tell one another (`agreement.py`) is told at every call, found or made:
ranks would differ in what they wait for.
"""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vocab_parallel.agreement import RankSummary, agree, digest_of
from vocab_parallel.backends import registry
from vocab_parallel.backends.interface import Backend, Shard
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.layout import (
    IGNORED,
    arrange,
    crosses_documents,
    mark_labels,
    own,
    shifted,
    target_digest,
    target_range,
)
from vocab_parallel.plan import BackwardPlan
from vocab_parallel.rank_rows import RankRows
from vocab_parallel.settings import (
    LossSettings,
    check_accumulation,
    check_rows,
    check_tensors,
    check_token_divisor,
    unknown_option,
)
from vocab_parallel.statistics import Columns, accumulation_dtype

_PLAIN = (Tensor, nn.Parameter)
_MOST = 256
_bound: dict[Hashable, "Bound"] = {}


@dataclass(frozen=True)
class Operands:
    """The tensors of a call; autocast has been applied to the first two.

    Attributes:
        hidden: [..., T, D]; [H, ..., T, D] where each position makes H predictions.
        classifier: [rows, D].
        targets: [..., T], or None where a call has none.
        bias: [rows] or None.
        token_weight: [..., T] or None.
        document_ids: [..., T] or None.
    """

    hidden: Tensor
    classifier: Tensor
    targets: Tensor | None
    bias: Tensor | None = None
    token_weight: Tensor | None = None
    document_ids: Tensor | None = None

    @classmethod
    def of(cls, e: Tensor, c: Tensor, *rest: Tensor | None, **named: Tensor | None) -> "Operands":
        """Cast hidden states and classifier as autocast casts the operands of a linear layer."""
        tensors = isinstance(e, Tensor) and isinstance(c, Tensor)
        if tensors and not e.is_meta and torch.is_autocast_enabled(e.device.type):
            dtype = torch.get_autocast_dtype(e.device.type)
            e, c = (t if t.dtype == torch.float64 else t.to(dtype) for t in (e, c))
        return cls(e, c, *rest, **named)

    @property
    def flat_hidden(self) -> Tensor:
        """[T, D], this rank's tokens in one row."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])


class Bound(NamedTuple):
    """What is known of a shape.

    Attributes:
        shard: of the local work, with neither tokens nor rows: its tensors hold nothing.
        backend: who does that work, and
        plan: how its backward finds the logits.
        later_columns: statistics of a second pass, which needs those of the first.
        gathers: whether hidden states are gathered over the group.
        sums_hidden_grad: whether their gradient is summed over the group.
        kernels: whether Triton's kernels work on its device, for labels and losses too.
        scalar_loss: whether the result that has a gradient is one number.
        records: whether autograd was recording (inside of a Function it never is).
        equal: what must be equal on all ranks, by name, and
        digest: a number that is equal where that is.
    """

    shard: Shard
    backend: Backend
    plan: BackwardPlan
    later_columns: Columns
    gathers: bool
    sums_hidden_grad: bool
    kernels: bool
    scalar_loss: bool
    records: bool
    equal: Mapping[str, Any]
    digest: int


class Call(NamedTuple):
    """A call whose arguments are known to be right, and how its work is done.

    Attributes:
        operands, settings: what the caller gave.
        rows: of this rank, and the vocab group.
        bound: what is known of its shape.
    """

    operands: Operands
    settings: LossSettings
    rows: RankRows
    bound: Bound

    def without_tokens(self) -> "Call":
        """Return what backward needs of the call: no tensor of the tokens' is kept alive by it."""
        own, none = self.operands, self.bound.shard.hidden
        return self._replace(operands=Operands(none, own.classifier, None, own.bias))

    def labels(self) -> Tensor:
        """Return the labels [N] in the loss's order; gathers those of a "sharded" layout."""
        return self._in_order(self._marked)

    def _marked(self, shift: int) -> Tensor:
        targets, documents = self.operands.targets, self.operands.document_ids
        if targets is None:  # no position is ignored that the shift leaves a label
            shape = list(self.operands.hidden.shape[:-1])
            if self.settings.hidden_layout == "sequence":
                shape[-1] *= self.rows.group.degree
            zeros = self.operands.hidden.new_zeros(shape, dtype=torch.int32)
            return shifted(zeros, shift, IGNORED)
        found = mark_labels(
            targets, self.settings.ignore_index, self.rows.vocab_size, shift,
            kernels=self.bound.kernels,
        )  # fmt: skip
        if documents is not None and shift:
            crosses = crosses_documents(documents, shift)
            found[..., : crosses.shape[-1]].masked_fill_(crosses, IGNORED)
        return found

    def token_weight(self) -> Tensor | None:
        """Return the tokens' weights [N] in that order; gathers those of a "sharded" layout."""
        weight = self.operands.token_weight
        if weight is None:
            return None
        # A copy, since backward reads it too: its owner may write to it before.
        wide = weight.detach().to(self.bound.shard.dtype, copy=True)
        # Kernels read it without a stride.
        return self._in_order(lambda shift: shifted(wide, shift, 0.0)).contiguous()

    def _in_order(self, shifted_by: Callable[[int], Tensor]) -> Tensor:
        """Bring what each token has, [..., T] for each prediction, to the loss's order [N]."""
        shift = self.settings.shift
        if isinstance(shift, int):
            found = shifted_by(shift)
        else:
            found = torch.stack([shifted_by(each) for each in shift])
        return arrange(found, self.settings.hidden_layout, self.rows.group)

    def own(self, per_token: Tensor) -> Tensor:
        """Return this rank's part of a result [N]; see `layout.own`.

        Several predictions keep their [H, ..., T]: each has another tail without a target.
        """
        tail = self.settings.shift if isinstance(self.settings.shift, int) else 0
        shape = self.operands.hidden.shape[:-1]
        return own(per_token, self.settings.hidden_layout, self.rows.group, shape, tail)


def prepare(
    operands: Operands,
    settings: LossSettings,
    options: Any,
    *,
    validate: bool | None,
    needs_targets: bool = True,
    known: Collection[str] = (),
    also: Callable[[Call, bool], tuple[Call, Mapping[str, Any]]] | None = None,
) -> Call:
    """Check the arguments, agree on them over the group where asked, and return the call.

    Args:
        operands, settings: what the caller gave.
        options: which rows these are.
        validate: see `linear_cross_entropy`.
        needs_targets: whether it cannot be without.
        known: names of what the caller could have given, for who misspelt an option.
        also: checks what a relative of the loss takes beside these. It gets the call, and whether
            values may be read, which waits for a GPU; it returns the relative's call, and what
            must be equal on all ranks.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds, or where it is
            None and the tensors are on the CPU.
    """
    on_gpu = isinstance(operands.hidden, Tensor) and operands.hidden.is_cuda
    reads_values = bool(validate or not on_gpu)
    try:
        rows = rows_of(operands.classifier, options)
    except ValueError as error:
        if reads_values and validate is not False and hasattr(options, "group"):
            agree(error, RankSummary(), {}, VocabGroup.of(options.group))
        raise
    group = rows.group
    call: Call | None = None
    problem: ValueError | None = None
    more: Mapping[str, Any] = {}
    try:
        unknown = unknown_option(settings, known) if settings.impl_options else None
        if unknown is not None:
            raise unknown
        if needs_targets and operands.targets is None:
            raise ValueError("targets must be a tensor of class ids, got None")
        call = checked(operands, settings, rows, reads_values=reads_values)
        if also is not None:
            call, more = also(call, reads_values)
    except ValueError as error:
        problem = error
    if reads_values and (validate is not False or group.degree == 1):
        claim, equal, digest = RankSummary(rows.start, rows.stop), more, 0
        if call is not None and problem is None:
            claim = _claim(operands, settings, rows, reads_values=True)
            if group.degree > 1:
                equal, digest = _equal(call, more)
        agree(problem, claim, equal, group, digest=digest)
    elif problem is not None:
        raise problem
    assert call is not None
    return call


def rows_of(classifier: Tensor, options: Any) -> RankRows:
    """Return which rows a rank's classifier has."""
    if options is not None:
        return RankRows.from_options(options)
    has_rows = isinstance(classifier, Tensor) and classifier.dim() > 0
    num_rows = classifier.shape[0] if has_rows else 0
    return RankRows(0, num_rows, num_rows, True, VocabGroup())


def checked(
    operands: Operands, settings: LossSettings, rows: RankRows, *, reads_values: bool
) -> Call:
    """Check what one rank alone can check, and choose who does the work."""
    key = _key(operands, settings, rows)
    bound = None if key is None else _bound.get(key)
    if bound is None:
        bound = _bind(operands, settings, rows)
        if key is not None:
            if len(_bound) >= _MOST:
                _bound.clear()
            _bound[key] = bound
    if settings.num_valid_tokens is not None:
        check_token_divisor(
            settings.num_valid_tokens,
            operands.hidden,
            settings.reduction,
            reads_values=reads_values,
            num_heads=settings.num_heads,
        )
    if settings.accumulate_into is not None:
        check_accumulation(operands.classifier, settings.accumulate_into)
    return Call(operands, settings, rows, bound)


def forget() -> None:
    """Forget all shapes, for whoever changes what plans are made of."""
    _bound.clear()


def _key(operands: Operands, settings: LossSettings, rows: RankRows) -> Hashable | None:
    """Return what tells shapes apart, or None for a call that is checked anew each time.

    Settings are told apart by their types too: 1, 1.0 and True are not one.
    """
    kinds: list[Hashable] = []
    for tensor in operands.__dict__.values():
        if tensor is None:
            kinds.append(None)
            continue
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        # Hopper's kernels read what TMA can: `registry.choose`.
        lies = (tensor.stride(), tensor.data_ptr() % 16) if tensor.is_cuda else None
        kinds.append((tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, lies))
    own = {**settings.__dict__, "num_valid_tokens": None}
    own["impl_options"] = tuple(sorted(settings.impl_options.items()))
    values = tuple(own.values())
    several = settings.shift if isinstance(settings.shift, tuple) else ()
    of_rows = (
        rows.start, rows.stop, rows.vocab_size, rows.reduce_e_grad, rows.largest_shard,
        rows.group.degree,
    )  # fmt: skip
    types = tuple(map(type, (*values, *several)))
    key = (tuple(kinds), values, types, of_rows, torch.is_grad_enabled(), registry.choose)
    try:
        hash(key)
    except TypeError:  # an option that cannot be, as the checks will say
        return None
    return key


def _bind(operands: Operands, settings: LossSettings, rows: RankRows) -> Bound:
    """Check what one rank alone can check, and choose who does the work."""
    settings.check()
    both = operands.hidden, operands.classifier
    degree, layout = rows.group.degree, settings.hidden_layout
    check_tensors(operands, settings, degree)
    check_rows(operands.classifier, rows, settings)
    if degree == 1:
        # That its rows are the vocabulary: a call on a GPU does not ask again.
        agree(None, _claim(operands, settings, rows, reads_values=False), {}, rows.group)
    backend = registry.create_backend(
        settings.impl, settings.memory_budget, settings.impl_options, both
    )
    shard = _shard(operands, settings, rows)
    equal = _equal_of_shape(operands, settings, rows)
    return Bound(
        shard=shard,
        backend=backend,
        plan=plan_of(backend, shard, operands, settings, rows),
        later_columns=(),
        gathers=layout != "replicated" and degree > 1,
        sums_hidden_grad=rows.sums_hidden_grad(layout),
        kernels=registry.choose(*both) != "torch",
        scalar_loss=settings.scalar_loss,
        records=torch.is_grad_enabled(),
        equal=equal,
        digest=digest_of(equal),
    )


def plan_of(
    backend: Backend, shard: Shard, operands: Operands, settings: LossSettings, rows: RankRows
) -> BackwardPlan:
    """Return how a backend's backward of a call finds the logits.

    Raises:
        ValueError: see `Backend.plan`.
    """
    degree = rows.group.degree
    return backend.plan(
        shard,
        tokens=(1 if settings.hidden_layout == "replicated" else degree)
        * operands.hidden.shape[:-1].numel(),
        most_rows=rows.most_rows,
        degree=degree,
        backward=settings.backward,
        has_main_grad=settings.accumulate_into == "main_grad",
    )


def _shard(operands: Operands, settings: LossSettings, rows: RankRows) -> Shard:
    """Describe this rank's rows for the local work; no tensor of the call's is held."""
    hidden, classifier, bias = operands.flat_hidden, operands.classifier, operands.bias
    none = hidden.detach().new_empty((0, hidden.shape[1]))
    wide = accumulation_dtype(torch.promote_types(hidden.dtype, classifier.dtype))
    sums = rows.sums_hidden_grad(settings.hidden_layout)
    return Shard.of(
        none,
        _of_shape(classifier, rows.num_token_rows),
        None if bias is None else _of_shape(bias, rows.num_token_rows),
        none[:, 0],
        transform=settings.transform,
        columns=settings.columns,
        grad_columns=settings.grad_columns,
        separate_lse_grad=settings.separate_lse_grad,
        logits_dtype=wide if settings.logits_dtype else None,
        sum_dtype=accumulation_dtype(hidden.dtype) if sums else None,
    )


def _of_shape(parameter: Tensor, num_rows: int) -> Tensor:
    """Return a tensor of a parameter's shape and dtype, with so many rows and no memory."""
    return parameter.detach().new_empty(()).expand(num_rows, *parameter.shape[1:])


def _claim(
    operands: Operands, settings: LossSettings, rows: RankRows, *, reads_values: bool
) -> RankSummary:
    """Return what this rank says of the vocabulary; reading targets waits for a GPU."""
    lowest, highest, checksum = 0, -1, 0
    if operands.targets is not None and reads_values:
        lowest, highest = target_range(operands.targets, settings.ignore_index)
        if settings.hidden_layout != "sharded" and rows.group.degree > 1:
            checksum = target_digest(operands.targets)
    vocab_size = -1 if rows.vocab_size is None else rows.vocab_size
    return RankSummary(rows.start, rows.stop, vocab_size, lowest, highest, checksum)


def _equal(call: Call, more: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """Return what must be equal over the group, and its digest."""
    bound, given = call.bound, call.settings.num_valid_tokens
    documents = call.operands.document_ids
    varying = dict(more)
    if given is not None:
        varying["num_valid_tokens"] = given.tolist() if isinstance(given, Tensor) else given
    if documents is not None and call.settings.hidden_layout != "sharded":  # else each its own
        varying["document_ids (their checksum)"] = target_digest(documents)
    if not varying:
        return bound.equal, bound.digest
    return {**bound.equal, **varying}, bound.digest ^ digest_of(varying)


def _equal_of_shape(
    operands: Operands, settings: LossSettings, rows: RankRows
) -> Mapping[str, Any]:
    """Name what must be equal over the group, for the ranks to communicate and return alike.

    That is everything but what is known to be a rank's own, so that nothing is forgotten: its
    rows, and of its tensors the values.
    """
    hidden, given, records = operands.hidden, operands.__dict__, torch.is_grad_enabled()
    own = {**settings.__dict__, "impl_options": sorted(settings.impl_options.items())}
    del own["num_valid_tokens"]
    return {
        **own,
        "reduce_e_grad": rows.reduce_e_grad,
        "largest_shard": rows.largest_shard,
        "tokens of e": hidden.shape[:-1].numel(),
        # As many tokens in other sequences have other labels, once they are shifted.
        "sequence length of e": None if own["hidden_layout"] == "sharded" else hidden.shape[-2],
        "hidden size": hidden.shape[-1],
        "dtype of e": hidden.dtype,
        "dtype of c": operands.classifier.dtype,
        "e requires grad": hidden.requires_grad and records,
        # Per-token gradients are gathered in backward, where there is one.
        "a gradient is required": records
        and any(tensor is not None and tensor.requires_grad for tensor in given.values()),
        **{f"{name} given": tensor is not None for name, tensor in given.items()},
    }
