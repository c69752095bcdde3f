"""The last stage against the others: equal GPUs, an equal global batch, every way to cut the loss.

    python -m benchmarks.last_stage --out benchmarks/results

A model on pipeline x V GPUs, 1F1B, sequences of 4096 tokens, V columns of M microbatches:

    (a) V data-parallel columns, each last stage with the whole classifier, and each peer's loss
    (b) tensor-parallel groups of V ranks with loss-parallel logits, V x M microbatches
    (c) ours, sharded layout: columns with sequences of their own, the classifier cut over them
    (d) ours, replicated layout: columns with the same sequences, V x M microbatches
    (e) ours, the vocabulary cut over all P x V ranks, columns with sequences of their own

Layers are spread over the stages for each contestant by what its loss was measured to take. Then
the last stage (its layers forward, the loss, its layers backward) and the first stage (its layers,
with its microbatches in flight) are run on this one card, and timed. From that a step of 1F1B is
simulated; what goes over links is arithmetic: the hardware file's rate, nothing hidden but by the
order of (e), whose layers are spread evenly.

The last line of the output is one JSON document.
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

from benchmarks import all_stages, contestants
from benchmarks.cases import Case, Row
from benchmarks.contestants import Operands
from benchmarks.cuts import Cut, cuts_of
from benchmarks.measure import interleaved
from benchmarks.plot import plot_last_stages
from benchmarks.stages import Stage, measure_layers, measure_with_loss, release
from launch.planning.balance import layer_counts
from launch.planning.hardware import Hardware
from launch.planning.orders import alone

GB = 1e9


@dataclass(frozen=True)
class Arguments:
    """Which models and meshes."""

    cases: tuple[str, ...] = ("qwen3-1.7b:2x2", "qwen3-8b:4x2", "llama-3.1-8b:4x2", "qwen3-32b:8x4")
    """model:pipeline x vocab."""
    sequence: int = 4096
    """N, tokens of a microbatch of a column."""
    microbatches: int = 16
    """M, of a column, where columns have sequences of their own."""
    recompute_from: float = 2e10
    """Models of at least so many parameters keep a layer's input alone and run it again."""
    hardware: str = "h200"
    """Whose links are taken."""
    rounds: int = 5
    """Timed rounds."""
    peers: bool = True
    """Whether other packages' losses are timed."""
    out: Path = Path("runs/last_stage")
    """Folder for the numbers (JSON) and the figure (PNG)."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    hardware = Hardware.load(arguments.hardware)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in asdict(arguments).items()},
        "cases": {},
    }
    for text in tqdm(arguments.cases, desc="cases"):
        case = Case.parse(text, arguments.recompute_from)
        found, missing = study(case, arguments, hardware, device)
        _print(case, found, missing)
        document["cases"][text] = {
            "rows": {name: asdict(row) for name, row in found.items()},
            "layers run again": case.again,
            "missing": missing,
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"{document['date']}-last-stage-{machine.split()[-1].lower()}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot_last_stages(document, arguments.out / f"{stem}.png")
    print(json.dumps(document))
    dist.destroy_process_group()


def study(
    case: Case, arguments: Arguments, hardware: Hardware, device: torch.device
) -> tuple[dict[str, Row], dict[str, str]]:
    """Measure one model's contestants; returns those that ran, and why others did not."""
    cuts, missing = cuts_of(case.vocab, arguments.peers), {}
    losses: dict[str, float] = {}
    for name, cut in cuts.items():
        try:
            operands = _operands(case, cut, arguments, device)
            one = interleaved({name: cut.make(operands)}, device=device, rounds=arguments.rounds)
            losses[name] = one[name].milliseconds
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).strip()[:160]}"
        operands = None
        release(device)
    layer = {
        degree: _layer_milliseconds(case, degree, arguments, device)
        for degree in {cut.degree for cut in cuts.values()}
    }
    found = {
        name: _measure(
            case, cuts[name], loss, layer[cuts[name].degree], arguments, hardware, device
        )
        for name, loss in tqdm(losses.items(), desc=case.name, leave=False)
    }
    try:
        found[all_stages.NAME] = all_stages.measure_all_stages(
            case,
            layer[1],
            sequence=arguments.sequence,
            microbatches=arguments.microbatches,
            rounds=arguments.rounds,
            hardware=hardware,
            device=device,
        )
    except Exception as error:
        missing[all_stages.NAME] = f"{type(error).__name__}: {str(error).strip()[:160]}"
    return found, missing


def _operands(case: Case, cut: Cut, arguments: Arguments, device: torch.device) -> Operands:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = -(-case.config["vocab_size"] // cut.shards)
    tokens = cut.columns * arguments.sequence
    return contestants.draw(tokens, case.config["hidden_size"], rows, dtype, device)


def _layer_milliseconds(
    case: Case, degree: int, arguments: Arguments, device: torch.device
) -> float:
    """Return the milliseconds of a layer, among as many as a stage has on average."""
    count = max(1, case.config["num_hidden_layers"] // case.pipeline)
    stage = Stage(case.config, count, arguments.sequence, device, degree=degree, again=case.again)
    found = measure_layers(stage, 1, device, arguments.rounds)
    del stage
    release(device)
    return found.milliseconds / count


def _measure(
    case: Case,
    cut: Cut,
    loss: float,
    layer: float,
    arguments: Arguments,
    hardware: Hardware,
    device: torch.device,
) -> Row:
    counts = layer_counts(case.config["num_hidden_layers"], case.pipeline, loss / layer)
    options: dict[str, Any] = {"degree": cut.degree, "again": case.again}
    operands = _operands(case, cut, arguments, device)
    stage = Stage(case.config, counts[-1], arguments.sequence, device, **options)
    last = measure_with_loss(stage, operands, cut.make(operands), device, arguments.rounds)
    del stage, operands
    release(device)
    microbatches = arguments.microbatches * (case.vocab if cut.same else 1)
    rows = case.config["vocab_size"]
    if cut.degree > 1 or (case.config["tie_word_embeddings"] and cut.shards > 1):
        rows = -(-rows // case.vocab)  # the embedding is cut as the classifier is
    stage = Stage(
        case.config, counts[0], arguments.sequence, device, embedding_rows=rows, **options
    )
    first = measure_layers(stage, min(case.pipeline, microbatches), device, arguments.rounds)
    del stage
    release(device)
    links = [_link_milliseconds(case, cut, count, arguments, hardware) for count in counts]
    links[-1] += _loss_link_milliseconds(case, cut, arguments, hardware)
    per_layer = first.milliseconds / counts[0]
    stage_times = [count * per_layer for count in counts[:-1]] + [last.milliseconds]
    seconds = [(own + link) / 1e3 for own, link in zip(stage_times, links, strict=True)]
    order = alone(
        "1f1b",
        case.pipeline,
        microbatches,
        [(one / 3, one / 3, one / 3) for one in seconds],
        arguments.sequence * case.config["hidden_size"] * 2 / hardware.link_bytes,
    )
    return Row(
        layers=counts,
        loss_milliseconds=loss,
        last_milliseconds=1e3 * seconds[-1],
        first_milliseconds=1e3 * seconds[0],
        link_milliseconds=links[-1],
        last_peak=last.peak,
        first_peak=first.peak,
        step_seconds=order.finish,
    )


def _link_milliseconds(
    case: Case, cut: Cut, layers: int, arguments: Arguments, hardware: Hardware
) -> float:
    """Four all-reduces of [N, D] a tensor-parallel layer, two more where it runs again."""
    if cut.degree == 1:
        return 0.0
    calls = layers * (6 if case.again else 4)
    size = arguments.sequence * case.config["hidden_size"] * 2
    return 1e3 * calls * 2 * (1 - 1 / cut.degree) * size / hardware.link_bytes


def _loss_link_milliseconds(
    case: Case, cut: Cut, arguments: Arguments, hardware: Hardware
) -> float:
    """Hidden states gathered and their float32 gradient scattered, or that gradient summed."""
    if cut.shards == 1:
        return 0.0
    share = (1 - 1 / cut.shards) * arguments.sequence * case.config["hidden_size"]
    moved = share * cut.columns * (2 + 4) if cut.columns > 1 else share * 2 * 4
    if cut.degree > 1:  # torch sums a bfloat16 gradient
        moved = share * 2 * 2
    return 1e3 * moved / hardware.link_bytes


def _print(case: Case, found: dict[str, Row], missing: dict[str, str]) -> None:
    again = ", layers run again" if case.again else ""
    title = f"{case.name}, {case.pipeline} x {case.vocab} GPUs{again}"
    table = Table(title=title)
    for column in (
        "", "layers of last", "loss ms", "last ms", "first ms", "last GB", "first GB", "step s",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for name, row in found.items():
        table.add_row(
            name,
            f"{row.layers[-1]} ({row.layers[0]} first)",
            f"{row.loss_milliseconds:.1f}",
            f"{row.last_milliseconds:.1f}",
            f"{row.first_milliseconds:.1f}",
            f"{row.last_peak / GB:.1f}",
            f"{row.first_peak / GB:.1f}",
            f"{row.step_seconds:.3f}",
        )
    console = Console(width=120)
    console.print(table)
    for name, reason in missing.items():
        console.print(f"not here: {name}: {reason}", markup=False)


if __name__ == "__main__":
    main()
