"""One rank of `benchmarks.memory`: what the loss holds above its inputs, for every contestant.

Started by torchrun, all ranks on one card, with a JSON list of classifiers and one of impls, none
for all. Rank 0 prints one JSON document: for every
contestant the most bytes that any rank held.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vocab_parallel import VocabParallelOptions, available_impls, linear_cross_entropy


@dataclass(frozen=True)
class Head:
    """A classifier and the microbatches whose losses are alive before the first backward."""

    tokens: int
    hidden: int
    vocabulary: int
    alive: int


HEADS = {
    # Table 1 of arXiv 2411.09009.
    "gemma-2-2b": Head(tokens=8192, hidden=2304, vocabulary=256_000, alive=1),
    # Sequence 4096, 8 microbatches of which 3 are alive.
    "qwen3-1.7b": Head(tokens=4096, hidden=2048, vocabulary=151_936, alive=3),
    # Those of `benchmarks.scaling`.
    "qwen3-8b": Head(tokens=8192, hidden=4096, vocabulary=151_936, alive=1),
    "qwen3-32b": Head(tokens=8192, hidden=5120, vocabulary=151_936, alive=1),
    "llama-3.1-70b": Head(tokens=8192, hidden=8192, vocabulary=128_256, alive=1),
    "248,320 rows": Head(tokens=8192, hidden=5120, vocabulary=248_320, alive=1),
}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    # NCCL takes ranks with different host ids on one card for ranks of different machines.
    os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
    torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl", timeout=timedelta(seconds=120), device_id=torch.device("cuda", 0)
    )
    heads, impls = (json.loads(argument) for argument in sys.argv[1:3])
    found = {name: measure(HEADS[name], impls) for name in heads}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def contestants(options: VocabParallelOptions, impls: list[str], alive: int) -> dict[str, Loss]:
    """The losses of this rank's rows; "eager" is the plain one, of one rank alone."""
    found: dict[str, Loss] = {}
    if dist.get_world_size() == 1 and (not impls or "eager" in impls):
        found["eager"] = lambda e, c, targets: F.cross_entropy(F.linear(e, c).float(), targets)
    for impl, state in available_impls().items():
        if state == "ready" and (not impls or impl in impls):
            told = {"microbatches_in_flight": alive} if impl == "chunked" else {}
            found[impl] = ours(impl, options, told)
    return found


def ours(impl: str, options: VocabParallelOptions, told: dict[str, int]) -> Loss:
    def loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        result = linear_cross_entropy(
            e, c, targets, impl=impl, vocab_parallel_options=options, **told
        )
        assert isinstance(result, Tensor)
        return result

    return loss


def measure(head: Head, impls: list[str]) -> dict[str, dict[str, int]]:
    """Return bytes above the inputs: after the forwards at their peak, and over the whole."""
    options = VocabParallelOptions.from_vocab(head.vocabulary)
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    rows = options.stop - options.start

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    c = normal(rows, head.hidden).div_(head.hidden**0.5).requires_grad_()
    es = [normal(head.tokens, head.hidden).requires_grad_() for _ in range(head.alive)]
    targets = torch.randint(head.vocabulary, (head.tokens,), device="cuda")
    found = {}
    for name, loss in contestants(options, impls, head.alive).items():
        try:
            for _ in range(2):  # the first one compiles
                peaks = peaks_of(loss, es, c, targets)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", file=sys.stderr)
            continue
        torch.cuda.empty_cache()  # other ranks share the card
        reduced = torch.tensor(peaks, device="cuda")
        dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        found[name] = dict(zip(("forward", "all"), reduced.tolist(), strict=True))
    return found


def peaks_of(loss: Loss, es: list[Tensor], c: Tensor, targets: Tensor) -> tuple[int, int]:
    """Run every forward, then every backward; gradients are part of what is held."""
    c.grad = None
    for e in es:
        e.grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = [loss(e, c, targets) for e in es]
    torch.cuda.synchronize()
    forward = torch.cuda.max_memory_allocated() - before
    while losses:
        losses.pop(0).backward()
    torch.cuda.synchronize()
    return forward, torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
