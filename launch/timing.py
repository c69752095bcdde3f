"""How long a call takes on a device that is as busy as it is in training.

The planner's calibration and the benchmarks share it, so it knows of neither.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor


def busy_work(device: torch.device) -> Callable[[], object]:
    """Return about 12 ms of products on a GPU, nothing on a CPU.

    A card that runs at its power limit is faster after a pause, or after products of equal numbers,
    than it is in training.
    """
    if device.type != "cuda":
        return lambda: None
    operand = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(operand)

    def products() -> Tensor:
        for _ in range(8):
            torch.mm(operand, operand, out=out)
        return out

    return products


def time_of(call: Callable[[], object], device: torch.device, ahead: Callable[[], object]) -> float:
    """Return the milliseconds of a call that is queued behind what ``ahead`` queues.

    On a GPU that is `busy_work`, so that it is the device's time; over several ranks also what lets
    them begin together.
    """
    if device.type != "cuda":
        ahead()
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
