"""SHA256SUMS: what the files of a folder were when they were saved.

It is in the format of ``sha256sum -c SHA256SUMS``, which checks a folder without this program. It
tells damage, and not malice: whoever can write to the folder can write the sums too.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_synced(file: Path, text: str) -> str:
    """Write a file that is on the disk when this returns, and return its checksum."""
    with file.open("w", encoding="utf-8", newline="\n") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    return checksum(file)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS of files, by their names in the folder."""
    write_synced(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_sums(folder: Path) -> dict[str, str]:
    """Return the checksum of each file that was saved; every name is one of the folder's own.

    Raises:
        ValueError: there is no SHA256SUMS, or what it has is not in its format.
    """
    file = folder / SUMS
    if not file.is_file():
        raise ValueError(
            f"{folder} has no {SUMS}, without which damage would go unseen: it was saved by an "
            f"older version, or is not whole"
        )
    sums = {}
    for line in file.read_bytes().decode("utf-8", "replace").split("\n")[:-1]:
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums or not match[2].strip("."):
            raise ValueError(f"{file} is damaged: {line[:100]!r} is not a checksum and a name")
        sums[match[2]] = match[1]
    return sums


def verify_share(folder: Path, sums: Mapping[str, str], rank: int, ranks: int) -> None:
    """Compare some of the files with their checksums; all of them over all ranks.

    Files go to the ranks in turn, by size.

    Raises:
        ValueError: a file of this rank's is not there, or is not what was saved.
    """
    missing = sorted(name for name in sums if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder / missing[0]} is missing, which was saved there")
    by_size = sorted(sums, key=lambda name: ((folder / name).stat().st_size, name))
    for name in by_size[rank::ranks]:
        if checksum(folder / name) != sums[name]:
            raise ValueError(
                f"{folder / name} is damaged: its checksum is not that of what was saved"
            )
