"""Thousands of steps of the loss over ranks, in memory that does not grow."""

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from vocab_parallel import VocabParallelOptions, linear_cross_entropy

STEPS, WARM = 3000, 1000
# Of an allocator's arenas, which settle in the first thousand steps. A tensor [32, 16] kept each
# step would be 4 MiB, and what autograd keeps with it more.
MOST = 2 * 2**20


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def check_memory() -> None:
    options = VocabParallelOptions.from_vocab(101)
    torch.manual_seed(0)
    e = torch.randn(32, 16, requires_grad=True)
    c = torch.randn(options.stop - options.start, 16, requires_grad=True)
    targets = torch.randint(101, (32,))
    ways = [{"backward": way} for way in ("recompute", "probs")]
    held = 0
    for step in range(STEPS):
        loss = linear_cross_entropy(
            e, c, targets, vocab_parallel_options=options, validate=False, **ways[step % 3]
        )
        loss.backward()
        e.grad = c.grad = None
        if step in (WARM, STEPS - 1):
            del loss
            gc.collect()
            objects = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            if step == WARM:
                held, before = resident(), objects
    print(f"grew by {(resident() - held) / 2**10:.0f} KiB", flush=True)
    assert objects == before
    assert resident() - held < MOST
    dist.barrier()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for its memory")
def test_two_thousand_steps() -> None:
    run_ranks(check_memory, 2, timeout=300)
