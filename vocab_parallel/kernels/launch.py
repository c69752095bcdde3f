"""Kernels that are started without triton's look at their arguments.

Through triton a launch asks of every argument what a binary could be made of it, finds the binary
by the answers, and asks for device, stream and hooks: tens of microseconds where the host is what a
short microbatch waits for. A kernel declared here is first started through triton, and then, for
the same constants, dtypes and widths of integers, by what came of that.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_WIDE = 2**31  # from here on a number has 8 bytes
_LINE = 16  # bytes or numbers that a load of full width begins at a multiple of
# Names of constants with their values, of a kernel's own and of the compiler's options; hashable.
Constants = tuple[tuple[str, Any], ...]


class Kernel:
    """A kernel whose values come first and whose constants last.

    Args:
        function: in triton's language.
        aligned: whether its binaries are made for what lies at multiples of 16, addresses and
            numbers, which kernels want that load matrices without TMA.
        never: names of numbers that no binary is made for in any case.
    """

    def __init__(
        self, function: Callable[..., None], *, aligned: bool = False, never: tuple[str, ...] = ()
    ) -> None:
        parameters = inspect.signature(function).parameters.values()
        values = [each.name for each in parameters if each.annotation is not tl.constexpr]
        names = [each.name for each in parameters]
        assert names[: len(values)] == values, "constants come last"
        self._aligned = aligned
        self._jitted = triton.jit(function, do_not_specialize=never if aligned else values)
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
        device = like.get_device()
        if 0 <= device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.start(like, grid, values, constants)
        # Written out, since a call of a function for each value takes as long as the launch.
        kinds = [
            value.dtype
            if type(value) is Tensor
            else -_WIDE <= value < _WIDE
            if type(value) is int
            else _kind(value)
            for value in values
        ]
        if self._aligned:
            kinds += [
                value.data_ptr() % _LINE
                if isinstance(value, Tensor)
                else -(value == 1) or value % _LINE
                if type(value) is int
                else 0
                for value in values
            ]
        key = (constants, device, *kinds)
        known = self._started.get(key)
        if known is None:
            by_name = dict(constants)
            compiled = self._jitted[grid](*values, **by_name)
            # The interpreter compiles nothing; of what is aligned AMD's binaries are also made for
            # how long its memory is, and triton is asked each time.
            if compiled is not None and not (self._aligned and torch.version.hip):
                self._started[key] = compiled, [by_name[name] for name in self._constants]
            return None
        compiled, own = known
        sizes = grid + (1,) * (3 - len(grid))
        hook = knobs.runtime.launch_enter_hook
        if getattr(hook, "calls", hook):  # a profiler's
            compiled[sizes](*values, *own)
            return None
        stream, function = torch._C._cuda_getCurrentRawStream(device), compiled.function
        metadata = compiled.packed_metadata
        compiled.run(*sizes, stream, function, metadata, None, None, None, *values, *own)
        return None


def kernel(function: Callable[..., None]) -> Kernel:
    """Declare a kernel, in the place of ``triton.jit``."""
    return Kernel(function)


def aligned_kernel(*never: str) -> Callable[[Callable[..., None]], Kernel]:
    """Declare a kernel that loads matrices without TMA; see `Kernel`."""
    return lambda function: Kernel(function, aligned=True, never=never)


def _kind(value: Any) -> object:
    """Return what a binary is made for of a value that is neither a tensor nor an integer.

    A descriptor's is its tensor's; its block is the kernel's own.
    """
    return getattr(getattr(value, "base", value), "dtype", type(value))
