"""What a misspelt name may have meant."""

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is nearest to one, in capitals or not; None where none is near."""
    by_lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.75)
    return by_lower[found[0]] if found else None


def nearest_path(path: Path) -> Path | None:
    """Return what lies where a path should, under the nearest name; None where nothing does."""
    if not path.parent.is_dir():
        return None
    name = nearest(path.name, (one.name for one in path.parent.iterdir()))
    return None if name is None else path.parent / name
