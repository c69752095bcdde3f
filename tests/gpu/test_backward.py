"""The three ways of backward on the card: errors, memory, no synchronisation, graphs, overlap."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.cases import tiles_of
from tests.oracle import oracle, relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    VocabParallelOptions,
    linear_cross_entropy,
    plan_backward,
    token_logprobs,
)
from vocab_parallel.plan import row_blocks

BACKWARDS = ("recompute", "probs")
MIB = 2**20
SMALL_TILES: dict[str, Any] = {"memory_budget": 2 * 256 * 256}


def drawn(
    tokens: int,
    rows: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    confident: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden, device="cuda")
    c = torch.randn(rows, hidden, device="cuda") / hidden**0.5
    targets = torch.randint(rows, (tokens,), device="cuda")
    if confident:
        e = 16.0 * c[targets] + 0.3 * e
    targets[::9] = -100
    return e.to(dtype).requires_grad_(), c.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("rows", [4992, 5001])
def test_errors(rows: int, confident: bool) -> None:
    """At most 1.1 times eager bfloat16's, however the work is cut."""
    e, c, targets = drawn(1500, rows, 512, confident=confident)
    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
    peers = torch.autograd.grad(F.cross_entropy(F.linear(e, c).float(), targets), (e, c))
    tiles: tuple[tuple[int | None, ...], ...] = ((), (512,), (None, 1024), (None, 999))
    half = {"memory_budget": 1500 * rows}  # of the logits are kept
    for backward, options, cuts in (
        ("recompute", {}, tiles),
        ("probs", {}, ((),)),  # in one tile
        ("auto", half, tiles),
    ):
        for cut in cuts:
            with tiles_of(*cut):
                loss = linear_cross_entropy(e, c, targets, backward=backward, **options)
                found = torch.autograd.grad(loss, (e, c))
            for name, ours, peer, want in zip(("dE", "dC"), found, peers, exact, strict=True):
                ours_error, peer_error = relative_error(ours, want), relative_error(peer, want)
                print(backward, cut, name, f"{ours_error:.2e}", f"eager {peer_error:.2e}")
                assert ours_error <= 1.1 * peer_error, (backward, cut, name)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_every_option(backward: str) -> None:
    """Bias, softcap, smoothing, z-loss, temperature and weights inside of the kernels."""
    e, c, targets = drawn(700, 3001, 64, torch.float32)
    bias = torch.randn(3001, device="cuda", requires_grad=True)
    options: dict[str, Any] = {
        "softcap": 4.0,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "temperature": 0.7,
        "token_weight": torch.rand(700, device="cuda"),
    }
    wide = [t.detach().double().requires_grad_() for t in (e, c, bias)]
    exact_loss = oracle(wide[0], wide[1], targets, wide[2], **options)[0]
    exact = torch.autograd.grad(3.0 * exact_loss, wide)
    loss = linear_cross_entropy(e, c, targets, bias, backward=backward, **options)
    assert relative_error(loss, exact_loss) < 1e-6
    for got, want in zip(torch.autograd.grad(3.0 * loss, (e, c, bias)), exact, strict=True):
        assert relative_error(got, want) < 1e-5


def test_small_tiles() -> None:
    plan = plan_backward(600, 1777, 64, backward="recompute", **SMALL_TILES)
    assert plan.tile == (256, 256)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("backward", BACKWARDS)
def test_no_synchronisation(backward: str) -> None:
    e, c, targets = drawn(600, 1777, 64)

    def step() -> Tensor:
        loss = linear_cross_entropy(e, c, targets, backward=backward, shift=1, **SMALL_TILES)
        loss.backward()
        return loss

    step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("backward", BACKWARDS)
def test_cuda_graph(backward: str) -> None:
    """Forward and backward are captured once and replayed on other data."""
    e, c, targets = drawn(600, 1777, 64)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, targets, backward=backward, **SMALL_TILES)
        return (loss, *torch.autograd.grad(loss, (e, c)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        e.copy_(torch.randn_like(e))
        targets.copy_(torch.randint_like(targets, 1777))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backward", [*BACKWARDS, "auto"])
def test_predicted_memory(backward: str) -> None:
    """`plan_backward` predicts what the allocator holds, beside inputs and both gradients."""
    tokens, rows, hidden = 4096, 32_000, 1024
    e, c, targets = drawn(tokens, rows, hidden)
    budget = 64 * MIB
    plan = plan_backward(tokens, rows, hidden, backward=backward, memory_budget=budget)
    assert plan.backward == (backward if backward != "auto" else "recompute")
    assert (plan.kept_rows > 0) == (backward in ("auto", "probs"))

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, targets, backward=backward, memory_budget=budget)
        return torch.autograd.grad(loss, (e, c))

    step()
    gc.collect()  # what compiling left in cycles is no memory of the call
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = step()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    print(backward, f"predicted {plan.peak_bytes / MIB:.1f} MiB, held {peak / MIB:.1f}")
    assert abs(peak - plan.peak_bytes) <= 0.05 * plan.peak_bytes


@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_tiles_in_the_gradient(backward: str) -> None:
    """Tiles lie in rows of dC that are still to be written: as exact, in no more memory."""
    tokens, rows, hidden = 1024, 40_000, 2048
    e, c, targets = drawn(tokens, rows, hidden)
    options: dict[str, Any] = {"backward": backward, "memory_budget": 4 * MIB}
    plan = plan_backward(tokens, rows, hidden, **options)
    lengths = [
        one.stop - one.start
        for one in row_blocks(rows, plan.tile.rows, aligned=True, lent=(tokens, hidden))
    ]
    assert lengths[0] > 8 * plan.tile.rows
    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
    del wide
    for turn in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = torch.autograd.grad(linear_cross_entropy(e, c, targets, **options), (e, c))
        torch.cuda.synchronize()
        if turn:
            assert torch.cuda.max_memory_allocated() - before <= 1.02 * plan.peak_bytes
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < 1.8e-3


def test_accumulation_makes_no_gradient() -> None:
    """dC goes into main_grad by its product: a tensor [rows, D] never exists beside it."""
    e, c, targets = drawn(2048, 40_000, 1024)
    c.main_grad = torch.zeros_like(c, dtype=torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)[1]
    del wide
    for turn in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(
            e, c, targets, backward="recompute", memory_budget=16 * MIB, accumulate_into="main_grad"
        )
        loss.backward()
        torch.cuda.synchronize()
        if turn:
            assert torch.cuda.max_memory_allocated() - before < c.nbytes // 2
    assert c.grad is None
    assert relative_error(c.main_grad / 2, exact) < 3e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_model() -> None:
    e, c, targets = drawn(256, 999, 64)
    layer = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)

    def step(e: Tensor) -> Tensor:
        loss = linear_cross_entropy(torch.tanh(layer(e)), c, targets)
        return 2.0 * loss

    def eager(e: Tensor, c: Tensor, layer: torch.nn.Linear) -> Tensor:
        logits = F.linear(torch.tanh(layer(e)), c)
        return 2.0 * F.cross_entropy(
            logits.to(torch.promote_types(e.dtype, torch.float32)), targets
        )

    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    exact = torch.autograd.grad(eager(*wide, copy.deepcopy(layer).double()), wide)
    peers = torch.autograd.grad(eager(e, c, layer), (e, c))
    found = torch.autograd.grad(torch.compile(step)(e), (e, c))
    for got, peer, want in zip(found, peers, exact, strict=True):
        assert relative_error(got, want) <= 1.1 * relative_error(peer, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("where", ["e", "c"])
def test_a_nan_is_never_hidden(backward: str, where: str, dtype: torch.dtype) -> None:
    """A NaN in the hidden states or in a row that is nobody's target is in loss and gradients."""
    e, c, targets = drawn(300, 1000, 64, dtype)
    with torch.no_grad():
        if where == "e":
            e[5, 1] = torch.nan
        else:
            c[999, 2] = torch.nan
    loss = linear_cross_entropy(e, c, targets % 999, backward=backward)
    assert torch.isnan(loss)
    e_grad, c_grad = torch.autograd.grad(loss, (e, c))
    assert torch.isnan(e_grad[5]).all()
    assert torch.isnan(c_grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_no_probability(dtype: torch.dtype) -> None:
    """Entropy and its gradient where a bias of -inf masks rows, whole blocks of them too."""
    e, c, targets = drawn(300, 1000, 64, dtype)
    bias = torch.zeros(1000, device="cuda", dtype=dtype)
    bias[200:700] = -torch.inf
    targets = targets % 200
    logprobs, entropy = token_logprobs(e, c, targets, bias, return_entropy=True)
    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    logits = wide[0] @ wide[1].T + bias.double()
    p, log_p = logits.softmax(-1), logits.log_softmax(-1).masked_fill(bias == -torch.inf, 0.0)
    exact = torch.autograd.grad(-(p * log_p).sum(), wide)
    assert relative_error(entropy, -(p * log_p).sum(-1)) < 1e-3
    found = torch.autograd.grad(entropy.sum(), (e, c), retain_graph=True)
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < (1e-4 if dtype == torch.float32 else 1e-2)
    assert torch.isfinite(logprobs).all()


def test_more_logits_than_32_bits_count() -> None:
    """A tile of 2.5e9 logits: each kernel's last tokens and rows are where they should be.

    One case after the other: a tile is 5 or 10 GB, on a card that other workers use.
    """
    for dtype, backward in (
        (torch.bfloat16, "probs"),
        (torch.bfloat16, "recompute"),
        (torch.float32, "probs"),
    ):
        check_large_tile(dtype, backward)
        gc.collect()
        torch.cuda.empty_cache()


def check_large_tile(dtype: torch.dtype, backward: str) -> None:
    tokens, rows, hidden = 32_768, 76_032, 64
    assert tokens * rows > 2**31
    e, c, targets = drawn(tokens, rows, hidden, dtype)
    bias = torch.randn(rows, device="cuda").to(dtype).requires_grad_()
    whole = (tokens, rows) if backward == "recompute" else ()
    with tiles_of(*whole):
        loss = linear_cross_entropy(e, c, targets, bias, backward=backward, memory_budget=2**34)
        found = torch.autograd.grad(loss, (e, c, bias))
    wide = [t.detach().double().requires_grad_() for t in (e, c, bias)]
    count = int((targets != -100).sum())
    for part in range(0, tokens, 512):  # their logits in float64 are 0.3 GB
        own = slice(part, part + 512)
        exact, _ = oracle(wide[0][own], wide[1], targets[own], wide[2], reduction="sum")
        (exact / count).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for got, leaf in zip(found, wide, strict=True):
        assert leaf.grad is not None
        assert relative_error(got, leaf.grad) < tolerance
        tail = slice(-256, None)  # an index that wrapped would be wrong at the end
        assert relative_error(got[tail], leaf.grad[tail]) < 2 * tolerance


def check_overlap() -> None:
    """Communication beside the products gives the same bits every time."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    e, c, targets = drawn(8192, 16_000, 512)
    del rank
    options = VocabParallelOptions.from_vocab(16_000)
    own = c.detach()[options.start : options.stop].clone().requires_grad_()
    assert degree == 2
    for backward in BACKWARDS:
        for budget in (None, 32 * MIB):
            if budget is not None:
                plan = plan_backward(8192, 8000, 512, backward="recompute", memory_budget=budget)
                assert plan.tile == (2048, 8000)
            plain: tuple[Tensor, ...] | None = None
            for turn in range(12):
                # Memory that was just freed is what a race would see overwritten.
                torch.full((64 * MIB,), float("nan"), device="cuda")
                loss = linear_cross_entropy(
                    e, own, targets, vocab_parallel_options=options, backward=backward,
                    memory_budget=budget,
                )  # fmt: skip
                if turn == 0:  # nothing under way while anything else is queued
                    torch.cuda.synchronize()
                found = (loss.detach(), *torch.autograd.grad(loss, (e, own)))
                plain = found if plain is None else plain
                for got, want in zip(found, plain, strict=True):
                    assert torch.equal(got, want), (backward, budget, turn)


def test_overlap() -> None:
    run_ranks(check_overlap, 2, backend="nccl", timeout=110)
