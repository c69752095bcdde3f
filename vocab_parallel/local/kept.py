"""What stays of a forward for its backward."""

from torch import Tensor


class Kept:
    """What forward kept of the logits [N, r] of a shard's first rows, for backward to use once.

    Raw logits are turned into their gradient in place: under a split backward the inputs' half
    leaves them as they are, and the weights' half pops them. Exponentials of whole shards stay,
    but for their targets' places, where 0 is written. Who comes later (a backward that is run
    again) makes logits anew.

    Attributes:
        num_rows: r; the buffer may be wider.
        reference: [N], what exponentials are relative to, or None: raw logits are kept.
    """

    def __init__(self, values: Tensor, num_rows: int, reference: Tensor | None) -> None:
        self._values: Tensor | None = values
        self.num_rows = num_rows
        self.reference = reference

    def peek(self) -> Tensor | None:
        """Return what was kept, not to be used up; None where it is gone."""
        return self._values

    def pop(self) -> Tensor | None:
        """Return what was kept and forget it; None where it is gone."""
        values, self._values = self._values, None
        return values
