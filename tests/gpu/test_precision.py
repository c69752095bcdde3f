"""Operands of two dtypes, float32 logits, and metrics, as a GPU's kernels do them."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.oracle import metrics_oracle, oracle, relative_error
from vocab_parallel import linear_cross_entropy, plan_backward, token_logprobs
from vocab_parallel.backends import registry

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS, ROWS, HIDDEN = 700, 3001, 136
# Budgets of tiles of some rows, and of some tokens by some rows.
ROW_TILES: dict[str, Any] = {"backward": "recompute", "memory_budget": TOKENS * 1000 * 2}
SMALL_TILES: dict[str, Any] = {"backward": "recompute", "memory_budget": 2**18}


def drawn(*dtypes: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    c = torch.randn(ROWS, HIDDEN, device="cuda") / HIDDEN**0.5
    targets = torch.randint(ROWS, (TOKENS,), device="cuda")
    e = torch.randn(TOKENS, HIDDEN, device="cuda")
    e[::2] = 12.0 * c[targets][::2] + 0.3 * e[::2]
    targets[::9] = -100
    return e.to(dtypes[0]), c.to(dtypes[1]), targets


@pytest.mark.parametrize(
    "pair", [pair for pair in itertools.product(DTYPES, DTYPES) if pair[0] != pair[1]]
)
def test_two_dtypes(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Each gradient is the exact one, rounded once."""
    e, c, targets = drawn(*pair)
    leaves = [e.requires_grad_(), c.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact_loss, _ = oracle(*wide, targets, softcap=9.0)
    exact = torch.autograd.grad(exact_loss, wide)
    plan = plan_backward(TOKENS, ROWS, HIDDEN, pair[0], classifier_dtype=pair[1], **SMALL_TILES)
    assert plan.tile == (256, 256)
    ways: tuple[dict[str, Any], ...] = (
        SMALL_TILES,
        {"backward": "probs"},
        {"memory_budget": TOKENS * ROWS * 2},
    )
    for way in ways:
        loss = linear_cross_entropy(*leaves, targets, softcap=9.0, **way)
        assert relative_error(loss, exact_loss) < 1e-5, way
        for found, want in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
            limit = torch.finfo(found.dtype).eps / 2 + 1e-5
            assert relative_error(found, want) < limit, way


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("hopper", [True, False])
def test_float32_logits(dtype: torch.dtype, hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logit is rounded: log-probabilities are float32's, and gradients no worse than before."""
    if not hopper:
        monkeypatch.setattr(registry, "choose", lambda hidden, classifier: "triton")
    e, c, targets = drawn(dtype, dtype)
    leaves = [e.requires_grad_(), c.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact_loss, _ = oracle(*wide, targets)
    exact = torch.autograd.grad(exact_loss, wide)
    plan = plan_backward(TOKENS, ROWS, HIDDEN, dtype, logits_dtype="float32", **ROW_TILES)
    assert plan.tile == (TOKENS, 256)
    ways: tuple[dict[str, Any], ...] = ({}, ROW_TILES)
    if dtype == torch.bfloat16:
        ways += ({"backward": "probs"},)
    for way in ways:
        loss = linear_cross_entropy(*leaves, targets, logits_dtype="float32", **way)
        assert relative_error(loss, exact_loss, 1.0) < 1e-5, way
        rounded = linear_cross_entropy(*leaves, targets, **way)
        found = torch.autograd.grad(loss, leaves)
        before = torch.autograd.grad(rounded, leaves)
        for ours, theirs, want in zip(found, before, exact, strict=True):
            assert relative_error(ours, want) <= 1.1 * relative_error(theirs, want) + 1e-4, way


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("given", [{}, {"softcap": 4.0, "temperature": 0.7}, {"z_loss": 1e-3}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("hopper", [True, False])
def test_metrics(
    given: dict[str, Any], smoothing: float, hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right, without a wait for the device, and the loss and its gradients are as without."""
    if not hopper:
        monkeypatch.setattr(registry, "choose", lambda hidden, classifier: "triton")
    e, c, targets = drawn(torch.bfloat16, torch.bfloat16)
    leaves = [e.requires_grad_(), c.requires_grad_()]
    transform = {name: each for name, each in given.items() if name != "z_loss"}
    want = metrics_oracle(e.detach(), c.detach(), targets, **transform)
    options = {**given, "label_smoothing": smoothing}
    plain = linear_cross_entropy(*leaves, targets, **options)
    plain_grads = torch.autograd.grad(plain, leaves)
    linear_cross_entropy(*leaves, targets, return_metrics=True, **options)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss, metrics = linear_cross_entropy(*leaves, targets, return_metrics=True, **options)
        grads = torch.autograd.grad(loss, leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Without Hopper's kernels logits are rounded to bfloat16, and two may change places.
    for found, exact in zip(metrics, want, strict=True):
        assert relative_error(found, exact) < (1e-4 if hopper else 1e-2)
    assert relative_error(loss, plain, 1.0) < 1e-6
    for ours, theirs in zip(grads, plain_grads, strict=True):
        assert relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [{}, ROW_TILES])
def test_an_offset_costs_the_entropy_no_digits(dtype: torch.dtype, way: dict[str, Any]) -> None:
    """As far as float32 holds a number of the offset's size, which an lse is."""
    offset = 1000.0
    unit = torch.finfo(torch.float32).eps * offset
    e, c, targets = drawn(dtype, dtype)
    bias = torch.full((ROWS,), offset, dtype=dtype, device="cuda")
    leaves = [e.requires_grad_(), c.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    log_p = torch.log_softmax(wide[0] @ wide[1].T + offset, -1)
    want = (-(log_p.exp() * log_p).sum(-1)).masked_fill(targets == -100, 0.0)
    exact = torch.autograd.grad(want.sum(), wide)
    options = {"logits_dtype": "float32", "return_entropy": True, **way}
    _, entropy = token_logprobs(*leaves, targets, bias, **options)
    assert relative_error(entropy, want) < unit
    rounding = torch.finfo(dtype).eps
    for ours, theirs in zip(torch.autograd.grad(entropy.sum(), leaves), exact, strict=True):
        assert relative_error(ours, theirs) < 2.0 * (unit + rounding)
    _, metrics = linear_cross_entropy(*leaves, targets, bias, return_metrics=True)
    assert relative_error(metrics.entropy, want.sum() / (targets != -100).sum()) < unit + rounding


def test_predictions_of_two_dtypes() -> None:
    from vocab_parallel import predict

    e, c, _ = drawn(torch.bfloat16, torch.float32)
    exact = F.linear(e.double(), c.double())
    assert torch.equal(predict(e, c).ids[:, 0], exact.argmax(-1))
