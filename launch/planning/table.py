"""The table of meshes, as the command prints it."""

from rich.console import Console
from rich.table import Table

from launch.planning.hardware import Hardware
from launch.planning.meshes import MeshPlan


def print_table(title: str, plans: list[MeshPlan], hardware: Hardware) -> None:
    """Print a line a mesh, and below them what was measured and what is assumed."""
    table = Table(title=title)
    for column in (
        "d x p x v",
        "layers",
        "tokens/s",
        "step s",
        "bubble",
        "last / others",
        "layers again",
        "fullest GB",
        "GB with loss",
        "classifier GB",
        "loss GB",
        "loss",
        "missing GB",
    ):
        table.add_column(column, justify="right")
    for one in plans:
        last = one.stages[-1]
        memory = one.rank_memory
        holder = next(rank for rank, own in enumerate(one.ranks) if len(one.stages) - 1 in own)
        layers = [stage.layers for stage in one.stages]
        table.add_row(
            f"{one.mesh.data} x {one.mesh.pipeline} x {one.mesh.vocab}",
            f"{layers[0]}..{layers[-1]}" if len(layers) > 1 else str(layers[0]),
            f"{one.tokens_per_second:,.0f}",
            f"{one.step_seconds:.2f}",
            f"{one.bubble:.0%}",
            f"{one.imbalance:.2f}",
            "yes" if one.recompute_layers else "",
            f"{max(memory) / 1e9:.1f}",
            f"{memory[holder] / 1e9:.1f}",
            f"{last.classifier / 1e9:.2f}",
            f"{last.loss / 1e9:.2f}",
            last.loss_way,
            "" if one.fits else f"{one.missing / 1e9:.1f}",
        )
    console = Console(width=150)
    console.print(table)
    console.print("d x p x v: data x pipeline x vocab degrees; memory is a rank's", markup=False)
    console.print(
        "Memory is arithmetic, within 1% of what ranks of Qwen3-1.7B held. Nothing of the links' "
        f"time is hidden. Products {_rate(hardware, 'product_flops', 1e12, 'TFLOP/s')}, layers "
        f"{_rate(hardware, 'layer_flops', 1e12, 'TFLOP/s')}, links "
        f"{_rate(hardware, 'link_bytes', 1e9, 'GB/s')}.",
        markup=False,
    )


def _rate(hardware: Hardware, name: str, unit: float, unit_name: str) -> str:
    return f"{getattr(hardware, name) / unit:.0f} {unit_name} ({hardware.sources[name]})"
