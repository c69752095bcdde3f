"""Products that finish their tile in the same kernel, beside cuBLAS and the passes they replace.

    python -m benchmarks.products --hidden 2048 5120 --rows 37984

Forward makes all logits, backward a tile of rows at a time. A rate counts the product's flops
alone, whatever else a contestant does. The last line of the output is one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import interleaved
from vocab_parallel.backends.torch import put_product
from vocab_parallel.kernels.logits_gradient import logits_gradient
from vocab_parallel.kernels.logits_statistics import logits_statistics
from vocab_parallel.kernels.product_gradient import product_gradient
from vocab_parallel.kernels.product_statistics import product_statistics
from vocab_parallel.plan import padded


@dataclass(frozen=True)
class Arguments:
    """The shards."""

    tokens: int = 8192
    """T, tokens."""
    hidden: tuple[int, ...] = (2048, 5120)
    """Hidden sizes."""
    rows: tuple[int, ...] = (37_984,)
    """Rows of each shard."""
    tile_rows: int = 4096
    """Rows of a tile of backward."""
    rounds: int = 9
    """Timed rounds."""


@dataclass(frozen=True)
class Contestant:
    """A call, its product's flops, and which contestant is the product alone."""

    call: Callable[[], object]
    flops: float
    alone: str


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda")
    found = []
    for hidden in arguments.hidden:
        for rows in arguments.rows:
            sizes = (arguments.tokens, hidden, rows, min(arguments.tile_rows, rows))
            entered = contestants(*sizes, torch.bfloat16, device)
            calls = {name: one.call for name, one in entered.items()}
            times = interleaved(calls, device=device, rounds=arguments.rounds)
            table = Table(title=f"{arguments.tokens} tokens, hidden x rows {hidden} x {rows:,}")
            for column in ("", "ms", "TFLOP/s", "x product"):
                table.add_column(column, justify="right")
            for name, one in entered.items():
                took = times[name].milliseconds
                row = {
                    "hidden": hidden,
                    "rows": rows,
                    "contestant": name,
                    "milliseconds": took,
                    "TFLOP/s": one.flops / took / 1e9,
                    "x product": took / times[one.alone].milliseconds,
                }
                found.append(row)
                numbers = (f"{took:.3f}", f"{row['TFLOP/s']:.0f}", f"{row['x product']:.3f}")
                table.add_row(name, *numbers)
            Console().print(table)
            torch.cuda.empty_cache()
    print(json.dumps({"machine": torch.cuda.get_device_name(), "products": found}))


def contestants(
    tokens: int, hidden: int, rows: int, tile_rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Contestant]:
    """Return the calls; those that do the same work return the same tensors."""
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden, device=device).to(dtype)
    c = (torch.randn(rows, hidden, device=device) / hidden**0.5).to(dtype)
    targets = torch.randint(rows, (tokens,), device=device, dtype=torch.int32)
    logits = e.new_empty((tokens, padded(rows)))[:, :rows]
    tile = e.new_empty((tokens, padded(tile_rows)))[:, :tile_rows]
    tile_grad = (torch.randn(tokens, tile_rows, device=device) / rows).to(dtype)
    few = c[:tile_rows]
    names = ("lse", "target")
    statistics = torch.zeros(2, tokens, device=device)
    plain = (None, 1.0)  # no softcap, no temperature
    product_statistics(e, c, None, targets, None, statistics, names, None, plain)
    grads = torch.tensor([[1.0], [-1.0]], device=device).expand(2, tokens).contiguous()
    hidden_sum = torch.zeros(tokens, hidden, device=device)
    hidden_grad, rows_grad = torch.empty_like(e), torch.empty_like(few)

    def all_statistics(*, in_one: bool) -> object:
        out = torch.empty_like(statistics)
        if in_one:
            product_statistics(e, c, None, targets, None, out, names, None, plain)
        else:
            torch.mm(e, c.T, out=logits)
            logits_statistics(logits, None, targets, 0, out, names, plain, first=True)
        return out

    def tile_gradient(*, in_one: bool) -> object:
        shared = (None, targets, 0, statistics, grads, names, tile)
        if in_one:
            product_gradient(e, few, *shared, plain, sum_tokens=False)
        else:
            torch.mm(e, few.T, out=tile)
            logits_gradient(tile, *shared, plain, sum_tokens=False)
        return tile

    whole, part = 2.0 * tokens * hidden * rows, 2.0 * tokens * hidden * tile_rows
    everything, one_tile = "logits of all rows", "logits of a tile"
    return {
        everything: Contestant(lambda: torch.mm(e, c.T, out=logits), whole, everything),
        "and their statistics": Contestant(lambda: all_statistics(in_one=False), whole, everything),
        "statistics in one kernel": Contestant(
            lambda: all_statistics(in_one=True), whole, everything
        ),
        one_tile: Contestant(lambda: torch.mm(e, few.T, out=tile), part, one_tile),
        "and its gradient": Contestant(lambda: tile_gradient(in_one=False), part, one_tile),
        "gradient in one kernel": Contestant(lambda: tile_gradient(in_one=True), part, one_tile),
        "dE of a tile": Contestant(
            lambda: put_product(hidden_grad, tile_grad, few, add=False), part, "dE of a tile"
        ),
        "dE, added to float32": Contestant(
            lambda: put_product(hidden_sum, tile_grad, few, add=True), part, "dE of a tile"
        ),
        "dC of a tile": Contestant(
            lambda: put_product(rows_grad, tile_grad.T, e, add=False), part, "dC of a tile"
        ),
    }


if __name__ == "__main__":
    main()
