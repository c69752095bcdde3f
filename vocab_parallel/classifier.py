"""The module that owns one rank's rows of the classifier."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vocab_parallel.gathered_logits import gather_logits, replicated_input
from vocab_parallel.gradient_norm import mark_vocab_rows
from vocab_parallel.options import (
    VocabParallelOptions,
    ceiling_rows,
    generator_of_rows,
    group_rank_and_size,
)


class VocabParallelClassifier(nn.Module):
    """A linear classifier [vocab_size, D] of which this rank holds rows [start, stop).

    The rows are those of DTensor's ``Shard(0)``: ``ceil(vocab_size / V)`` a rank, so that the
    last ranks may hold fewer, or none, and a checkpoint of the DTensor loads on any mesh. It
    lives in the last pipeline stage's module, where the stage's gradient scaling, the optimizer
    and the zero-bubble split find its weight; the loss only reads it.

        pipeline_mode = True     forward(hidden [..., D]) -> hidden, unchanged
        pipeline_mode = False    forward(hidden [..., D]) -> logits [..., vocab_size]

    The second gathers the logits of every rank (all must call it, with the same hidden states) and
    is meant for a few tokens at a time. It is differentiable; its gradient of the hidden states
    is summed over the group.

    Args:
        hidden_size: D.
        vocab_size: rows of the whole classifier.
        group: the vocab group; None is the default group, or one rank alone where
            torch.distributed is not initialized.
        bias: whether the rows have a bias.
        device, dtype: of the parameters.

    Attributes:
        weight: Parameter [stop - start, D].
        bias: Parameter [stop - start], or None.

    Raises:
        ValueError: a size that is not positive, or a rank outside of the group.
    """

    bias: nn.Parameter | None
    owns_vocab_rows = True  # for clip_grad_norm_

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: ProcessGroup | None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        rank, degree = group_rank_and_size(group)
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.group = group
        self.degree = degree
        self.start, self.stop = ceiling_rows(vocab_size, rank, degree)
        self.pipeline_mode = True
        num_rows = self.stop - self.start
        self.weight = mark_vocab_rows(
            nn.Parameter(torch.empty(num_rows, hidden_size, device=device, dtype=dtype))
        )
        if bias:
            self.bias = mark_vocab_rows(
                nn.Parameter(torch.empty(num_rows, device=device, dtype=dtype))
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: ProcessGroup | None) -> Self:
        """Take this rank's rows of a whole linear layer [vocab_size, D], as a copy.

        Communicates nothing; the layer must be the same on every rank, and can be freed after.
        """
        classifier = cls(
            linear.in_features,
            linear.out_features,
            group=group,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        rows = slice(classifier.start, classifier.stop)
        for name in ("weight", "bias"):
            whole = getattr(linear, name)
            if whole is not None:
                own = nn.Parameter(whole.detach()[rows].clone(), requires_grad=whole.requires_grad)
                setattr(classifier, name, mark_vocab_rows(own))
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

    @property
    def options(self) -> VocabParallelOptions:
        """The options that tell the loss which rows these are."""
        return VocabParallelOptions(self.start, self.stop, self.group, vocab_size=self.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states in pipeline mode, else the whole logits."""
        if self.pipeline_mode:
            return hidden
        if self.degree == 1:
            return F.linear(hidden, self.weight, self.bias)
        hidden = replicated_input(hidden, self.group, self.degree)
        logits = F.linear(hidden, self.weight, self.bias)
        return gather_logits(logits, self.start, self.vocab_size, self.group, self.degree)

    def extra_repr(self) -> str:
        """Describe the rows in the module's repr."""
        return (
            f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, "
            f"rows=[{self.start}, {self.stop}), bias={self.bias is not None}"
        )
