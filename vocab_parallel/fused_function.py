"""The loss whose gradients are computed in its forward, a chunk of tokens at a time.

Each chunk's logits are made once and live only as long as the chunk is worked on:

    for each chunk    z = e c^T, statistics     and their exchange, behind the next chunk's product
                      the loss's gradient of the statistics, of this chunk's tokens
                      g in place of z, dE = g c, dC += g^T e

What is left for backward is to multiply both by the gradient that the loss receives.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vocab_parallel import collectives
from vocab_parallel.collectives import Pending
from vocab_parallel.function import (
    own_of_idle_rank,
    pull_back,
    total_hidden_grad,
    with_padding,
)
from vocab_parallel.impls import (
    BackwardTask,
    ClassifierGrad,
    ForwardTask,
    KeptLogits,
    Shard,
    Wanted,
)
from vocab_parallel.impls.passes import scale_
from vocab_parallel.impls.tiles import blocks
from vocab_parallel.pieces import HiddenGradSum
from vocab_parallel.problem import LossProblem
from vocab_parallel.second_derivative import first_derivative_only
from vocab_parallel.split_backward import wanted_inputs
from vocab_parallel.statistics import join_shards

# The loss of some tokens, from their statistics [k, n]: a number, the sum over chunks is the loss.
LossOfTokens = Callable[[Tensor, slice], Tensor]


@dataclass
class _Chunk:
    """Some tokens between their two halves of the work."""

    tokens: slice
    shard: Shard | None
    kept: KeptLogits | None
    gathered: Pending


class VocabLoss(torch.autograd.Function):
    """The scalar loss over all the group's tokens, equal on every rank."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (T, D), this rank's
        classifier: Tensor,  # (rows, D)
        bias: Tensor | None,  # (rows,)
        targets: Tensor,  # (N,), rows of this shard, or outside of them
        problem: LossProblem,
        loss_of: LossOfTokens,
    ) -> Tensor:
        """Compute the loss and its gradients; gathers statistics, and sums the hidden states'."""
        shard = problem.shard
        if problem.layout.gathers:
            hidden = collectives.gather_tokens(hidden, shard.group, shard.degree)
        wanted = Wanted(*(need and problem.grad_enabled for need in ctx.needs_input_grad[:3]))
        work = _Work(problem, hidden, classifier, bias, targets, wanted, loss_of)
        loss = work.run()
        ctx.gradients = dict(zip(wanted._fields, work.gradients(), strict=True))
        ctx.save_for_backward(hidden, classifier, bias, targets, work.statistics)
        ctx.problem, ctx.loss_of = problem, loss_of
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradients, times the one that the loss receives; each once."""
        hidden, classifier, bias, targets, statistics = ctx.saved_tensors
        problem: LossProblem = ctx.problem
        wanted = Wanted(*wanted_inputs(ctx, (True, True, bias is not None)))
        names = [name for name, want in zip(wanted._fields, wanted, strict=True) if want]
        if all(ctx.gradients[name] is not None for name in names):
            found = {name: scale_(ctx.gradients[name], grad) for name in names}
            ctx.gradients.update(dict.fromkeys(names))
            if wanted.classifier:
                rows = found.pop("classifier")
                target = problem.classifier_grad(classifier).add_to
                if target is None:
                    found["classifier"] = with_padding(rows, classifier)
                else:  # of the rows that are tokens; the others get nothing
                    target.add_(rows[: target.shape[0]])
            return (*(found.get(name) for name in wanted._fields), None, None, None)
        # They were handed out before, and may belong to a parameter now: a graph that is run
        # again makes them again.
        _, grads = _differentiate(statistics, slice(0, hidden.shape[0]), ctx.loss_of)
        again = pull_back(
            problem, (hidden, classifier, bias), targets, statistics, grads * grad, wanted
        )
        return (*again, None, None, None)


class _Work:
    """One forward's way through its chunks."""

    def __init__(
        self,
        problem: LossProblem,
        hidden: Tensor,
        classifier: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        wanted: Wanted,
        loss_of: LossOfTokens,
    ) -> None:
        self._problem, self._wanted, self._loss_of = problem, wanted, loss_of
        self._hidden, self._classifier, self._bias = hidden, classifier, bias
        self._local = problem.local(hidden, classifier, bias, targets, any(wanted))
        num_tokens = hidden.shape[0]
        size = max(problem.chunk_tokens, 1)
        self._chunks = list(blocks(num_tokens, size)) or [slice(0, 0)]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.statistics = hidden.new_empty((len(problem.names), num_tokens), dtype=dtype)
        self._reduction: HiddenGradSum | None = None
        if wanted.hidden:
            self._reduction = problem.hidden_grad_sum(hidden, pieces=self._chunks)
        self._partial: Tensor | None = None  # of the hidden states, [N, D]
        self._row_grad: Tensor | None = None
        self._bias_grad: Tensor | None = None

    def run(self) -> Tensor:
        """Return the loss; afterwards `gradients` and `statistics` are there."""
        # With one rank there is nothing to hide, and one buffer of logits is enough.
        ahead = self._problem.shard.degree > 1 and self._problem.impl.overlap
        loss: Tensor | None = None
        waiting: list[_Chunk] = []
        for tokens in self._chunks:
            waiting.append(self._begin(tokens))
            if len(waiting) > ahead:
                part = self._end(waiting.pop(0))
                loss = part if loss is None else loss + part
        for chunk in waiting:
            part = self._end(chunk)
            loss = part if loss is None else loss + part
        assert loss is not None
        return loss

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients for a loss that receives 1, in the parameters' dtypes."""
        wanted, bias = self._wanted, self._bias
        hidden_grad = None
        if wanted.hidden:
            hidden_grad = total_hidden_grad(
                self._partial, self._hidden, self._reduction, self._problem
            )
        return (
            hidden_grad,
            self._rows_total() if wanted.classifier else None,
            with_padding(self._bias_grad, bias) if wanted.bias and bias is not None else None,
        )

    def _rows_total(self) -> Tensor:
        """Return the classifier's gradient; as it was summed where it will be added to a sum."""
        found = self._row_grad
        if found is not None and self._problem.weight_grad is not None:
            return found
        return with_padding(found, self._classifier)

    def _begin(self, tokens: slice) -> _Chunk:
        problem, group = self._problem, self._problem.shard.group
        if self._local is None:
            own = own_of_idle_rank(self._hidden[tokens], problem)
            shard, kept = None, None
        else:
            shard = replace(
                self._local,
                hidden=self._local.hidden[tokens],
                targets=self._local.targets[tokens],
            )
            keep = shard.classifier.shape[0] if any(self._wanted) else 0
            task = ForwardTask(problem.names, keep_rows=keep)
            own, _, kept = problem.impl.forward(shard, task)
        gathered = collectives.start_gather_shards(own, group, problem.shard.degree)
        return _Chunk(tokens, shard, kept, gathered)

    def _end(self, chunk: _Chunk) -> Tensor:
        problem, wanted = self._problem, self._wanted
        statistics = join_shards(chunk.gathered.wait(), problem.names)
        self.statistics[:, chunk.tokens] = statistics
        if not any(wanted):
            return self._loss_of(statistics, chunk.tokens)
        loss, grads = _differentiate(statistics, chunk.tokens, self._loss_of)
        if chunk.shard is not None:
            task = BackwardTask(
                problem.names,
                statistics,
                grads,
                wanted,
                self._classifier_grad(),
                kept=chunk.kept,
            )
            hidden_grad, row_grad, bias_grad = problem.impl.backward(chunk.shard, task)
            self._row_grad = row_grad
            if bias_grad is not None:
                self._bias_grad = (
                    bias_grad if self._bias_grad is None else self._bias_grad + bias_grad
                )
            self._place(hidden_grad, chunk.tokens)
        if self._reduction is not None:
            self._place(None, chunk.tokens)
            assert self._partial is not None
            self._reduction.complete(self._partial, chunk.tokens.stop)
        return loss

    def _classifier_grad(self) -> ClassifierGrad:
        """Write the first chunk's product, and add the others', in float32 if there are some."""
        if self._row_grad is not None:
            return ClassifierGrad(self._row_grad.dtype, self._row_grad)
        wide = len(self._chunks) > 1 or self._problem.weight_grad is not None
        return ClassifierGrad(self.statistics.dtype if wide else self._classifier.dtype)

    def _place(self, hidden_grad: Tensor | None, tokens: slice) -> None:
        """Put a chunk's gradient [n, D] in its place among all tokens'."""
        if len(self._chunks) == 1 and hidden_grad is not None:
            self._partial = hidden_grad
            return
        if self._partial is None:
            summed = self._reduction is not None
            dtype = self._problem.sum_dtype(self._hidden.dtype)
            self._partial = self._hidden.new_zeros(
                self._hidden.shape, dtype=dtype if summed else self._hidden.dtype
            )
        if hidden_grad is not None:
            self._partial[tokens] = hidden_grad


def _differentiate(
    statistics: Tensor, tokens: slice, loss_of: LossOfTokens
) -> tuple[Tensor, Tensor]:
    """Return the loss of some tokens and its gradient by their statistics [k, n]."""
    with torch.enable_grad():
        leaf = statistics.detach().requires_grad_()
        loss = loss_of(leaf, tokens)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]
