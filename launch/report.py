"""What a run leaves: a table of the ranks, the loss curve and the numbers."""

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.check import Comparison
from launch.opening import count_parameters, device_name, left_behind, model_name


@dataclass(frozen=True)
class RankReport:
    """One rank at the end of training.

    Attributes:
        rank: in the world.
        stages, vocab_rank: where it stands in the mesh.
        rows: the classifier rows [start, stop) that it holds.
        parameters: how many it holds and trains.
        peak_memory: bytes.
        bytes_read: of the model's folder.
        losses: of each step of the run; empty off the last stage.
        seconds: of each step of the run.
        scores: step and loss of each evaluation, of the rank that tells of the run.
    """

    rank: int
    stages: list[int]
    vocab_rank: int
    rows: tuple[int, int]
    parameters: int
    peak_memory: int
    bytes_read: int
    losses: list[float]
    seconds: list[float]
    scores: list[tuple[int, float]] = field(default_factory=list)


def print_ranks(reports: list[RankReport]) -> None:
    """Print a line for each rank."""
    table = Table(title="ranks")
    for column in (
        "rank",
        "stages",
        "vocab rank",
        "rows held",
        "of the classifier",
        "parameters",
        "peak",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for report in reports:
        start, stop = report.rows
        table.add_row(
            str(report.rank),
            ", ".join(map(str, report.stages)),
            str(report.vocab_rank),
            f"{stop - start:,}",
            f"[{start:,}, {stop:,})" if stop > start else "none",
            f"{report.parameters:,}",
            f"{report.peak_memory / 2**20:,.0f} MiB",
        )
    Console(width=100).print(table)


def write_run(
    arguments: TrainArguments,
    config: PretrainedConfig,
    device: torch.device,
    reports: list[RankReport],
    losses: list[float],
    comparison: Comparison | None,
    first_step: int = 0,
) -> None:
    """Write run.json and loss.png to ``--out``, and say so.

    Args:
        arguments: of the run, settled.
        config: of its model.
        device: this rank's.
        reports: of all ranks.
        comparison: with one process, where that was made.
        losses: of every step of the run, also of those before ``first_step``, where it was resumed.
        first_step: of those that this start did, whose speed is told.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens = arguments.batch * arguments.sequence
    own = reports[0].seconds[first_step:]
    median = statistics.median(own)
    scores = next((report.scores for report in reports if report.scores), [])
    model = model_name(arguments, config)
    given = {name: _plain(value) for name, value in asdict(arguments).items()}
    if arguments.model is not None:  # which says these itself
        for name in ("layers", "hidden", "vocabulary"):
            del given[name]
    document: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "vocab-parallel")},
        },
        "device": device_name(device),
        "model": {
            "name": model,
            "model_type": config.model_type,
            "parameters": count_parameters(config),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "vocabulary": config.vocab_size,
        },
        "arguments": given,
        "first_step": first_step,
        "losses": losses,
        "eval_losses": [{"step": step, "loss": loss} for step, loss in scores],
        "seconds_per_step": reports[0].seconds,
        "tokens_per_second": tokens / median,
        "ranks": [
            {
                key: value
                for key, value in asdict(report).items()
                if key not in ("losses", "seconds", "scores")
            }
            for report in reports
        ],
        "check": None
        if comparison is None
        else {**asdict(comparison), "passed": comparison.passed},
    }
    path = arguments.out / "run.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    plot_losses(arguments, model, max(report.rows[1] for report in reports), losses, scores)
    Console().print(
        f"loss {losses[first_step]:.3f} -> {losses[-1]:.3f} in {len(own)} steps, "
        f"{sum(own):.0f} s, {tokens / median:.0f} tokens/s; "
        f"{path}, {arguments.out / 'loss.png'}",
        soft_wrap=True,
    )
    for line in left_behind(arguments, scores):
        Console().print(line, soft_wrap=True, markup=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):  # which JSON does not have
        return str(value)
    return value if value is None or isinstance(value, int | float | str | tuple) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of a clone that is not installed
        return None


def plot_losses(
    arguments: TrainArguments,
    model: str,
    rows: int,
    losses: list[float],
    scores: list[tuple[int, float]],
) -> None:
    """Draw the loss of each step and of each evaluation into loss.png of ``--out``."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".", label="training")
    if scores:
        axes.plot(*zip(*scores, strict=True), marker="o", label="evaluation")
        axes.legend()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title=f"{model}: {arguments.pipeline} x {arguments.vocab} ranks, {rows:,} rows, "
        f"{arguments.schedule}",
    )
    axes.grid(alpha=0.3)
    figure.savefig(arguments.out / "loss.png", dpi=150)
    pyplot.close(figure)
