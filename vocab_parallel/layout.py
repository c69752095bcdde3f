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

from typing import Any, Literal

import torch
from torch import Tensor

from vocab_parallel.backends.registry import load
from vocab_parallel.collectives import VocabGroup

HiddenLayout = Literal["replicated", "sharded", "sequence"]

IGNORED = -1  # the label of a position without a target
OUT_OF_RANGE = -2  # a label that is no token: the loss becomes NaN instead of silently wrong


def arrange(shifted: Tensor, layout: HiddenLayout, group: VocabGroup) -> Tensor:
    """Bring shifted labels or their weights [..., T] to the loss's flat order [N].

    Gathers those of the "sharded" layout: there all ranks call.
    """
    if layout == "replicated" or group.degree == 1:
        return shifted.reshape(-1)
    if layout == "sharded":
        return group.gather_tokens(shifted.reshape(-1))
    return shifted.unflatten(-1, (group.degree, -1)).movedim(-2, 0).reshape(-1)


def own(
    per_token: Tensor,
    layout: HiddenLayout,
    group: VocabGroup,
    batch_shape: torch.Size,
    shift: int,
) -> Tensor:
    """Return this rank's part of a result [N], in the shape of its own tokens.

    That is [..., T - shift], or [..., T / V] in the "sequence" layout, where the shift's positions
    lie on the last rank and hold 0. Differentiable: backward gathers every rank's gradient, so all
    ranks must use the result or none.
    """
    if layout != "replicated" and group.degree > 1:
        per_token = _OwnTokens.apply(per_token, group)
    per_token = per_token.view(batch_shape)
    if layout == "sequence" or shift == 0:
        return per_token
    return per_token[..., : per_token.shape[-1] - shift]


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
        marked: Tensor = load("vocab_parallel.kernels.labels").mark_and_shift(
            labels,
            ignore_index=ignore_index,
            vocab_size=vocab_size,
            shift=shift,
            ignored=IGNORED,
            out_of_range=OUT_OF_RANGE,
        )
        return marked
    outside = labels < 0
    if vocab_size is not None:
        outside |= labels >= vocab_size
    marked = labels.masked_fill(outside, OUT_OF_RANGE)
    marked = marked.masked_fill_(labels.long() == ignore_index, IGNORED).to(torch.int32)
    return shifted(marked, shift, IGNORED) if shift else marked


def is_ignored(labels: Tensor, ignore_index: int) -> Tensor:
    """Tell which labels are ``ignore_index``, which need not fit their dtype: int32 would wrap."""
    return labels.long() == ignore_index


def target_range(targets: Tensor, ignore_index: int) -> tuple[int, int]:
    """Return the lowest and the highest target that is not ignored, (0, -1) where all are.

    Waits for a GPU: for validation alone.
    """
    kept = targets[targets.long() != ignore_index]
    return (int(kept.min()), int(kept.max())) if kept.numel() else (0, -1)


def target_digest(targets: Tensor) -> int:
    """Return a number that unlike targets seldom share. Waits for a GPU: for validation alone."""
    flat = targets.reshape(-1).to(torch.int64)
    places = torch.arange(1, 2 * len(flat) + 1, 2, device=flat.device)
    return int((flat * (places * 0x9E3779B97F4A7C15 % 2**63)).sum())


def count_valid(labels: Tensor) -> Tensor:
    """Return how many marked labels are not ignored, those out of range too, as a tensor ()."""
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
