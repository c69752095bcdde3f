"""Ctrl-C and SIGTERM: all ranks end after the same step, with what they know."""

import os
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from launch.arguments import TrainArguments
from launch.command import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(UserError):
    """A run that a signal has ended, on every rank."""

    def __init__(self, sentence: str, number: int) -> None:
        super().__init__(sentence)
        self.code = 128 + number  # as a shell has it


class StopRequest:
    """Whether a rank has got a signal, as all ranks know it at the same step.

    What one step asks is answered at the next, so that no host waits for another. A second signal
    changes nothing: a terminal's Ctrl-C reaches a rank twice, once from torchrun.

    Args:
        group: of all ranks, on the CPU.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._got = 0
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Take the signals of this process, where its main thread asks for them."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back; of a run that was stopped another one changes nothing still."""
        if self._got:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """Return the signal that a rank had got when all called this before; 0 for none.

        All ranks call it, once a step.
        """
        found = self.last()
        if not found:
            numbers = torch.tensor([self._got])
            work = dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group, async_op=True)
            self._asked = (numbers, work)
        return found

    def last(self) -> int:
        """Return the answer to what was asked last, and ask no more; all ranks call it."""
        if self._asked is None:
            return 0
        (numbers, work), self._asked = self._asked, None
        work.wait()
        return int(numbers)

    def _take(self, number: int, _: FrameType | None) -> None:
        self._got = number


def said_of(arguments: TrainArguments, number: int, step: int) -> str:
    """Say which signal has ended a run after which step, and how it goes on."""
    stopped = f"stopped by {signal.Signals(number).name} after step {step} of {arguments.steps}"
    if arguments.checkpoint is None:
        return f"{stopped}; without --checkpoint FOLDER nothing is there to go on from"
    given = shlex.join(sys.argv[1:])
    resume = "" if arguments.resume else " --resume"
    local = os.environ.get("LOCAL_WORLD_SIZE", str(arguments.world))
    ranks = f"--nproc-per-node {local}" if local == str(arguments.world) else "..."
    return f"{stopped}; go on with: torchrun {ranks} -m launch.train {given}{resume}"
