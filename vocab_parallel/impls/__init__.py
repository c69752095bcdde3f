"""The implementations of a shard's local work, by name."""

from vocab_parallel.impls.base import Demand, Forward, Gradients, LocalImpl, Shard, Wanted
from vocab_parallel.impls.registry import available_impls, create_impl

__all__ = [
    "Demand",
    "Forward",
    "Gradients",
    "LocalImpl",
    "Shard",
    "Wanted",
    "available_impls",
    "create_impl",
]
