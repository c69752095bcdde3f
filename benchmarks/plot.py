"""The figures: one shard, several GPUs, the last stage against the others, scaling, all stages."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MIB = 2**20
BACKWARDS = ("recompute", "probs", "auto")


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
    for way in BACKWARDS:
        points = sorted(
            (max(row["memory"], MIB) / MIB, row["over_floor"])
            for name, row in rows.items()
            if name.startswith(f"ours, {way}")
            and "main_grad" not in name
            and row["memory"] is not None
        )
        if points:
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


def plot_last_stages(document: dict[str, Any], path: Path) -> None:
    """Draw a step's time and the peaks of the last and the first stage, a line a contestant."""
    cases = document["cases"]
    figure, axes = plt.subplots(
        len(cases), 2, figsize=(12, 0.6 + 3.0 * len(cases)), squeeze=False, layout="constrained"
    )
    for (case, found), (time_axis, memory_axis) in zip(cases.items(), axes, strict=True):
        rows = dict(reversed(found["rows"].items()))
        places = range(len(rows))
        colors = ["tab:blue" if "ours" in name else "tab:gray" for name in rows]
        model, mesh = case.split(":")
        again = ", layers run again" if found["layers run again"] else ""
        time_axis.barh(places, [row["step_seconds"] for row in rows.values()], color=colors)
        time_axis.set_yticks(places, list(rows), fontsize=8)
        time_axis.set_title(f"{model} on {mesh} GPUs{again}: seconds of a step", fontsize=9)
        for offset, stage, color in ((0.2, "last", "tab:orange"), (-0.2, "first", "tab:green")):
            peaks = [row[f"{stage}_peak"] / 1e9 for row in rows.values()]
            memory_axis.barh(
                [place + offset for place in places],
                peaks,
                0.4,
                color=color,
                label=f"{stage} stage",
            )
        memory_axis.set_yticks(places, [])
        memory_axis.set_title("peak of a rank, GB", fontsize=9)
        for axis in (time_axis, memory_axis):
            axis.grid(axis="x", alpha=0.3)
    axes[0][1].legend(fontsize=8)
    figure.suptitle(f"Equal GPUs, equal global batch; {document['machine']}, {document['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_several_gpus(document: dict[str, Any], path: Path) -> None:
    """Draw each contestant's time over the products', a panel a shape; a line is that floor."""
    shapes = document["shapes"]
    names = list(dict.fromkeys(name for found in shapes.values() for name in found["rows"]))[::-1]
    figure, axes = plt.subplots(
        1,
        len(shapes),
        figsize=(4 + 3.4 * len(shapes), 1.5 + 0.24 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (shape, found) in zip(axes.flat, shapes.items(), strict=True):
        for place, name in enumerate(names):
            row = found["rows"].get(name)
            if row is not None:
                color = "tab:blue" if name.startswith("ours") else "tab:gray"
                axis.barh(place, row["over_floor"], color=color)
                ratio = row["over_floor"]
                axis.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
        axis.minorticks_off()
        slowest = max((row["over_floor"] for row in found["rows"].values()), default=1.0)
        axis.set_xlim(0.9, 1.3 * slowest)
        axis.set_title(f"tokens x hidden x rows\n{shape}", fontsize=9)
        axis.set_xlabel("time / the three products alone")
        axis.grid(axis="x", alpha=0.3)
    axes.flat[0].set_yticks(range(len(names)), names, fontsize=7)
    figure.suptitle(
        f"{document['ranks']} x {document['machine']}, {document['dtype'].partition('.')[2]}, "
        f"{document['date']}, torch {document['torch']}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_scaling(document: dict[str, Any], path: Path) -> None:
    """Draw efficiency and time over the degree, measured as points and predicted as lines."""
    figure, (efficiency, time) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (model, rows) in enumerate(document["models"].items()):
        for way, marker in (("recompute", "o"), ("probs", "^")):
            own = [row for row in rows if row["way"] == way]
            degrees = [row["degree"] for row in own]
            color = f"C{number}"
            label = f"{model}, {way}"
            efficiency.plot(
                degrees, [row["efficiency"] for row in own], marker, color=color, label=label
            )
            efficiency.plot(degrees, [row["efficiency"] for row in own], color=color, alpha=0.3)
            time.plot(degrees, [row["milliseconds"] for row in own], marker, color=color)
            time.plot(degrees, [row["predicted_milliseconds"] for row in own], color=color)
    for axis in (efficiency, time):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("shards V")
        axis.grid(alpha=0.3)
    efficiency.set_ylabel("time of V = 1 / (V x time)")
    efficiency.set_ylim(0, 1.1)
    efficiency.legend(fontsize=7)
    time.set_yscale("log")
    time.set_ylabel("ms of a shard (lines: predicted)")
    figure.suptitle(
        f"{document['tokens']} tokens, {document['machine']}, torch {document['torch']}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_spanning(document: dict[str, Any], path: Path) -> None:
    """Draw how much longer rebalanced layers take than all stages, over P, a line a model."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    degrees: set[int] = set()
    for number, (model, found) in enumerate(document["models"].items()):
        rows = [row for row in found["rows"] if row["schedule"] == "1f1b"]
        ranks = [row["ranks"] for row in rows]
        degrees |= set(ranks)
        for way, line, marker in (("balanced", "--", "o"), ("filled", "-", "^")):
            ratios = [row["rebalanced"] / row[way]["milliseconds"] for row in rows]
            label = f"{model}, rows {way}"
            axis.plot(ranks, ratios, line, marker=marker, color=f"C{number}", label=label)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(degrees), [str(degree) for degree in sorted(degrees)])
    axis.set_xlabel("stages P, M = 8 P microbatches, 1F1B")
    axis.set_ylabel("step with the best rebalanced layers / over all stages")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"Simulated from pieces measured on {document['machine']}, {document['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
