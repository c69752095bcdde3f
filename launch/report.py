"""What a run leaves: a table of the ranks, the loss curve and the numbers."""

import json
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.arguments import TrainArguments
from launch.check import Comparison


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
    reports: list[RankReport],
    losses: list[float],
    comparison: Comparison | None,
    first_step: int = 0,
) -> None:
    """Write run.json and loss.png to ``--out``, and say so.

    Args:
        losses: of every step of the run, also of those before ``first_step``, where it was resumed.
        first_step: of those that this start did, whose speed is told.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens = arguments.batch * arguments.sequence
    own = reports[0].seconds[first_step:]
    median = statistics.median(own)
    document: dict[str, Any] = {
        "arguments": {name: _plain(value) for name, value in asdict(arguments).items()},
        "first_step": first_step,
        "losses": losses,
        "seconds_per_step": reports[0].seconds,
        "tokens_per_second": tokens / median,
        "ranks": [
            {
                key: value
                for key, value in asdict(report).items()
                if key not in ("losses", "seconds")
            }
            for report in reports
        ],
        "check": None
        if comparison is None
        else {**asdict(comparison), "passed": comparison.passed},
    }
    path = arguments.out / "run.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    _plot(arguments, max(report.rows[1] for report in reports), losses)
    Console().print(
        f"loss {losses[first_step]:.3f} -> {losses[-1]:.3f} in {len(own)} steps, "
        f"{sum(own):.0f} s, {tokens / median:.0f} tokens/s; "
        f"{path}, {arguments.out / 'loss.png'}",
        soft_wrap=True,
    )


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else str(value)


def _plot(arguments: TrainArguments, rows: int, losses: list[float]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, marker=".")
    axes.set(
        xlabel="step",
        ylabel="loss (nats per token)",
        title=f"{arguments.pipeline} x {arguments.vocab} ranks, {rows:,} rows, "
        f"{arguments.schedule}",
    )
    axes.grid(alpha=0.3)
    figure.savefig(arguments.out / "loss.png", dpi=150)
    pyplot.close(figure)
