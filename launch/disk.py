"""Folders that are written to: one run at a time, and ValueErrors for what a disk does not take."""

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


def try_to_write(folder: Path, option: str) -> None:
    """Make a folder and write to it, before hours of training.

    Raises:
        ValueError: it takes no file.
    """
    with as_values(f"{option} {folder} cannot be written to"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def as_values(what: str, remedy: str = "") -> Iterator[None]:
    """Raise what a disk, or a library over one, did not take as a ValueError that says so."""
    try:
        yield
    except (CheckpointException, OSError, SafetensorError) as error:
        cause: Any = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        words = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise ValueError(f"{what}: {words}") from error
    except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}: {error!r}") from error  # JSON of another form
    except ValueError as error:
        raise ValueError(f"{error}{remedy}") from error


def lock_folder(folder: Path, option: str) -> IO[str] | None:
    """Take the lock of a folder, or None where its file system has no locks.

    Whoever keeps the result holds the lock until the process ends, however it does. The file
    stays: taking it away could give two runs a lock each.

    Raises:
        ValueError: another process holds it.
    """
    file = (folder / "lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        with file:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
        raise ValueError(
            f"{option} {folder} is in use by another run, {holder}: wait for its end, or give "
            f"another folder"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
