"""Implementations by name: which there are, which work here, and how one is made."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vocab_parallel.impls.base import LocalImpl
from vocab_parallel.impls.chunked import ChunkedImpl
from vocab_parallel.impls.reference import ReferenceImpl

_CLASSES: Mapping[str, type] = {"chunked": ChunkedImpl, "reference": ReferenceImpl}
READY = "ready"


def available_impls() -> dict[str, str]:
    """Tell for every implementation "ready", or why it does not work on this machine.

    Needs no process group and communicates nothing.
    """
    return dict.fromkeys(_CLASSES, READY)


def create_impl(name: str, memory_budget: int | None, options: Mapping[str, Any]) -> LocalImpl:
    """Make the implementation ``name`` with its own options.

    "auto" is the fastest one here that is exact and does not materialise a shard's logits.

    Raises:
        ValueError: an unknown name or option, or an option's value that cannot be.
    """
    chosen = "chunked" if name == "auto" else name
    if chosen not in _CLASSES:
        raise ValueError(f"unknown impl {name!r}: known are {['auto', *sorted(_CLASSES)]}")
    cls = _CLASSES[chosen]
    known = {field.name for field in fields(cls)}
    given = dict(options)
    if memory_budget is not None and "memory_budget" in known:
        given["memory_budget"] = memory_budget
    unknown = sorted(given.keys() - known)
    if unknown:
        own = sorted(known - {"memory_budget"})
        raise ValueError(f"impl {chosen!r} has no option {unknown}: its own options are {own}")
    impl: LocalImpl = cls(**given)
    return impl
