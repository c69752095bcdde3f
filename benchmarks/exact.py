"""Gradients in float64, and how far others are from them; over a group each rank has its rows."""

import torch
from torch import Tensor

from benchmarks.contestants import Gradients, Operands

CHUNK = 1024  # tokens at a time


def exact_gradients(operands: Operands) -> Gradients:
    """Compute both gradients of replicated operands, some tokens at a time.

    Where they are a group's, each of its ranks calls: [3, CHUNK] statistics are gathered, and the
    hidden states' gradient is summed.
    """
    count, group = operands.targets.numel(), operands.group
    rows = operands.rows.detach().double()
    hidden_grad = torch.empty_like(operands.hidden, dtype=torch.float64, requires_grad=False)
    rows_grad = torch.zeros_like(rows)
    for start in range(0, count, CHUNK):
        tokens = slice(start, start + CHUNK)
        hidden = operands.hidden.detach()[tokens].double()
        logits_grad = _logits_gradient(hidden @ rows.T, operands, tokens).div_(count)
        hidden_grad[tokens] = logits_grad @ rows
        rows_grad.addmm_(logits_grad.T, hidden)
    return group.sum(hidden_grad), rows_grad


def _logits_gradient(logits: Tensor, operands: Operands, tokens: slice) -> Tensor:
    """Return softmax - [is target], in the logits' place.

    The target's entry is minus the sum of the others: 1 - p of a confident token cancels.
    """
    local = (operands.targets[tokens] - operands.shard.start).unsqueeze(1)
    owned = (local >= 0) & (local < logits.shape[1])
    local = torch.where(owned, local, 0)
    peak = logits.amax(1, keepdim=True)
    target = torch.where(owned, logits.gather(1, local), -torch.inf)
    weights = logits.sub_(peak).exp_()
    weights.scatter_(1, local, torch.where(owned, 0.0, weights.gather(1, local)))
    others = weights.sum(1, keepdim=True)

    peaks, sums, targets = operands.group.gather_shards(torch.stack([peak, others, target])).unbind(
        1
    )
    highest = peaks.amax(0)
    others = (sums * (peaks - highest).exp()).sum(0)
    total = others + (targets - highest).exp().sum(0)
    weights.mul_((peak - highest).exp()).div_(total)
    return weights.scatter_(1, local, torch.where(owned, -others / total, weights.gather(1, local)))


def relative_errors(found: Gradients, exact: Gradients, operands: Operands) -> dict[str, float]:
    """Return |found - exact| / |exact| of dE and dC over all of the group's ranks, which all call.

    Args:
        found: what a contestant made of these operands, in their layout.
        exact: of the same operands, replicated.
    """
    want = (exact[0][operands.own_tokens], exact[1])
    squares = torch.stack(
        [
            torch.stack([(got.double() - right).square().sum(), right.square().sum()])
            for got, right in zip(found, want, strict=True)
        ]
    )
    difference, norm = operands.group.sum(squares).sqrt().unbind(1)
    return dict(zip(("dE", "dC"), (difference / norm).tolist(), strict=True))
