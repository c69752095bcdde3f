"""The picture of one mesh: what each rank holds, and a simulated step."""

from pathlib import Path
from typing import Any

from launch.planning.meshes import MeshPlan

# Of each kind of pass its name, and its color, alone and with the last stage's loss.
_KINDS = {
    "F": ("forward", "tab:blue", "tab:orange"),
    "B": ("backward", "tab:green", "tab:red"),
    "I": ("inputs", "tab:green", "tab:red"),
    "W": ("weights", "tab:olive", "tab:purple"),
    "S": ("S: statistics and dE of the rows", "gold", ""),
    "T": ("T: gradient of the rows", "tab:pink", ""),
}
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


def plot_plan(plan: MeshPlan, path: Path, model: str, gpu_memory: float) -> None:
    """Draw bars of memory, a rank each, over the step's timeline.

    Args:
        plan: what is drawn.
        path: of the picture.
        model: its name, for the title.
        gpu_memory: bytes of a card, drawn as a line.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (bars, line) = pyplot.subplots(
        2, 1, figsize=(10, 4 + 0.25 * len(plan.ranks)), layout="constrained"
    )
    _draw_memory(bars, plan, model, gpu_memory)
    _draw_step(line, plan)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_memory(bars: Any, plan: MeshPlan, model: str, gpu_memory: float) -> None:
    count = len(plan.ranks)
    below = [0.0] * count
    for part in _PARTS:
        values = [size / 1e9 for size in plan.of_ranks(part)]
        bars.bar(range(count), values, bottom=below, label=part)
        below = [low + value for low, value in zip(below, values, strict=True)]
    card = gpu_memory / 1e9
    bars.axhline(card, color="black", linestyle="--", linewidth=1, label=f"a card's {card:.0f} GB")
    mesh = plan.mesh
    place = "on the last stage" if plan.vocab_over == "last-stage" else "on all stages"
    filled = ", rows filled" if plan.rows == "filled" else ""
    bars.set(
        xticks=range(count),
        xlabel="pipeline rank",
        ylabel="GB a rank",
        title=f"{model}: data {mesh.data} x pipeline {mesh.pipeline} x vocab {mesh.vocab}, "
        f"vocabulary {place}{filled}",
    )
    bars.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_step(line: Any, plan: MeshPlan) -> None:
    from matplotlib import pyplot

    on_last = len(plan.stages) - 1 if plan.vocab_over == "last-stage" else None
    shown: dict[str, str] = {}  # colors, by what they are of
    for one in plan.passes:
        name, color, with_loss = _KINDS[one.kind]
        if one.stage == on_last:
            name, color = f"{name}, with the loss", with_loss
        shown[name] = color
        line.barh(
            one.ranks[0],
            1e3 * (one.end - one.start),
            left=1e3 * one.start,
            color=color,
            edgecolor="white",
            linewidth=0.4,
        )
    line.legend(
        handles=[
            pyplot.Rectangle((0, 0), 1, 1, color=color, label=x) for x, color in shown.items()
        ],
        fontsize=7,
        ncols=len(shown),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    line.invert_yaxis()
    fewer = "" if plan.drawn == plan.microbatches else f" of {plan.drawn} microbatches alone"
    line.set(
        yticks=range(len(plan.ranks)),
        xlabel=f"ms of a step{fewer}; {plan.bubble:.0%} of the ranks' time is waiting",
        ylabel="pipeline rank",
    )
