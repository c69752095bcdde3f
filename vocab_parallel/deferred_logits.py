"""Logits that are not computed: what a model does to them before its loss is noted instead.

A causal model of transformers multiplies hidden states by its classifier, scales or caps the
logits, shifts and flattens them, and calls ``F.cross_entropy``. `DeferredLogits` takes the logits'
place on that way: a tensor without memory that holds the hidden states, and whose
``F.cross_entropy`` is `linear_cross_entropy`. So the model's own code says how its loss is made.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Recipe:
    """What logits are made of: ``inner * product``, or ``outer * tanh(inner * product)``.

    Attributes:
        hidden: [..., D], the classifier's input.
        classifier: gives the product [..., vocab_size] where it is wanted after all.
        vocab_size: rows of the whole classifier.
        loss: stands for F.cross_entropy: ``loss(hidden, targets, softcap=, temperature=,
            ignore_index=, reduction=)``, with label_smoothing where the model has one.
        dtype: that the logits would have.
        may_compute: tells whether the model is done with its loss.
        inner, outer: constants; ``outer`` is None where there is no tanh.
    """

    hidden: Tensor
    classifier: Callable[[Tensor], Tensor]
    vocab_size: int
    loss: Callable[..., Tensor]
    dtype: torch.dtype
    may_compute: Callable[[], bool]
    inner: float = 1.0
    outer: float | None = None

    def scaled(self, factor: float) -> "Recipe":
        """Multiply the logits."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)

    def settings(self) -> dict[str, Any]:
        """Return the softcap s and the temperature t of ``s tanh(product / s) / t``."""
        if self.outer is None:
            return {"softcap": None, "temperature": 1.0 / self.inner}
        scale = self.inner * self.outer
        # The product of a cap and its inverse is meant to be 1.
        scale = 1.0 if math.isclose(scale, 1.0) else scale
        return {"softcap": 1.0 / self.inner, "temperature": 1.0 / scale}

    def computed(self) -> Tensor:
        """Return the logits [..., vocab_size].

        Raises:
            ValueError: the classifier gives others, as one of a vocab group may.
        """
        logits = self.classifier(self.hidden)
        if logits.shape[-1] != self.vocab_size:
            raise ValueError(
                f"expected a classifier that gives whole logits [..., {self.vocab_size}], got "
                f"{list(logits.shape)}: set pipeline_mode=False of a VocabParallelClassifier, or "
                f"output_layouts=Replicate() of ColwiseParallel, to read them"
            )
        if self.inner != 1.0:
            logits = logits * self.inner
        if self.outer is not None:
            logits = logits.tanh() * self.outer
        return logits.to(self.dtype)


class DeferredLogits(Tensor):
    """Logits [..., vocab_size] without memory.

    Until the model is done with its loss, casts, views, indices of tokens, constant factors and
    one tanh are noted, each in a new tensor, and F.cross_entropy with ids as targets is the loss.
    After that whatever touches them, but for a cast, computes them, once.

    Raises:
        ValueError: something else touches them before.
    """

    recipe: Recipe
    _real: Tensor | None

    @staticmethod
    def __new__(cls, recipe: Recipe) -> "DeferredLogits":
        """Make a tensor of the logits' shape."""
        shape = (*recipe.hidden.shape[:-1], recipe.vocab_size)
        self: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=recipe.dtype, device=recipe.hidden.device
        )
        self.recipe, self._real = recipe, None
        return self

    def computed(self, what: str) -> Tensor:
        """Return real logits, the same ones at each call, for an operation of this name."""
        if not self.recipe.may_compute():
            raise ValueError(
                f"expected a model that scales or caps its logits at most before their "
                f"cross-entropy, got one that calls {what} on them: its loss is more than what "
                f"use_vocab_parallel_loss knows, so leave this model as it is, or give its hidden "
                f"states to linear_cross_entropy"
            )
        if self._real is None:
            self._real = self.recipe.computed()
        return self._real

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note a step of the model's; compute the logits for any other."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        note: Any = _NOTED.get(func)
        noted: Any = NotImplemented
        own = [value for value in args if isinstance(value, DeferredLogits)]
        known = note is not None and own and (own[0] is args[0] or note is _times)
        if known and (note in (_float, _to) or not own[0].recipe.may_compute()):
            noted = note(*args, **kwargs)
        if noted is NotImplemented:
            return _with_real_logits(func, args, kwargs)
        return DeferredLogits(noted) if isinstance(noted, Recipe) else noted

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute the logits for what reaches them past Python."""
        return _with_real_logits(func, args, kwargs or {})


def _with_real_logits(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    args, kwargs = tree_map_only(DeferredLogits, lambda own: own.computed(name), (args, kwargs))
    return func(*args, **kwargs)


# Each returns the recipe of a step, or NotImplemented where it is another than it seems.


def _float(logits: DeferredLogits) -> Recipe:
    return replace(logits.recipe, dtype=torch.float32)  # nothing is rounded to it


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    recipe = logits.recipe
    like = torch.empty(0, dtype=recipe.dtype, device=recipe.hidden.device).to(*args, **kwargs)
    moved = like.device != recipe.hidden.device
    return NotImplemented if moved else replace(recipe, dtype=like.dtype)


def _view(logits: DeferredLogits, *shape: Any) -> Any:
    axes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    recipe = logits.recipe
    if isinstance(axes, torch.dtype) or axes[-1] != recipe.vocab_size:
        return NotImplemented
    return replace(recipe, hidden=recipe.hidden.reshape(*axes[:-1], recipe.hidden.shape[-1]))


def _index(logits: DeferredLogits, index: Any) -> Any:
    """Take some tokens, each with its whole vocabulary."""
    items = list(index) if isinstance(index, tuple) else [index]
    constants = [item for item in items if not isinstance(item, Tensor)]
    if any(item is None for item in constants):
        return NotImplemented
    ellipsis = any(item is Ellipsis for item in constants)
    axes = sum(
        item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1
        for item in items
        if item is not Ellipsis
    )
    last, rows = items[-1], logits.recipe.vocab_size
    all_rows = isinstance(last, slice) and last.indices(rows) == (0, rows, 1)
    if all_rows and (ellipsis or axes == logits.dim()):
        stays = axes <= logits.dim()
    else:
        stays = axes < logits.dim() and (last is Ellipsis or not ellipsis)
    return replace(logits.recipe, hidden=logits.recipe.hidden[index]) if stays else NotImplemented


def _times(left: Any, right: Any) -> Any:
    logits, factor = (left, right) if isinstance(left, DeferredLogits) else (right, left)
    return logits.recipe.scaled(factor) if isinstance(factor, int | float) else NotImplemented


def _divided(logits: DeferredLogits, divisor: Any) -> Any:
    known = isinstance(divisor, int | float)
    return logits.recipe.scaled(1.0 / divisor) if known else NotImplemented


def _tanh(logits: DeferredLogits) -> Any:
    recipe = logits.recipe
    return replace(recipe, outer=1.0) if recipe.outer is None else NotImplemented


def _cross_entropy(
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    plain = weight is None and size_average is None and reduce is None
    if not plain or target.shape != logits.shape[:-1]:
        return NotImplemented
    recipe = logits.recipe
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    if label_smoothing:
        options["label_smoothing"] = label_smoothing
    return recipe.loss(recipe.hidden, target, **recipe.settings(), **options)


# What the tensor without memory answers itself.
_METADATA = frozenset(
    {
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn", "is_cuda")
        ),
    }
)
_NOTED: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        Tensor.contiguous: lambda logits: logits.recipe,
        Tensor.float: _float,
        Tensor.to: _to,
        Tensor.view: _view,
        Tensor.reshape: _view,
        Tensor.__getitem__: _index,
        Tensor.mul: _times,
        torch.mul: _times,
        Tensor.div: _divided,
        torch.div: _divided,
        Tensor.tanh: _tanh,
        torch.tanh: _tanh,
        F.cross_entropy: _cross_entropy,
    }
)
