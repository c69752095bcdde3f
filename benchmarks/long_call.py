"""One long call of the loss, beside calls of a span's tokens whose gradients add up.

    python -m benchmarks.long_call          # a GPU of 8 GB: 262,144 tokens, 75,968 rows

Each contestant makes the gradients of all hidden states and of the rows, forward and backward,
for the mean over all tokens:

    one call                 of all tokens
    calls                    of --part tokens each; autograd adds the rows' gradients, in bfloat16
    one call, main_grad      accumulate_into="main_grad", in float32
    calls, main_grad         the same, a part at a time

What is shown is time, and the most bytes that torch's allocator held above the inputs and the
gradients (``main_grad`` too is there before). One GPU does the work of one rank of a vocab group:
what ranks say to one another is not in it. The last line of the output is one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.measure import interleaved
from vocab_parallel import linear_cross_entropy, plan_backward
from vocab_parallel.plan import blocks


@dataclass(frozen=True)
class Arguments:
    """The shape, and how often."""

    tokens: int = 262_144
    """Of the long call."""
    part: int = 8192
    """Tokens of each of the other calls."""
    hidden: int = 2048
    """D."""
    rows: int = 75_968
    """Of one rank: 151,936 over two."""
    memory_budget: int = 64 * 2**20
    """Bytes; of the loss."""
    rounds: int = 5
    """How often each contestant is timed."""


@dataclass(frozen=True)
class Operands:
    """Hidden states in parts, each a leaf with its targets; rows with and without main_grad."""

    whole: Tensor  # (N, D)
    parts: list[Tensor]
    targets: Tensor  # (N,)
    rows: Tensor  # (R, D)
    accumulating: Tensor  # (R, D), which has a main_grad


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    document = measure(arguments)
    print_table(document)
    print(json.dumps(document))


def measure(arguments: Arguments) -> dict[str, Any]:
    """Time every contestant, and count what it held."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    operands = draw(arguments, device)
    found = interleaved(
        contestants(arguments, operands), device=device, rounds=arguments.rounds, warmup=1
    )
    rows = {}
    for name, one in found.items():
        gradients = operands.whole.nbytes
        if "main_grad" not in name:
            gradients += operands.rows.nbytes
        rows[name] = {
            "milliseconds": one.milliseconds,
            "spread": one.spread,
            "bytes_beside_gradients": one.peak - gradients,
        }
    plan = plan_backward(
        arguments.tokens,
        arguments.rows,
        arguments.hidden,
        memory_budget=arguments.memory_budget,
        device_type=device.type,
    )
    return {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens": arguments.tokens,
        "part": arguments.part,
        "hidden": arguments.hidden,
        "rows_of_a_rank": arguments.rows,
        "span": plan.span,
        "predicted_bytes_beside_gradients": plan.peak_bytes
        - operands.whole.nbytes
        - operands.rows.nbytes,
        "contestants": rows,
    }


def draw(arguments: Arguments, device: torch.device) -> Operands:
    """Draw operands in bfloat16, whose logits have a deviation of 1."""
    torch.manual_seed(0)
    shape = (arguments.tokens, arguments.hidden)
    whole = torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()
    rows = torch.randn(arguments.rows, arguments.hidden, device=device)
    rows = rows.div_(arguments.hidden**0.5).bfloat16()
    accumulating = rows.clone().requires_grad_()
    accumulating.main_grad = torch.zeros_like(rows, dtype=torch.float32)  # type: ignore[attr-defined]
    return Operands(
        whole,
        [whole.detach()[part].requires_grad_() for part in blocks(shape[0], arguments.part)],
        torch.randint(arguments.rows, shape[:1], device=device),
        rows.requires_grad_(),
        accumulating,
    )


def contestants(arguments: Arguments, operands: Operands) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    one, several = [operands.whole], operands.parts
    calls = f"{len(several)} calls of {arguments.part}"

    def contestant(hidden: list[Tensor], rows: Tensor) -> Callable[[], object]:
        return lambda: gradients(arguments, hidden, rows, operands.targets)

    return {
        "one call": contestant(one, operands.rows),
        calls: contestant(several, operands.rows),
        "one call, main_grad": contestant(one, operands.accumulating),
        f"{calls}, main_grad": contestant(several, operands.accumulating),
    }


def gradients(
    arguments: Arguments, hidden: list[Tensor], rows: Tensor, targets: Tensor
) -> list[Tensor | None]:
    """Make the gradients of some calls that together have all tokens, and take them away."""
    into = "main_grad" if hasattr(rows, "main_grad") else None
    if into is not None:
        rows.main_grad.zero_()  # type: ignore[attr-defined]
    for e, own in zip(hidden, targets.split([len(e) for e in hidden]), strict=True):
        loss = linear_cross_entropy(
            e,
            rows,
            own,
            num_valid_tokens=arguments.tokens,
            memory_budget=arguments.memory_budget,
            accumulate_into=into,
            impl="chunked",
        )
        loss.backward()
    found = [tensor.grad for tensor in (*hidden, rows)]
    for tensor in (*hidden, rows):
        tensor.grad = None
    return found


def print_table(document: dict[str, Any]) -> None:
    """Print a row for each contestant."""
    shape = f"{document['tokens']} x {document['hidden']} x {document['rows_of_a_rank']}"
    table = Table(title=f"{shape}, {document['machine']}; a span has {document['span']} tokens")
    table.add_column("")
    table.add_column("ms (spread)", justify="right")
    table.add_column("MiB beside inputs and gradients", justify="right")
    for name, row in document["contestants"].items():
        time = f"{row['milliseconds']:,.1f} ({row['spread']:.1f})"
        table.add_row(name, time, f"{row['bytes_beside_gradients'] / 2**20:,.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
