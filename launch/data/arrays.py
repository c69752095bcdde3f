"""Token ids that somebody else has made, as an array of numpy's."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from launch.data.sources import Source
from launch.data.tokenizers import Document

_PIECE = 2**22  # ids that are read at a time


def validate_ids(source: Source, sequence: int) -> None:
    """Look at an array's shape and dtype.

    Raises:
        ValueError: neither a stream [tokens] of integers nor rows [sequences, T] of that length.
    """
    try:
        ids = _open(source.files[0])
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise ValueError(
                f"expected integers [tokens] or [sequences, T], got {ids.dtype} {list(ids.shape)}"
            )
        if ids.ndim == 2 and ids.shape[1] != sequence:
            raise ValueError(
                f"its rows have {ids.shape[1]} ids, but --sequence is {sequence}: give --sequence "
                f"{ids.shape[1]}"
            )
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{source.name}: {error}") from error


def read_ids(source: Source) -> Iterator[Document]:
    """Read an array, rows one behind the other, a piece at a time."""
    ids = _open(source.files[0]).reshape(-1)
    for start in range(0, len(ids), _PIECE):
        yield Document(ids[start : start + _PIECE])


def _open(file: Path) -> np.ndarray:
    ids = np.load(file, mmap_mode="r", allow_pickle=False)
    if not isinstance(ids, np.ndarray):
        raise ValueError("expected one array (.npy), got an archive of arrays (.npz)")
    return ids
