"""How a program that torchrun starts meets its user: the command line, and what a mistake ends in.

Every rank runs the program, but there is one user: what all ranks know to be a mistake is one
sentence on stderr, by rank 0 alone, and exit code 2. Every other error keeps its traceback.

Nothing here loads torch before it must: ``--help`` and a mistyped option answer at once.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from launch.arguments import EvaluateArguments, TrainArguments
from launch.options import parse

A = TypeVar("A", TrainArguments, EvaluateArguments)

# Seconds for the other ranks to leave before the one whose end makes torchrun end them: it lists
# every rank that it had to stop.
_OTHERS_LEAVE = 1.0


class UserError(ValueError):
    """A user's mistake that every rank knows of.

    Attributes:
        code: that the process ends with.
    """

    code = 2


def read_command(program: str, kind: type[A]) -> A:
    """Parse and check the command line; rank 0 alone prints help, or what is wrong.

    Raises:
        UserError: what can be known before torch is loaded. Paths are looked at only where all
            ranks are on one machine; otherwise when the ranks can tell each other.
    """
    try:
        with contextlib.ExitStack() as silence:
            if _rank() != 0:
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
                silence.enter_context(contextlib.redirect_stderr(nowhere))
            arguments = parse(kind, program)
        if "RANK" not in os.environ:
            raise ValueError(
                f"start this with torchrun, e.g. torchrun --nproc-per-node 4 -m {program}; "
                f"--help lists the options"
            )
        ranks = os.environ["WORLD_SIZE"]
        arguments.validate()
        arguments.validate_ranks(int(ranks))
        if os.environ.get("LOCAL_WORLD_SIZE") == ranks:
            arguments.validate_paths()
    except ValueError as error:
        raise UserError(str(error)) from None
    return arguments


def say(words: str) -> None:
    """Print to stderr at once; one rank calls it."""
    print(words, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """End the process with one sentence and its code where a `UserError` leaves the block."""
    try:
        yield
    except UserError as error:
        sentence, code = f"{program}: {error}", error.code
    else:
        return
    _leave(sentence, code)


@contextlib.contextmanager
def raised_on_all(group: Any = None) -> Iterator[None]:
    """Raise one rank's ValueError on every rank, as a `UserError`; one exchange of strings.

    All ranks of the world enter and leave it. Work inside may fail on any of them, but not between
    two collectives: the others would wait in the second.

    Args:
        group: of all ranks, where the exchange is not to wait for a GPU; None is the default.
    """
    import torch.distributed as dist

    own = None
    try:
        yield
    except ValueError as error:
        own = str(error)
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own, group=group)
    words = next((words for words in told if words is not None), None)
    if words is not None:
        raise UserError(words)


def partial_name(report: str) -> Path:
    """Return where torchrun's report of a rank is written, which it must not read half."""
    return Path(f"{report}.partial")


def _leave(sentence: str, code: int) -> None:
    """Say it on rank 0, and exit so that torchrun's own report names one rank of a machine."""
    if _rank() == 0:
        say(sentence)
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        sys.exit(0)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is not None:
        # What torchrun prints of a failed rank: its traceback, or this in its place.
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        document = {"message": {"message": sentence, "extraInfo": extra}}
        partial_name(report).write_text(json.dumps(document))
        partial_name(report).rename(report)
        time.sleep(_OTHERS_LEAVE)
    sys.exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
