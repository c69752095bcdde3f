"""Time and memory of the loss, forward and backward, on one shard: ours beside torch's own.

    python -m benchmarks.loss --tokens 1024 --hidden 256 --rows 37984

Every contestant computes the mean loss of the same random hidden states, rows and targets, and
the gradients of hidden states and rows. "products" is the floor: the three matrix products alone,
in chunks of tokens, with nothing between them. Contestants are interleaved; times are medians.
The last line of the output is one JSON document.
"""

import json
import platform
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import interleaved
from vocab_parallel import linear_cross_entropy


@dataclass(frozen=True)
class Arguments:
    """The shard and how often it is timed."""

    tokens: int = 1024
    """T, tokens."""
    hidden: int = 256
    """D, hidden size."""
    rows: int = 37_984
    """Rows of the shard."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of hidden states and rows."""
    rounds: int = 7
    """Timed rounds."""
    chunk: int = 512
    """Tokens in a chunk of the floor's products."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    e = torch.randn(arguments.tokens, arguments.hidden, device=device, dtype=dtype)
    c = torch.randn(arguments.rows, arguments.hidden, device=device, dtype=dtype)
    c /= arguments.hidden**0.5
    targets = torch.randint(arguments.rows, (arguments.tokens,), device=device)
    e.requires_grad_()
    c.requires_grad_()

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (e, c))

    contestants = {
        "products": lambda: products(e.detach(), c.detach(), arguments.chunk),
        "chunked": lambda: gradients(linear_cross_entropy(e, c, targets, impl="chunked")),
        "eager": lambda: gradients(F.cross_entropy(F.linear(e, c).float(), targets)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        contestants["torch linear_cross_entropy"] = lambda: gradients(
            F.linear_cross_entropy(e, c, targets, options=options)
        )
    found = interleaved(contestants, device=device, rounds=arguments.rounds)

    floor = found["products"].milliseconds
    table = Table(title=f"{arguments.tokens} tokens, {arguments.rows:,} x {arguments.hidden}")
    for column in ("", "ms", "x products", "peak MiB"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        peak = "" if one.peak is None else f"{one.peak / 2**20:,.0f}"
        table.add_row(name, f"{one.milliseconds:.1f}", f"{one.milliseconds / floor:.2f}", peak)
    Console().print(table)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(
        json.dumps(
            {
                "arguments": asdict(arguments),
                "machine": machine,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "contestants": {name: asdict(one) for name, one in found.items()},
            }
        )
    )


def products(e: Tensor, c: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Multiply as the loss must: logits, then the two gradients, with nothing between."""
    hidden_grad, rows_grad = torch.empty_like(e), torch.zeros_like(c)
    for start in range(0, e.shape[0], chunk):
        own = slice(start, start + chunk)
        logits = e[own] @ c.T
        torch.mm(logits, c, out=hidden_grad[own])
        rows_grad.addmm_(logits.T, e[own])
    return hidden_grad, rows_grad


if __name__ == "__main__":
    main()
