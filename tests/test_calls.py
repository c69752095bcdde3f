"""How many Python calls of the library one call of the loss makes, and in how many files.

Each costs the host a microsecond, and a reader a jump: at small shards the host is what the device
waits for.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import vocab_parallel
from tests.ranks import run_ranks
from vocab_parallel import VocabParallelOptions, linear_cross_entropy

PACKAGE = str(Path(vocab_parallel.__file__).parent)


def counted(function: Callable[[], Any]) -> tuple[Any, tuple[int, int, int]]:
    """Return what a function returns, and calls, files and changes of file that it took."""
    files: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            files.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    changes = sum(a != b for a, b in pairwise(files))
    return result, (len(files), len(set(files)), changes)


def check_calls(limits: list[tuple[int, int, int]]) -> None:
    """Compare forward and backward of a call whose shape is known with what they may take."""
    torch.manual_seed(0)
    group = dist.group.WORLD if dist.is_initialized() else None
    options = VocabParallelOptions.from_vocab(500, group)
    e = torch.randn(64, 32, requires_grad=True)
    c = torch.randn(options.stop - options.start, 32, requires_grad=True)
    targets = torch.randint(500, (64,))
    given = {} if group is None else {"vocab_parallel_options": options}
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(3):
            linear_cross_entropy(e, c, targets, **given).backward()
        loss, forward = counted(lambda: linear_cross_entropy(e, c, targets, **given))
        _, backward = counted(lambda: torch.autograd.grad(loss, (e, c)))
    for found, most in zip((forward, backward), limits, strict=True):
        assert all(a <= b for a, b in zip(found, most, strict=True)), (forward, backward)


def test_one_rank() -> None:
    check_calls([(60, 8, 25), (45, 7, 20)])


def test_two_ranks() -> None:
    run_ranks(check_calls, 2, limits=[(76, 12, 26), (54, 8, 20)])
