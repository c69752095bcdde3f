"""Bytes of each pass, counted and achieved, beside a plain copy's.

    python -m benchmarks.passes --rows 4096 37984 151936 --hidden 2048

First the passes over logits, for those who keep them raw; then all that `backward="probs"` does on
Hopper beside its three products, over hidden states and numbers of a token. The logits are larger
than the cache in all but the smallest case. The last line of the output is one JSON document.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import draw, other_targets
from benchmarks.measure import interleaved
from vocab_parallel.kernels.logits_gradient import logits_gradient
from vocab_parallel.kernels.logits_statistics import logits_statistics
from vocab_parallel.plan import padded

HOPPER = 9
ROWS = 37_984

Pass = tuple[Callable[[], object], int]  # and the bytes that it must move


@dataclass(frozen=True)
class Arguments:
    """The buffers."""

    tokens: int = 8192
    """T, tokens."""
    rows: tuple[int, ...] = (18_992, 37_984, 151_936)
    """Rows of each shard, for the passes over its logits."""
    hidden: tuple[int, ...] = (2048, 5120)
    """Hidden sizes, for the other passes, on a shard of 37,984 rows."""
    rounds: int = 9
    """Timed rounds."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = torch.device("cuda")
    ceiling = _copy_bandwidth(device)
    measured: dict[str, dict[str, Pass]] = {
        f"{rows:,} rows": _passes(arguments.tokens, rows, device) for rows in arguments.rows
    }
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        for hidden in arguments.hidden:
            measured[f"D = {hidden}"] = _beside_the_products(arguments.tokens, hidden, device)
    table = Table(title=f"copy: {ceiling:.2f} TB/s")
    for column in ("", "pass", "MB", "ms", "TB/s", "of copy"):
        table.add_column(column, justify="right")
    found = []
    for size, passes in measured.items():
        times = interleaved(
            {name: run for name, (run, _) in passes.items()},
            device=device,
            rounds=arguments.rounds,
        )
        for name, (_, count) in passes.items():
            milliseconds = times[name].milliseconds
            rate = count / milliseconds / 1e9
            found.append(
                {"size": size, "pass": name, "bytes": count, "ms": milliseconds, "TB/s": rate}
            )
            table.add_row(
                size,
                name,
                f"{count / 1e6:,.1f}",
                f"{milliseconds:.4f}",
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


def _passes(tokens: int, rows: int, device: torch.device) -> dict[str, Pass]:
    """Return each pass over raw logits."""
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


def _beside_the_products(tokens: int, hidden_size: int, device: torch.device) -> dict[str, Pass]:
    """Return what keeping exponentials takes besides products, with targets of three kinds."""
    from vocab_parallel.kernels.join_blocks import join_blocks
    from vocab_parallel.kernels.kept_probabilities import rescale_kept
    from vocab_parallel.kernels.reference import token_reference
    from vocab_parallel.kernels.scaling import scale_tokens
    from vocab_parallel.kernels.target_rows import add_to_target_rows, order_by_target

    operands = draw(tokens, hidden_size, ROWS, torch.bfloat16, device)
    e, c, uniform = operands.hidden.detach(), operands.rows.detach(), operands.targets.int()
    transform, names = (None, 1.0), ("lse", "target")
    statistics, grads = torch.randn(2, 2, tokens, device=device).unbind()
    parts = torch.randn(1, -(-ROWS // 256), tokens, device=device)
    reference = token_reference(e, c, None, transform)
    kept = torch.ones(tokens, padded(ROWS), device=device, dtype=e.dtype)[:, :ROWS]
    scale = torch.randn(tokens, device=device)
    sums, out, rows_grad = e.float(), torch.empty_like(e), torch.zeros_like(c)
    size = e.nbytes
    found: dict[str, Pass] = {
        "reference": (lambda: token_reference(e, c, None, transform), size),
        "statistics of blocks": (
            lambda: join_blocks(parts, ROWS, uniform, statistics, names),
            parts.nbytes + statistics.nbytes,
        ),
        "rescale_kept": (
            lambda: rescale_kept(
                kept, e, c, None, uniform, reference, statistics, grads, transform
            ),
            statistics.nbytes + grads.nbytes + 5 * 4 * tokens,
        ),
        "s e": (lambda: scale_tokens(e, scale, out), 2 * size),
        "dE": (
            lambda: scale_tokens(sums, scale, out, targets=uniform, own=scale, rows=c),
            4 * size,
        ),
        "order of targets": (lambda: order_by_target(uniform), 12 * tokens),
    }
    for kind, case in {"uniform": operands, **other_targets(operands)}.items():
        targets = case.targets.int()
        rows = int(targets.unique().numel())
        found[f"dC, {kind}"] = (
            lambda targets=targets: add_to_target_rows(rows_grad, e, scale, targets),
            size + 2 * rows * hidden_size * c.element_size(),
        )
    return found


if __name__ == "__main__":
    main()
