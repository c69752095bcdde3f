"""Implementations by name: which there are, which work here, and how one is made."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from vocab_parallel.local import cce, cce_kernels
from vocab_parallel.local.cce import CceImpl
from vocab_parallel.local.chunked import ChunkedImpl
from vocab_parallel.local.interface import LocalImpl
from vocab_parallel.local.reference import ReferenceImpl, TorchCompileImpl

READY = "ready"
_CLASSES: Mapping[str, type] = {
    "chunked": ChunkedImpl,
    "reference": ReferenceImpl,
    "torch_compile": TorchCompileImpl,
}


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


def create_impl(name: str, memory_budget: int | None, options: Mapping[str, Any]) -> LocalImpl:
    """Make the implementation ``name`` with its own options.

    "auto" is the fastest one here that is exact and does not materialise a shard's logits; it
    never is one that filters gradients.

    Raises:
        ValueError: an unknown name or option, an option's value that cannot be, or an
            implementation that does not work here, with the reason.
    """
    chosen = "chunked" if name == "auto" else name
    if chosen not in _CLASSES and chosen not in _names():
        raise ValueError(f"unknown impl {name!r}: known are {['auto', *_names()]}")
    reason = _why_unavailable(chosen)
    if reason is not None:
        raise ValueError(f"impl {chosen!r} does not work here: {reason}")
    cls = _class(chosen)
    given: dict[str, Any] = {}
    if cls is CceImpl:
        given = {**(cce.preset(chosen) or {}), "name": chosen}
    allowed = option_names(name)
    if memory_budget is not None and "memory_budget" in allowed:
        given["memory_budget"] = memory_budget
    unknown = sorted(options.keys() - allowed)
    if unknown:
        own = sorted(allowed - {"memory_budget"})
        raise ValueError(f"impl {chosen!r} has no option {unknown}: its own options are {own}")
    impl: LocalImpl = cls(**{**given, **options})
    return impl


def option_names(name: str) -> set[str]:
    """Return the names of the options that the implementation ``name`` has."""
    return {field.name for field in fields(_class("chunked" if name == "auto" else name))} - {
        "name"
    }


def _class(name: str) -> type:
    return _CLASSES.get(name, CceImpl)


def _names() -> list[str]:
    kernels = {*cce.OWN_PRESETS, *cce.NEWER_PRESETS}
    if cce_kernels.why_unavailable() is None:
        kernels |= cce_kernels.installed_presets().keys()
    return [*_CLASSES, *sorted(kernels)]


def _why_unavailable(name: str) -> str | None:
    if name == "torch_compile":
        return _why_no_compiler()
    if name in _CLASSES:
        return None
    reason = cce_kernels.why_unavailable()
    if reason is not None:
        return reason
    settings = cce.preset(name)
    needs_newer = settings is None or (
        name != "cce_exact"
        and bool(settings.get("accum_e_fp32"))
        and not cce_kernels.features().fp32_accumulation
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
