"""One process on the card: no synchronisation with the host, half precision, odd sizes."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.oracle import oracle, relative_error
from vocab_parallel import available_impls, linear_cross_entropy

IMPLS = ("chunked", "reference", "cce", "cce_exact")


def drawn(dtype: torch.dtype, tokens: int = 300, rows: int = 1777, hidden: int = 136) -> Any:
    torch.manual_seed(0)
    e = torch.randn(tokens, hidden, device="cuda").to(dtype).requires_grad_()
    c = torch.randn(rows, hidden, device="cuda").div(hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(rows, (tokens,), device="cuda")
    targets[::5] = -100
    return e, c, targets


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("impl", IMPLS)
def test_no_synchronisation(impl: str) -> None:
    e, c, targets = drawn(torch.bfloat16)
    linear_cross_entropy(e, c, targets, impl=impl, shift=1).backward()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = linear_cross_entropy(e, c, targets, impl=impl, shift=1)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_half_precision(impl: str, dtype: torch.dtype, softcap: float | None) -> None:
    e, c, targets = drawn(dtype)
    wide_e, wide_c = e.detach().double().requires_grad_(), c.detach().double().requires_grad_()

    def eager(e: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        logits = F.linear(e, c).to(torch.promote_types(e.dtype, torch.float32))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, targets)

    exact = torch.autograd.grad(eager(wide_e, wide_c), (wide_e, wide_c))
    peers = torch.autograd.grad(eager(e, c), (e, c))
    extra: dict[str, Any] = {"filter_eps": 1e-9} if impl == "cce" else {}
    loss = linear_cross_entropy(e, c, targets, softcap=softcap, impl=impl, **extra)
    found = torch.autograd.grad(loss, (e, c))
    slack = 2.5 if impl.startswith("cce") else 1.1  # the registry's release adds up in bfloat16
    for ours, peer, want in zip(found, peers, exact, strict=True):
        assert relative_error(ours, want) <= slack * relative_error(peer, want) + 1e-4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's first one is
@pytest.mark.parametrize("backward", ["probs", "recompute"])
@pytest.mark.parametrize("shape", [{}, {"rows": 2048, "hidden": 128}])
def test_compiled_in_one_graph(backward: str, shape: dict[str, int]) -> None:
    """torch.compile sees an operator: no break, the bits of an eager call, no synchronisation."""
    e, c, targets = drawn(torch.bfloat16, **shape)

    def step(e: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(e.relu(), c, targets, shift=1, backward=backward)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    compiled(e).backward()  # compiles
    expected = step(e)
    expected_grads = torch.autograd.grad(expected, (e, c))
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = compiled(e)
        grads = torch.autograd.grad(loss, (e, c))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))
    fast = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for turn in range(1, 5):  # the first calls only warm up
        other = e.detach().mul(turn).requires_grad_()
        try:
            loss = fast(other)
            found = torch.autograd.grad(loss, (other, c))
        except (ValueError, RuntimeError) as error:  # refused, by torch or by us, or right
            assert "cudagraph" in str(error).lower().replace(" ", "")  # noqa: PT017
            break
        expected_grads = torch.autograd.grad(step(other), (other, c))
        assert all(torch.equal(a, b) for a, b in zip(found, expected_grads, strict=True))


def test_one_rank_has_every_impl() -> None:
    states = available_impls()
    assert all(states[name] == "ready" for name in ("cce", "cce_exact", "chunked", "torch_compile"))


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl: str) -> None:
    e, c, targets = drawn(torch.bfloat16)
    linear_cross_entropy(e, c, torch.full_like(targets, -100), impl=impl).backward()
    assert not e.grad.any()
    assert not c.grad.any()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_tf32_is_the_callers_choice(impl: str) -> None:
    """float32 products are exact unless torch was told to use TF32, and then near it."""
    errors = []
    for precision in ("highest", "high"):
        e, c, targets = drawn(torch.float32, hidden=512)
        wide = [t.detach().double().requires_grad_() for t in (e, c)]
        torch.set_float32_matmul_precision("highest")
        exact = torch.autograd.grad(F.cross_entropy(wide[0] @ wide[1].T, targets), wide)
        try:
            torch.set_float32_matmul_precision(precision)
            found = torch.autograd.grad(linear_cross_entropy(e, c, targets, impl=impl), (e, c))
        finally:
            torch.set_float32_matmul_precision("highest")
        errors.append(max(relative_error(a, b) for a, b in zip(found, exact, strict=True)))
    assert errors[0] < 1e-5
    assert 1e-5 < errors[1] < 3e-3


def test_float16_with_a_grad_scaler() -> None:
    """1/N of a probability underflows float16; the loss scales after its products."""
    e, c, targets = drawn(torch.float16, tokens=4096, rows=30_000)
    e32, c32 = e.detach().float().requires_grad_(), c.detach().float().requires_grad_()
    exact = torch.autograd.grad(F.cross_entropy(e32 @ c32.T, targets), (e32, c32))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    for impl in IMPLS:
        loss = linear_cross_entropy(
            e, c, targets, impl=impl, **({"filter_eps": None} if impl == "cce" else {})
        )
        found = torch.autograd.grad(scaler.scale(loss), (e, c))
        for ours, want in zip(found, exact, strict=True):
            assert relative_error(ours.float() / scaler.get_scale(), want) < 3e-2, impl


@pytest.mark.parametrize("impl", ["cce_exact", "cce"])
def test_drawn_half_precision(impl: str) -> None:
    """Apple's kernels over random shapes and options, float16 and bfloat16, against float64."""
    generator = random.Random(0)
    for turn in range(40):
        dtype = generator.choice((torch.float16, torch.bfloat16))
        e, c, targets = drawn(
            dtype, generator.randint(1, 400), generator.randint(2, 3000), generator.randint(8, 300)
        )
        options: dict[str, Any] = {
            "softcap": generator.choice((None, 2.0, 30.0)),
            "shift": generator.choice((0, 0, 1)) if len(targets) > 1 else 0,
            "z_loss": generator.choice((0.0, 0.01)),
            "reduction": generator.choice(("mean", "sum")),
        }
        wide = [t.detach().double().requires_grad_() for t in (e, c)]
        exact_loss, _ = oracle(wide[0], wide[1], targets, **options)
        exact = torch.autograd.grad(exact_loss, wide)
        extra: dict[str, Any] = {"filter_eps": 1e-9} if impl == "cce" else {}
        loss = linear_cross_entropy(e, c, targets, impl=impl, **options, **extra)
        found = torch.autograd.grad(loss, (e, c))
        assert relative_error(loss, exact_loss, 1.0) < 1e-2, (turn, options)
        for ours, want in zip(found, exact, strict=True):
            assert relative_error(ours, want, 1e-3) < 3e-2, (turn, dtype, e.shape, c.shape, options)
