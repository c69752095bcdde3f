"""An adapter of the classifier (LoRA): one product of longer operands, or rows that are merged.

    python -m benchmarks.adapters

Forward and backward of the loss over a frozen shard W and an adapter s B A, in bfloat16:

    no adapter          W alone, trained: what the loss costs without one
    longer operands     [e, s e A^T] [W, B]^T, what the library does
    merged rows         e (W + s B A)^T, W + s B A made anew in each call

Errors are those of dB against float64, where the adapter is a thousandth of the rows (it begins at
nothing): merged rows are rounded to bfloat16. The last line of the output is one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import interleaved
from vocab_parallel import linear_cross_entropy
from vocab_parallel.modules.heads import LowRank, Rows


@dataclass(frozen=True)
class Arguments:
    """The shapes."""

    tokens: int = 8192
    """T, tokens."""
    rows: int = 37_984
    """Rows of the shard."""
    hidden: tuple[int, ...] = (2048, 5120)
    """D, hidden sizes."""
    rank: int = 16
    """r, of the adapter."""
    rounds: int = 9
    """Timed rounds."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table()
    for column in ("D", "", "ms", "MiB", "error of dB"):
        table.add_column(column, justify="right")
    found = []
    for hidden in arguments.hidden:
        calls = contestants(arguments, hidden, device)
        errors = errors_of_b(arguments, hidden, device)
        measured = interleaved(calls, device=device, rounds=arguments.rounds)
        for name, one in measured.items():
            error = errors.get(name)
            table.add_row(
                str(hidden),
                name,
                f"{one.milliseconds:.2f}",
                f"{one.peak / 2**20:.0f}",
                "" if error is None else f"{error:.1e}",
            )
            found.append(
                {"hidden": hidden, "way": name, "ms": one.milliseconds, "bytes": one.peak}
                | ({} if error is None else {"error of dB": error})
            )
    Console().print(table)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(json.dumps({"machine": machine, "arguments": vars(arguments), "found": found}))


def drawn(
    arguments: Arguments, hidden: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw (e, W, A, B, targets)."""
    torch.manual_seed(0)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device=device) * scale).bfloat16()

    e = normal(arguments.tokens, hidden, scale=1.0).requires_grad_()
    w = normal(arguments.rows, hidden, scale=hidden**-0.5)
    a = normal(arguments.rank, hidden, scale=hidden**-0.5).requires_grad_()
    b = normal(arguments.rows, arguments.rank, scale=1e-3).requires_grad_()
    return e, w, a, b, torch.randint(arguments.rows, (arguments.tokens,), device=device)


def contestants(
    arguments: Arguments, hidden: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    e, w, a, b, targets = drawn(arguments, hidden, device)
    trained = w.clone().requires_grad_()

    def plain() -> object:
        return torch.autograd.grad(linear_cross_entropy(e, trained, targets), (e, trained))

    def longer() -> object:
        operands = Rows(w, None, None, (LowRank(a, b, 1.0),)).operands(e)
        return torch.autograd.grad(linear_cross_entropy(*operands, targets), (e, a, b))

    def merged() -> object:
        rows = torch.addmm(w, b, a)
        return torch.autograd.grad(linear_cross_entropy(e, rows, targets), (e, a, b))

    return {"no adapter": plain, "longer operands": longer, "merged rows": merged}


def errors_of_b(arguments: Arguments, hidden: int, device: torch.device) -> dict[str, float]:
    """Compare dB with float64 on some of the tokens, and eager bfloat16's beside."""
    e, w, a, b, targets = drawn(arguments, hidden, device)
    part = slice(0, 1024)
    wide = [t[part].double() if t is e else t.double() for t in (e, w, a, b)]
    leaf = wide[3].detach().requires_grad_()
    logits = wide[0] @ wide[1].T + (wide[0] @ wide[2].T) @ leaf.T
    exact = torch.autograd.grad(F.cross_entropy(logits, targets[part]), leaf)[0]
    del logits
    operands = Rows(w, None, None, (LowRank(a, b, 1.0),)).operands(e[part])
    losses = {
        "longer operands": linear_cross_entropy(*operands, targets[part]),
        "merged rows": linear_cross_entropy(e[part], torch.addmm(w, b, a), targets[part]),
        "eager": F.cross_entropy(
            (F.linear(e[part], w) + F.linear(F.linear(e[part], a), b)).float(), targets[part]
        ),
    }
    found = {}
    for name, loss in losses.items():
        own = torch.autograd.grad(loss, b)[0]  # type: ignore[arg-type]
        found[name] = float((own.double() - exact).norm() / exact.norm())
    print("errors of dB:", found)
    return found


if __name__ == "__main__":
    main()
