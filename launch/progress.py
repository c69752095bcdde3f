"""What one rank tells of each step: on the terminal, in a file, and in TensorBoard or wandb."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.evaluation import mean_loss
from launch.planning.hardware import peak_of
from launch.planning.shape import ModelShape
from launch.readings import Reading
from vocab_parallel import TokenScores

_LINES = 20  # of a whole run, where stderr is no terminal


class Progress:
    """The progress of a run; one rank of the last stage makes it.

    Args:
        arguments: of the run.
        config: of the model.
        first_step: how many steps were done before.
        device: this rank's, of which all ranks are taken to be.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        config: PretrainedConfig,
        first_step: int,
        device: torch.device,
    ) -> None:
        self._tokens = arguments.batch * arguments.sequence
        on_gpu = device.type == "cuda"
        self._peak = peak_of(torch.cuda.get_device_name(device)) if on_gpu else None
        self._flops = step_flops(arguments, config)
        self._log = StepLog(arguments, first_step)
        self._steps = arguments.steps
        # A log file has no use for a bar: a line now and then.
        self._every = 0 if sys.stderr.isatty() else max(1, arguments.steps // _LINES)
        self._bar = tqdm(
            total=arguments.steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=self._every > 0,
        )
        self._first = first_step + 1

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Step and loss of each evaluation of the run."""
        return self._log.scores

    def show(self, reading: Reading, learning_rate: float) -> None:
        """Tell of a step; its values are loss, gradient's norm, accuracy and entropy."""
        loss, norm, accuracy, entropy = reading.values
        speed = self._tokens / reading.seconds
        self._bar.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{speed:.0f}")
        self._bar.update()
        step = reading.step
        if self._every and (step % self._every == 0 or step in (self._first, self._steps)):
            self._say(f"step {step}/{self._steps}: loss {loss:.4f}, {speed:,.0f} tokens/s")
        self._log.write(
            reading.step,
            {
                "loss": loss,
                "accuracy": _known(accuracy),
                "entropy": _known(entropy),
                "learning_rate": learning_rate,
                "gradient_norm": norm,
                "seconds": reading.seconds,
                "tokens_per_second": speed,
                "utilisation": utilisation(
                    self._flops, reading.seconds, dist.get_world_size(), self._peak
                ),
            },
        )

    def show_scores(self, step: int, scores: TokenScores) -> None:
        """Tell of the text that is not trained on; waits for a GPU."""
        loss, accuracy = mean_loss(scores), scores.accuracy
        self._say(f"step {step}: eval loss {loss:.4f}, accuracy {accuracy:.2%}")
        self._log.write(step, {"eval_loss": loss, "eval_accuracy": accuracy})

    def close(self) -> None:
        """End the bar and the log."""
        self._bar.close()
        self._log.close()

    def _say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _known(value: float) -> float | None:
    """Return a number, or None where the loss's implementation had none."""
    return None if math.isnan(value) else value


def step_flops(arguments: TrainArguments, config: PretrainedConfig) -> float | None:
    """Return the FLOPs of one step over all ranks; None where layers have experts.

    Of a token, its 2 a parameter of the products and classifier, and causal attention at half;
    three times the forward, and not what recomputing adds (arXiv 2204.02311, appendix B).
    """
    raw = config.to_dict()
    if any("expert" in name and value for name, value in raw.items()):
        return None
    shape = ModelShape.of(config.model_type, raw)
    return shape.step_flops(arguments.batch * arguments.sequence, arguments.sequence)


def utilisation(
    flops: float | None, seconds: float, ranks: int, peak: float | None
) -> float | None:
    """Return the part of all ranks' peak that so many FLOPs in so many seconds are.

    The peak of a rank is its data sheet's, of dense bfloat16 products.
    """
    if flops is None or peak is None:
        return None
    return flops / (seconds * ranks * peak)


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
        self._tracker: _TensorBoard | _Wandb | None = None
        if arguments.tracker is not None:  # before the lines of an earlier run are gone
            self._tracker = _TRACKERS[arguments.tracker](arguments, first_step)
        path = arguments.out / "log.jsonl"
        kept = _lines_until(path, first_step)
        self.scores: list[tuple[int, float]] = []
        self._file = path.open("w")
        for line in kept:
            self._write(**line)

    def write(self, step: int, numbers: dict[str, float | None]) -> None:
        """Write the numbers of a step; None is what is not known."""
        self._write(step, **numbers)
        if self._tracker is not None:
            known = {name: value for name, value in numbers.items() if value is not None}
            self._tracker.log(known, step)

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()

    def _write(self, step: int, **numbers: float | None) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()
        if (loss := numbers.get("eval_loss")) is not None:
            self.scores.append((step, loss))


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return what the whole lines of the steps until this one say."""
    kept: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if step and path.is_file() else []:
        try:
            found = json.loads(line)
            if int(found["step"]) <= step:
                kept.append(found)
        except (ValueError, KeyError, TypeError):  # the end of a run that was killed
            continue
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


_TRACKERS: dict[str, type[_TensorBoard | _Wandb]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
