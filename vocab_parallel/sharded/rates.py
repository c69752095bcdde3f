"""How fast a group's link and its devices are, measured once and known to every rank alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from vocab_parallel.collectives import VocabGroup

_SUM_BYTES = 16 * 2**20
_PRODUCT_SIDE = 4096
_TURNS = 3


@dataclass(frozen=True)
class Rates:
    """What the slowest rank of a group found.

    Attributes:
        bytes_a_second: of a partial gradient, summed over the group.
        flops_a_second: of a product in one dtype.
    """

    bytes_a_second: float
    flops_a_second: float


# By the group's name: a group that something holds at the interpreter's end may abort it.
_known: dict[tuple[str, int, torch.dtype], Rates] = {}


def rates_of(group: VocabGroup, dtype: torch.dtype, device: torch.device) -> Rates:
    """Return a group's rates on a GPU; all its ranks call, at the same place.

    The first call measures, waits for the device and communicates some MiB, which takes a
    hundredth of a second; it must not be captured into a graph, and in one nothing is measured: the
    link counts as fast, until somebody asks outside of it.
    """
    members = dist.group.WORLD if group.group is None else group.group
    assert members is not None
    key = (members.group_name, group.degree, dtype)
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return Rates(float("inf"), 1.0)
        _known[key] = _measured(group, dtype, device)
    return _known[key]


def _measured(group: VocabGroup, dtype: torch.dtype, device: torch.device) -> Rates:
    partial = torch.zeros(_SUM_BYTES // 4, device=device)
    side = torch.zeros((_PRODUCT_SIDE, _PRODUCT_SIDE), dtype=dtype, device=device)
    summing = _seconds(lambda: group.sum(partial), device)
    product = _seconds(lambda: torch.mm(side, side), device)
    slowest = torch.tensor([summing, product], device=device)
    slowest = group.gather_shards(slowest).amax(0).cpu()
    return Rates(_SUM_BYTES / slowest[0].item(), 2.0 * _PRODUCT_SIDE**3 / slowest[1].item())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of some turns, after one that warms up."""
    work()
    times = []
    for _ in range(_TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000.0)
    return min(times)
