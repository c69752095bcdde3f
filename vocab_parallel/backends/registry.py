"""Backends by name: which there are, which work here, and how one is chosen and made.

    torch, triton, hopper    "chunked": exact, bounded memory; one of them by device and dtype
    reference                the oracle, and torch_compile
    cut_cross_entropy        Apple's kernels, by preset

Each is a module of this folder, loaded when a call first chooses it.
"""

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends.interface import Backend

READY = "ready"
_HOPPER = 9
# The class of each: "chunked" is one of the first three.
_CLASSES: Mapping[str, tuple[str, str]] = {
    "torch": ("torch", "TorchBackend"),
    "triton": ("triton", "TritonBackend"),
    "hopper": ("hopper", "HopperBackend"),
    "reference": ("reference", "ReferenceBackend"),
    "torch_compile": ("reference", "TorchCompileBackend"),
    "cut_cross_entropy": ("cut_cross_entropy", "CutCrossEntropyBackend"),
}
_OWN = ("chunked", "reference", "torch_compile")


def available_impls() -> dict[str, str]:
    """Tell for every implementation "ready", or why it does not work on this machine.

        chunked         exact, bounded memory, deterministic; any device
        reference       materialises its shard's logits; the oracle
        torch_compile   materialises its shard's logits, fused by torch.compile
        cce             Apple's kernels, which filter small gradients
        cce_exact       Apple's kernels, unfiltered; float32 accumulation where they have it
        cce_kahan       Apple's kernels, filtered, with float32 accumulation
        others          the presets that the installed cut-cross-entropy lists

    Needs no process group and communicates nothing.
    """
    return {name: _why_unavailable(name) or READY for name in _names()}


def choose(hidden: Tensor, classifier: Tensor) -> str:
    """Choose who works on the tiles of hidden states [..., D] and rows [R, D].

    It asks for device, dtype, the packages that are there and, for Hopper's kernels, addresses
    that TMA can read. Tests put another choice in this function's place.
    """
    if not hidden.is_cuda or hidden.dtype == torch.float64 or not has_triton():
        return "torch"
    half = hidden.dtype in (torch.float16, torch.bfloat16) and classifier.dtype == hidden.dtype
    if half and _has_hopper_kernels(hidden.device):
        operands_fit = load("vocab_parallel.kernels.product").operands_fit
        # Hidden states that are gathered lie without gaps in memory of their own.
        gathered = hidden.shape[-1] * hidden.element_size() % 16 == 0
        if gathered and operands_fit(hidden, classifier):
            return "hopper"
    return "triton"


@functools.cache
def load(module: str) -> Any:
    """Import a module by its name, at its first use: kernels load triton."""
    return importlib.import_module(module)


@functools.cache
def has_triton() -> bool:
    """Tell whether triton is installed; it is not for every system that has CUDA."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_hopper_kernels(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def create_backend(
    name: str,
    memory_budget: int | None,
    options: Mapping[str, Any],
    operands: tuple[Tensor, Tensor] | None = None,
) -> Backend:
    """Make the backend of the implementation ``name`` with its own options.

    "auto" is the fastest one here that is exact and does not materialise a shard's logits; it
    never is one that filters gradients.

    Args:
        name, memory_budget, options: as the caller of the loss gave them.
        operands: hidden states and rows that it is for; None checks the rest alone.

    Raises:
        ValueError: an unknown name or option, an option's value that cannot be, or an
            implementation that does not work here, with the reason.
    """
    impl = "chunked" if name == "auto" else name
    if impl not in _OWN and impl not in _names():
        raise ValueError(f"unknown impl {name!r}: known are {['auto', *_names()]}")
    reason = _why_unavailable(impl)
    if reason is not None:
        raise ValueError(f"impl {impl!r} does not work here: {reason}")
    given: dict[str, Any] = {}
    if impl not in _OWN:
        given = {**(_apple().preset(impl) or {}), "name": impl}
    allowed = option_names(name)
    if memory_budget is not None and "memory_budget" in allowed:
        given["memory_budget"] = memory_budget
    unknown = sorted(options.keys() - allowed)
    if unknown:
        own = sorted(allowed - {"memory_budget"})
        raise ValueError(f"impl {impl!r} has no option {unknown}: its own options are {own}")
    cls = _class_of(impl)
    if impl == "chunked" and operands is not None:
        cls = backend_class(choose(*operands))
    backend: Backend = cls(**{**given, **options})
    return backend


def option_names(name: str) -> set[str]:
    """Return the names of the options that the implementation ``name`` has."""
    cls = _class_of("chunked" if name == "auto" else name)
    return {field.name for field in fields(cls)} - {"name"}


def backend_class(name: str) -> Any:
    """Return a backend's class by the name of its module."""
    module, cls = _CLASSES[name]
    return getattr(load(f"vocab_parallel.backends.{module}"), cls)


def _class_of(impl: str) -> Any:
    own = "torch" if impl == "chunked" else impl
    return backend_class(own if impl in _OWN else "cut_cross_entropy")


def _apple() -> Any:
    return load("vocab_parallel.backends.cut_cross_entropy")


def _names() -> list[str]:
    kernels = {*_apple().OWN_PRESETS, *_apple().NEWER_PRESETS}
    if _apple().cce_kernels.why_unavailable() is None:
        kernels |= _apple().installed_presets().keys()
    return [*_OWN, *sorted(kernels)]


def _why_unavailable(name: str) -> str | None:
    if name == "torch_compile":
        return _why_no_compiler()
    if name in _OWN:
        return None
    reason: str | None = _apple().cce_kernels.why_unavailable()
    if reason is not None:
        return reason
    settings = _apple().preset(name)
    needs_newer = settings is None or (
        name != "cce_exact"
        and bool(settings.get("accum_e_fp32"))
        and not _apple().cce_kernels.is_newer()
    )
    if needs_newer:
        return "the installed cut-cross-entropy is too old: it needs 25.6 or later"
    return None


def _why_no_compiler() -> str | None:
    if torch.cuda.is_available():
        return None
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        return f"torch.compile needs a C++ compiler on a CPU, and {compiler} is not installed"
    return None
