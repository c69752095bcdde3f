"""How long the host takes to call the loss: from call to return, forward and backward, V = 1.

    python -m benchmarks.host
    python -m benchmarks.host --only "ours, auto" --profile
    python -m benchmarks.host --one-thread        # backward on the thread that calls it

A loop has 8 microbatches, each forward and then backward, on a shard whose products take a fast
card about 2 ms. The device is idle when a loop begins, and nothing waits for it before the loop's
end: what is shown is the median over all microbatches of the time in which the calls return, the
second is all of a loop's, work of the device included, for one microbatch. Where it is not larger
than the host's two together, the host is what the loop waits for. On a CPU the calls do the work
themselves.

On a GPU autograd runs backward on a thread of its own, and what Python has in the caches goes from
core to core and back with every call; `--one-thread` is what
`torch.autograd.set_multithreading_enabled(False)` does. `--profile` prints the 20 functions with
most time of their own (cProfile, which slows them down), with backward on the calling thread, where
the profiler sees it.
The last line of the output is one JSON document.
"""

import cProfile
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contestants import Operands, draw
from benchmarks.older import older_library
from vocab_parallel import CCEPipelineLoss, linear_cross_entropy

Forward = Callable[[], Tensor]
SHOWN = 20  # functions of a profile


@dataclass(frozen=True)
class Arguments:
    """The shard, and whose calls."""

    tokens: int = 2048
    """T, tokens of a microbatch."""
    hidden: int = 2048
    """D, hidden size."""
    rows: int = 50_646
    """Rows of the shard."""
    microbatches: int = 8
    """Of a loop."""
    loops: int = 20
    """Timed loops."""
    only: tuple[str, ...] = ()
    """Names of the table's rows; all of them by default."""
    against: Path | None = None
    """A checkout of this repository whose loss is called beside today's."""
    one_thread: bool = False
    """Whether backward runs on the thread that calls it."""
    profile: bool = False
    """Whether to print in which functions the host is."""


@dataclass(frozen=True)
class HostTime:
    """Medians."""

    forward_microseconds: float
    backward_microseconds: float
    microbatch_milliseconds: float  # of a loop, until the device is done


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    operands = draw(arguments.tokens, arguments.hidden, arguments.rows, dtype, device)
    forwards = chosen(contestants(operands, arguments.against), arguments.only)
    with torch.autograd.set_multithreading_enabled(not arguments.one_thread):
        found = measure(forwards, operands, arguments.microbatches, arguments.loops)
    if arguments.profile:
        for name, forward in forwards.items():
            print_profiles(name, forward, operands, arguments.microbatches * arguments.loops)
    print_table(arguments, found)
    document = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "arguments": asdict(arguments),
        "host": {name: asdict(one) for name, one in found.items()},
    }
    print(json.dumps(document, default=str))


def contestants(operands: Operands, against: Path | None = None) -> dict[str, Forward]:
    """Return the forwards: ours in each way, as a schedule calls it, an older one, torch's own."""
    e, c, targets = operands.hidden, operands.rows, operands.targets

    def ours(backward: str, loss: Callable[..., Any] = linear_cross_entropy) -> Forward:
        return lambda: loss(e, c, targets, backward=backward)

    def eager(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(e, c).float(), targets)

    pipeline_loss = CCEPipelineLoss(c, shift=0)
    found: dict[str, Forward] = {
        f"ours, {way}": ours(way) for way in ("probs", "recompute", "auto")
    }
    if against is not None:
        older = older_library(against).linear_cross_entropy
        found |= {f"older, {way}": ours(way, older) for way in ("probs", "auto")}
    found["CCEPipelineLoss, auto"] = lambda: pipeline_loss(e, targets)
    found["eager, materialised"] = lambda: eager(e, c, targets)
    if e.is_cuda:
        compiled = torch.compile(eager)
        found["torch.compile, materialised"] = lambda: compiled(e, c, targets)
    return found


def chosen(forwards: dict[str, Forward], only: tuple[str, ...]) -> dict[str, Forward]:
    """Return those that were named, or all.

    Raises:
        ValueError: a name that is not there.
    """
    unknown = [name for name in only if name not in forwards]
    if unknown:
        raise ValueError(f"expected names of {list(forwards)}, got {unknown}")
    return {name: forward for name, forward in forwards.items() if not only or name in only}


def measure(
    forwards: dict[str, Forward], operands: Operands, microbatches: int, loops: int
) -> dict[str, HostTime]:
    """Time every contestant's loop in turn; the first two turns compile and fill caches."""
    times: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in forwards}
    wholes: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(2 + loops):
        for name, forward in forwards.items():
            calls, whole = _time_loop(forward, operands, microbatches)
            times[name].append(calls)
            wholes[name].append(whole)
    found = {}
    for name in forwards:
        calls = [pair for loop in times[name][2:] for pair in loop]
        forward_times, backward_times = zip(*calls, strict=True)
        found[name] = HostTime(
            1e6 * statistics.median(forward_times),
            1e6 * statistics.median(backward_times),
            1e3 * statistics.median(wholes[name][2:]) / microbatches,
        )
    return found


def _time_loop(
    forward: Forward, operands: Operands, microbatches: int
) -> tuple[list[tuple[float, float]], float]:
    """Return seconds of each (forward, backward) until they return, and of all until it is done."""
    found = []
    _wait(operands)
    began = time.perf_counter()
    for _ in range(microbatches):
        before = time.perf_counter()
        loss = forward()
        between = time.perf_counter()
        operands.gradients(loss)
        found.append((between - before, time.perf_counter() - between))
    _wait(operands)
    return found, time.perf_counter() - began


def _wait(operands: Operands) -> None:
    if operands.hidden.is_cuda:
        torch.cuda.synchronize(operands.hidden.device)


def print_profiles(name: str, forward: Forward, operands: Operands, calls: int) -> None:
    """Print where the host is in so many forwards, and where in their backwards."""
    profiles = {"forward": cProfile.Profile(), "backward": cProfile.Profile()}
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(calls):
            _wait(operands)
            with profiles["forward"]:
                loss = forward()
            with profiles["backward"]:
                operands.gradients(loss)
    for half, profile in profiles.items():
        print(f"{name}, {half}, {calls} calls")
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(SHOWN)


def print_table(arguments: Arguments, found: dict[str, HostTime]) -> None:
    """Print the medians."""
    table = Table(
        title=f"{arguments.microbatches} microbatches of {arguments.tokens} tokens, hidden x rows "
        f"{arguments.hidden} x {arguments.rows:,}, one of them"
    )
    for column in ("", "host, forward", "host, backward", "until the device is done"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        table.add_row(
            name,
            f"{one.forward_microseconds:.0f} µs",
            f"{one.backward_microseconds:.0f} µs",
            f"{one.microbatch_milliseconds:.2f} ms",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
