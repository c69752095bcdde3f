"""How everything here is timed: contestants interleaved in one process, medians, peaks."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Measurement:
    """Median milliseconds of a call, and the bytes that it held above what was there before."""

    milliseconds: float
    peak: int | None  # None where the device has no counter


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = 7,
    warmup: int = 2,
) -> dict[str, Measurement]:
    """Time every contestant once a round, so that a slow spell of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks = {name: _peak(call, device) for name, call in contestants.items()}
    for turn in tqdm(range(warmup + rounds), desc="rounds", leave=False):
        for name, call in contestants.items():
            milliseconds = _time(call, device)
            if turn >= warmup:
                times[name].append(milliseconds)
    return {name: Measurement(statistics.median(times[name]), peaks[name]) for name in contestants}


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes that one call held above the level before it."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
