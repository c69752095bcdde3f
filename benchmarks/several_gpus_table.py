"""The tables of docs/performance.md, of the numbers that `benchmarks.several_gpus` wrote.

    python -m benchmarks.several_gpus_table runs/several_gpus/NUMBERS.json
    python -m benchmarks.several_gpus_table NUMBERS.json --page docs/performance.md

The latter puts them between the page's two markers. A cell is milliseconds, in brackets times the
products alone, and MiB held above inputs and both gradients; errors are the largest of all shapes,
and bits are equal where they are in two calls of each and, where every rank has the whole dE, on
all ranks.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.several_gpus import FLOOR_OF, PRODUCTS
from vocab_parallel.layout import HiddenLayout

MIB = 2**20
BEGIN, END = "<!-- several-gpus -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Arguments:
    """Which numbers, and where they go."""

    numbers: tyro.conf.Positional[Path]
    """The JSON file."""
    page: Path | None = None
    """A page with the two markers; without it the tables are printed."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    tables = markdown(json.loads(arguments.numbers.read_text()))
    if arguments.page is None:
        print(tables, end="")
    else:
        arguments.page.write_text(between_markers(arguments.page.read_text(), tables))


def between_markers(page: str, tables: str) -> str:
    """Return the page with these tables in the place of those that it had.

    Raises:
        ValueError: a page without the markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected a page with the lines {BEGIN!r} and {END!r}")
    return before + begin + tables + end + after


def markdown(document: dict[str, Any]) -> str:
    """Return where it was measured, a table for each layout, and who was left out and why."""
    shapes = document["shapes"]
    layouts = dict.fromkeys(row["layout"] for found in shapes.values() for row in _rows(found))
    parts = [
        f"{document['ranks']} x {document['machine']}, {document['date']}, torch "
        f"{document['torch']}, {document['rounds']} rounds. Liger ran its "
        f"{document['liger']['kind']}: {document['liger']['note']}."
    ]
    parts += ["\n".join(_table(shapes, layout)) for layout in layouts]
    parts += [f"Left out: {', '.join(names)}: {why}." for why, names in _missing(shapes).items()]
    return "".join(f"\n{part}\n" for part in parts) + "\n"


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    return list(found["rows"].values())


def _missing(shapes: dict[str, Any]) -> dict[str, list[str]]:
    """Return the contestants without a row somewhere, by reason."""
    found: dict[str, list[str]] = {}
    for shape, one in shapes.items():
        for name, reason in one["missing"].items():
            found.setdefault(" ".join(reason.split()), []).append(f"{name} of {shape}")
    return found


def _table(shapes: dict[str, Any], layout: HiddenLayout) -> Iterator[str]:
    kinds = ("random", "confident")
    columns = [_title(shape) for shape in shapes]
    columns += [*(f"error dE / dC, {kind}" for kind in kinds), "equal bits"]
    yield f"| {layout} | " + " | ".join(columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for floor in (PRODUCTS, FLOOR_OF[layout]):
        yield f"| {floor} | " + " | ".join([*_floors(shapes, floor), "", "", ""]) + " |"
    names = dict.fromkeys(
        name
        for found in shapes.values()
        for name, row in found["rows"].items()
        if row["layout"] == layout
    )
    for name in names:
        rows = [found["rows"].get(name) for found in shapes.values()]
        ran = [row for row in rows if row is not None]
        cells = [_cell(row) for row in rows]
        cells += [_errors(ran, kind) for kind in kinds]
        same = all(
            row["same_in_two_calls"] and row["same_on_all_ranks"] is not False for row in ran
        )
        cells.append("yes" if same else "no")
        yield f"| {ran[0]['contestant']} | " + " | ".join(cells) + " |"


def _title(shape: str) -> str:
    tokens, hidden, rows = shape.split("x")
    return f"{tokens} x {hidden} x {int(rows):,}"


def _floors(shapes: dict[str, Any], floor: str) -> Iterator[str]:
    for found in shapes.values():
        taken = found["floors"].get(floor)
        alone = found["floors"][PRODUCTS]
        yield "" if taken is None else f"{taken:.2f} ({taken / alone:.2f})"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['milliseconds']:.2f} ({row['over_floor']:.2f}) / {row['held'] / MIB:,.0f}"


def _errors(rows: list[dict[str, Any]], kind: str) -> str:
    found = [
        [row["errors"][name] for row in rows if name in row["errors"]]
        for name in (f"{kind} dE", f"{kind} dC")
    ]
    return " / ".join(f"{max(errors):.1e}" for errors in found if errors)


if __name__ == "__main__":
    main()
