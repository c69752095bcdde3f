"""The loss over a real vocab group, one rank a GPU, with its collectives: ours beside its peers.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.several_gpus
    torchrun --standalone --nproc-per-node 2 -m benchmarks.several_gpus --shapes 64x32x1000

(the latter on a laptop). Rank r holds rows [start, stop) of the classifier, and the group's loss
covers the same T tokens in every layout. Forward and backward are timed together, collectives
included, each contestant with its own. A round calls every contestant once, in an order that is the
same on all ranks; a call waits on the device behind other products and a barrier, so that the ranks
begin together. Its time is that of the slowest rank, and what is shown is the median over the
rounds. Floors come from the same rounds, and the column "x floor" takes the layout's:

    products                     the three matrix products alone, in the best of a few chunks of T
    products, all-reduce         and then [T, D] in float32, once: what "replicated" needs
    gather, products, scatter    of hidden states, and of [T, D] in float32: the other layouts

Memory is the most that any rank held above its inputs, both gradients included. Errors are those of
all ranks' gradients together against float64. Bits are compared over two calls and, where every
rank has the whole dE, over the ranks. A contestant that is not installed on some rank, or is not
for a shape, is left out on all of them, with the reason; one that fails on one rank alone ends the
run. NVLink multicast is off unless NCCL_NVLS_ENABLE and NVSHMEM_DISABLE_NVLS say otherwise.
The last line of the output is one JSON document; it is written to --out, too, with the figure.
"""

import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from benchmarks import contestants
from benchmarks.contestants import Contestant, Operands
from benchmarks.exact import exact_gradients, relative_errors
from benchmarks.liger import Liger
from benchmarks.measure import median_and_spread, peak_of, timed_rounds
from benchmarks.older import older_library
from benchmarks.plot import plot_several_gpus
from benchmarks.ranks import Ranks
from vocab_parallel import VocabParallelOptions
from vocab_parallel.layout import HiddenLayout

MIB = 2**20
GPU_SHAPES = ("8192x2048", "8192x5120", "4096x4096", "2048x4096x262144")
CPU_SHAPES = ("256x64x4000",)
LAYOUTS: tuple[HiddenLayout, ...] = ("replicated", "sharded", "sequence")
WAYS: Mapping[str, dict[str, Any]] = {
    "probs": {"backward": "probs"},
    "recompute": {"backward": "recompute"},
    "auto 64 MiB": {},
}
# The name of each layout's floor: the products alone, and with the collectives that it needs.
PRODUCTS = "products"
FLOOR_OF: Mapping[HiddenLayout, str] = {
    "replicated": "products, all-reduce",
    "sharded": "gather, products, scatter",
    "sequence": "gather, products, scatter",
}
YES_OR_NO = {True: "yes", False: "no", None: ""}
# The layouts that a peer knows, where it knows more than the plain one.
LAYOUTS_OF_PEERS: Mapping[str, tuple[HiddenLayout, ...]] = {
    "torch, loss_parallel": ("replicated", "sequence"),
}


@dataclass(frozen=True)
class Arguments:
    """Which calls, and who is timed on them."""

    shapes: tuple[str, ...] = ()
    """Tokens x hidden size, or tokens x hidden size x vocabulary."""
    vocabulary: int = 151_936
    """Rows of all ranks together, for shapes that do not say."""
    layouts: tuple[HiddenLayout, ...] = LAYOUTS
    """What the vocab axis does for the hidden states."""
    rounds: int = 9
    """Timed rounds."""
    peers: bool = True
    """Whether other packages' losses are timed."""
    against: Path | None = None
    """A checkout of this repository whose loss is timed beside today's."""
    errors: bool = True
    """Whether gradients are compared with float64."""
    timeout: float = 120.0
    """Seconds that a collective waits for a rank before the run ends."""
    out: Path = Path("runs/several_gpus")
    """Folder for the numbers (JSON) and the figure (PNG)."""


@dataclass(frozen=True)
class Shape:
    """T tokens, hidden size D, and the rows of all ranks together."""

    tokens: int
    hidden: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str, vocabulary: int) -> Self:
        sides = text.split("x")
        if len(sides) not in (2, 3) or not all(side.isdigit() and int(side) for side in sides):
            raise ValueError(f"expected a shape TOKENSxHIDDEN or TOKENSxHIDDENxROWS, got {text!r}")
        return cls(*(int(side) for side in sides), *(vocabulary,) * (3 - len(sides)))

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocabulary}"


@dataclass(frozen=True)
class Entry:
    """A contestant in one layout, and how it is made of operands in that layout."""

    contestant: str
    layout: HiddenLayout
    make: Callable[[Operands], Contestant]

    @property
    def name(self) -> str:
        return f"{self.contestant} [{self.layout}]"

    def made_of(self, operands: Operands) -> Contestant:
        """Make it of replicated operands."""
        return self.make(operands.laid_out(self.layout))


@dataclass
class Row:
    """What was found of one entry."""

    contestant: str
    layout: str
    milliseconds: float
    spread: float
    over_floor: float  # the products alone
    over_floor_with_collectives: float
    peak: int  # bytes above the inputs, on the rank that held most
    held: int  # and above the two gradients
    errors: dict[str, float] = field(default_factory=dict)
    same_in_two_calls: bool = False
    same_on_all_ranks: bool | None = None  # of dE; None where each rank has a part
    rounds: list[float] = field(default_factory=list)  # milliseconds of each, to be paired


@record
def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    ranks = Ranks.start(arguments.timeout)
    document, is_first = study(arguments, ranks), ranks.is_first
    gc.collect()
    ranks.end()
    if is_first:
        plot_several_gpus(document, path_of(document, arguments.out).with_suffix(".png"))
        print(json.dumps(document))


def study(arguments: Arguments, ranks: Ranks) -> dict[str, Any]:
    """Measure every shape; every rank returns the same numbers."""
    on_gpu = ranks.device.type == "cuda"
    degree = dist.get_world_size()
    shapes = [
        Shape.parse(text, arguments.vocabulary)
        for text in arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    ]
    calls = [(one.tokens, one.hidden, -(-one.vocabulary // degree)) for one in shapes]
    liger = Liger.set_up(calls, ranks) if arguments.peers else Liger("fallback", "not asked for")
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "ranks": degree,
        "backend": dist.get_backend(),
        "dtype": str(torch.bfloat16 if on_gpu else torch.float32),
        "rounds": arguments.rounds,
        "liger": asdict(liger),
        "shapes": {},
    }
    for shape in shapes:
        # torch.compile would take another shape for one of many, and compile for all of them.
        torch.compiler.reset()
        found = measure(shape, entries(arguments, liger), arguments, ranks)
        document["shapes"][str(shape)] = found
        if ranks.is_first:
            print_table(shape, document)
            # A run that is cut leaves what it has found.
            path = path_of(document, arguments.out)
            path.write_text(json.dumps(document, indent=1) + "\n")
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    liger.tear_down(ranks)
    return document


def entries(arguments: Arguments, liger: Liger) -> list[Entry]:
    """Return everybody, in every layout that he has."""
    found = []
    for layout in arguments.layouts:
        for way, options in WAYS.items():
            found.append(Entry(f"ours, {way}", layout, partial(contestants.ours, **options)))
            if arguments.against is not None:
                older = older_library(arguments.against).linear_cross_entropy
                made = partial(contestants.ours, loss=older, **options)
                found.append(Entry(f"older, {way}", layout, made))
        for peer in contestants.PEERS_OVER_RANKS if arguments.peers else ():
            if layout in LAYOUTS_OF_PEERS.get(peer, ("replicated",)):
                name = f"{peer}, {liger.kind}" if peer.startswith("liger") else peer
                found.append(Entry(name, layout, partial(contestants.peer, name=peer)))
    return found


def measure(
    shape: Shape, wanted: list[Entry], arguments: Arguments, ranks: Ranks
) -> dict[str, Any]:
    """Measure one shape: the floors, a row for each entry that runs, and why others do not."""
    options = VocabParallelOptions.from_vocab(shape.vocabulary, dist.group.WORLD)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    operands = contestants.draw_over_group(shape.tokens, shape.hidden, options, dtype, ranks.device)
    entered, calls, missing = _enter(wanted, operands, ranks)
    peaks = {name: max(ranks.tell(peak_of(call, ranks.device))) for name, call in calls.items()}
    floors = _floors(operands, {entry.layout for entry in entered.values()})
    rounds = _slowest_rounds(floors | calls, arguments.rounds, ranks)
    lowest: dict[str, float] = {}
    for name in floors:
        kind = name.rpartition(",")[0]  # what follows is the chunk
        median = statistics.median(rounds[name])
        lowest[kind] = min(lowest.get(kind, median), median)
    rows = {}
    for name, entry in entered.items():
        own = operands.laid_out(entry.layout)
        milliseconds, spread = median_and_spread(rounds[name])
        rows[name] = Row(
            contestant=entry.contestant,
            layout=entry.layout,
            milliseconds=milliseconds,
            spread=spread,
            over_floor=milliseconds / lowest[PRODUCTS],
            over_floor_with_collectives=milliseconds / lowest[FLOOR_OF[entry.layout]],
            peak=peaks[name],
            held=peaks[name] - own.hidden.nbytes - own.rows.nbytes,
            rounds=rounds[name],
        )
    del calls, floors
    _compare_bits(entered, rows, operands, ranks)
    if arguments.errors:
        _compare_with_float64(entered, rows, operands)
    return {
        "floors": lowest,
        "rows": {name: asdict(row) for name, row in rows.items()},
        "missing": missing,
    }


def _enter(
    wanted: list[Entry], operands: Operands, ranks: Ranks
) -> tuple[dict[str, Entry], dict[str, Contestant], dict[str, str]]:
    """Return the entries that run on all ranks, their calls, and why the others are left out."""
    entered: dict[str, Entry] = {}
    calls: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for entry in wanted:
        call, reason = ranks.enter(entry.name, lambda entry=entry: entry.made_of(operands))
        if call is None:
            missing[entry.name] = reason
        else:
            entered[entry.name], calls[entry.name] = entry, call
    return entered, calls, missing


def _floors(operands: Operands, layouts: Collection[HiddenLayout]) -> dict[str, Contestant]:
    """Return the products by themselves, and between the collectives of some layouts."""
    products = contestants.floors(operands)
    found = dict(products)
    for kind in {FLOOR_OF[layout]: None for layout in LAYOUTS if layout in layouts}:
        gathers = kind == FLOOR_OF["sharded"]
        for name, call in products.items():
            both = contestants.between_collectives(operands, gathers, call)
            found[name.replace(PRODUCTS, kind)] = both
    return found


def _slowest_rounds(
    calls: dict[str, Contestant], rounds: int, ranks: Ranks
) -> dict[str, list[float]]:
    """Return milliseconds; those of a round are the slowest rank's, found after all rounds."""
    times = timed_rounds(
        calls,
        device=ranks.device,
        ahead=ranks.busy_then_together(),
        rounds=rounds,
        quiet=not ranks.is_first,
    )
    return ranks.slowest(times)


def _compare_bits(
    entered: dict[str, Entry], rows: dict[str, Row], operands: Operands, ranks: Ranks
) -> None:
    """Tell whether gradients have equal bits in two calls, and dE on the ranks that share it."""
    group = operands.group
    for name, entry in entered.items():
        call = entry.made_of(operands)
        first = tuple(gradient.clone() for gradient in call())
        again = call()
        equal = all(_same_bits(one, other) for one, other in zip(first, again, strict=True))
        rows[name].same_in_two_calls = all(ranks.tell(equal))
        if entry.layout == "replicated":
            of_first_rank = group.start_broadcast(first[0].clone(), 0).wait()
            equal = _same_bits(first[0], of_first_rank)
            rows[name].same_on_all_ranks = all(ranks.tell(equal))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _compare_with_float64(
    entered: dict[str, Entry], rows: dict[str, Row], operands: Operands
) -> None:
    for kind, case in (("random", operands), ("confident", contestants.confident(operands))):
        exact = exact_gradients(case)
        for name, entry in entered.items():
            own = case.laid_out(entry.layout)
            errors = relative_errors(entry.make(own)(), exact, own)
            rows[name].errors |= {f"{kind} {what}": error for what, error in errors.items()}


def print_table(shape: Shape, document: dict[str, Any]) -> None:
    """Print a shape's floors, then its rows, the layouts one after another."""
    found = document["shapes"][str(shape)]
    kinds = [f"{kind} {what}" for kind in ("random", "confident") for what in ("dE", "dC")]
    title = (
        f"{shape.tokens} tokens, hidden size {shape.hidden}, {shape.vocabulary:,} rows "
        f"on {document['ranks']} ranks"
    )
    table = Table(title=title)
    table.add_column("")
    for column in (
        "layout", "ms", "+-", "x products", "x floor", "MiB", *kinds, "2 calls =", "ranks ="
    ):  # fmt: skip
        table.add_column(column, justify="right")
    lowest = found["floors"]
    for kind, milliseconds in lowest.items():
        table.add_row(kind, "", f"{milliseconds:.2f}", "", f"{milliseconds / lowest[PRODUCTS]:.3f}")
    for row in found["rows"].values():
        errors = row["errors"]
        table.add_row(
            row["contestant"],
            row["layout"],
            f"{row['milliseconds']:.2f}",
            f"{row['spread']:.2f}",
            f"{row['over_floor']:.3f}",
            f"{row['over_floor_with_collectives']:.3f}",
            f"{row['peak'] / MIB:,.0f}",
            *(f"{errors[kind]:.1e}" if kind in errors else "" for kind in kinds),
            YES_OR_NO[row["same_in_two_calls"]],
            YES_OR_NO[row["same_on_all_ranks"]],
        )
    console = Console(width=170)
    console.print(table)
    console.print(f"liger: {document['liger']['kind']}: {document['liger']['note']}", markup=False)
    for name, reason in found["missing"].items():
        console.print(f"left out: {name}: {reason}", markup=False)


def path_of(document: dict[str, Any], folder: Path) -> Path:
    """Return where the numbers go; the figure lies beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = document["machine"].replace(" ", "-").lower()
    return folder / f"{document['date']}-several-gpus-{document['ranks']}x-{machine}.json"


if __name__ == "__main__":
    main()
