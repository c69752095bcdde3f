"""What one rank tells of each step: the progress bar and a line of the log."""

import math
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.held_out import mean_loss
from launch.readings import Reading
from launch.step_log import StepLog
from launch.utilisation import peak_flops, step_flops, utilisation
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
        self._flops, self._peak = step_flops(arguments, config), peak_flops(device)
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
