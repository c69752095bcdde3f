"""Memory of one rank's loss for 1, 2, 4 and 8 shards, beside the figures others published.

    python -m benchmarks.memory --out benchmarks/results

Needs one CUDA device; the ranks of a vocab group share it, as NCCL ranks of their own. What is
shown is the most bytes that torch's allocator held above the inputs (hidden states, classifier
rows, targets), gradients included, over forward and backward. Two classifiers:

    gemma-2-2b   T = 8192, D = 2304, V = 256,000: the table of arXiv 2411.09009
    qwen3-1.7b   T = 4096, D = 2048, V = 151,936, the losses of 3 microbatches alive at a time

The last line of the output is one JSON document.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# What the documents say for one shard: (MiB of the forward, MiB in all).
PUBLISHED: dict[str, dict[str, tuple[float | None, float]]] = {
    "gemma-2-2b": {"eager": (24_000, 28_000), "cce": (1, 1_164)},
    "qwen3-1.7b": {
        "eager": (None, 10.5 * 1024),
        "chunked": (None, 5.96 * 1024),  # "a pure-PyTorch fused loss"
        "cce": (None, 1.82 * 1024),
    },
}
Found = dict[int, dict[str, dict[str, dict[str, int]]]]  # shards, classifier, impl, part: bytes


@dataclass(frozen=True)
class Arguments:
    """How many shards, and where the results go."""

    shards: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Vocab degrees."""
    impls: tuple[str, ...] = ()
    """Losses, by name; all that are ready here, and the eager one, by default."""
    out: Path = Path("runs/memory")
    """Folder for the numbers (JSON) and the plot (PNG)."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.memory needs a CUDA device")
    # Two degrees at a time: what is measured is each process's own allocator, not time.
    with ThreadPoolExecutor(max_workers=2) as pool:
        ranks = partial(run_ranks, impls=arguments.impls)
        runs = tqdm(pool.map(ranks, arguments.shards), total=len(arguments.shards))
        found: Found = dict(zip(arguments.shards, runs, strict=True))
    name = torch.cuda.get_device_name()
    print_tables(found)
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": name,
        "torch": torch.__version__,
        "bytes": found,
        "published_mib": PUBLISHED,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"memory-{name.split()[-1].lower()}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(found, name, arguments.out / f"{stem}.png")
    print(json.dumps(document))


def run_ranks(
    shards: int, heads: tuple[str, ...] = tuple(PUBLISHED), impls: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, int]]]:
    """Start the ranks of one vocab group on this card and read what rank 0 printed."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    start = ["-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={shards}"]
    done = subprocess.run(
        [
            sys.executable,
            *start,
            "-m",
            "benchmarks.memory_rank",
            json.dumps(heads),
            json.dumps(impls),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=True,
    )
    found: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_tables(found: Found) -> None:
    """Print a table for each classifier: a row an implementation, a column a degree, in MiB."""
    for head in PUBLISHED:
        table = Table(title=f"{head}: MiB held above the inputs, in all (forward alone)")
        table.add_column("impl")
        table.add_column("published, 1 shard", justify="right")
        for shards in found:
            table.add_column(f"{shards} shards", justify="right")
        names = list(dict.fromkeys(name for every in found.values() for name in every[head]))
        for name in names:
            published = PUBLISHED[head].get(name)
            cells = ["" if published is None else f"{published[1]:,.0f}"]
            for every in found.values():
                one = every[head].get(name)
                cells.append("" if one is None else f"{mib(one['all'])} ({mib(one['forward'])})")
            table.add_row(name, *cells)
        Console(width=120).print(table)


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def curves(found: Found, head: str) -> dict[str, dict[int, int]]:
    """Return bytes by degree for each implementation, those that agree to 1% under one name."""
    merged: list[tuple[list[str], dict[int, int]]] = []
    for name in dict.fromkeys(name for every in found.values() for name in every[head]):
        sizes = {n: every[head][name]["all"] for n, every in found.items() if name in every[head]}
        for names, known in merged:
            if known.keys() == sizes.keys() and all(
                abs(sizes[n] - known[n]) <= 0.01 * known[n] for n in sizes
            ):
                names.append(name)
                break
        else:
            merged.append(([name], sizes))
    return {", ".join(names): sizes for names, sizes in merged}


def plot(found: Found, machine: str, path: Path) -> None:
    """Draw bytes over degrees, a line an implementation, published figures as crosses."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PUBLISHED), figsize=(12, 4.8), layout="constrained")
    degrees = list(found)
    for axes, (head, published) in zip(panels, PUBLISHED.items(), strict=True):
        for names, sizes in curves(found, head).items():
            points = sorted((shards, size / 2**20) for shards, size in sizes.items())
            (line,) = axes.plot(
                *zip(*points, strict=True), marker="o", ms=4, label=names.replace(", ", "\n")
            )
            for name, (_, size) in published.items():
                if name in names.split(", "):
                    axes.plot(1, size, marker="x", ms=10, mew=2, color=line.get_color())
        axes.set(title=head, xlabel="shards", xscale="log", yscale="log", ylabel="MiB a rank")
        axes.set_xticks(degrees, [str(degree) for degree in degrees])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.suptitle(f"Loss and gradients above the inputs, {machine}; x: published")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
