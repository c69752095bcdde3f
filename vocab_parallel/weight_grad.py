"""Adding the classifier's gradient where it is accumulated, by the product that computes it."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

AccumulateInto = Literal["grad", "main_grad"]


@dataclass(frozen=True)
class WeightGrad:
    """The classifier's own parameter, and the attribute that its gradient is added to.

    Read in backward, not before: an optimizer may free and replace it in between.
    """

    parameter: Tensor
    attribute: AccumulateInto

    def destination(self) -> Tensor | None:
        """Return the tensor [rows, D] to add to; None where autograd is to make ``.grad``."""
        found: Tensor | None = getattr(self.parameter, self.attribute, None)
        if found is None and self.attribute == "main_grad":
            raise RuntimeError(
                "the classifier's main_grad was removed between forward and backward"
            )
        return found


def weight_grad_of(classifier: Tensor, accumulate_into: str | None) -> WeightGrad | None:
    """Check that the classifier's gradient can be accumulated as asked.

    Raises:
        ValueError: an unknown name, a classifier that is no plain leaf, or one without a
            ``main_grad`` in float32 of its shape.
    """
    if accumulate_into is None:
        return None
    if accumulate_into not in get_args(AccumulateInto):
        raise ValueError(
            f"unknown accumulate_into {accumulate_into!r}: known are "
            f"{[None, *get_args(AccumulateInto)]}"
        )
    if isinstance(classifier, DTensor) or not (classifier.is_leaf and classifier.requires_grad):
        raise ValueError(
            "accumulate_into adds to an attribute of the parameter itself, but c is not a plain "
            "leaf that requires a gradient (a DTensor's local rows, a cast by autocast and a view "
            "are none): pass the parameter, or leave accumulate_into out"
        )
    if accumulate_into == "main_grad":
        found = getattr(classifier, "main_grad", None)
        dtype = torch.promote_types(classifier.dtype, torch.float32)
        if found is None or found.shape != classifier.shape or found.dtype != dtype:
            come = "none" if found is None else f"{list(found.shape)} in {found.dtype}"
            raise ValueError(
                f'accumulate_into="main_grad" needs c.main_grad {list(classifier.shape)} in '
                f"float32 (float64 for float64), got {come}: make it before the first step"
            )
    return WeightGrad(classifier, cast(AccumulateInto, accumulate_into))
