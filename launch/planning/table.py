"""The table of meshes, as the command prints it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.planning.estimate import StageEstimate
from launch.planning.hardware import Hardware, peak_of
from launch.planning.meshes import MeshPlan, best_of
from launch.planning.unpiped import Unpiped

ALIKE = 0.01  # of a speed: what is nearer is no difference that this arithmetic can tell


def print_table(
    title: str,
    plans: list[MeshPlan],
    others: list[Unpiped],
    hardware: Hardware,
    show: int,
    advice: list[str],
) -> None:
    """Print a line a mesh, and below them which place of the vocabulary wins, and what is assumed.

    Args:
        title: above it.
        plans: all, sorted.
        others: what the GPUs would do without a pipeline.
        hardware: whose rates they have.
        show: how many have a line.
        advice: sentences to print below.
    """
    columns = {
        "d x p x v": lambda one: str(one.mesh),
        "vocabulary": _place,
        "layers": _layers,
        "M": lambda one: str(one.microbatches),
        "tokens/s": lambda one: f"{one.tokens_per_second:,.0f}",
        "MFU": lambda one: _share(utilisation(one, hardware)),
        "step s": lambda one: f"{one.step_seconds:.2f}",
        "bubble": lambda one: f"{one.bubble:.0%}",
        "last / others": lambda one: f"{one.imbalance:.2f}",
        "layers again": lambda one: "yes" if one.recompute_layers else "",
        "fullest GB": lambda one: f"{max(one.rank_memory) / 1e9:.1f}",
        "last stage GB": lambda one: f"{one.rank_memory[_last_rank(one)] / 1e9:.1f}",
        "loss GB": lambda one: f"{_with_loss(one).loss / 1e9:.2f}",
        "loss": lambda one: _with_loss(one).loss_way,
        "missing GB": _missing,
    }
    console = Console(width=160)
    whole = ("d x p x v", "vocabulary")
    console.print(_table(title, columns, plans[:show], whole, left="vocabulary"))
    if others:
        console.print(_table_of_others(plans[0], others, hardware))
    for line in (
        verdict(plans),
        *advice,
        "d x p x v: data x pipeline x vocab degrees; M: microbatches of a column; MFU: of the data "
        "sheet's dense bfloat16; memory is a rank's",
        "Memory is arithmetic, within 2% of what ranks of Qwen3-1.7B held. Nothing of the links' "
        f"time is hidden{_hidden(plans)}. Products "
        f"{_rate(hardware, 'product_flops', 1e12, 'TFLOP/s')}, layers "
        f"{_rate(hardware, 'layer_flops', 1e12, 'TFLOP/s')}, compiled "
        f"{hardware.compiled_speed:.2f} times as fast, links "
        f"{_rate(hardware, 'link_bytes', 1e9, 'GB/s')}{_nodes(hardware)}.",
        "Without a pipeline: FSDP2's gathers and reductions hide behind computation, tensor "
        "parallelism's messages do not; the fastest microbatch that fits; the same loss and rates.",
    ):
        if line:
            console.print(line, markup=False)


def _table_of_others(best: MeshPlan, others: list[Unpiped], hardware: Hardware) -> Table:
    batch = others[0].microbatch * others[0].count * others[0].mesh.data
    columns = {
        "": lambda one: one.name,
        "microbatch": lambda one: f"{one.microbatch} x {one.count}",
        "tokens/s": lambda one: f"{one.tokens_per_second:,.0f}",
        "of the best mesh": lambda one: f"{one.tokens_per_second / best.tokens_per_second:.0%}",
        "MFU": lambda one: _share(utilisation(one, hardware)),
        "step s": lambda one: f"{one.step_seconds:.2f}",
        "waits": lambda one: f"{one.waits:.0%}",
        "layers again": lambda one: "yes" if one.recompute_layers else "",
        "GB a GPU": lambda one: f"{one.memory / 1e9:.1f}",
        "missing GB": _missing,
    }
    title = f"the same batch of {batch:,} sequences without a pipeline"
    return _table(title, columns, others, list(columns)[:7])


def _table(
    title: str,
    columns: Mapping[str, Callable[[Any], str]],
    lines: Sequence[object],
    whole: Collection[str],
    left: str | None = None,
) -> Table:
    """Make a table of a line each; columns that are whole are never wrapped."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name == left else "right", no_wrap=name in whole)
    for one in lines:
        table.add_row(*(cell(one) for cell in columns.values()))
    return table


def utilisation(one: MeshPlan | Unpiped, hardware: Hardware) -> float | None:
    """Return the model-FLOPs utilisation: of the data sheet's peak; None where that is unknown."""
    peak = peak_of(hardware.name)
    return None if peak is None else one.flops_per_second / (peak * one.mesh.ranks)


def verdict(plans: list[MeshPlan]) -> str:
    """Say in a sentence where the vocabulary should be; nothing where one place was planned."""
    last, everywhere = best_of(plans, "last-stage"), best_of(plans, "all-stages")
    if last is None or everywhere is None:
        return ""
    if not (last.fits or everywhere.fits):
        return "Nothing fits, neither with the vocabulary on the last stage nor on all stages."
    if last.fits != everywhere.fits:
        one = last if last.fits else everywhere
        return f"Only the vocabulary on {_words(one)} fits: {one.mesh} at {_speed(one)}."
    gain = everywhere.tokens_per_second / last.tokens_per_second
    layers = "its one stage" if last.mesh.pipeline == 1 else "the last stage, layers rebalanced,"
    compared = (
        f"{everywhere.mesh} with the vocabulary on all stages has {_speed(everywhere)}, "
        f"{last.mesh} with it on {layers} {_speed(last)}"
    )
    if abs(gain - 1.0) < ALIKE:
        return f"No difference, less than {ALIKE:.0%}: {compared}."
    if gain <= 1.0:
        instead = "Do without a pipeline" if last.mesh.pipeline == 1 else "Rebalance layers instead"
        return f"{instead}, {1 / gain - 1:.1%} faster: {compared}."
    alike = (one for one in plans if one.vocab_over == "last-stage")
    same = next((one for one in alike if one.mesh == everywhere.mesh), None)
    if same is not None and not same.fits:
        compared += f"; on the last stage of {same.mesh} it lacks {same.missing / 1e9:.1f} GB"
    return f"Give the vocabulary to all stages, {gain - 1:.1%} faster: {compared}."


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _place(one: MeshPlan) -> str:
    if one.vocab_over == "last-stage":
        return "last stage"
    return "all, filled" if one.rows == "filled" else "all stages"


def _layers(one: MeshPlan) -> str:
    counts = [stage.layers for stage in one.stages]
    return f"{counts[0]}..{counts[-1]}" if len(counts) > 1 else str(counts[0])


def _last_rank(one: MeshPlan) -> int:
    return next(rank for rank, own in enumerate(one.ranks) if len(one.stages) - 1 in own)


def _with_loss(one: MeshPlan) -> StageEstimate:
    return max(one.stages, key=lambda stage: stage.rows)


def _missing(one: MeshPlan | Unpiped) -> str:
    return "" if one.missing <= 0 else f"{one.missing / 1e9:.1f}"


def _words(one: MeshPlan) -> str:
    return "the last stage" if one.vocab_over == "last-stage" else "all stages"


def _speed(one: MeshPlan) -> str:
    return f"{one.tokens_per_second:,.0f} tokens/s"


def _hidden(plans: list[MeshPlan]) -> str:
    spans = any(one.vocab_over == "all-stages" for one in plans)
    return ", but where all stages carry the vocabulary" if spans else ""


def _nodes(hardware: Hardware) -> str:
    if hardware.node_bytes is None:
        return ", between nodes too"
    return f", between nodes of {hardware.node_gpus} GPUs {hardware.node_bytes / 1e9:.0f} GB/s"


def _rate(hardware: Hardware, name: str, unit: float, unit_name: str) -> str:
    return f"{getattr(hardware, name) / unit:.0f} {unit_name} ({hardware.sources[name]})"
