"""The figure of `benchmarks.loss`: time over memory, one panel a shard."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
WAYS = ("recompute", "gradients", "probs")


def plot_time_over_memory(document: dict[str, Any], path: Path) -> None:
    """Draw the ways as curves over the sizes of their tiles, and the peers as points."""
    shapes = document["shapes"]
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False)
    for axis, (shape, found) in zip(axes.flat, shapes.items(), strict=False):
        _draw_shard(axis, found["rows"])
        axis.set_title(f"hidden x rows {shape}")
        axis.set_xlabel("MiB held above inputs and gradients")
        axis.set_ylabel("time / the three products alone")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        axis.minorticks_off()
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(shapes) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(
        f"{document['tokens']} tokens, {document['machine']}, torch {document['torch']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _draw_shard(axis: Any, rows: dict[str, Any]) -> None:
    for way in WAYS:
        points = sorted(
            (max(row["memory"], MIB) / MIB, row["over_floor"])
            for name, row in rows.items()
            if name.startswith(f"ours, {way}")
            and "main_grad" not in name
            and row["memory"] is not None
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=f"ours, {way}")
    for name, row in rows.items():
        if not name.startswith(("ours", "products")) and row["memory"] is not None:
            axis.plot(
                max(row["memory"], MIB) / MIB,
                row["over_floor"],
                marker="x",
                linestyle="",
                label=name,
            )
