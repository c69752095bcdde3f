"""Errors against float64, beside those of eager torch: on random and on confident tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import tiles_of
from tests.oracle import oracle, relative_error
from vocab_parallel import linear_cross_entropy

IMPLS = ("chunked", "reference")
TOKENS, ROWS, HIDDEN = 192, 1500, 64


def draw(dtype: torch.dtype, confident: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    c = torch.randn(ROWS, HIDDEN).div(HIDDEN**0.5)
    targets = torch.randint(ROWS, (TOKENS,))
    e = torch.randn(TOKENS, HIDDEN)
    if confident:  # a hidden state near its target's row: probability near 1, as late in training
        e = 14.0 * c[targets] + 0.3 * e
    return e.to(dtype), c.to(dtype), targets


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def eager(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(e, c).float(), targets)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_eager(impl: str, confident: bool, dtype: torch.dtype) -> None:
    e, c, targets = (t.requires_grad_(t.is_floating_point()) for t in draw(dtype, confident, 0))
    exact_loss, _ = oracle(e, c, targets)
    exact = gradients(exact_loss, e, c)
    exact_loss = exact_loss.detach()
    if confident:
        assert float(exact_loss) < 0.05
    eager_loss = eager(e, c, targets)
    loss = linear_cross_entropy(e, c, targets, impl=impl)
    assert isinstance(loss, Tensor)
    # Where eager is right by chance, float32 may still round as its logits do.
    floor = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 4
    ours, theirs = (abs(float(x - exact_loss)) for x in (loss.detach(), eager_loss.detach()))
    assert ours <= max(1.1 * theirs, 2e-6), (ours, theirs)
    for got, peer, want in zip(
        gradients(loss, e, c), gradients(eager_loss, e, c), exact, strict=True
    ):
        ours, theirs = relative_error(got, want), relative_error(peer, want)
        assert ours <= max(1.1 * theirs, floor), (ours, theirs)


def products_around_softmax(e: Tensor, c: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by products of low-precision operands around a float32 softmax.

    Logits, sums and softmax in float32; only what enters a product is rounded. On a CPU a product
    of widened low-precision operands is exact enough to stand for one with float32 accumulation.
    """
    dtype = e.dtype
    logits = e.float() @ c.float().T
    logits_grad = torch.softmax(logits, -1)
    logits_grad[torch.arange(TOKENS), targets] -= 1.0
    logits_grad = logits_grad.to(dtype).float()
    e_grad, c_grad = logits_grad @ c.float(), logits_grad.T @ e.float()
    return (e_grad / TOKENS).to(dtype), (c_grad / TOKENS).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("confident", [False, True])
def test_no_worse_than_products_around_a_softmax(impl: str, confident: bool) -> None:
    e, c, targets = (
        t.requires_grad_(t.is_floating_point()) for t in draw(torch.bfloat16, confident, 4)
    )
    exact = gradients(oracle(e, c, targets)[0], e, c)
    peers = products_around_softmax(e.detach(), c.detach(), targets)
    loss = linear_cross_entropy(e, c, targets, impl=impl)
    assert isinstance(loss, Tensor)
    for got, peer, want in zip(gradients(loss, e, c), peers, exact, strict=True):
        assert relative_error(got, want) <= 1.1 * relative_error(peer, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_float32_equals_cross_entropy(impl: str) -> None:
    e, c, targets = (t.requires_grad_(t.is_floating_point()) for t in draw(torch.float32, False, 1))
    expected = F.cross_entropy(F.linear(e.double(), c.double()), targets)
    loss = linear_cross_entropy(e, c, targets, impl=impl)
    assert isinstance(loss, Tensor)
    assert relative_error(loss, expected) < 1e-5
    for got, want in zip(gradients(loss, e, c), gradients(expected, e, c), strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_with_a_grad_scaler(impl: str) -> None:
    """A step of a scaled loss moves float32 weights as an unscaled float32 step does."""
    e, c, targets = draw(torch.float32, False, 5)
    weights = []
    for scaled in (True, False):
        weight = torch.nn.Parameter(c.clone())
        optimizer = torch.optim.SGD([weight], lr=10.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = linear_cross_entropy(e, weight, targets, impl=impl)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(weight.detach() - c)
    assert relative_error(weights[0], weights[1]) < 2e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_bitwise_repeatable(impl: str) -> None:
    e, c, targets = (t.requires_grad_(t.is_floating_point()) for t in draw(torch.float32, False, 2))
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(e, c, targets, impl=impl)
        assert isinstance(loss, Tensor)
        runs.append([loss, *gradients(loss, e, c)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_chunk_size_does_not_matter() -> None:
    """Losses of different tiles agree to float32's rounding of a logit, 2e-6 relative."""
    e, c, targets = draw(torch.float32, False, 3)
    losses = []
    for tile in ((192, 1500), (7, 1500), (192, 64), (50, 333)):
        with tiles_of(*tile):
            losses.append(float(linear_cross_entropy(e, c, targets)))
    assert max(losses) - min(losses) <= 2e-6 * max(losses)
