"""Kernels that are started without looking at what their arguments are worth.

Through triton a launch asks of every argument whether it is 1, a multiple of 16 or aligned, and
finds the binary by the answers: tens of microseconds for thirty arguments. A kernel declared here
has one binary for each device and set of constants, dtypes and widths of integers. The first launch
goes through triton; later ones find the binary by these, and start it.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDE = 2**31  # from here on a number has 8 bytes
# Names of constants with their values, of a kernel's own and of the compiler's options; hashable.
Constants = tuple[tuple[str, Any], ...]


class Kernel:
    """A kernel whose values come first and whose constants last."""

    def __init__(self, function: Callable[..., None]) -> None:
        parameters = inspect.signature(function).parameters.values()
        values = [each.name for each in parameters if each.annotation is not tl.constexpr]
        names = [each.name for each in parameters]
        assert names[: len(values)] == values, "constants come last"
        self._jitted = triton.jit(function, do_not_specialize=values)
        self._constants = names[len(values) :]
        self._started: dict[Any, Any] = {}

    def start(
        self, like: Tensor, grid: tuple[int, ...], values: tuple[Any, ...], constants: Constants
    ) -> None:
        """Queue the kernel.

        Args:
            like: a tensor of the device, on whose current stream it runs.
            grid: how many programs, along one to three axes.
            values: all that are no constants, in order.
            constants: all others, and options of the compiler.
        """
        key = (constants, like.device, *_kinds(values))
        known = self._started.get(key)
        with torch.cuda.device_of(like):
            if known is None:
                by_name = dict(constants)
                compiled = self._jitted[grid](*values, **by_name)
                if compiled is not None:  # the interpreter compiles nothing
                    own = [by_name[name] for name in self._constants]
                    self._started[key] = compiled, own
            else:
                compiled, own = known
                compiled[grid + (1,) * (3 - len(grid))](*values, *own)


def kernel(function: Callable[..., None]) -> Kernel:
    """Declare a kernel, in the place of ``triton.jit``."""
    return Kernel(function)


def _kinds(values: tuple[Any, ...]) -> list[object]:
    """Return what of the values a binary is made for."""
    found: list[object] = []
    for value in values:
        kind = type(value)
        if kind is int:
            found.append(-_WIDE <= value < _WIDE)
        else:
            dtype = getattr(value, "dtype", None)
            if dtype is None:  # a descriptor's is its tensor's; its block is the kernel's own
                base = getattr(value, "base", None)
                dtype = kind if base is None else base.dtype
            found.append(dtype)
    return found
