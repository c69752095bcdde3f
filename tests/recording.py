"""Dispatch modes that write down what a call allocates and communicates."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Collective:
    """One collective call: its name and what this rank contributes to it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


_CONTRIBUTED = {  # the operator of torch.ops.c10d, and which argument is contributed
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather_list", 1),
    "broadcast_": ("broadcast", 0),
}


_POINT_TO_POINT = ("send", "recv_", "recv_any_source_")  # a schedule's own


class CollectiveRecorder(TorchDispatchMode):
    """Records every collective; a schedule's point-to-point calls are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func._schema.name.split("::")[1]
        if func.namespace == "c10d" and operator not in _POINT_TO_POINT:
            name, index = _CONTRIBUTED[operator]
            given = args[index]
            tensor = given if isinstance(given, Tensor) else tree_flatten(given)[0][0]
            self.calls.append(Collective(name, tuple(tensor.shape), tensor.dtype))
        return func(*args, **(kwargs or {}))


@dataclass
class Allocation:
    """The largest tensor seen."""

    size: int = 0  # bytes
    shape: tuple[int, ...] = ()
    operator: str = ""


class AllocationRecorder(TorchDispatchMode):
    """Records the largest storage that any operator returned, views counted by their base."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = Allocation()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known and storage.nbytes() > self.largest.size:
                self.largest = Allocation(storage.nbytes(), tuple(tensor.shape), str(func))
        return result


class ProductRecorder(TorchDispatchMode):
    """Counts the flops of matrix products, in place ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].rstrip("_")
        if name in ("mm", "addmm"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
