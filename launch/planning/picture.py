"""The picture of one mesh: what each stage holds, and a simulated step."""

from pathlib import Path

from launch.planning.meshes import MeshPlan, of_ranks

_COLORS = {
    "forward": "tab:blue",
    "backward": "tab:green",
    "inputs": "tab:green",
    "weights": "tab:olive",
}
_WITH_LOSS = {
    "forward": "tab:orange",
    "backward": "tab:red",
    "inputs": "tab:red",
    "weights": "tab:purple",
}
_PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


def plot_plan(plan: MeshPlan, path: Path) -> None:
    """Draw bars of memory, a stage each, over the step's timeline."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    count = len(plan.ranks)
    figure, (bars, line) = pyplot.subplots(
        2, 1, figsize=(10, 4 + 0.25 * count), layout="constrained"
    )
    below = [0.0] * count
    for part in _PARTS:
        values = [size / 1e9 for size in of_ranks(plan.stages, plan.ranks, part)]
        bars.bar(range(count), values, bottom=below, label=part)
        below = [low + value for low, value in zip(below, values, strict=True)]
    mesh = plan.mesh
    bars.set(
        xlabel="pipeline rank",
        ylabel="GB a rank",
        title=f"data {mesh.data} x pipeline {mesh.pipeline} x vocab {mesh.vocab}",
    )
    bars.legend(fontsize=8)
    for span in plan.spans:
        has_loss = span.stage == len(plan.stages) - 1
        line.barh(
            span.rank,
            1e3 * (span.stop - span.start),
            left=1e3 * span.start,
            color=(_WITH_LOSS if has_loss else _COLORS)[span.kind],
            edgecolor="white",
            linewidth=0.4,
        )
    shown: list[tuple[str, str]] = [
        (kind, _COLORS[kind]) for kind in _COLORS if kind in {s.kind for s in plan.spans}
    ]
    shown += [("forward, with the loss", _WITH_LOSS["forward"])]
    shown += [("backward, with the loss", _WITH_LOSS["backward"])]
    line.legend(
        handles=[pyplot.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in shown],
        fontsize=7,
        ncols=len(shown),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    line.invert_yaxis()
    line.set(
        xlabel=f"ms of a step; {plan.bubble:.0%} of the ranks' time is waiting",
        ylabel="pipeline rank",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
