"""A line for each step: in a file, and in TensorBoard or wandb."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from launch.arguments import TrainArguments


class Tracker(Protocol):
    """Where numbers are drawn."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is held."""


class StepLog:
    """The lines of a run, one JSON document each, in ``log.jsonl`` of --out.

    One rank makes it. A resumed run keeps the lines up to its first step.

    Args:
        arguments: of the run.
        first_step: how many steps were done before.

    Attributes:
        scores: step and loss of each evaluation so far.

    Raises:
        ValueError: the tracker cannot start.
    """

    def __init__(self, arguments: TrainArguments, first_step: int) -> None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        self._tracker: Tracker | None = None
        if arguments.tracker is not None:  # before the lines of an earlier run are gone
            self._tracker = TRACKERS[arguments.tracker](arguments, first_step)
        path = arguments.out / "log.jsonl"
        kept = _lines_until(path, first_step) if first_step else []
        self.scores = _scores(kept)
        self._file = path.open("w")
        self._file.writelines(kept)

    def write(self, step: int, numbers: dict[str, float | None]) -> None:
        """Write the numbers of a step; None is what is not known."""
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if (loss := numbers.get("eval_loss")) is not None:
            self.scores.append((step, loss))
        if self._tracker is not None:
            known = {name: value for name, value in numbers.items() if value is not None}
            self._tracker.log(known, step)

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def _scores(lines: list[str]) -> list[tuple[int, float]]:
    """Return step and loss of the evaluations in a log's lines."""
    documents = [json.loads(line) for line in lines]
    return [(each["step"], each["eval_loss"]) for each in documents if "eval_loss" in each]


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the whole lines of the steps until this one."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            known = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # the end of a run that was killed
            continue
        if known <= step:
            kept.append(line)
    return kept


class _TensorBoard:
    def __init__(self, arguments: TrainArguments, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # What another run in this folder has drawn of later steps is dropped.
        self._writer: Any = SummaryWriter(str(arguments.out), purge_step=first_step + 1)

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, arguments: TrainArguments, first_step: int) -> None:
        import wandb

        config = {name: str(value) for name, value in asdict(arguments).items()}
        # The other ranks wait for it.
        settings = wandb.Settings(init_timeout=min(90.0, arguments.timeout / 2))
        try:
            self._run: Any = wandb.init(dir=str(arguments.out), config=config, settings=settings)
        except wandb.errors.Error as error:
            words = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                f"--tracker wandb cannot start: {words}; or set "
                f"WANDB_MODE=offline, or leave it out: log.jsonl in --out has the same lines"
            ) from error

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrainArguments, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
