"""The implementations of a shard's local work, by name."""

from vocab_parallel.impls.base import (
    BackwardTask,
    Choice,
    ClassifierGrad,
    Demand,
    Forward,
    ForwardTask,
    Gradients,
    KeptLogits,
    LocalImpl,
    Shard,
    Wanted,
    Way,
)
from vocab_parallel.impls.plan import BackwardPlan, plan_backward
from vocab_parallel.impls.registry import available_impls, create_impl

__all__ = [
    "BackwardPlan",
    "BackwardTask",
    "Choice",
    "ClassifierGrad",
    "Demand",
    "Forward",
    "ForwardTask",
    "Gradients",
    "KeptLogits",
    "LocalImpl",
    "Shard",
    "Wanted",
    "Way",
    "available_impls",
    "create_impl",
    "plan_backward",
]
