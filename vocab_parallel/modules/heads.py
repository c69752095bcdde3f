"""Where a loss finds the classifier: read at each call, never kept, and no more than it is.

A module stands for its weight only where its logits are ``linear(hidden, weight, bias)``. One that
does more (an adapter, a hook, a forward of its own) would be trained without it, silently: it is
known here, or refused.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vocab_parallel.modules.checkpoint import rows_of_dtensor
from vocab_parallel.modules.gradient_sums import local_part
from vocab_parallel.options import VocabParallelOptions


@dataclass(frozen=True)
class LowRank:
    """One adapter of the rows: scale B A beside W, of which nothing as large as W is made.

    Attributes:
        a: [r, D], equal on every rank of the vocab group.
        b: [rows, r], this rank's.
        scale: of the product.
        dropout: applied to the hidden states that ``a`` multiplies, or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: nn.Module | None = None


@dataclass(frozen=True)
class Rows:
    """This rank's rows as they are now.

    Attributes:
        weight: [rows, D].
        bias: [rows], or None.
        options: which rows they are, or None for the whole vocabulary.
        adapters: what is added to the rows.
    """

    weight: Tensor
    bias: Tensor | None
    options: Any
    adapters: tuple[LowRank, ...] = ()

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states [..., D + r] and rows [rows, D + r] whose product is the logits.

        With adapters, e W^T + s (e A^T) B^T is one product of longer operands: exact where the
        merged rows W + s B A would round a small adapter away, and its gradients are autograd's.
        That of ``a`` is a body parameter's: complete where hidden states are replicated, and in
        the gathering layouts a summand of the sum over the vocab group.
        """
        if not self.adapters:
            return hidden, self.weight
        tails = []
        for adapter in self.adapters:
            dropped = hidden if adapter.dropout is None else adapter.dropout(hidden)
            tails.append(F.linear(dropped, adapter.a.to(hidden.dtype)) * adapter.scale)
        own = [adapter.b.to(self.weight.dtype) for adapter in self.adapters]
        return torch.cat([hidden, *tails], -1), torch.cat([self.weight, *own], 1)


@dataclass(frozen=True)
class OutputWeight:
    """A classifier that somebody else owns.

    Attributes:
        owner: the module that owns it, a Parameter, or a DTensor sharded over its rows. Known
            modules are nn.Linear and what inherits its forward, `VocabParallelClassifier`, PEFT's
            LoRA layers and its modules to save, and any module that says by an attribute
            ``logits_are_linear = True`` that its logits are linear(hidden, weight, bias).
        bias: its bias; None takes the module's own, if it has one.
        options: which rows these are; None takes the module's ``.options``, or the DTensor's
            placement; a plain tensor is the whole vocabulary.

    Raises:
        ValueError: a module whose logits may be more than that.
    """

    owner: nn.Module | Tensor
    bias: Tensor | None = None
    options: Any = None

    def __post_init__(self) -> None:
        self._parts()

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters that make the rows, as they are now."""
        weight, bias, adapters = self._parts()
        factors = [factor for adapter in adapters for factor in (adapter.a, adapter.b)]
        return [weight, *([] if bias is None else [bias]), *factors]

    def read(self) -> Rows:
        """Return this rank's rows, their bias, their options and their adapters.

        Without options, the rows of a plain weight are the whole vocabulary: they are compared with
        what the owner says of itself, its ``out_features``, ``num_embeddings`` and ``config``.

        Raises:
            ValueError: a DTensor that is not sharded over its rows alone, or a module that has
                become more than its weight, or a weight of other rows than its module says.
        """
        weight, bias, adapters = self._parts()
        options = self.options
        if options is None and not isinstance(self.owner, Tensor):
            options = getattr(_unwrapped(self.owner), "options", None)
            if options is None and not isinstance(weight, DTensor):
                _check_rows(_unwrapped(self.owner), weight)
        if options is None and isinstance(weight, DTensor):
            options = _options_of_dtensor(weight)
        factors = [replace(own, a=local_part(own.a), b=local_part(own.b)) for own in adapters]
        bias = None if bias is None else local_part(bias)
        return Rows(local_part(weight), bias, options, tuple(factors))

    def check_vocab_size(self, model: nn.Module) -> None:
        """Refuse fewer rows than the configuration of the model says.

        Looked at is ``config.vocab_size``, or ``config.text_config.vocab_size``, of the model or of
        the first module within it that has one. Rows that explicit options describe may be fewer:
        this rank does not know how many there are in all. Communicates nothing.

        Raises:
            ValueError: the classifier has fewer rows than that.
        """
        module: Any = None if isinstance(self.owner, Tensor) else _unwrapped(self.owner)
        if self.options is None and hasattr(module, "row_counts"):  # of every rank of the group
            _check_configured(sum(module.row_counts), model)
        elif self.options is None and getattr(module, "options", None) is None:
            _check_configured(self._parts()[0].shape[0], model)

    def warn_of_padding(self, model: nn.Module) -> None:
        """Warn where more rows count as tokens than the configuration of the model says.

        That is found as `check_vocab_size` finds it.
        """
        size, rows = _configured_vocab_size(model), self.read()
        options = rows.options
        counted = len(rows.weight) if options is None else getattr(options, "vocab_size", None)
        if size is not None and counted is not None and counted > size:
            warnings.warn(
                f"the loss takes {counted} rows of the classifier for tokens, but the "
                f"configuration of {type(model).__name__} says vocab_size={size}: if the others "
                f"are padding they get probability. Pass vocab_parallel_options with "
                f"vocab_size={size}, as VocabParallelOptions.from_vocab({size}, group, "
                f"num_rows={counted}) makes them, or correct the configuration",
                stacklevel=3,
            )

    def _parts(self) -> tuple[Tensor, Tensor | None, tuple[LowRank, ...]]:
        if isinstance(self.owner, Tensor):
            return self.owner, self.bias, ()
        module: Any = _unwrapped(self.owner)
        low_rank = getattr(module, "low_rank", None)
        adapters: tuple[LowRank, ...] = () if low_rank is None else (low_rank,)
        if all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "scaling")):
            adapters, module = _lora_adapters(module), module.base_layer
        _check_module(module)
        bias = getattr(module, "bias", None) if self.bias is None else self.bias
        return module.weight, bias if isinstance(bias, Tensor) else None, adapters


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that computes: what torch.compile or PEFT's modules_to_save wraps."""
    inner: Any = getattr(module, "_orig_mod", module)
    if hasattr(inner, "modules_to_save") and hasattr(inner, "original_module"):
        active = [name for name in inner.active_adapters if name in inner.modules_to_save]
        if inner.disable_adapters or not active:
            return inner.original_module
        return inner.modules_to_save[active[0]]
    return inner


def _check_module(module: nn.Module) -> None:
    """Raise ValueError where a module's logits may be more than linear(hidden, weight, bias)."""
    is_module = isinstance(module, nn.Module)
    if not is_module or not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"output_weight must be a tensor or a module with a weight, got {type(module).__name__}"
        )
    if getattr(module, "logits_are_linear", False):
        return
    more = None
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        more = "has a forward of its own"
    elif _has_foreign_hooks(module):
        more = "has forward hooks"
    if more is not None:
        raise ValueError(
            f"output_weight is a {type(module).__name__} that {more}, so that its logits may be "
            f"more than linear(hidden, weight, bias), which is all that the loss computes: pass "
            f"its weight (and output_bias) themselves if they are not, or say so by an attribute "
            f"logits_are_linear = True of the module"
        )


def _check_rows(module: Any, weight: Tensor) -> None:
    """Raise ValueError where a plain weight has not the rows that its module says it has."""
    for name in ("out_features", "num_embeddings"):
        rows = getattr(module, name, None)
        if isinstance(rows, int) and rows != weight.shape[0]:
            raise ValueError(
                f"output_weight is a {type(module).__name__} of {name}={rows} whose weight has "
                f"{weight.shape[0]} rows here: it would be taken for the whole vocabulary. Pass "
                f"vocab_parallel_options that say which rows these are, and their group"
            )
    _check_configured(weight.shape[0], module)


def _check_configured(num_rows: int, model: nn.Module) -> None:
    """Raise ValueError for fewer rows of the whole classifier than a configuration states."""
    size = _configured_vocab_size(model)
    if size is not None and num_rows < size:
        raise ValueError(
            f"the classifier has {num_rows} rows, which the loss takes for the whole vocabulary, "
            f"but the configuration of {type(model).__name__} says vocab_size={size}. Pass "
            f"vocab_parallel_options that say which rows these are, and their group, or "
            f"VocabParallelOptions(0, {num_rows}) where there are no more"
        )


def _configured_vocab_size(model: nn.Module) -> int | None:
    """Return the vocabulary that the configuration of a model, or of one within it, states."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "text_config", None)):
            size = getattr(part, "vocab_size", None)
            if isinstance(size, int):
                return size
    return None


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Tell whether hooks may change logits; those of torch.distributed move parameters alone."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
        for hook in hooks
    )


def _lora_adapters(module: Any) -> tuple[LowRank, ...]:
    """Return what the forward of PEFT's LoRA layer adds to its base layer.

    Raises:
        ValueError: an adapter is more than scale B A, or is merged though it is switched off.
    """
    if module.disable_adapters and module.merged:
        raise ValueError(
            "the classifier's adapter is merged into its weight and disabled: unmerge it first"
        )
    found = []
    for name in () if module.disable_adapters or module.merged else module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", {}):
            raise ValueError(
                f"the classifier's adapter {name!r} is a {type(module.lora_variant[name]).__name__}"
                f", and the loss knows plain LoRA alone, W + scale B A: leave the classifier out "
                f"of the adapter, or merge it"
            )
        a, b = module.lora_A[name], module.lora_B[name]
        if getattr(b, "bias", None) is not None:
            raise ValueError(
                f"the classifier's adapter {name!r} has a bias, and the loss knows LoRA without "
                f"one alone: configure it with lora_bias=False"
            )
        scale, dropout = float(module.scaling[name]), module.lora_dropout[name]
        found.append(LowRank(a.weight, b.weight, scale, dropout))
    return tuple(found)


def _options_of_dtensor(weight: DTensor) -> VocabParallelOptions:
    """Read the rows of a DTensor [vocab, D] off its placement."""
    start, stop, axis = rows_of_dtensor(weight)
    if axis is None:
        raise ValueError(
            "a DTensor classifier that is replicated has no shard of rows: pass "
            "weight.to_local() of a plain module, or shard it by Shard(0)"
        )
    group = weight.device_mesh.get_group(axis)
    return VocabParallelOptions(start, stop, group, vocab_size=weight.shape[0])
