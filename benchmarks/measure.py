"""How everything here is timed: contestants interleaved in one process, medians, peaks."""

import gc
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from launch.timing import busy_work, time_of


@dataclass(frozen=True)
class Measurement:
    """Median milliseconds of a call, and the bytes that it held above what was there before."""

    milliseconds: float
    spread: float  # milliseconds, between the second fastest and the second slowest
    peak: int
    rounds: tuple[float, ...]  # milliseconds of each

    def over(self, other: "Measurement") -> float:
        """Return the median of the rounds' ratios to another's of the same rounds."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int = 7,
    warmup: int = 2,
) -> dict[str, Measurement]:
    """Time every contestant once a round, so that a slow spell of the machine meets all.

    Each round has an order of its own: a device that runs at its power limit is faster after a
    contestant that left it cool.

    On a GPU each call is queued behind other products, as it is in training, where the last
    layer's work is still running when the loss is called: what is measured is the device's time,
    at the clock of a busy device, and the host's time only where it is longer than that.
    """
    peaks = {name: peak_of(call, device) for name, call in contestants.items()}
    times = timed_rounds(
        contestants, device=device, ahead=busy_work(device), rounds=rounds, warmup=warmup
    )
    return {
        name: Measurement(*median_and_spread(times[name]), peaks[name], tuple(times[name]))
        for name in contestants
    }


def timed_rounds(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    ahead: Callable[[], object],
    rounds: int,
    warmup: int = 2,
    quiet: bool = False,
) -> dict[str, list[float]]:
    """Return each contestant's milliseconds, one a round, behind what ``ahead`` queues.

    The orders are drawn from one seed: ranks that time the same contestants are in step.
    """
    shuffle = random.Random(0).shuffle
    order = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm(range(warmup + rounds), desc="rounds", leave=False, disable=quiet):
        shuffle(order)
        for name in order:
            milliseconds = time_of(contestants[name], device, ahead)
            if turn >= warmup:
                times[name].append(milliseconds)
    return times


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and what lies between the second smallest and the second largest."""
    ordered = sorted(values)
    inner = ordered[1:-1] if len(ordered) > 2 else ordered
    return statistics.median(values), inner[-1] - inner[0]


def _peak_of_host(call: Callable[[], object]) -> int:
    """Add up what torch's allocator says in a trace of the call; products' own buffers are not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def peak_of(call: Callable[[], object], device: torch.device, *, above: bool = True) -> int:
    """Return the most bytes that one call held, above the level before it or in all."""
    call()  # what is loaded and compiled once is no memory of the call
    if device.type != "cuda":
        return _peak_of_host(call)
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if above else 0
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
