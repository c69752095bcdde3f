"""The gradients of a rank's rows, added up over parts of the tokens."""

from torch import Tensor

from vocab_parallel.local.interface import ClassifierGrad, Gradients


class RowSums:
    """Adds up what each part of the tokens gives, by the product that makes it.

    Attributes:
        classifier: [R, D], the sum so far, or None.
        bias: [R], or None.
    """

    def __init__(self, target: ClassifierGrad) -> None:
        self._target = target
        self.classifier: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def target(self) -> ClassifierGrad:
        """Where the classifier's gradient of the next part goes."""
        if self.classifier is None:
            return self._target
        return ClassifierGrad(self.classifier.dtype, self.classifier)

    def add(self, found: Gradients) -> None:
        """Take what a part gave; that of the classifier is in its place already."""
        if found.classifier is not None:
            self.classifier = found.classifier
        if found.bias is not None:
            self.bias = found.bias if self.bias is None else self.bias + found.bias
