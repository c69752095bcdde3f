"""Strong scaling of one shard's work: the same tokens, the classifier cut into V = 1 to 32 parts.

    python -m benchmarks.scaling --out benchmarks/results

Times are of one rank's shard on this card, forward and backward, without the collectives that join
the shards; efficiency is the time of V = 1 over V times that of V. Beside each stands what the
planner predicts from a hardware file that was measured just before, at another shape. Memory is
what real NCCL ranks that share this card held above their inputs, gradients included, for V = 2
and 4. The last line of the output is one JSON document.
"""

import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.contestants import draw, ours
from benchmarks.measure import interleaved
from benchmarks.memory import run_ranks
from benchmarks.memory_rank import HEADS
from benchmarks.plot import plot_scaling
from benchmarks.stages import release
from launch.planning.calibrate import calibrate
from launch.planning.hardware import Hardware
from launch.planning.loss_time import loss_seconds
from vocab_parallel import plan_backward

MIB = 2**20
BACKWARDS = ("recompute", "probs")


@dataclass(frozen=True)
class Arguments:
    """Which classifiers and degrees."""

    models: tuple[str, ...] = ("qwen3-8b", "qwen3-32b", "llama-3.1-70b", "248,320 rows")
    """Heads of benchmarks.memory_rank."""
    degrees: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """V."""
    memory_degrees: tuple[int, ...] = (2, 4)
    """V of the real ranks whose memory is measured; none on a CPU."""
    tokens: int = 8192
    """Of the loss."""
    hardware: str | None = None
    """A hardware file, or h200; by default the device is measured first."""
    rounds: int = 7
    """Timed rounds."""
    out: Path = Path("runs/scaling")
    """Folder for the numbers (JSON), the figure (PNG) and the hardware file."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.hardware is None:
        hardware = calibrate(device)
        hardware.save(arguments.out / "hardware.json")
    else:
        hardware = Hardware.load(arguments.hardware)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    models = {
        model: scale(model, arguments, hardware, device)
        for model in tqdm(arguments.models, desc="classifiers")
    }
    dist.destroy_process_group()
    memory: list[dict[str, Any]] = []
    if device.type == "cuda":
        release(device)
        memory = [
            row
            for degree in tqdm(arguments.memory_degrees, desc="NCCL ranks")
            for row in memory_of_ranks(degree, arguments)
        ]
    _print(models, memory)
    document = {
        "date": date.today().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "tokens": arguments.tokens,
        "hardware": asdict(hardware),
        "models": models,
        "memory": memory,
    }
    stem = f"{document['date']}-scaling-{machine.split()[-1].lower()}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot_scaling(document, arguments.out / f"{stem}.png")
    print(json.dumps(document))


def scale(
    model: str, arguments: Arguments, hardware: Hardware, device: torch.device
) -> list[dict[str, Any]]:
    """Measure every degree's shard, each way, in one interleaved run."""
    head = HEADS[model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    contestants, predicted, shapes = {}, {}, {}
    for degree in arguments.degrees:
        rows = -(-head.vocabulary // degree)
        operands = draw(arguments.tokens, head.hidden, rows, dtype, device)
        for way in BACKWARDS:
            name = f"{way}, V = {degree}"
            shapes[name] = (way, degree, rows)
            contestants[name] = ours(operands, backward=way)
            plan = plan_backward(
                arguments.tokens, rows, head.hidden, dtype, backward=way, device_type=device.type
            )
            predicted[name] = 1e3 * loss_seconds(
                plan, arguments.tokens, rows, head.hidden, dtype.itemsize, hardware
            )
    measured = interleaved(contestants, device=device, rounds=arguments.rounds)
    whole = {way: measured[f"{way}, V = {arguments.degrees[0]}"].milliseconds for way in BACKWARDS}
    found = []
    for name, (way, degree, rows) in shapes.items():
        milliseconds = measured[name].milliseconds
        found.append(
            {
                "way": way,
                "degree": degree,
                "rows": rows,
                "milliseconds": milliseconds,
                "spread": measured[name].spread,
                "efficiency": whole[way] * arguments.degrees[0] / (degree * milliseconds),
                "predicted_milliseconds": predicted[name],
                "error": predicted[name] / milliseconds - 1.0,
            }
        )
    return found


def memory_of_ranks(degree: int, arguments: Arguments) -> list[dict[str, Any]]:
    """Compare what real ranks of a vocab group held with what `plan_backward` says."""
    found = run_ranks(degree, arguments.models, ("chunked",))
    rows = []
    for model, impls in found.items():
        head = HEADS[model]
        shard = -(-head.vocabulary // degree)
        plan = plan_backward(head.tokens, shard, head.hidden, degree=degree)
        held = impls["chunked"]["all"]
        rows.append(
            {
                "model": model,
                "degree": degree,
                "bytes": held,
                "predicted_bytes": plan.peak_bytes,
                "error": plan.peak_bytes / held - 1.0,
            }
        )
    return rows


def _print(models: dict[str, list[dict[str, Any]]], memory: list[dict[str, Any]]) -> None:
    console = Console(width=110)
    for model, rows in models.items():
        table = Table(title=model)
        for column in ("way", "V", "rows", "ms", "+-", "efficiency", "predicted ms", "error"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                row["way"],
                str(row["degree"]),
                f"{row['rows']:,}",
                f"{row['milliseconds']:.2f}",
                f"{row['spread']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['predicted_milliseconds']:.2f}",
                f"{row['error']:+.1%}",
            )
        console.print(table)
    table = Table(title="MiB that a rank of a vocab group held above its inputs")
    for column in ("", "V", "MiB", "predicted", "error"):
        table.add_column(column, justify="right")
    for row in memory:
        table.add_row(
            row["model"],
            str(row["degree"]),
            f"{row['bytes'] / MIB:,.0f}",
            f"{row['predicted_bytes'] / MIB:,.0f}",
            f"{row['error']:+.1%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
