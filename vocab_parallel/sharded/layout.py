"""How the tokens of a vocab group are laid out, and in which order the loss sees them.

T below is the last dimension of the labels, V the vocab degree, n the number of tokens that one
rank's hidden states have. The loss works on N flat tokens:

    layout        hidden states        labels       N      order
    "replicated"  [..., T, D]          [..., T]     n      as given, the same on every rank
    "sharded"     [..., T, D]          [..., T]     V n    rank by rank
    "sequence"    [..., T / V, D]      [..., T]     V n    rank by rank

Where each position makes H predictions, hidden states are [H, ..., T, D] and n counts all of them:
every rank's tokens go head by head.

Labels are put in the order of the gathered hidden states, never the reverse, so that no [N, D]
tensor is permuted. A shift moves the labels alone: the last ``shift`` positions of a sequence get
no target, instead of being cut off the hidden states, which would copy them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vocab_parallel.collectives import VocabGroup

HiddenLayout = Literal["replicated", "sharded", "sequence"]

IGNORED = -1  # the label of a position without a target
OUT_OF_RANGE = -2  # a label that is no token: the loss becomes NaN instead of silently wrong


@dataclass(frozen=True)
class TokenLayout:
    """Where this rank's tokens stand among those of its vocab group."""

    layout: HiddenLayout
    group: VocabGroup

    @property
    def gathers(self) -> bool:
        """Whether hidden states are gathered over the group."""
        return self.layout != "replicated" and self.group.degree > 1

    def arrange(self, shifted: Tensor) -> Tensor:
        """Bring shifted labels or their weights [..., T] to the loss's flat order [N]."""
        if not self.gathers:
            return shifted.reshape(-1)
        if self.layout == "sharded":
            return self.group.gather_tokens(shifted.reshape(-1))
        return shifted.unflatten(-1, (self.group.degree, -1)).movedim(-2, 0).reshape(-1)

    def own(self, per_token: Tensor, batch_shape: torch.Size, shift: int) -> Tensor:
        """Return this rank's part of a result [N], in the shape of its own tokens.

        That is [..., T - shift], or [..., T / V] in the "sequence" layout, where the shift's
        positions lie on the last rank and hold 0. Differentiable: backward gathers every rank's
        gradient, so all ranks must use the result or none.
        """
        if self.gathers:
            per_token = _OwnTokens.apply(per_token, self.group)
        per_token = per_token.view(batch_shape)
        return per_token if self.layout == "sequence" else _without_tail(per_token, shift)


class _OwnTokens(torch.autograd.Function):
    """Slice this rank's tokens [n] of [V n]; backward gathers the slices' gradients."""

    @staticmethod
    def forward(ctx: Any, per_token: Tensor, group: VocabGroup) -> Tensor:
        ctx.group = group
        return per_token.unflatten(0, (group.degree, -1))[group.rank].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: VocabGroup = ctx.group
        return group.gather_tokens(grad), None


def mark_labels(
    labels: Tensor,
    ignore_index: int,
    vocab_size: int | None,
    shift: int = 0,
    *,
    kernels: bool = False,
) -> Tensor:
    """Return shifted labels as int32, with `IGNORED` and `OUT_OF_RANGE` for what is no token.

    Args:
        labels: [..., T].
        ignore_index, vocab_size, shift: of the loss.
        kernels: whether Triton's kernels work on the labels' device.
    """
    if kernels:
        from vocab_parallel.kernels.labels import mark_and_shift

        return mark_and_shift(
            labels,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            shift=shift,
            ignored=IGNORED,
            out_of_range=OUT_OF_RANGE,
        )
    outside = labels < 0
    if vocab_size is not None:
        outside |= labels >= vocab_size
    marked = labels.masked_fill(outside, OUT_OF_RANGE)
    return shifted(
        marked.masked_fill(is_ignored(labels, ignore_index), IGNORED).to(torch.int32),
        shift,
        IGNORED,
    )


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Tell which labels are ``ignore_index``, which need not fit their dtype: int32 would wrap."""
    return labels.long() == ignore_index


def count_valid(labels: Tensor, *, kernels: bool = False) -> Tensor:
    """Return how many marked labels are not ignored, those out of range too, as a tensor ()."""
    if kernels:
        from vocab_parallel.kernels.labels import count_tokens

        return count_tokens(labels, IGNORED)
    return (labels != IGNORED).sum()


def shifted(per_label: Tensor, shift: int, fill: float) -> Tensor:
    """Move labels or their weights [..., T] to the left; what has none left gets ``fill``."""
    if shift == 0:
        return per_label
    moved = torch.full_like(per_label, fill)
    moved[..., :-shift] = per_label[..., shift:]
    return moved


def crosses_documents(document_ids: Tensor, shift: int) -> Tensor:
    """Tell where position t and label t + shift are of two documents, [..., T - shift] bool.

    Args:
        document_ids: [..., T] integers; a document is a run of equal ones.
        shift: at least 0.
    """
    begins = document_ids[..., 1:] != document_ids[..., :-1]
    number = torch.nn.functional.pad(begins.cumsum(-1), (1, 0))
    return number[..., shift:] != number[..., : number.shape[-1] - shift]


def _without_tail(per_token: Tensor, shift: int) -> Tensor:
    return per_token[..., : per_token.shape[-1] - shift] if shift else per_token
