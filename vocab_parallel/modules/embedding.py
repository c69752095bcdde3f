"""The module that owns one rank's rows of the input embedding."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from vocab_parallel.agreement import RankSummary, agree
from vocab_parallel.collectives import VocabGroup
from vocab_parallel.entry import entry
from vocab_parallel.layout import target_digest
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.options import generator_of_rows

EmbeddingLayout = Literal["sharded", "replicated"]


class VocabParallelEmbedding(VocabRows):
    """An embedding [vocab_size, D] of which this rank holds rows [start, stop).

    Its partition is by default that of `VocabParallelClassifier`, so that the two ends of a
    pipeline can hold the same rows of a tied weight (`tied.py`). Every rank of the vocab group
    calls it:

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
        rows: how many each rank of the group holds; None as in `VocabParallelClassifier`.
        layout: see above.
        scale: multiplies the embeddings (Gemma's sqrt(D)).
        validate: agree over the group, at each call, that all its ids are in the vocabulary: an
            exchange of a few integers that the host waits for. None means yes on the CPU and no
            on a GPU. Without it the embedding of an id outside of the vocabulary is NaN, on every
            rank.
        device, dtype: of the rows.

    Attributes:
        weight: Parameter [stop - start, D].

    Raises:
        ValueError: a size that is not positive, counts that are no partition of the vocabulary over
            the group, an unknown layout, or a rank outside of the group.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: ProcessGroup | None,
        rows: Sequence[int] | None = None,
        layout: EmbeddingLayout = "sharded",
        scale: float = 1.0,
        validate: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, vocab_size, group, rows)
        if layout not in ("sharded", "replicated"):
            raise ValueError(f'layout must be "sharded" or "replicated", got {layout!r}')
        self.layout, self.scale, self.validate = layout, scale, validate
        self.weight = nn.Parameter(
            torch.empty(self.stop - self.start, hidden_size, device=device, dtype=dtype)
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
        """Return the embeddings [..., T, D] of ids [..., T]; all ranks of the group must call.

        Where the ids or the rows are on the meta device, so is the result, and nothing is checked
        or communicated.

        Raises:
            ValueError: ids that are not integers on the rows' device; and where ``validate``
                holds, on every rank of the group, also an id outside of the vocabulary, and ids
                that are not equally many on all ranks, or, in the "replicated" layout, not equal.
        """
        if self.weight.is_meta or getattr(ids, "is_meta", False):
            found = F.embedding(ids.to("meta"), self.weight.to("meta"))
        else:
            self._check(ids)
            flat = cast(Tensor, _Lookup.apply(self.weight, ids.reshape(-1), self))
            found = flat.view(*ids.shape, self.hidden_size)
        return found if self.scale == 1.0 else found * self.scale

    @torch.no_grad()
    def own_part(self, ids: Tensor) -> Tensor:
        """Return what this rank adds to the sum over the group: [N, D] of ids [N], unscaled.

        That is zeros where another rank has the row, and NaN on every rank where none has.
        Communicates nothing.
        """
        weight = self.weight
        owned, rows = self._owned(ids)
        known = (ids >= 0) & (ids < self.vocab_size)
        others = weight.new_zeros(ids.shape).masked_fill_(~known, math.nan).unsqueeze(1)
        if weight.shape[0] == 0:
            return others.expand(-1, weight.shape[1]).contiguous()
        found = weight[rows]
        return torch.where(owned.unsqueeze(1), found, others, out=found)

    @torch.no_grad()
    def rows_grad(self, ids: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient [rows, D] of this rank's rows, where their sum receives [N, D].

        Bitwise repeatable. Communicates nothing.
        """
        num_rows = self.weight.shape[0]
        owned, rows = self._owned(ids)
        # Tokens of other ranks' rows go to a row of padding.
        rows = torch.where(owned, rows, num_rows)
        found = torch.ops.aten.embedding_dense_backward(
            grad.contiguous(), rows, num_rows + 1, num_rows, False
        )
        return cast(Tensor, found[:-1])

    def _owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether this rank has an id's row, and which one, 0 where not."""
        owned = (ids >= self.start) & (ids < self.stop)
        return owned, (ids - self.start).masked_fill(~owned, 0)

    @entry
    def _check(self, ids: Tensor) -> None:
        validate = self.weight.is_cpu if self.validate is None else self.validate
        problem = self._problem_of(ids, reads_ids=validate)
        if validate:
            agree(
                problem,
                RankSummary(self.start, self.stop, self.vocab_size),
                self._agreed(ids) if problem is None and self.degree > 1 else {},
                VocabGroup.of(self.group),
            )
        elif problem is not None:
            raise problem

    def _problem_of(self, ids: Tensor, *, reads_ids: bool) -> ValueError | None:
        """Say what is wrong with this rank's ids; to read them is to wait for a GPU."""
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            return ValueError(f"ids of the embedding must be an int32 or int64 tensor, got {kind}")
        if ids.device != self.weight.device:
            return ValueError(
                f"ids of the embedding are on {ids.device} but its rows on {self.weight.device}: "
                f"move one"
            )
        if reads_ids and ids.numel() > 0:
            for end in torch.stack(torch.aminmax(ids)).tolist():
                if not 0 <= end < self.vocab_size:
                    return ValueError(
                        f"ids of the embedding must lie in [0, {self.vocab_size}), got {end}: they "
                        f"are ids of the whole vocabulary, not of one rank's rows, and padding "
                        f"needs one too"
                    )
        return None

    def _agreed(self, ids: Tensor) -> dict[str, Any]:
        """Name what must be equal over the group, for the ranks to communicate alike."""
        agreed = {
            "layout of the embedding": self.layout,
            "hidden size": self.hidden_size,
            "dtype of the rows": self.weight.dtype,
            "rows require grad": self.weight.requires_grad and torch.is_grad_enabled(),
            "dtype of ids": ids.dtype,
            "tokens of ids": ids.numel(),
        }
        if self.layout == "replicated":
            agreed['ids, which differ in layout="sharded" alone (their checksum)'] = target_digest(
                ids
            )
        return agreed

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
        gathers, group = module.layout == "sharded", VocabGroup.of(module.group)
        if gathers:
            ids = group.gather_tokens(ids)
        ctx.save_for_backward(ids)
        ctx.module = module
        found = module.own_part(ids)
        return group.scatter_sum(found) if gathers else group.sum(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        module: VocabParallelEmbedding = ctx.module
        if module.layout == "sharded":
            grad = VocabGroup.of(module.group).gather_tokens(grad)
        return module.rows_grad(ids, grad), None, None
