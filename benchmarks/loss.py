"""Time, memory and error of the loss, forward and backward, on one shard: ours beside its peers.

    python -m benchmarks.loss                                on a GPU: six shards, every peer
    python -m benchmarks.loss --shapes 2048x37984 --no-peers --against ../older
    python -m benchmarks.loss --tokens 1024 --shapes 256x37984 --dtype float32    on a laptop

The floor is the fastest of the three matrix products alone, in chunks of 2048, 4096 and 8192
tokens, timed in the same run. An older checkout (`git worktree add ../older COMMIT`) can be timed
beside today's code in the same rounds. Targets are uniform; two rows have others. Memory is what a
call holds above its inputs and the two gradients that it returns. Contestants are interleaved;
times are medians, and a ratio to the floor is the median of the rounds' ratios. `--plot` writes
time over memory.
The last line of the output is one JSON document.
"""

import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import contestants
from benchmarks.contestants import Contestant, Operands
from benchmarks.exact import exact_gradients, relative_errors
from benchmarks.measure import Measurement, interleaved
from benchmarks.older import older_library

MIB = 2**20
GPU_SHAPES = (
    "2048x37984", "5120x37984", "2048x75968", "4096x75968", "2048x18992", "5120x151936",
)  # fmt: skip
CPU_SHAPES = ("256x37984",)
# Float64 of a larger shard takes longer than it teaches.
MOST_LOGITS_FOR_ERRORS = 4e8


@dataclass(frozen=True)
class Arguments:
    """Which shards, and who is timed on them."""

    tokens: int | None = None
    """T, tokens: 8192 on a GPU, 1024 on a CPU."""
    shapes: tuple[str, ...] = ()
    """Hidden size x rows of each shard."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of hidden states and rows: bfloat16 on a GPU, float32 on a CPU."""
    rounds: int = 9
    """Timed rounds."""
    peers: bool = True
    """Whether other packages' losses are timed."""
    errors: bool = True
    """Whether gradients are compared with float64."""
    against: Path | None = None
    """Time the `vocab_parallel` of this checkout, too."""
    curve: bool = True
    """Whether each way is timed at several sizes of its tiles."""
    plot: Path | None = None
    """Write the figure of time over memory here."""
    out: Path | None = None
    """Write the JSON document here, too."""


@dataclass
class Row:
    """What was found of one contestant on one shard."""

    milliseconds: float
    spread: float
    over_floor: float  # median of the rounds' ratios
    memory: int | None  # bytes above inputs and returned gradients
    rounds: tuple[float, ...]  # milliseconds of each, in which all contestants ran
    errors: dict[str, float] = field(default_factory=dict)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    tokens = arguments.tokens or (8192 if on_gpu else 1024)
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    document: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "dtype": str(dtype),
        "shapes": {},
    }
    for shape in arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        hidden, rows = (int(side) for side in shape.split("x"))
        operands = contestants.draw(tokens, hidden, rows, dtype, device)
        found, missing = _measure(operands, arguments, device)
        _print_table(shape, tokens, found, missing)
        document["shapes"][shape] = {
            "rows": {name: asdict(row) for name, row in found.items()},
            "missing": missing,
        }
        if arguments.out is not None:  # a run that is cut leaves what it has found
            arguments.out.write_text(json.dumps(document) + "\n")
        del operands
        if on_gpu:
            torch.cuda.empty_cache()
    if arguments.plot is not None:
        from benchmarks.plot import plot_time_over_memory

        plot_time_over_memory(document, arguments.plot)
    dist.destroy_process_group()
    print(json.dumps(document))


def _measure(
    operands: Operands, arguments: Arguments, device: torch.device
) -> tuple[dict[str, Row], dict[str, str]]:
    entered, missing = _entries(operands, arguments, device)
    for kind, case in contestants.other_targets(operands).items():
        entered[f"ours, probs, {kind}"] = contestants.ours(case, backward="probs")
    if arguments.against is not None:
        older = older_library(arguments.against).linear_cross_entropy
        for name, options in (("probs", {"backward": "probs"}), ("auto 64 MiB", {})):
            entered[f"older, {name}"] = contestants.ours(operands, loss=older, **options)
    found = interleaved(entered, device=device, rounds=arguments.rounds)
    floors = (one for name, one in found.items() if name.startswith("products"))
    floor = min(floors, key=lambda one: one.milliseconds)
    table = {}
    for name, one in found.items():
        table[name] = Row(
            one.milliseconds,
            one.spread,
            one.over(floor),
            _memory(name, one, operands),
            one.rounds,
        )
    elements = operands.hidden.shape[0] * operands.rows.shape[0]
    if arguments.errors and elements <= MOST_LOGITS_FOR_ERRORS:
        for kind, case in (("random", operands), ("confident", contestants.confident(operands))):
            exact = exact_gradients(case)
            same, _ = _entries(case, arguments, device)
            for name, contestant in same.items():
                if not name.startswith("products") and "main_grad" not in name:
                    errors = relative_errors(contestant(), exact, case)
                    table[name].errors |= {f"{kind} {what}": one for what, one in errors.items()}
    return table, missing


def _entries(
    operands: Operands, arguments: Arguments, device: torch.device
) -> tuple[dict[str, Contestant], dict[str, str]]:
    entered = contestants.floors(operands)
    entered["ours, probs"] = contestants.ours(operands, backward="probs")
    entered["ours, recompute"] = contestants.ours(
        operands, backward="recompute", memory_budget=64 * MIB
    )
    entered["ours, auto 64 MiB"] = contestants.ours(operands)
    if arguments.curve:
        for budget in (16, 32, 128):
            entered[f"ours, recompute {budget} MiB"] = contestants.ours(
                operands, backward="recompute", memory_budget=budget * MIB
            )
        for budget in (128, 256, 512):
            entered[f"ours, auto {budget} MiB"] = contestants.ours(
                operands, memory_budget=budget * MIB
            )
    entered["ours, probs into main_grad"] = contestants.ours_into_main_grad(
        operands, backward="probs"
    )
    entered["eager, materialised"] = contestants.materialised(operands, compiled=False)
    missing: dict[str, str] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        entered["torch F.linear_cross_entropy"] = lambda: operands.gradients(
            F.linear_cross_entropy(
                operands.hidden, operands.rows, operands.targets, options=options
            )
        )
    if arguments.peers and device.type == "cuda":
        entered["torch.compile, materialised"] = contestants.materialised(operands, compiled=True)
        others, missing = contestants.peers(operands)
        entered |= others
    return entered, missing


def _memory(name: str, one: Measurement, operands: Operands) -> int | None:
    """Take the returned gradients off the peak; an accumulator was there before."""
    if name.startswith("products"):
        return None
    returned = operands.hidden.nbytes
    if "main_grad" not in name:
        returned += operands.rows.nbytes
    return one.peak - returned


def _print_table(shape: str, tokens: int, found: dict[str, Row], missing: dict[str, str]) -> None:
    table = Table(title=f"{tokens} tokens, hidden x rows {shape}")
    kinds = sorted({kind for row in found.values() for kind in row.errors}, reverse=True)
    for column in ("", "ms", "+-", "x floor", "MiB held", *kinds):
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row.milliseconds:.2f}",
            f"{row.spread:.2f}",
            f"{row.over_floor:.3f}",
            "" if row.memory is None else f"{row.memory / MIB:,.0f}",
            *(f"{row.errors[kind]:.1e}" if kind in row.errors else "" for kind in kinds),
        )
    console = Console(width=140)
    console.print(table)
    for name, reason in missing.items():
        console.print(f"not here: {name}: {reason}", markup=False)


if __name__ == "__main__":
    main()
