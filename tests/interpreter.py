"""Apple's kernels on a CPU: Triton's interpreter, and a count of the launches."""

import importlib
from collections import Counter
from typing import Any

INTERPRETED = {"TRITON_INTERPRET": "1"}
KERNELS = {
    "cce_lse_forward": "_cce_lse_forward_kernel",
    "indexed_dot": "_indexed_neg_dot_forward_kernel",
    "cce_backward": "_cce_backward_kernel",
}


class Counted:
    """Stands in a kernel's place, counts its launches and launches it."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return self.kernel[grid]


def prepare() -> Counter[str]:
    """Make the kernels run in the interpreter, and count their launches."""
    from tests import libdevice

    utils = importlib.import_module("cut_cross_entropy.tl_utils")
    utils.tl_log1p, utils.tl_tanh = libdevice.log1p, libdevice.tanh
    launches: Counter[str] = Counter()
    for module_name, kernel_name in KERNELS.items():
        module = importlib.import_module(f"cut_cross_entropy.{module_name}")
        setattr(module, kernel_name, Counted(getattr(module, kernel_name), kernel_name, launches))
    return launches
