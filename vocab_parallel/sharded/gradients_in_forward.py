"""The loss with its gradients, a chunk of tokens at a time: S and T of each, one after the other.

Each chunk's logits are made once and live only as long as the chunk is worked on:

    for each chunk    z = e c^T, statistics     and their exchange, behind the next chunk's product
                      the loss's gradient of the statistics, of this chunk's tokens
                      g in place of z, dE = g c, dC += g^T e

What is left for backward is to multiply both by the gradient that the loss receives.
"""

from torch import Tensor

from vocab_parallel.collectives import Pending
from vocab_parallel.local.backward_plan import blocks
from vocab_parallel.local.interface import (
    ClassifierGrad,
    Gradients,
    Upstream,
    Wanted,
)
from vocab_parallel.local.statistics import Statistics, join
from vocab_parallel.sharded.call import Call
from vocab_parallel.sharded.exchange import HiddenGradSpans, HiddenGradSum
from vocab_parallel.sharded.halves import (
    Inputs,
    RowSums,
    hidden_grad_spans,
    hidden_grad_sum,
    is_long,
    own_gradients,
    own_statistics,
    spans_total,
    total_hidden_grad,
    with_padding,
)
from vocab_parallel.sharded.token_loss import TokenLoss

# Some tokens between their two halves: which, what S kept of them, their statistics under way.
_Chunk = tuple[slice, object, Pending]


class LossWithGradients:
    """One forward's way through its chunks; all ranks of the group make it and call alike.

    Attributes:
        statistics: [k, N], of the whole vocabulary once `run` has returned.
    """

    def __init__(
        self,
        call: Call,
        inputs: Inputs,
        wanted: Wanted,
        loss: TokenLoss,
    ) -> None:
        self._call, self._inputs, self._wanted, self._loss = call, inputs, wanted, loss
        num_tokens = inputs.hidden.shape[0]
        size = max(call.plan.chunk_tokens, 1)
        self._chunks = list(blocks(num_tokens, size)) or [slice(0, 0)]
        self.statistics = Statistics.empty(call.shard.names, num_tokens, inputs.hidden)
        self._reduction: HiddenGradSum | None = None
        self._spans: HiddenGradSpans | None = None  # in its place, in a long call
        if wanted.hidden and is_long(call, inputs):
            self._spans = hidden_grad_spans(call, inputs.hidden)
        elif wanted.hidden:
            self._reduction = hidden_grad_sum(call, inputs.hidden, pieces=self._chunks)
        self._hidden_grad: Tensor | None = None  # partial, [N, D]
        # The first chunk's product is written, and the others' added, in float32 if there are some.
        wide = len(self._chunks) > 1 or call.settings.accumulate_into is not None
        dtype = self.statistics.values.dtype if wide else inputs.classifier.dtype
        self._row_sums = RowSums(ClassifierGrad(dtype))

    def run(self) -> Tensor:
        """Return the loss; afterwards `gradients` and `statistics` are there."""
        # With one rank there is nothing to hide, and one buffer of logits is enough.
        ahead = self._call.rows.group.degree > 1 and self._call.impl.overlap is not False
        parts: list[Tensor] = []
        waiting: list[_Chunk] = []
        for tokens in self._chunks:
            waiting.append(self._begin(tokens))
            if len(waiting) > ahead:
                parts.append(self._end(waiting.pop(0)))
        parts += [self._end(chunk) for chunk in waiting]
        loss = parts[0]
        for part in parts[1:]:
            loss = loss + part
        return loss

    def gradients(self) -> Gradients:
        """Return the gradients for a loss that receives 1, in the parameters' dtypes.

        That of the classifier stays as it was summed where it will be added to an accumulator.
        """
        call, inputs, wanted = self._call, self._inputs, self._wanted
        hidden = None
        if self._spans is not None:
            hidden = spans_total(call, self._spans)
        elif wanted.hidden:
            hidden = total_hidden_grad(call, self._hidden_grad, inputs.hidden, self._reduction)
        classifier = None
        if wanted.classifier:
            classifier = self._row_sums.classifier
            if classifier is None or call.settings.accumulate_into is None:
                classifier = with_padding(classifier, inputs.classifier)
        bias = None
        if wanted.bias and inputs.bias is not None:
            bias = with_padding(self._row_sums.bias, inputs.bias)
        return Gradients(hidden, classifier, bias)

    def _begin(self, tokens: slice) -> _Chunk:
        call = self._call
        own, kept = own_statistics(call, self._inputs.of(tokens), needs_grad=any(self._wanted))
        return tokens, kept, call.rows.group.start_gather_shards(own.values)

    def _end(self, chunk: _Chunk) -> Tensor:
        names = self.statistics.names
        tokens, kept, gathered = chunk
        statistics = Statistics(join(gathered.wait(), names), names)
        self.statistics.values[:, tokens] = statistics.values
        loss, grads = self._loss.part(statistics.values, tokens)
        if any(self._wanted):
            received = self._call.shard.grad_names
            upstream = Upstream(
                statistics.first(received),
                Statistics(grads, names).first(received),
                self._wanted,
                self._row_sums.target,
                kept,
            )
            found = own_gradients(self._call, self._inputs.of(tokens), upstream)
            self._row_sums.add(found)
            self._place(found.hidden, tokens)
        return loss

    def _place(self, hidden_grad: Tensor | None, tokens: slice) -> None:
        """Put a chunk's gradient [n, D] in its place among all tokens', and communicate it."""
        if not self._wanted.hidden:
            return
        if self._spans is not None:
            self._spans.add(hidden_grad, tokens)
            return
        hidden = self._inputs.hidden
        if len(self._chunks) == 1 and hidden_grad is not None:
            self._hidden_grad = hidden_grad
        else:
            if self._hidden_grad is None:
                dtype = self._call.shard.sum_dtype
                self._hidden_grad = hidden.new_zeros(hidden.shape, dtype=dtype)
            if hidden_grad is not None:
                self._hidden_grad[tokens] = hidden_grad
        if self._reduction is not None:
            self._reduction.complete(self._hidden_grad, tokens.stop)
