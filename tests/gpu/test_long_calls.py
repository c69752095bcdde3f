"""Long calls on the card: memory of 262,144 tokens, errors, and the bits in any order."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import spans_of, tiles_of
from tests.oracle import oracle, relative_error
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import VocabParallelOptions, linear_cross_entropy, plan_backward

TOKENS, ROWS, HIDDEN = 262_144, 75_968, 2048  # one rank of two that share 151,936 rows
MIB = 2**20


def drawn(tokens: int, rows: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    c = torch.randn(rows, hidden, device="cuda").div_(hidden**0.5).bfloat16()
    targets = torch.randint(rows, (tokens,), device="cuda")
    targets[::9] = -100
    return e.requires_grad_(), c.requires_grad_(), targets


@pytest.mark.parametrize("into", [None, "main_grad"])
def test_memory(into: str | None) -> None:
    """At most 1 GiB beside inputs and gradients, as planned; gradients are those of 32 calls."""
    e, c, targets = drawn(TOKENS, ROWS, HIDDEN)
    if into is not None:
        c.main_grad = torch.zeros_like(c, dtype=torch.float32)
    plan = plan_backward(TOKENS, ROWS, HIDDEN, has_main_grad=into is not None)
    assert plan.span < TOKENS

    def step(e: Tensor, targets: Tensor, backward: str = "auto") -> tuple[Tensor, Tensor]:
        loss = linear_cross_entropy(
            e, c, targets, num_valid_tokens=TOKENS, accumulate_into=into, backward=backward
        )
        loss.backward()
        found = e.grad, c.grad
        e.grad = c.grad = None
        return found

    step(e, targets)  # compiles
    gc.collect()
    if into is not None:
        c.main_grad.zero_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    e_grad, c_grad = step(e, targets)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = e.nbytes + (c.nbytes if into is None else 0)
    print(into, f"beside gradients {(peak - gradients) / MIB:.1f} MiB,", end=" ")
    print(f"held {peak / MIB:.1f}, predicted {plan.peak_bytes / MIB:.1f}")
    assert peak - gradients <= 2**30
    assert abs(peak - plan.peak_bytes) <= 0.05 * plan.peak_bytes

    sums = torch.zeros_like(c, dtype=torch.float32)
    found = c_grad if into is None else c.main_grad.clone()
    if into is not None:
        c.main_grad.zero_()
    for start in range(0, TOKENS, plan.span):
        own = slice(start, start + plan.span)
        part = e.detach()[own].requires_grad_()
        part_grad, rows_grad = step(part, targets[own], "recompute")
        # Without an accumulator its tiles are longer: a few float32 sums are rounded otherwise.
        assert relative_error(e_grad[own], part_grad) < (5e-4 if into is None else 1e-6)
        if into is None:
            sums += rows_grad
    # The sums of 32 rounded gradients, or the same products in the same order.
    expected, tolerance = (sums, 5e-3) if into is None else (c.main_grad, 1e-6)
    assert relative_error(found, expected) < tolerance


# With 30,001 rows a call is long for its main_grad alone.
@pytest.mark.parametrize("rows", [4096, 30_001])
@pytest.mark.parametrize(
    ("options", "tile_rows"),
    [
        ({"backward": "recompute"}, None),
        ({"backward": "probs"}, None),
        ({"memory_budget": 256 * MIB, "return_lse": True}, 1024),  # keeps some rows
        ({"accumulate_into": "main_grad"}, None),
    ],
)
def test_errors(rows: int, options: dict[str, Any], tile_rows: int | None) -> None:
    """Against float64: as exact as a call of few tokens."""
    tokens, hidden = 40_000, 64
    e, c, targets = drawn(tokens, rows, hidden)
    bias = torch.randn(rows, device="cuda").bfloat16().requires_grad_()
    c.main_grad = torch.zeros_like(c, dtype=torch.float32)
    with tiles_of(rows=tile_rows):
        result = linear_cross_entropy(e, c, targets, bias, **options)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
    wide = [t.detach().double().requires_grad_() for t in (e, c, bias)]
    count = int((targets != -100).sum())
    for start in range(0, tokens, 1000):
        own = slice(start, start + 1000)
        exact, _ = oracle(wide[0][own], wide[1], targets[own], wide[2], reduction="sum")
        (exact / count).backward()
    found = (e.grad, c.grad if c.grad is not None else c.main_grad, bias.grad)
    for got, leaf in zip(found, wide, strict=True):
        assert relative_error(got, leaf.grad) < 5e-3
        tail = slice(-256, None)
        assert relative_error(got[tail], leaf.grad[tail]) < 1e-2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_synchronisation() -> None:
    e, c, targets = drawn(33_000, 1777, 64)

    def step() -> Tensor:
        loss = linear_cross_entropy(e, c, targets, shift=1)
        loss.backward()
        return loss

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def check_order() -> None:
    """Sums beside the next span's products give the same bits every time."""
    tokens, rows = 8192, 4000
    e, c, targets = drawn(tokens, rows, 512)
    options = VocabParallelOptions.from_vocab(rows)
    own = c.detach()[options.start : options.stop].clone().requires_grad_()
    for layout, call in (("replicated", "reduce_scatter"), ("sharded", "reduce")):
        for backward in ("recompute", "probs"):
            plain: tuple[Tensor, ...] | None = None
            for turn in range(8):
                # Memory that was just freed is what a race would see overwritten.
                torch.full((64 * MIB,), float("nan"), device="cuda")
                with spans_of(1024), CollectiveRecorder() as recorded:
                    loss = linear_cross_entropy(
                        e, own, targets, vocab_parallel_options=options, hidden_layout=layout,
                        backward=backward, validate=False,
                    )  # fmt: skip
                    found = (loss.detach(), *torch.autograd.grad(loss, (e, own)))
                spans = (2 if layout == "sharded" else 1) * tokens // 1024
                assert [one.name for one in recorded.calls].count(call) == spans
                plain = found if plain is None else plain
                for got, want in zip(found, plain, strict=True):
                    assert torch.equal(got, want), (layout, backward, turn)


def test_order() -> None:
    run_ranks(check_order, 2, backend="nccl", timeout=110)
