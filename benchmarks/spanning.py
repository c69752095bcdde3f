"""The vocabulary on all stages of deep pipelines: steps simulated from what is measured here.

    python -m benchmarks.spanning --out benchmarks/results

Measured on this device, all of a model interleaved: a decoder layer's forward and its backward, the
whole loss, the loss of one of V ranks of a last stage's vocab group (V x T tokens on its rows), and
S and T of as many rows as a rank of P has. From that a step of M = 8 P microbatches is simulated:

    (a) equally many layers on every stage, the whole loss on the last one besides
    (b) the best number of layers on the last stage, 0 allowed
    (c) the same with V ranks on the last stage, whose columns have sequences of their own
    (d) all stages, equally many rows a rank, in the order that is run
    (e) all stages, rows filled: ranks with fewer layers have more

beside the ideal, (layers + loss) / P for each microbatch and the bubble of the schedule itself.
What goes over links is arithmetic: the hardware file's rate. Gemma's attention runs without its
softcap, which torch's own kernel does not have. The last line of the output is one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import contestants
from benchmarks.measure import interleaved
from benchmarks.plot import plot_spanning
from benchmarks.row_passes import RowPasses
from benchmarks.stages import release
from benchmarks.steps import Pieces, Pipeline, equal, ideal, rebalanced, spanning
from launch.planning.hardware import Hardware
from launch.planning.layers import DecoderLayers
from launch.planning.published import PUBLISHED

_MEASURED_LAYERS = 2
_DEEP = "18 x 2048, 256k rows"
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-32b": dict(PUBLISHED["qwen3-32b"]),
    "qwen3-8b": dict(PUBLISHED["qwen3-8b"]),
    _DEEP: {
        "model_type": "gemma",
        "vocab_size": 256_000,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "gemma-2-2b": {**PUBLISHED["gemma-2-2b"], "attn_logit_softcapping": None},
    "small": {
        **PUBLISHED["qwen3-8b"],
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


@dataclass(frozen=True)
class Arguments:
    """Which models and pipelines."""

    models: tuple[str, ...] = ("qwen3-32b", "qwen3-8b", _DEEP, "gemma-2-2b")
    """Those above, or "small" for a CPU."""
    pipelines: tuple[int, ...] = (8, 16, 32)
    """P of 1F1B."""
    other_schedules: tuple[str, ...] = ("interleaved1f1b", "zbvzerobubble")
    """Simulated at the first P besides."""
    sequence: int = 4096
    """T, tokens of a microbatch."""
    columns: int = 4
    """V of (c)."""
    backward: str = "auto"
    """How the losses' backward finds the logits: auto, recompute or probs."""
    memory_budget: int | None = None
    """Of the losses, in bytes; by default the library's, 64 MiB."""
    hardware: str = "h100"
    """Whose links are taken."""
    rounds: int = 7
    """Timed rounds."""
    out: Path = Path("runs/spanning")
    """Folder for the numbers (JSON) and the figure (PNG)."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    unknown = set(arguments.models) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown models {sorted(unknown)}: known are {list(MODELS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    hardware = Hardware.load(arguments.hardware)
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in asdict(arguments).items()},
        "models": {},
    }
    for model in tqdm(arguments.models, desc="models"):
        pieces = measure(MODELS[model], arguments, hardware, device)
        release(device)
        rows = study(pieces, arguments)
        _print(model, pieces, rows)
        document["models"][model] = {"pieces": asdict(pieces), "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"{document['date']}-spanning-{machine.split()[-1].lower()}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot_spanning(document, arguments.out / f"{stem}.png")
    print(json.dumps(document))


def measure(
    config: dict[str, Any], arguments: Arguments, hardware: Hardware, device: torch.device
) -> Pieces:
    """Time a model's pieces in one interleaved run."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tokens, columns = arguments.sequence, arguments.columns
    softcap = config.get("final_logit_softcapping")
    options: dict[str, Any] = {
        "softcap": softcap,
        "backward": arguments.backward,
        "memory_budget": arguments.memory_budget,
    }
    layers = DecoderLayers(config, _MEASURED_LAYERS, tokens, dtype, device)

    def forward_and_backward() -> None:
        out = layers()
        out.backward(out.detach())

    whole = contestants.draw(tokens, hidden, vocabulary, dtype, device)
    shard = contestants.draw(columns * tokens, hidden, -(-vocabulary // columns), dtype, device)
    calls: dict[str, Callable[[], object]] = {
        "forward": layers,
        "layers": forward_and_backward,
        "loss": contestants.ours(whole, **options),
        "group loss": contestants.ours(shard, **options),
    }
    numbers = sorted({-(-vocabulary // ranks) for ranks in arguments.pipelines} | {vocabulary})
    for rows in numbers:
        passes = RowPasses(tokens, hidden, rows, dtype, device, **options)
        calls[f"S {rows}"], calls[f"S and T {rows}"] = passes.calls(whole.hidden[None])
    found = {
        name: one.milliseconds
        for name, one in interleaved(calls, device=device, rounds=arguments.rounds).items()
    }
    sent = 1e3 * tokens * hidden / hardware.link_bytes  # of a byte for each number
    forward = found["forward"] / _MEASURED_LAYERS
    return Pieces(
        layers=config["num_hidden_layers"],
        vocabulary=vocabulary,
        layer_forward=forward,
        layer_backward=max(found["layers"] / _MEASURED_LAYERS - forward, 0.0),
        loss=found["loss"],
        group_loss=found["group loss"],
        passes={
            rows: (found[f"S {rows}"], max(found[f"S and T {rows}"] - found[f"S {rows}"], 0.0))
            for rows in numbers
        },
        message=sent * dtype.itemsize,
        broadcast=sent * dtype.itemsize,
        exchange=sent * 4,
        group_link=sent * (columns - 1) * (dtype.itemsize + 4),
    )


def study(pieces: Pieces, arguments: Arguments) -> list[dict[str, Any]]:
    """Simulate every pipeline's step, each place of the vocabulary."""
    pipelines = [Pipeline("1f1b", ranks, 8 * ranks) for ranks in arguments.pipelines]
    pipelines += [replace(pipelines[0], schedule=name) for name in arguments.other_schedules]
    rows = []
    for pipeline in tqdm(pipelines, desc="pipelines", leave=False):
        best, counts = rebalanced(pieces, pipeline)
        group, _ = rebalanced(pieces, pipeline, group=True)
        balanced = spanning(pieces, pipeline, filled=False)
        filled = spanning(pieces, pipeline, filled=True)
        rows.append(
            {
                **asdict(pipeline),
                "equal": equal(pieces, pipeline),
                "rebalanced": best,
                "rebalanced layers": counts,
                "group": group,
                "balanced": asdict(balanced),
                "filled": asdict(filled),
                "ideal": ideal(pieces, pipeline),
                "whole layers": ideal(pieces, pipeline, whole_layers=True),
            }
        )
    return rows


def _print(model: str, pieces: Pieces, rows: list[dict[str, Any]]) -> None:
    table = Table(
        title=f"{model}: a layer takes {pieces.layer:.2f} ms, the loss {pieces.loss:.2f} ms"
    )
    table.add_column("schedule", no_wrap=True)
    for column in (
        "P", "M", "(a) equal ms", "(b) rebalanced", "layers on last", "(c) group",
        "(d) all", "(e) filled", "ideal", "best / ideal", "(b) / best",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        ours = [row["balanced"]["milliseconds"], row["filled"]["milliseconds"]]
        table.add_row(
            row["schedule"],
            str(row["ranks"]),
            str(row["microbatches"]),
            f"{row['equal']:.0f}",
            f"{row['rebalanced']:.0f}",
            str(row["rebalanced layers"][-1]),
            f"{row['group']:.0f}",
            f"{ours[0]:.0f}",
            f"{ours[1]:.0f}",
            f"{row['ideal']:.0f}",
            f"{min(ours) / row['ideal']:.3f}",
            f"{row['rebalanced'] / min(ours):.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
