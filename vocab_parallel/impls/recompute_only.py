"""What the implementations share that make the logits anew in backward."""

from torch import Tensor

from vocab_parallel.impls.base import Choice, ClassifierGrad, Demand


def placed(gradient: Tensor | None, target: ClassifierGrad) -> Tensor | None:
    """Bring a finished gradient where it is to go, for who cannot compute it there."""
    if gradient is None or target.add_to is None:
        return gradient if gradient is None else gradient.to(target.dtype)
    return target.add_to.add_(gradient)


class RecomputeOnly:
    """Base of implementations that make the logits anew in backward, and report no progress."""

    @property
    def overlap(self) -> bool:
        """See `LocalImpl`: nothing is reported while it works."""
        return False

    def way(self, demand: Demand) -> Choice:
        """See `LocalImpl.way`."""
        return Choice("recompute", demand.tokens)

    def refuse_other_ways(self, demand: Demand) -> None:
        """Raise ValueError where the caller names another way."""
        if demand.backward not in ("auto", "recompute"):
            raise ValueError(
                f'backward="{demand.backward}" is done by impl="chunked" alone; this one makes '
                f'the logits anew in backward: use backward="recompute" or "auto"'
            )
