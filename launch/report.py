"""What a run says before its first step and after its last, and the files that it leaves."""

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.check import Comparison
from launch.checkpoint import History, complete_checkpoints
from launch.command import say
from launch.configs import model_without_memory
from launch.data.batches import Batches
from launch.optimizer import OF_SIZE


def count_parameters(config: PretrainedConfig) -> int:
    """Count a model's parameters, a tied one once; it is built without memory."""
    model = model_without_memory(config, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def model_name(arguments: TrainArguments, config: PretrainedConfig) -> str:
    """Return what a model is called, in a word or two."""
    if arguments.model is None:
        return f"{config.model_type} of {arguments.layers} layers"
    return Path(arguments.model).resolve().name


def say_opening(
    given: TrainArguments,
    arguments: TrainArguments,
    config: PretrainedConfig,
    batches: Batches,
    device: torch.device,
) -> None:
    """Say what will be done, in one block on stderr; one rank calls it.

    Args:
        given: the command line's options.
        arguments: the same, with what was chosen for those that were left out.
        config: of the model.
        batches: of the run.
        device: this rank's, of which all ranks are taken to be.
    """
    lines = {
        "model": _model(arguments, config),
        "mesh": _mesh(arguments, device),
        "text": _text(arguments, batches),
        "optimizer": _optimizer(given, arguments),
        "folders": _folders(arguments),
    }
    block = [f"  {name:<10} {words}" for name, words in lines.items()]
    say("\n".join(["launch.train", *block]))


def say_resumed(arguments: TrainArguments, history: History) -> None:
    """Say from which step, and from which mesh's checkpoint, a run goes on; one rank calls it."""
    saved = f", which a mesh of {history.mesh} has saved" if history.mesh else ""
    words = f"goes on after step {history.step} of {arguments.steps}{saved}"
    words += f", behind {history.tokens:,} tokens"
    if history.step == 0:
        words = f"--resume: {arguments.checkpoint} has no checkpoint yet, so from the first step on"
    say(f"launch.train: {words}")


def _model(arguments: TrainArguments, config: PretrainedConfig) -> str:
    copies = ", float32 copies" if arguments.dtype == "bfloat16" else ""
    return (
        f"{model_name(arguments, config)}, {count_parameters(config):,} parameters, "
        f"{arguments.dtype}{copies if arguments.float32_weights else ''}"
    )


def _mesh(arguments: TrainArguments, device: torch.device) -> str:
    place = "the last stage" if arguments.vocab_over == "last-stage" else "all stages"
    sharded = ", body sharded over the data axis" if arguments.shard_body else ""
    return (
        f"{arguments.mesh} on {arguments.world} x {device_name(device)}, "
        f"{arguments.schedule}, vocabulary on {place}{sharded}"
    )


def _text(arguments: TrainArguments, batches: Batches) -> str:
    name = "the standard library" if arguments.text is None else str(arguments.text)
    of_step = arguments.batch * arguments.sequence
    wanted = arguments.steps * of_step
    tokens, order = len(batches.tokens), "shuffled" if arguments.shuffle else "in their order"
    epochs = wanted / (batches.sequences * arguments.sequence)
    read = f"{tokens:,} tokens, {order}; {wanted:,} in {arguments.steps:,} steps"
    step = f"{arguments.batch} x {arguments.sequence} = {of_step:,} a step"
    return f"{name}: {read}, {epochs:.3g} epochs; {step}"


def _optimizer(given: TrainArguments, arguments: TrainArguments) -> str:
    clip = arguments.clip_norm
    chosen = [f"--{name.replace('_', '-')}" for name in OF_SIZE if getattr(given, name) is None]
    by_size = arguments.model is not None and Path(arguments.model).is_dir() and chosen
    return (
        f"AdamW, learning rate {arguments.learning_rate:g}, {arguments.learning_rate_schedule}, "
        f"{arguments.warmup} steps of warm-up, weight decay {arguments.weight_decay:g}, "
        f"{'no clipping' if clip is None else f'gradient norm clipped to {clip:g}'}"
        + (f"; chosen by the model's size: {', '.join(chosen)}" if by_size else "")
    )


def _folders(arguments: TrainArguments) -> str:
    named = {name: getattr(arguments, name) for name in ("out", "profile", "export", "checkpoint")}
    return ", ".join(f"--{name} {folder}" for name, folder in named.items() if folder is not None)


@dataclass
class Trained:
    """What a rank knows after training.

    Attributes:
        first_step: of those that this start did; a checkpoint had those before.
        losses: of each step of the run; empty off the last stage.
        seconds: of each step of the run.
        scores: step and loss of each evaluation, of the rank that tells of the run.
        first_gradients: of step 1, for --check.
        stopped: the signal that has ended it, or 0.
    """

    first_step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    stopped: int = 0


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
    """

    rank: int
    stages: list[int]
    vocab_rank: int
    rows: tuple[int, int]
    parameters: int
    peak_memory: int
    bytes_read: int


def print_ranks(reports: list[RankReport]) -> None:
    """Print a line for each rank."""
    table = Table(title="ranks")
    words = "rank, stages, vocab rank, rows held, of the classifier, parameters, peak"
    for column in words.split(", "):
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
    trained: Trained,
    comparison: Comparison | None,
) -> None:
    """Write run.json and loss.png to ``--out``, and say what is where.

    Args:
        arguments: of the run, settled.
        config: of its model.
        device: this rank's.
        reports: of all ranks.
        trained: with losses and scores, of every step of the run; told is the speed of this start.
        comparison: with one process, where that was made.
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    losses, scores = trained.losses, trained.scores
    own = trained.seconds[trained.first_step :]
    speed = arguments.batch * arguments.sequence / statistics.median(own)
    model = model_name(arguments, config)
    given = {  # JSON has neither paths nor infinity
        name: str(value) if isinstance(value, Path) or value == math.inf else value
        for name, value in asdict(arguments).items()
    }
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
        "first_step": trained.first_step,
        "losses": losses,
        "eval_losses": [{"step": step, "loss": loss} for step, loss in scores],
        "seconds_per_step": trained.seconds,
        "tokens_per_second": speed,
        "ranks": [asdict(report) for report in reports],
        "check": None
        if comparison is None
        else {**asdict(comparison), "passed": comparison.passed},
    }
    path = arguments.out / "run.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    plot_losses(arguments, model, max(report.rows[1] for report in reports), losses, scores)
    lines = [
        f"loss {losses[trained.first_step]:.3f} -> {losses[-1]:.3f} in {len(own)} steps, "
        f"{sum(own):.0f} s, {speed:.0f} tokens/s; {path}, {arguments.out / 'loss.png'}"
    ]
    if scores:
        lines.append(f"evaluation's loss {scores[-1][1]:.4f} after step {scores[-1][0]}")
    if arguments.checkpoint is not None:
        lines += [f"checkpoint {path}" for path in complete_checkpoints(arguments.checkpoint)[-1:]]
    if arguments.export is not None and (arguments.export / "config.json").is_file():
        lines.append(f"export {arguments.export}")
    print("\n".join(lines))


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
