"""The loss in one process, in float64, written in the most obvious way."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def oracle(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (rows, D)
    targets: Tensor,  # (..., T)
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    document_ids: Tensor | None = None,
    num_valid_tokens: int | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss, lse), the loss reduced and lse [..., T - shift]."""
    length = targets.shape[-1]
    logits = e.double() @ c.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits / temperature)[..., : length - shift, :vocab_size]
    targets = targets[..., shift:]

    valid = targets != ignore_index
    if document_ids is not None:
        valid = valid & (document_ids[..., shift:] == document_ids[..., : length - shift])
    log_probabilities = torch.log_softmax(logits, -1)
    chosen = targets.masked_fill(~valid, 0).long().unsqueeze(-1)
    loss = -(1 - label_smoothing) * log_probabilities.gather(-1, chosen).squeeze(-1)
    loss = loss - label_smoothing * log_probabilities.mean(-1)
    lse = torch.logsumexp(logits, -1)
    loss = loss + z_loss * lse**2
    if token_weight is not None:
        loss = loss * token_weight[..., shift:].double()
    loss = loss.masked_fill(~valid, 0.0)
    lse = lse.masked_fill(~valid, 0.0)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        count = int(valid.sum()) if num_valid_tokens is None else num_valid_tokens
        loss = loss.sum() / max(count, 1)
    return loss, lse


def multi_token_oracle(
    e: Tensor,  # (H, ..., T, D)
    c: Tensor,  # (rows, D)
    targets: Tensor,  # (..., T)
    bias: Tensor | None = None,
    *,
    shift: Sequence[int],
    head_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    num_valid_tokens: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return (loss, heads): the weighted sum of heads [H], or (H, ..., T) of both for "none"."""
    weights = [1.0] * len(shift) if head_weights is None else head_weights
    divisors = torch.as_tensor(0 if num_valid_tokens is None else num_valid_tokens)
    heads = []
    for hidden, own, divisor in zip(e, shift, divisors.expand(len(shift)).tolist(), strict=True):
        given = None if num_valid_tokens is None else divisor
        options.update(shift=own, reduction=reduction, num_valid_tokens=given)
        loss, _ = oracle(hidden, c, targets, bias, **options)
        heads.append(torch.nn.functional.pad(loss, (0, own)) if reduction == "none" else loss)
    parts = torch.stack([weight * loss for weight, loss in zip(weights, heads, strict=True)])
    return parts if reduction == "none" else parts.sum(), torch.stack(heads)


def distillation_oracle(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (rows, D)
    log_q: Tensor,  # (..., T, vocabulary), the teacher's; (..., T, k) with ids
    bias: Tensor | None = None,
    *,
    ids: Tensor | None = None,  # (..., T, k)
    other: bool = True,
    least: float = 0.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
    targets: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_valid_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Return the loss of a student against a teacher's distribution.

    With ids the outcomes are these and all others as one, which the teacher gives what its k leave
    (``least`` at least), or nothing where ``other`` is False.
    """
    logits = e.double() @ c.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[..., :vocab_size]
    p, q = torch.softmax(logits / temperature, -1), log_q.double().exp()
    if ids is not None:
        among = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, q > 0)
        rest = p.masked_fill(among, 0.0).sum(-1, keepdim=True)
        p = torch.cat([p.gather(-1, ids) * (q > 0), rest], -1)
        left = (1.0 - q.sum(-1, keepdim=True)).clamp(min=least)
        left = left * ((~among).any(-1, keepdim=True) if other else 0.0)
        q = torch.cat([q if other else q / q.sum(-1, keepdim=True), left], -1)
    m = beta * q + (1.0 - beta) * p

    def kl(one: Tensor, two: Tensor) -> Tensor:
        there = one > 0  # 0 log 0 is 0, and so is its gradient
        ratio = (
            one.where(there, torch.ones_like(one)).log()
            - two.where(there, torch.ones_like(two)).log()
        )
        return (one * ratio).sum(-1)

    loss = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: beta * kl(q, m) + (1.0 - beta) * kl(p, m),
    }[divergence]()
    length = loss.shape[-1]
    loss, valid = loss[..., : length - shift], torch.ones(loss[..., shift:].shape, dtype=torch.bool)
    if targets is not None:
        targets = targets[..., shift:]
        valid = targets != ignore_index
    if targets is not None and cross_entropy_weight:
        chosen = targets.masked_fill(~valid, 0).long().unsqueeze(-1)
        log_p = torch.log_softmax(logits[..., : length - shift, :], -1)
        nll = -log_p.gather(-1, chosen).squeeze(-1)
        loss = (1.0 - cross_entropy_weight) * loss + cross_entropy_weight * nll
    if token_weight is not None:
        loss = loss * token_weight[..., shift:].double()
    loss = loss.masked_fill(~valid, 0.0)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        count = int(valid.sum()) if num_valid_tokens is None else num_valid_tokens
        loss = loss.sum() / max(count, 1)
    return loss


def metrics_oracle(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (rows, D)
    targets: Tensor,  # (..., T)
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return accuracy, mean entropy, and how many valid tokens they are of."""
    logits = e.double() @ c.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits / temperature)[..., : targets.shape[-1] - shift, :vocab_size]
    targets = targets[..., shift:]
    valid = targets != ignore_index
    logits, targets = logits[valid], targets[valid].long()
    right = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) == logits.amax(-1)
    entropy = torch.distributions.Categorical(logits=logits).entropy() if len(logits) else logits
    divisor = valid.sum().clamp(min=1)
    return right.double().sum() / divisor, entropy.sum() / divisor, valid.sum()


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return ||actual - expected|| / max(||expected||, floor); NaN counts as infinite."""
    actual, expected = actual.detach(), expected.detach()
    difference = float((actual.double() - expected.double()).norm())
    if difference == 0.0:
        return 0.0
    norm = max(float(expected.double().norm()), floor)
    error = difference / norm if norm else float("inf")
    return error if error == error else float("inf")
