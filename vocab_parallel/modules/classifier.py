"""The module that owns one rank's rows of the classifier."""

import math
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.modules.heads import LowRank, OutputWeight
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.options import VocabParallelOptions, generator_of_rows
from vocab_parallel.partition import row_range
from vocab_parallel.statistics import accumulation_dtype


class VocabParallelClassifier(VocabRows):
    """A linear classifier [vocab_size, D] of which this rank holds rows [start, stop).

    It lives in the last pipeline stage's module, where the stage's gradient scaling, the optimizer
    and the zero-bubble split find its weight; the loss only reads it. Its state dict names the rows
    as parts of the whole, so that a checkpoint loads on any number of ranks (`VocabRows`), and
    ``gather_rows(weight)`` gives each rank the whole.

        pipeline_mode = True     forward(hidden [..., D]) -> hidden, unchanged
        pipeline_mode = False    forward(hidden [..., D]) -> logits [..., vocab_size]

    The second gathers the logits of every rank (all must call it, with the same hidden states) and
    is meant for a few tokens at a time. It is differentiable; its gradient of the hidden states
    is summed over the group. On the meta device it gives their shape alone and communicates
    nothing. A deep copy is of the same group; `VocabRows` says what is pickled.

    Args:
        hidden_size: D.
        vocab_size: rows of the whole classifier.
        group: the vocab group; None is the default group, or one rank alone where
            torch.distributed is not initialized.
        rows: how many rows each rank of the group holds, by rank, `filled_rows` for instance. None
            are those of DTensor's ``Shard(0)``: ``ceil(vocab_size / V)`` a rank, so that the last
            ranks may hold fewer, or none.
        bias: whether the rows have a bias.
        device, dtype: of the parameters.

    Attributes:
        weight: Parameter [stop - start, D].
        bias: Parameter [stop - start], or None.
        lora_A, lora_B: Parameters [r, D], equal on every rank, and [stop - start, r], or None: an
            adapter, whose logits ``lora_scale`` B A e are added; `from_linear` takes it over.

    Raises:
        ValueError: a size that is not positive, counts that are no partition of the vocabulary over
            the group, or a rank outside of the group.
    """

    bias: nn.Parameter | None
    lora_A: nn.Parameter | None  # noqa: N815 (as PEFT calls it)
    lora_B: nn.Parameter | None  # noqa: N815
    row_names = ("weight", "bias", "lora_B")
    logits_are_linear = True  # for OutputWeight

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: ProcessGroup | None,
        rows: Sequence[int] | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, vocab_size, group, rows)
        self.pipeline_mode = True
        num_rows = self.stop - self.start
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size, device=device, dtype=dtype))
        own_bias = torch.empty(num_rows, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if own_bias is None else nn.Parameter(own_bias))
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.lora_scale = 1.0
        self.lora_dropout: nn.Module | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        group: ProcessGroup | None,
        *,
        rows: Sequence[int] | None = None,
    ) -> Self:
        """Take this rank's rows of a whole linear layer [vocab_size, D], as a copy.

        Communicates nothing; the layer must be the same on every rank, and can be freed after.

        Args:
            linear: nn.Linear, or a LoRA layer of PEFT's over one with one adapter or none: the
                rows of W and B are this rank's, A is whole.
            group: the vocab group.
            rows: how many each rank holds; None as in the constructor.

        Raises:
            ValueError: a layer whose logits may be more than that, several adapters, or counts that
                are no partition of its rows over the group.
        """
        whole = OutputWeight(linear).read()
        if len(whole.adapters) > 1:
            raise ValueError(
                f"expected one adapter of the classifier to shard, got {len(whole.adapters)}: "
                f"activate one, or merge the others"
            )
        vocab_size, hidden_size = whole.weight.shape
        classifier = cls(
            hidden_size,
            vocab_size,
            group=group,
            rows=rows,
            bias=whole.bias is not None,
            device="meta",
            dtype=whole.weight.dtype,
        )
        own = slice(classifier.start, classifier.stop)
        classifier.weight = _copied(whole.weight, own)
        if whole.bias is not None:
            classifier.bias = _copied(whole.bias, own)
        for adapter in whole.adapters:
            classifier.lora_A = _copied(adapter.a, slice(None))
            classifier.lora_B = _copied(adapter.b, own)
            classifier.lora_scale = adapter.scale
            classifier.lora_dropout = adapter.dropout
        return classifier

    def reset_parameters(self) -> None:
        """Draw the rows from nn.Linear's distribution, U(-1 / sqrt(D), 1 / sqrt(D))."""
        if self.weight.is_meta:
            return
        generator = generator_of_rows(self.weight.device, self.start)
        bound = 1.0 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def get_output_embeddings(self) -> Self:
        """Return itself, as models expect of a head that is more than an nn.Linear (Forgather)."""
        return self

    @property
    def low_rank(self) -> LowRank | None:
        """The adapter of the rows, for `OutputWeight`; None where there is none."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return LowRank(self.lora_A, self.lora_B, self.lora_scale, self.lora_dropout)

    @property
    def options(self) -> VocabParallelOptions:
        """The options that tell the loss which rows these are."""
        return VocabParallelOptions(
            self.start,
            self.stop,
            self.group,
            vocab_size=self.vocab_size,
            largest_shard=max(self.row_counts),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states in pipeline mode, else the whole logits."""
        if self.pipeline_mode:
            return hidden
        if hidden.is_meta or self.weight.is_meta:
            shape = (self.vocab_size, self.hidden_size)
            whole = self.weight.new_empty(
                shape, device="meta", requires_grad=self.weight.requires_grad
            )
            return F.linear(hidden.to("meta"), whole)
        group = VocabGroup.of(self.group)
        e, c = OutputWeight(self).read().operands(hidden)
        logits = F.linear(cast(Tensor, _ReplicatedInput.apply(e, group)), c, self.bias)
        return cast(Tensor, _GatherLogits.apply(logits, self.row_counts, group))

    def extra_repr(self) -> str:
        """Describe the rows in the module's repr."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, "
            f"rows=[{self.start}, {self.stop}), bias={self.bias is not None}"
        )


def _copied(whole: Tensor, rows: slice) -> nn.Parameter:
    return nn.Parameter(whole.detach()[rows].clone(), requires_grad=whole.requires_grad)


class _ReplicatedInput(torch.autograd.Function):
    """Hidden states [..., D] unchanged; their gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: VocabGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group: VocabGroup = ctx.group
        partial = grad.to(accumulation_dtype(grad.dtype), copy=True)
        return group.sum(partial).to(grad.dtype), None


class _GatherLogits(torch.autograd.Function):
    """The columns of every rank's logits [..., rows]; backward takes this rank's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row_counts: Sequence[int], group: VocabGroup) -> Tensor:
        ctx.own = slice(*row_range(row_counts, group.rank))
        padding = max(row_counts) - logits.shape[-1]
        gathered = group.gather_tokens(F.pad(logits, (0, padding)).unsqueeze(0))  # [V, ..., most]
        columns = [of_rank[..., :n] for of_rank, n in zip(gathered, row_counts, strict=True)]
        return torch.cat(columns, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[..., ctx.own].contiguous(), None, None
