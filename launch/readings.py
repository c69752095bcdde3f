"""What is measured of a step: its time and its numbers, read one step late, and once a trace.

A host that reads a loss waits until the GPU has computed it, and the GPU then waits for the host to
queue the next step. So the numbers of a step are copied when they exist, and looked at when the
next step is queued: the host never waits for the step it runs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """One step.

    Attributes:
        step: from 1.
        seconds: on the device, from its begin to its end.
        values: the numbers that were given.
    """

    step: int
    seconds: float
    values: list[float]


class Readings:
    """The steps of one rank on one device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._began: Any = None
        self._last: tuple[int, Any, Any, Tensor] | None = None

    def begin(self) -> None:
        """Mark the begin of a step."""
        self._began = self._now()

    def end(self, step: int, values: Tensor) -> Reading | None:
        """Mark the end of a step, when all of it is queued; return the step before this one.

        Args:
            step: from 1.
            values: float32 numbers [n] on the device.
        """
        if self._on_gpu:
            copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = copy.copy_(values, non_blocking=True)
        ended = self._now()
        earlier = self.finish()
        self._last = (step, self._began, ended, values)
        return earlier

    def finish(self) -> Reading | None:
        """Wait for the step that has not been returned yet, and return it."""
        if self._last is None:
            return None
        (step, began, ended, values), self._last = self._last, None
        if self._on_gpu:
            ended.synchronize()
            return Reading(step, began.elapsed_time(ended) / 1e3, values.tolist())
        return Reading(step, ended - began, values.tolist())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def traced(folder: Path | None, device: torch.device) -> Iterator[None]:
    """Write what runs inside to rank-N.json; waits for the GPU before and after. All ranks or none.

    Without a folder nothing happens.
    """
    if folder is None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with torch.profiler.profile() as profiled:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(folder / f"rank-{dist.get_rank()}.json"))
