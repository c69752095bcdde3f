"""Folders that are written to: what a disk does not take is a ValueError that says so."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise ValueError(f"{what}: {_first_line(cause)}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error
    except (
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:  # unlike JSON
        raise ValueError(f"{what}: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{error}{remedy}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
