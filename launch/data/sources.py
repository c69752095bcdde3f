"""What ``--text`` names: plain text, the entries of a data set, or token ids; and how it is read.

Which kind it is, names tell: `find_source` opens nothing and loads no library.
"""

import io
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.planning.nearest import nearest_path

TAKEN = (
    "--text takes UTF-8 text, .jsonl or .json, .parquet, a folder of one of these or saved by "
    "`datasets`, or token ids as .npy"
)
_ENTRIES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_PIECE = 2**19  # characters of text that are a document
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
# What lies beside the files of a published data set, and is none of them.
_BESIDE = re.compile(r"(readme|licen[sc]e|dataset_infos?\b).*|.*\.md", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What there is to read.

    Attributes:
        name: as messages call it.
        kind: plain text; entries of a data set, each a document; ids, without any text.
        files: in the order in which they are read.
        saved: whether the one of `files` is a folder that `datasets` saved.
    """

    name: str
    kind: Literal["text", "entries", "ids"]
    files: list[Path]
    saved: bool = False


def find_source(text: Path | None, option: str = "--text") -> Source:
    """Find what to read; None is the Python standard library.

    Of a folder whose files are named by split, only those of "train" are read. Messages name the
    option of the command line.

    Raises:
        ValueError: nothing of that name, an empty folder, or files of several kinds.
    """
    if text is None:
        library = Path(sysconfig.get_path("stdlib"))
        return Source("the standard library", "text", sorted(library.glob("*.py")))
    name = f"{option} {text}"
    if text.is_file():
        if text.suffix == ".npy":
            return Source(name, "ids", [text])
        return Source(name, "entries" if _reader(text) is not None else "text", [text])
    if not text.is_dir():
        near = nearest_path(text)
        meant = "" if near is None else f", did you mean {near}?"
        raise ValueError(f"{name} does not exist{meant}: {TAKEN}")
    if (text / "dataset_dict.json").is_file():
        if not (text / "train").is_dir():
            splits = sorted(path.name for path in text.iterdir() if path.is_dir())
            raise ValueError(f"{name} has the splits {splits} and no train: give one's folder")
        return Source(name, "entries", [text / "train"], saved=True)
    if (text / "state.json").is_file() and (text / "dataset_info.json").is_file():
        return Source(name, "entries", [text], saved=True)
    return _of_folder(text, name)


def _of_folder(folder: Path, name: str) -> Source:
    files = sorted(
        path
        for path in folder.glob("**/*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    if not files:
        raise ValueError(f"{name} is a folder without files: {TAKEN}")
    # A lone .json is more often a setting beside text than a data set.
    entries = [file for file in files if file.suffix != ".json" and _reader(file) is not None]
    if not entries:
        return Source(name, "text", files)
    others = [f for f in files if f not in entries and not _BESIDE.fullmatch(f.name)]
    if others:
        raise ValueError(
            f"{name} has a data set's {entries[0].relative_to(folder)} and other files, such as "
            f"{others[0].relative_to(folder)}: give a folder of one kind"
        )
    train = [f for f in entries if re.search(r"(^|[^a-z])train", str(f.relative_to(folder)), re.I)]
    return Source(name, "entries", train or entries)


def _reader(file: Path) -> str | None:
    """Return which reader of `datasets` takes a file."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return _ENTRIES.get(suffixes[-1]) if suffixes else None


def read_texts(source: Source) -> Iterator[str]:
    """Read plain text, a file or `_PIECE` of one at a time, which ends where a line does.

    Raises:
        ValueError: a file is not UTF-8 text, or cannot be read.
    """
    for file in source.files:
        try:
            raw = file.open("rb")
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error
        with raw:
            opened = io.TextIOWrapper(raw, encoding="utf-8-sig")
            try:
                while text := opened.read(_PIECE):
                    text += opened.readline(_PIECE)
                    if "\0" in text:
                        raise ValueError(f"{file} is binary, not text: {TAKEN}")
                    yield text
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                # What was being decoded is the last that was read of the file.
                place = raw.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{file} is not UTF-8 text (byte 0x{byte:02x} at {place}): {TAKEN}"
                ) from error


def read_entries(source: Source) -> Iterator[Mapping[str, Any]]:
    """Read a data set's entries, as far as they are asked for.

    Raises:
        ValueError: a file that `datasets` cannot read.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is raised
    for file in source.files:
        try:
            if source.saved:
                yield from datasets.load_from_disk(str(file))
            elif _reader(file) == "parquet":
                yield from datasets.IterableDataset.from_parquet(str(file))
            else:
                yield from datasets.IterableDataset.from_json(str(file))
        except StopIteration:  # what `datasets` makes of a file without entries
            continue
        except Exception as error:  # its readers raise each what they like
            raise ValueError(f"{file} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
