"""How many Python calls of the library one call of the loss makes, and in how many files.

Each costs the host a microsecond, and a reader a jump: at small shards the host is what the device
waits for.
"""

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

import vocab_parallel
from tests.ranks import ROOT, run_ranks
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


def counts_of_one_call() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Count forward and backward of a call whose shape is known."""
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
    return forward, backward


def check_calls(limits: list[tuple[int, int, int]]) -> None:
    """Compare what forward and backward take with what they may take."""
    found = counts_of_one_call()
    for one, most in zip(found, limits, strict=True):
        assert all(a <= b for a, b in zip(one, most, strict=True)), found


def test_one_rank() -> None:
    check_calls([(60, 8, 25), (45, 7, 20)])


def test_two_ranks() -> None:
    run_ranks(check_calls, 2, limits=[(76, 12, 26), (54, 8, 20)])


def test_page_names_what_is_there() -> None:
    """docs/how-it-works.md: files that exist, and functions that the files beside them define."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    files = set(re.findall(r"[\w/]+\.py", text)) - {"tests/test_calls.py"}
    assert len(files) > 15
    folder = ROOT / "vocab_parallel"
    rooms = (folder, folder / "backends", ROOT)
    assert [name for name in files if not any((room / name).is_file() for room in rooms)] == []
    defined = {
        name
        for path in (ROOT / "vocab_parallel").rglob("*.py")
        for name in re.findall(r"def (\w+)\(", path.read_text())
    }
    named = {
        "linear_cross_entropy", "prepare", "agree", "mark_labels", "arrange", "scalar_loss",
        "joined_statistics", "summed_gradients", "statistics", "gradients", "gather_shards",
        "start_sum", "join", "total_value", "total_gradient",
    }  # fmt: skip
    assert {name for name in named if name in text} == named <= defined


def test_page_gives_the_numbers_that_are_counted() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    found = re.search(r"makes (\d+) Python calls.* in (\d+) files, backward (\d+) in (\d+)", text)
    assert found is not None
    forward, backward = counts_of_one_call()
    said = [int(number) for number in found.groups()]
    made = [*forward[:2], *backward[:2]]
    # Python 3.12 calls no function for a comprehension.
    assert all(one <= number <= one + 4 for one, number in zip(made, said, strict=True)), made
