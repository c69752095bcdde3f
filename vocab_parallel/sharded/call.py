"""One call of the loss or of a relative: arguments in, checked and agreed on over the group."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vocab_parallel.local.backward_plan import BackwardPlan
from vocab_parallel.local.interface import LocalImpl, Shard
from vocab_parallel.local.statistics import accumulation_dtype
from vocab_parallel.sharded import settings as rules
from vocab_parallel.sharded.agreement import Claim, agree
from vocab_parallel.sharded.bound import bound_of
from vocab_parallel.sharded.layout import (
    IGNORED,
    TokenLayout,
    crosses_documents,
    mark_labels,
    shifted,
)
from vocab_parallel.sharded.operands import Operands
from vocab_parallel.sharded.rows import RankRows
from vocab_parallel.sharded.settings import LossSettings


class Call(NamedTuple):
    """A call whose arguments are known to be right, and how its work is done.

    Attributes:
        operands, settings: what the caller gave.
        rows: of this rank, and the vocab group.
        shard: this rank's rows for the local work, which its tokens are put into.
        impl: who does that work, and
        plan: how its backward finds the logits.
        records: whether autograd was recording (inside of a Function it never is).
    """

    operands: Operands
    settings: LossSettings
    rows: RankRows
    shard: Shard
    impl: LocalImpl
    plan: BackwardPlan
    records: bool

    @property
    def layout(self) -> TokenLayout:
        """How the group's tokens are laid out."""
        return TokenLayout(self.settings.hidden_layout, self.rows.group)

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether the gradient of the hidden states is summed over the group."""
        return self.rows.sums_hidden_grad(self.settings.hidden_layout)

    def without_tokens(self) -> "Call":
        """Return what backward needs of the call: no tensor of the tokens' is kept alive by it."""
        none = self.operands.hidden.new_empty(0)
        return self._replace(operands=Operands(none, self.operands.classifier, None))

    def labels(self) -> Tensor:
        """Return the labels [N] in the loss's order; gathers those of a "sharded" layout."""
        targets, settings = self.operands.targets, self.settings
        assert targets is not None
        vocab_size, kernels = self.rows.vocab_size, self.shard.ops.kernels

        def marked(shift: int) -> Tensor:
            found = mark_labels(targets, settings.ignore_index, vocab_size, shift, kernels=kernels)
            documents = self.operands.document_ids
            if documents is not None and shift:
                crosses = crosses_documents(documents, shift)
                found[..., : crosses.shape[-1]].masked_fill_(crosses, IGNORED)
            return found

        return self._arranged(marked)

    def token_weight(self) -> Tensor | None:
        """Return the tokens' weights [N] in that order; gathers those of a "sharded" layout."""
        weight = self.operands.token_weight
        if weight is None:
            return None
        # A copy, since backward reads it too: its owner may write to it before.
        dtype = accumulation_dtype(self.operands.hidden.dtype)
        wide = weight.detach().to(dtype, copy=True)
        # Kernels read it without a stride.
        return self._arranged(lambda shift: shifted(wide, shift, 0.0)).contiguous()

    def _arranged(self, of_shift: Callable[[int], Tensor]) -> Tensor:
        """Bring what is [..., T] of one shift, or several of them, to the loss's order."""
        shift = self.settings.shift
        if isinstance(shift, int):
            return self.layout.arrange(of_shift(shift))
        return self.layout.arrange(torch.stack([of_shift(each) for each in shift]))

    def own(self, per_token: Tensor) -> Tensor:
        """Return this rank's part of a result [N]; see `TokenLayout.own`.

        Several predictions keep their [H, ..., T]: each has another tail without a target.
        """
        tail = self.settings.shift if isinstance(self.settings.shift, int) else 0
        return self.layout.own(per_token, self.operands.hidden.shape[:-1], tail)


def prepare(
    operands: Operands,
    settings: LossSettings,
    options: Any,
    *,
    validate: bool | None,
    needs_targets: bool = True,
    problem: ValueError | None = None,
    also: Callable[[Call, bool], Mapping[str, Any]] | None = None,
) -> Call:
    """Check the arguments, agree on them over the group where asked, and return the call.

    Args:
        operands, settings: what the caller gave.
        options: which rows these are.
        validate: see `linear_cross_entropy`.
        needs_targets: whether it cannot be without.
        problem: what the caller has found wrong already.
        also: checks what a relative of the loss takes beside these. It gets the call, and whether
            values may be read, which waits for a GPU; it returns what must be equal on all ranks.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds, or where it is
            None and the tensors are on the CPU.
    """
    rows = rows_of(operands.classifier, options)
    on_gpu = isinstance(operands.hidden, Tensor) and operands.hidden.is_cuda
    reads_values = bool(validate or not on_gpu)
    call: Call | None = None
    more: Mapping[str, Any] = {}
    try:
        if problem is not None:
            raise problem
        if needs_targets and operands.targets is None:
            raise ValueError("targets must be a tensor of class ids, got None")
        call = checked(operands, settings, rows, reads_values=reads_values)
        more = {} if also is None else also(call, reads_values)
    except ValueError as error:
        problem = error
    group = rows.group
    if validate or group.degree == 1 or (validate is None and not on_gpu):
        targets = operands.targets if problem is None and reads_values else None
        equal: dict[str, Any] = {}
        if problem is None and group.degree > 1:
            equal = {**agreed(settings, operands, rows), **more}
        agree(problem, _claim(rows, targets, settings), equal, group)
    elif problem is not None:
        raise problem
    assert call is not None
    return call


def rows_of(classifier: Tensor, options: Any) -> RankRows:
    """Return which rows a rank's classifier has."""
    if options is not None:
        return RankRows.from_options(options)
    has_rows = isinstance(classifier, Tensor) and classifier.dim() > 0
    return RankRows.whole(classifier.shape[0] if has_rows else 0)


def checked(
    operands: Operands, settings: LossSettings, rows: RankRows, *, reads_values: bool
) -> Call:
    """Check what one rank alone can check, and choose who does the work."""
    bound = bound_of(operands, settings, rows)
    rules.check_token_divisor(
        settings.num_valid_tokens,
        operands.hidden,
        settings.reduction,
        reads_values=reads_values,
        num_heads=settings.num_heads,
    )
    rules.check_accumulation(operands.classifier, settings.accumulate_into)
    return Call(operands, settings, rows, *bound, torch.is_grad_enabled())


def _claim(rows: RankRows, targets: Tensor | None, settings: LossSettings) -> Claim:
    lowest, highest, digest = 0, -1, 0
    if targets is not None:
        lowest, highest = rules.target_range(targets, settings.ignore_index)
        if settings.hidden_layout != "sharded" and rows.group.degree > 1:
            digest = rules.target_digest(targets)
    vocab_size = -1 if rows.vocab_size is None else rows.vocab_size
    return Claim(rows.start, rows.stop, vocab_size, lowest, highest, digest)


def agreed(settings: LossSettings, operands: Operands, rows: RankRows) -> dict[str, Any]:
    """Name what must be equal over the group, for the ranks to communicate and return alike.

    That is everything but what is known to be a rank's own, so that nothing is forgotten: its
    rows, and of its tensors the values.
    """
    hidden = operands.hidden
    tensors = [(each.name, getattr(operands, each.name)) for each in fields(operands)]
    records = torch.is_grad_enabled()
    documents = operands.document_ids
    if settings.hidden_layout == "sharded":
        documents = None  # each rank has its own
    return {
        **settings.agreed(),
        "document_ids (their checksum)": 0 if documents is None else rules.target_digest(documents),
        "reduce_e_grad": rows.reduce_e_grad,
        "largest_shard": rows.largest_shard,
        "tokens of e": hidden.shape[:-1].numel(),
        "hidden size": hidden.shape[-1],
        "dtype of e": hidden.dtype,
        "dtype of c": operands.classifier.dtype,
        "e requires grad": hidden.requires_grad and records,
        # Per-token gradients are gathered in backward, where there is one.
        "a gradient is required": records
        and any(tensor is not None and tensor.requires_grad for _, tensor in tensors),
        **{f"{name} given": tensor is not None for name, tensor in tensors},
    }
