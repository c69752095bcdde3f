"""What is around every function that a user calls with tensors."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile not look into ``function``, and a call by others' names say ours.

    What is inside is kernels, cuBLAS products and collectives, which a compiler would not improve:
    `in_graphs.py` makes an operator of the call, or lets the graph break once. It loads the
    compiler, which takes most of a second that whoever compiles nothing should not wait for.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from vocab_parallel.in_graphs import run

            return run(function, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            from vocab_parallel.settings import others_names

            ours = others_names(kwargs)
            if not ours:
                raise
            raise ValueError(f"{error}; {ours}") from error

    return call
