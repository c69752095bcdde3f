"""An adapter of the classifier (LoRA): one product of longer operands, or rows that are merged.

    python -m benchmarks.adapters

Forward and backward of the loss over a frozen shard W and an adapter s B A, in bfloat16:

    no adapter          W alone, trained: what the loss costs without one
    longer operands     [e, s e A^T] [W, B]^T, what the library does
    merged rows         e (W + s B A)^T, W + s B A made anew in each call

Errors are those of what the adapter does to each token's loss, against float64, where it is a
thousandth of the rows (it begins at nothing): merged rows are rounded to bfloat16, and most of such
an adapter with them. The last line of the output is one JSON document.
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
    for column in ("D", "", "ms", "MiB", "error of its effect"):
        table.add_column(column, justify="right")
    found = []
    for hidden in arguments.hidden:
        calls = contestants(arguments, hidden, device)
        errors = errors_of_effect(arguments, hidden, device)
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
                | ({} if error is None else {"error of its effect": error})
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


def errors_of_effect(arguments: Arguments, hidden: int, device: torch.device) -> dict[str, float]:
    """Compare what the adapter does to each of some tokens' losses with float64."""
    e, w, a, b, targets = (
        t.detach()[: 1024 if i in (0, 4) else None]
        for i, t in enumerate(drawn(arguments, hidden, device))
    )

    def exact(rows: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(e.double(), rows), targets, reduction="none")

    def ours(operands: tuple[Tensor, Tensor]) -> Tensor:
        return linear_cross_entropy(*operands, targets, reduction="none").double()

    def eager(*factors: Tensor) -> Tensor:
        logits = F.linear(e, w)
        if factors:
            logits = logits + F.linear(F.linear(e, factors[0]), factors[1])
        return F.cross_entropy(logits.float(), targets, reduction="none").double()

    want = exact(w.double() + b.double() @ a.double()) - exact(w.double())
    longer = Rows(w, None, None, (LowRank(a, b, 1.0),))
    found = {
        "longer operands": ours(longer.operands(e)) - ours((e, w)),
        "merged rows": ours((e, torch.addmm(w, b, a))) - ours((e, w)),
        "eager": eager(a, b) - eager(),
    }
    return {name: float((own - want).norm() / want.norm()) for name, own in found.items()}


if __name__ == "__main__":
    main()
