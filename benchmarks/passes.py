"""Bytes of each pass over the logits, counted and achieved, beside a plain copy's.

    python -m benchmarks.passes --rows 4096 37984 151936

The logits are larger than the cache in all but the smallest case. The last line of the output is
one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import interleaved
from vocab_parallel.kernels.logits_gradient import logits_gradient
from vocab_parallel.kernels.logits_statistics import logits_statistics
from vocab_parallel.plan import padded


@dataclass(frozen=True)
class Arguments:
    """The buffers."""

    tokens: int = 8192
    """T, tokens."""
    rows: tuple[int, ...] = (18_992, 37_984, 151_936)
    """Rows of each shard."""
    rounds: int = 9
    """Timed rounds."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda")
    ceiling = _copy_bandwidth(device)
    table = Table(title=f"copy: {ceiling:.2f} TB/s")
    for column in ("rows", "pass", "MB", "exp/logit", "ms", "TB/s", "of copy"):
        table.add_column(column, justify="right")
    found = []
    for rows in arguments.rows:
        passes = _passes(arguments.tokens, rows, device)
        times = interleaved(
            {name: run for name, (run, _) in passes.items()},
            device=device,
            rounds=arguments.rounds,
        )
        for name, (_, count) in passes.items():
            rate = count / times[name].milliseconds / 1e9
            found.append({"rows": rows, "pass": name, "bytes": count, "TB/s": rate})
            table.add_row(
                f"{rows:,}",
                name,
                f"{count / 1e6:,.0f}",
                "1",
                f"{times[name].milliseconds:.3f}",
                f"{rate:.2f}",
                f"{rate / ceiling:.0%}",
            )
    Console().print(table)
    machine = torch.cuda.get_device_name()
    print(json.dumps({"machine": machine, "copy TB/s": ceiling, "passes": found}))


def _copy_bandwidth(device: torch.device) -> float:
    """Return TB/s of a large copy, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = interleaved({"copy": lambda: target.copy_(source)}, device=device)["copy"]
    return 2 * source.nbytes / copied.milliseconds / 1e9


def _passes(
    tokens: int, rows: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return each pass with the bytes that it must move."""
    buffer = torch.randn(tokens, padded(rows), device=device, dtype=torch.bfloat16)
    logits = buffer[:, :rows]
    targets = torch.randint(rows, (tokens,), device=device, dtype=torch.int32)
    bias = torch.randn(rows, device=device)
    statistics = torch.empty(2, tokens, device=device)
    grads = torch.randn(2, tokens, device=device)
    names = ("lse", "target")
    size = logits.numel() * logits.element_size()

    def gradient(given_bias: torch.Tensor | None) -> object:
        return logits_gradient(
            logits, given_bias, targets, 0, statistics, grads, names, logits,
            (None, 1.0), sum_tokens=given_bias is not None,
        )  # fmt: skip

    return {
        "statistics": (
            lambda: logits_statistics(
                logits, None, targets, 0, statistics, names,
                (None, 1.0), first=True,
            ),
            size,
        ),
        "gradient": (lambda: gradient(None), 2 * size),
        "gradient, bias": (lambda: gradient(bias), 2 * size),
    }  # fmt: skip


if __name__ == "__main__":
    main()
