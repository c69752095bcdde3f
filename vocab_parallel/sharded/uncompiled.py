"""One break in the graph of torch.compile, where it would otherwise make a dozen small graphs."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile break its graph at a call of ``function``, and not look into it.

    What is inside is kernels, cuBLAS products and collectives, which a compiler would not improve.
    `torch.compiler.disable` at import would load the compiler, which takes most of a second that
    whoever compiles nothing should not wait for.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from vocab_parallel.sharded.outside_of_graphs import run

            return run(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call
