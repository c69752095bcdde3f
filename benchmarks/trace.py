"""A picture of the loss's reduction beside its products, on 2 NCCL ranks that share one card.

    torchrun --rdzv-backend c10d --rdzv-endpoint localhost:0 --nproc-per-node 2 \
        -m benchmarks.trace --out docs/overlap.png

Rank 0 traces one forward and backward with communication beside the products, and one in the plain
order. Ranks that share a card talk through sockets and take turns on it: the picture shows what
runs beside what, and nothing about how fast a link between GPUs would be. The last line of the
output is one JSON document.
"""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch.profiler import ProfilerActivity, profile

from benchmarks import contestants
from vocab_parallel import VocabParallelOptions, linear_cross_entropy

KINDS = {"nccl": "collective", "_logits_statistics": "pass", "_logits_gradient": "pass"}
PRODUCTS = ("nvjet", "gemm", "cutlass")


@dataclass(frozen=True)
class Arguments:
    """One shard of the two."""

    tokens: int = 8192
    """T, tokens."""
    hidden: int = 2048
    """D, hidden size."""
    vocabulary: int = 75_968
    """Rows of both shards together."""
    out: Path = Path("overlap.png")
    """The figure."""


@dataclass(frozen=True)
class Span:
    """One kernel: microseconds from the first one's start."""

    kind: str
    start: float
    stop: float


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    # NCCL takes ranks with different host ids on one card for ranks of different machines.
    os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", timeout=timedelta(seconds=55), device_id=device)
    options = VocabParallelOptions.from_vocab(arguments.vocabulary)
    operands = contestants.draw(
        arguments.tokens, arguments.hidden, arguments.vocabulary, torch.bfloat16, device
    )
    rows = operands.rows.detach()[options.start : options.stop].clone().requires_grad_()
    traces = {}
    for overlap in (True, False):

        def step(overlap: bool = overlap) -> None:
            loss = linear_cross_entropy(
                operands.hidden, rows, operands.targets, vocab_parallel_options=options,
                backward="probs", overlap=overlap,
            )  # fmt: skip
            torch.autograd.grad(loss, (operands.hidden, rows))  # type: ignore[arg-type]

        step()
        torch.cuda.synchronize()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
        traces["beside" if overlap else "in the plain order"] = _spans(profiled)
        dist.barrier()
    if dist.get_rank() == 0:
        _draw(traces, arguments.out)
        shares = {name: _share_beside(spans) for name, spans in traces.items()}
        document = {"machine": torch.cuda.get_device_name(), "collective beside products": shares}
        print(json.dumps(document))
    dist.barrier()
    dist.destroy_process_group()


def _spans(profiled: profile) -> list[Span]:
    events = [
        event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    first = min(event.time_range.start for event in events)
    return [
        Span(kind, event.time_range.start - first, event.time_range.end - first)
        for event in events
        if (kind := _kind(event.name)) is not None
    ]


def _kind(name: str) -> str | None:
    for part, kind in KINDS.items():
        if part in name:
            return kind
    return "product" if any(part in name for part in PRODUCTS) else None


def _share_beside(spans: list[Span]) -> float:
    """Return which part of the collectives' time some product runs, too."""
    products = [span for span in spans if span.kind == "product"]
    total = beside = 0.0
    for collective in (span for span in spans if span.kind == "collective"):
        total += collective.stop - collective.start
        beside += sum(
            max(0.0, min(one.stop, collective.stop) - max(one.start, collective.start))
            for one in products
        )
    return beside / total if total else 0.0


def _draw(traces: dict[str, list[Span]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lanes = {"product": 2, "pass": 1, "collective": 0}
    colors = {"product": "tab:blue", "pass": "tab:green", "collective": "tab:red"}
    figure, axes = plt.subplots(len(traces), 1, figsize=(11, 4), sharex=True)
    for axis, (name, spans) in zip(axes, traces.items(), strict=True):
        for span in spans:
            axis.barh(
                lanes[span.kind],
                (span.stop - span.start) / 1e3,
                left=span.start / 1e3,
                color=colors[span.kind],
                edgecolor="white",
            )
        axis.set_yticks(list(lanes.values()), list(lanes))
        axis.set_title(f"communication {name}", fontsize=9)
    axes[-1].set_xlabel("ms, forward and backward of rank 0")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
