"""The picture of one mesh: what each stage holds, and a simulated step."""

from pathlib import Path

from launch.planning.meshes import Plan

_PARTS = ("weights", "gradients", "optimizer", "activations", "loss")


def plot_plan(plan: Plan, path: Path) -> None:
    """Draw bars of memory, a stage each, over the step's timeline."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    count = len(plan.stages)
    figure, (bars, line) = pyplot.subplots(
        2, 1, figsize=(10, 4 + 0.25 * count), layout="constrained"
    )
    below = [0.0] * count
    for part in _PARTS:
        values = [getattr(stage, part) / 1e9 for stage in plan.stages]
        bars.bar(range(count), values, bottom=below, label=part)
        below = [low + value for low, value in zip(below, values, strict=True)]
    mesh = plan.mesh
    bars.set(
        xlabel="stage",
        ylabel="GB a rank",
        title=f"data {mesh.data} x pipeline {mesh.pipeline} x vocab {mesh.vocab}",
    )
    bars.legend(fontsize=8)
    colors = {"forward": "tab:blue", "backward": "tab:green"}
    for span in plan.spans:
        color = colors[span.kind]
        if span.stage == count - 1:  # the loss is in it
            color = {"forward": "tab:orange", "backward": "tab:red"}[span.kind]
        line.barh(
            span.stage,
            1e3 * (span.stop - span.start),
            left=1e3 * span.start,
            color=color,
            edgecolor="white",
            linewidth=0.4,
        )
    line.invert_yaxis()
    line.set(
        xlabel=f"ms of a step; {plan.bubble:.0%} of the stages' time is waiting",
        ylabel="stage (last: with the loss)",
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
