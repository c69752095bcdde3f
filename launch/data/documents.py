"""A source's documents as token ids: encoded, or made by somebody else."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from launch.arguments import DataArguments
from launch.data.sources import Source, read_entries, read_texts
from launch.data.tokenizers import Document, TextTokenizer

_ENCODED = 2**23  # characters that a tokenizer gets at a time, and spreads over its threads
_PIECE = 2**22  # ids of an array that are read at a time

T = TypeVar("T")


def documents_of(
    source: Source, arguments: DataArguments, tokenizer: TextTokenizer
) -> Iterator[Document]:
    """Encode a source in its own order, as far as it is asked for.

    An entry's text ends with the tokenizer's end of a text, where it has one; a conversation as its
    template ends it; plain text, of which a file is a part, only where it is packed.

    Raises:
        ValueError: what cannot be read, an entry without text, or a conversation that the
            tokenizer has no template for.
    """
    found: Iterator[str | Document] = read_texts(source)
    end = tokenizer.end if arguments.packed == "yes" else None
    if source.kind == "entries":
        found, end = _read_entries(source, arguments, tokenizer), tokenizer.end
    for block in in_blocks(
        found, _ENCODED, lambda one: len(one if isinstance(one, str) else one.ids)
    ):
        encoded = iter(tokenizer.encode([one for one in block if isinstance(one, str)]))
        for one in block:
            yield one if isinstance(one, Document) else _ended(next(encoded), end)


def in_blocks(items: Iterable[T], least: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Return items some at a time, as soon as their sizes are that much."""
    block, held = [], 0
    for item in items:
        block.append(item)
        held += size(item)
        if held >= least:
            yield block
            block, held = [], 0
    if block:
        yield block


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


def _read_entries(
    source: Source, arguments: DataArguments, tokenizer: TextTokenizer
) -> Iterator[str | Document]:
    """Read entries that are not empty: texts, and conversations encoded."""
    for number, entry in enumerate(read_entries(source)):
        try:
            found = _read_entry(entry, arguments, tokenizer)
        except ValueError as error:
            raise ValueError(f"entry {number} of {source.name}: {error}") from error
        if found is not None:
            yield found


def _read_entry(
    entry: Mapping[str, Any], arguments: DataArguments, tokenizer: TextTokenizer
) -> str | Document | None:
    field = arguments.text_field
    if field == "text" and entry.get(field) is None and entry.get("messages") is not None:
        field = "messages"
    if field not in entry:
        raise ValueError(
            f"its columns are {sorted(entry)}, without {field!r}: name the text's column with "
            f"--text-field"
        )
    found = entry[field]
    if found is None or found in ("", []):
        return None
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(m, dict) and "role" in m for m in found):
        # Where messages differ in what they have, a column gives all of them all of it.
        messages = [{k: v for k, v in one.items() if v is not None} for one in found]
        tools = entry.get("tools") or None
        return tokenizer.encode_chat(messages, tools, arguments.chat_labels == "assistant")
    raise ValueError(
        f"its {field!r} is neither a text nor a list of messages with role and content, but "
        f"{str(found)[:60]!r}"
    )


def _ended(ids: list[int], end: int | None) -> Document:
    return Document(ids if end is None or ids[-1:] == [end] else [*ids, end])
