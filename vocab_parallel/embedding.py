"""The module that owns one rank's rows of the input embedding."""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vocab_parallel import collectives
from vocab_parallel.gradient_norm import mark_vocab_rows
from vocab_parallel.options import ceiling_rows, generator_of_rows, group_rank_and_size

EmbeddingLayout = Literal["sharded", "replicated"]


class VocabParallelEmbedding(nn.Module):
    """An embedding [vocab_size, D] of which this rank holds rows [start, stop).

    The rows are those of `VocabParallelClassifier`, so that the two ends of a pipeline can hold
    the same ones of a tied weight (`tied.py`). Every rank of the vocab group calls it:

        layout = "sharded"       ids [..., T] are this rank's own, equally many on every rank: they
                                 are gathered (8 bytes a token), and the embeddings, of which each
                                 rank has some, come back by a reduce-scatter of [V T, D]
        layout = "replicated"    ids are the same on every rank, and [T, D] is all-reduced

    in the rows' dtype, exactly, since all but one rank add zeros. Backward gathers the gradients
    [T, D] in the first layout and communicates nothing in the second; a rank's gradient is
    complete: that of all the group's tokens.

    Args:
        hidden_size: D.
        vocab_size: rows of the whole embedding.
        group: the vocab group; None as in `VocabParallelClassifier`.
        layout: see above.
        scale: multiplies the embeddings (Gemma's sqrt(D)).
        device, dtype: of the rows.

    Attributes:
        weight: Parameter [stop - start, D].

    Raises:
        ValueError: a size that is not positive, an unknown layout, or a rank outside of the group.
    """

    owns_vocab_rows = True  # for clip_grad_norm_

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: ProcessGroup | None,
        layout: EmbeddingLayout = "sharded",
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if layout not in ("sharded", "replicated"):
            raise ValueError(f'layout must be "sharded" or "replicated", got {layout!r}')
        rank, self.degree = group_rank_and_size(group)
        self.hidden_size, self.vocab_size, self.group = hidden_size, vocab_size, group
        self.layout, self.scale = layout, scale
        self.start, self.stop = ceiling_rows(vocab_size, rank, self.degree)
        self.weight = mark_vocab_rows(
            nn.Parameter(
                torch.empty(self.stop - self.start, hidden_size, device=device, dtype=dtype)
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rows from nn.Embedding's distribution, N(0, 1)."""
        if self.weight.is_meta:
            return
        generator = generator_of_rows(self.weight.device, self.start)
        with torch.no_grad():
            self.weight.normal_(generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..., T, D] of ids [..., T]."""
        flat = _Lookup.apply(self.weight, ids.reshape(-1), self)
        found = cast(Tensor, flat).view(*ids.shape, self.hidden_size)
        return found if self.scale == 1.0 else found * self.scale

    def extra_repr(self) -> str:
        """Describe the rows in the module's repr."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, "
            f"rows=[{self.start}, {self.stop}), layout={self.layout!r}"
        )


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, module: VocabParallelEmbedding
    ) -> Tensor:  # (T, D)
        gathers = module.layout == "sharded"
        if gathers:
            ids = collectives.gather_tokens(ids, module.group, module.degree)
        owned = (ids >= module.start) & (ids < module.stop)
        rows = (ids - module.start).masked_fill(~owned, 0)
        if weight.shape[0] == 0:
            found = weight.new_zeros((ids.shape[0], weight.shape[1]))
        else:
            found = weight[rows].masked_fill_(~owned.unsqueeze(1), 0.0)
        ctx.save_for_backward(rows, owned)
        ctx.module, ctx.num_rows = module, weight.shape[0]
        join = collectives.scatter_sum if gathers else collectives.sum_over_group
        return join(found, module.group, module.degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, owned = ctx.saved_tensors
        module: VocabParallelEmbedding = ctx.module
        if module.layout == "sharded":
            grad = collectives.gather_tokens(grad, module.group, module.degree)
        if ctx.num_rows == 0:
            return grad.new_zeros((0, grad.shape[1])), None, None
        # Tokens of other ranks' rows go to a row of padding.
        rows = torch.where(owned, rows, ctx.num_rows)
        found = torch.ops.aten.embedding_dense_backward(
            grad.contiguous(), rows, ctx.num_rows + 1, ctx.num_rows, False
        )
        return found[:-1], None, None
