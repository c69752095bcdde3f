"""The tensors of one call."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operands:
    """The tensors of a call; autocast has been applied to the first two.

    Attributes:
        hidden: [..., T, D]; [H, ..., T, D] where each position makes H predictions.
        classifier: [rows, D].
        targets: [..., T], or None where a call has none.
        bias: [rows] or None.
        token_weight: [..., T] or None.
        document_ids: [..., T] or None.
    """

    hidden: Tensor
    classifier: Tensor
    targets: Tensor | None
    bias: Tensor | None = None
    token_weight: Tensor | None = None
    document_ids: Tensor | None = None

    @classmethod
    def of(
        cls,
        e: Tensor,
        c: Tensor,
        targets: Tensor | None,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> "Operands":
        """Cast hidden states and classifier as autocast casts the operands of a linear layer."""
        tensors = isinstance(e, Tensor) and isinstance(c, Tensor)
        if tensors and not e.is_meta and torch.is_autocast_enabled(e.device.type):
            dtype = torch.get_autocast_dtype(e.device.type)
            e, c = (t if t.dtype == torch.float64 else t.to(dtype) for t in (e, c))
        return cls(e, c, targets, bias, token_weight, document_ids)

    @property
    def flat_hidden(self) -> Tensor:
        """[T, D], this rank's tokens in one row."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order in which they are named."""
        return (
            self.hidden, self.classifier, self.targets, self.bias, self.token_weight,
            self.document_ids,
        )  # fmt: skip
