"""An older copy of the library beside today's in one process, to be timed in the same rounds."""

import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

_PACKAGES = ("vocab_parallel", "stage_groups")
_OLDER = "older_"


def older_library(folder: Path) -> ModuleType:
    """Import the ``vocab_parallel`` of a checkout, under another name.

    Its packages are copied to a temporary folder, which stays until the process ends, and renamed
    there with all that they import of each other, also what they import later.

    Args:
        folder: of the checkout; `git worktree add FOLDER COMMIT` makes one.

    Raises:
        ValueError: there is no ``vocab_parallel`` in the folder.
    """
    if not (folder / _PACKAGES[0] / "__init__.py").is_file():
        raise ValueError(f"expected a checkout with the package {_PACKAGES[0]}, got {folder}")
    name = _OLDER + _PACKAGES[0]
    if name not in sys.modules:
        copy = Path(tempfile.mkdtemp(prefix="older-"))
        for package in _PACKAGES:
            _copy_renamed(folder / package, copy / (_OLDER + package))
        sys.path.append(str(copy))
        importlib.invalidate_caches()
    return importlib.import_module(name)


def _copy_renamed(package: Path, to: Path) -> None:
    shutil.copytree(package, to, ignore=shutil.ignore_patterns("__pycache__"))
    names = re.compile(rf"\b({'|'.join(_PACKAGES)})\b")
    for source in to.rglob("*.py"):
        source.write_text(names.sub(rf"{_OLDER}\1", source.read_text()))
