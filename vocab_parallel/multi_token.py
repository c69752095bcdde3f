"""Several predictions of each position over one classifier: their losses in one pass.

The H predictions of T positions are H T tokens of one call: one pass over the rows, one exchange of
statistics, one reduction of dE. Head h of position t predicts the token at t + shift[h], and with
n_h its valid tokens

    loss = sum_h head_weights[h] mean_h        mean_h = (sum of its tokens' losses) / n_h

so that what tells this loss from a plain one is a factor for each token.

Source: multi-token prediction, arXiv 2404.19737, section 2 (heads side by side); arXiv 2412.19437,
section 2.2 (one after the other, over the main model's classifier, weighted).
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vocab_parallel.arguments import Call, Operands, prepare
from vocab_parallel.entry import entry
from vocab_parallel.functional import linear_cross_entropy, reduced_loss, token_losses
from vocab_parallel.layout import IGNORED
from vocab_parallel.settings import LossSettings, parameters_of
from vocab_parallel.token_loss import TokenLoss, at_least_one


# For type checkers: the return type depends on one flag. The rest is below.
@overload
def multi_token_cross_entropy(
    e: Tensor | Sequence[Tensor],
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Sequence[int],
    return_heads: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def multi_token_cross_entropy(
    e: Tensor | Sequence[Tensor],
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Sequence[int],
    **options: Any,
) -> Tensor: ...


@entry
def multi_token_cross_entropy(
    e: Tensor | Sequence[Tensor],  # H of (..., T, D), or (H, ..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T) global ids
    bias: Tensor | None = None,  # (stop - start,)
    *,
    shift: Sequence[int],
    head_weights: Sequence[float] | None = None,
    return_heads: bool = False,
    reduction: str = "mean",
    num_valid_tokens: int | Tensor | None = None,
    token_weight: Tensor | None = None,
    document_ids: Tensor | None = None,
    vocab_parallel_options: Any = None,
    validate: bool | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of several predictions of each position, without their logits.

        multi_token_cross_entropy([e1, e2, e3], c, targets, shift=(1, 2, 3),
                                  head_weights=(1.0, 0.15, 0.15))

    The value and the gradients are those of the weighted sum of H calls of `linear_cross_entropy`,
    in one pass over the rows. Every rank of the vocab group calls it; it communicates what one
    call of H times the tokens does, in as many calls.

    One tensor [H, ..., T, D] is read in place. A sequence of tensors is copied into one first,
    H T D numbers of e's dtype that live until backward (in the gathering layouts until they are
    gathered): let the model write its hidden states into one tensor where that is too much. Their
    gradient is one tensor, which each hidden state gets a view of.

    Args:
        e: the hidden states that predict, one for each of ``shift``: a sequence of [..., T, D], or
            one tensor [H, ..., T, D]. In the "sequence" layout each is [..., T / V, D].
        c, targets, bias: as in `linear_cross_entropy`.
        shift: position t of head h predicts ``targets[..., t + shift[h]]``; each in
            [0, max(T, 1)).
        head_weights: multiply the heads' losses; None: 1 for each.
        return_heads: return (loss, heads), heads [H] being each head's own loss, without its
            weight and without a gradient. Equal on every rank of the group.
        reduction: "mean", each head's over its own valid tokens of the whole group; "sum"; or
            "none" for [H, ..., T] of this rank's own tokens ([H, ..., T / V] in the "sequence"
            layout), each times its head's weight, 0 where the shift leaves no target.
        num_valid_tokens: divides each head's mean in place of its count of valid tokens: a number
            for all heads, or a tensor [H], as ``count_valid_tokens(labels, groups, shift=shift,
            document_ids=document_ids)`` returns it.
        token_weight: [..., T], aligned with targets; moves with each head's shift.
        document_ids: [..., T], aligned with targets, as in `linear_cross_entropy`: no head predicts
            a token of another document.
        vocab_parallel_options, validate: as in `linear_cross_entropy`.
        **options: every other option of `linear_cross_entropy`, but for ``return_lse`` and
            ``return_metrics``.

    Returns:
        The loss in float32 (float64 for float64 inputs); with return_heads a pair.

    Raises:
        ValueError: as `linear_cross_entropy`; hidden states that are unlike, or not one for each
            of ``shift``.
    """
    settings = LossSettings.of(
        {
            **options,
            "shift": as_tuple(shift),
            "head_weights": None if head_weights is None else as_tuple(head_weights),
            "return_heads": return_heads,
            "reduction": reduction,
            "num_valid_tokens": num_valid_tokens,
        }
    )
    call = prepare(
        Operands.of(stacked(e), c, targets, bias, token_weight, document_ids),
        settings,
        vocab_parallel_options,
        validate=validate,
        known=parameters_of(linear_cross_entropy) | parameters_of(multi_token_cross_entropy),
    )
    labels, weight = call.labels(), call.token_weight()
    factors = weighted = _factors(call, labels)
    if settings.head_weights is not None:
        # Numbers of Python's, one by one: a tensor of them would wait for the GPU.
        pairs = zip(factors.unbind(), settings.head_weights, strict=True)
        weighted = torch.stack([factor * number for factor, number in pairs])
    loss, values = reduced_loss(call, labels, _losses(call, labels, weight, weighted))
    if not return_heads:
        return loss
    per_token = _losses(call, labels, weight, factors).values(values.detach())
    return loss, _by_head(call, per_token).sum((0, 2))


def _by_head(call: Call, per_token: Tensor) -> Tensor:  # (N,) -> (parts, H, n)
    """Part the tokens of a call; parts are the ranks whose tokens are gathered, or one."""
    parts, heads = call.rows.group.degree if call.bound.gathers else 1, call.settings.num_heads or 1
    return per_token.view(parts, heads, per_token.shape[0] // (parts * heads))


def _losses(call: Call, labels: Tensor, weight: Tensor | None, factors: Tensor) -> TokenLoss:
    """Return what makes each token's loss, times its weight [N] and its head's factor [H]."""
    spread = factors.view(1, -1, 1).expand_as(_by_head(call, labels)).reshape(-1).contiguous()
    return token_losses(call, labels, spread if weight is None else spread * weight)


def _factors(call: Call, labels: Tensor) -> Tensor:
    """Return what makes means of the heads' sums, [H]."""
    settings, dtype = call.settings, call.bound.shard.dtype
    factors = torch.ones(settings.num_heads or 1, dtype=dtype, device=labels.device)
    if settings.reduction != "mean":
        return factors
    given = settings.num_valid_tokens
    if given is None:
        given = (_by_head(call, labels) != IGNORED).sum((0, 2))
    given = given.reshape(-1) if isinstance(given, Tensor) else given
    return factors / at_least_one(given, dtype)


def stacked(e: Any) -> Any:
    """Return one tensor [H, ..., T, D] of several hidden states that are alike.

    What is one tensor already is returned as it is, and so is what makes none, which `prepare`
    refuses.
    """
    if not isinstance(e, Sequence) or not all(isinstance(head, Tensor) for head in e):
        return e
    alike = len({(head.shape, head.dtype, head.device) for head in e}) == 1
    if not alike:
        return e
    with torch.autocast(e[0].device.type, enabled=False):  # which stacks no float64
        return torch.stack(list(e))


def as_tuple(values: Any) -> Any:
    """Return a tuple of what can be one; what cannot is refused with all other settings."""
    return tuple(values) if isinstance(values, Sequence) else (values,)
