"""A trace of one step."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

_STEP = 5  # by then everything is compiled, and allocated


def traces(folder: Path | None, step: int, first: int, stop: int) -> Path | None:
    """Return the folder where this step of [first, stop) is to be traced, the fifth or the last."""
    return folder if step == min(first + _STEP, stop) - 1 else None


@contextmanager
def traced(folder: Path | None, device: torch.device) -> Iterator[None]:
    """Write what runs inside to rank-N.json; waits for the GPU before and after. All ranks or none.

    Without a folder nothing happens.
    """
    if folder is None:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiled:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    folder.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(folder / f"rank-{dist.get_rank()}.json"))
