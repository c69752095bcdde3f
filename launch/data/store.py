"""The tokens of a text, kept in a memory-mapped Arrow file that the first run makes.

A folder of the cache:

    tokens.arrow    ids, starts and counted, a row a token; `datasets.Dataset.from_file` opens it
    about.json      what a run wants to know of them before it reads any

It is written as ``NAME.partial`` and renamed when all of it is on the disk.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from launch.checksums import sync_folder, write_synced
from launch.data.documents import in_blocks
from launch.data.tokenizers import Document
from launch.disk import lock_folder, try_to_write

_TOKENS, _ABOUT = "tokens.arrow", "about.json"
_BLOCK = 2**22  # tokens, about, of a record batch; the open file holds some bytes for each
_STILL = 3600.0  # seconds in which a process that makes tokens writes some
_SCHEMA = pa.schema({"ids": pa.int32(), "starts": pa.bool_(), "counted": pa.bool_()})


@dataclass(frozen=True)
class Tokens:
    """All tokens of a text, one document behind the other.

    Attributes:
        digest: SHA-256 of ids, starts and counted.
        low, high: the least id and the largest; 0 without tokens.
        longest: tokens of the longest document.
        table: the file's, of which nothing is in memory but what is read.
        mapped: the file.
    """

    digest: str
    low: int
    high: int
    longest: int
    table: Any = field(repr=False)
    mapped: mmap.mmap = field(repr=False)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return some tokens: ids [n] int64, starts [n] bool and counted [n] bool.

        Starts are the first tokens of documents; counted ones count in the loss.
        """
        part = self.table.slice(start, length)
        ids, starts, counted = (part.column(name).to_numpy() for name in _SCHEMA.names)
        ids = ids.astype(np.int64)
        # The disk's cache keeps the pages; this process would count them as its own memory.
        self.mapped.madvise(mmap.MADV_DONTNEED)
        return ids, starts, counted


def open_tokens(folder: Path) -> Tokens | None:
    """Return the tokens that a folder has; None where there is no such folder.

    Raises:
        ValueError: what is in it is not whole.
    """
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / _ABOUT).read_text())
        with (folder / _TOKENS).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))).read_all()
        if (table.num_rows, table.schema) != (about.pop("tokens"), _SCHEMA):
            raise ValueError(f"{_TOKENS} has not what {_ABOUT} says")
        return Tokens(**about, table=table, mapped=mapped)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is damaged: {error}; delete it, to have it made again"
        ) from error


def make_tokens(folder: Path, documents: Iterable[Document]) -> Tokens:
    """Write a folder of tokens, unless another process has written it meanwhile, and open it.

    Raises:
        ValueError: the disk does not take it, or what the documents raise; nothing is left of it.
            Or another process, which is named, has stopped in the midst of writing it.
    """
    try_to_write(folder.parent, "--cache")
    partial = folder.with_suffix(".partial")
    try:
        with _wait_for_lock(folder):  # of runs that begin together one makes it
            found = open_tokens(folder)
            if found is not None:
                return found
            shutil.rmtree(partial, ignore_errors=True)  # what a run that was killed has left
            partial.mkdir()
            try:
                about = _write(partial / _TOKENS, documents)
                write_synced(partial / _ABOUT, json.dumps(about, indent=1))
                sync_folder(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            made = open_tokens(folder)
            assert made is not None
            return made
    except OSError as error:
        raise ValueError(
            f"--cache {folder.parent} does not take the tokens: {error}; give another folder"
        ) from error


def _write(file: Path, documents: Iterable[Document]) -> dict[str, Any]:
    """Write the tokens, and return what is said about them."""
    digest = hashlib.sha256()
    low, high, longest, tokens = sys.maxsize, 0, 0, 0
    with (
        file.open("wb") as opened,
        pa.ipc.new_stream(opened, _SCHEMA) as stream,
        tqdm(desc="making tokens", unit_scale=True, disable=None) as bar,
    ):
        filled = (one for one in documents if len(one.ids))
        for block in in_blocks(filled, _BLOCK, lambda one: len(one.ids)):
            ids = np.concatenate([np.asarray(one.ids) for one in block])
            counted = np.concatenate([_counted(one) for one in block])
            lengths = [len(one.ids) for one in block]
            starts = np.zeros(len(ids), bool)
            starts[np.cumsum([0, *lengths[:-1]])] = True
            # An id that no int32 is lies beyond every vocabulary: `high` refuses it.
            low, high = min(low, int(ids.min())), max(high, int(ids.max()))
            longest, tokens = max(longest, *lengths), tokens + len(ids)
            columns = ids.astype(np.int32), starts, counted
            for column in columns:
                digest.update(column.tobytes())
            stream.write_batch(pa.record_batch([pa.array(c) for c in columns], schema=_SCHEMA))
            bar.update(len(ids))
        opened.flush()
        os.fsync(opened.fileno())
    return {
        "tokens": tokens,
        "digest": digest.hexdigest(),
        "low": low if tokens else 0,
        "high": high,
        "longest": longest,
    }


def _counted(one: Document) -> np.ndarray:
    return np.ones(len(one.ids), bool) if one.counted is None else np.array(one.counted, bool)


@contextmanager
def _wait_for_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder's maker, which ends with its process however that ends.

    Raises:
        ValueError: whoever holds it has written nothing for `_STILL` seconds.
    """
    lock, written = folder.with_suffix(".lock"), folder.with_suffix(".partial") / _TOKENS
    lock.mkdir(exist_ok=True)
    size, since = -1, time.monotonic()
    while True:
        try:
            held = lock_folder(lock, "--cache")
            break
        except ValueError as error:
            grown = written.stat().st_size if written.is_file() else 0
            if grown != size:
                size, since = grown, time.monotonic()
            elif time.monotonic() - since > _STILL:
                raise ValueError(
                    f"{error}; it has written nothing to {written} for {_STILL:.0f} s: end it if "
                    f"it hangs"
                ) from None
        time.sleep(0.2)
    with held or nullcontext():
        yield
