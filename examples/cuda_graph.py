# torchrun --nproc-per-node 2 examples/cuda_graph.py
"""Forward, backward and their collectives in one CUDA graph, replayed on other tokens.

A graph launches all kernels of a call at once: what a short microbatch costs the host is gone. The
call is captured like any other code: warmed up on a side stream, then recorded, with inputs that
stay where they are. On a CPU there are no graphs, and the call runs as it is.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from vocab_parallel import VocabParallelOptions, linear_cross_entropy

VOCABULARY, HIDDEN, TOKENS = 1000, 64, 128
Results = tuple[torch.Tensor, ...]


def main() -> None:
    """Capture a call, replay it, and compare each replay with a call."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    options = VocabParallelOptions.from_vocab(VOCABULARY, dist.group.WORLD)

    torch.manual_seed(0)  # the same hidden states and labels on every rank
    rows = torch.randn(VOCABULARY, HIDDEN)[options.start : options.stop]
    hidden = torch.randn(TOKENS, HIDDEN).to(device).requires_grad_()
    classifier = rows.to(device).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,)).to(device)

    def step() -> Results:
        loss = linear_cross_entropy(hidden, classifier, labels, vocab_parallel_options=options)
        return (loss, *torch.autograd.grad(loss, (hidden, classifier)))

    replay = captured(step) if on_gpu else step
    for ignored in (0, TOKENS // 2, TOKENS):  # some, half and all labels count for nothing
        with torch.no_grad():
            hidden.copy_(torch.randn(TOKENS, HIDDEN))
            labels.copy_(torch.randint(VOCABULARY, (TOKENS,)))
            labels[:ignored] = -100
        for found, exact in zip(replay(), step(), strict=True):
            assert torch.equal(found, exact), "a replay is the call, bit by bit"
    print(f"rank {dist.get_rank()}: {'replays' if on_gpu else 'calls'} are right", flush=True)
    dist.barrier()
    if on_gpu:  # a graph that has recorded a group's calls holds it
        torch.cuda.synchronize()
        os._exit(0)
    dist.destroy_process_group()


def captured(step: Callable[[], Results]) -> Callable[[], Results]:
    """Return what replays a step on its inputs as they are then; its results are overwritten."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Results:
        graph.replay()
        return results

    return replay


if __name__ == "__main__":
    main()
