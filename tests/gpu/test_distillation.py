"""Distillation on the card: exactness, no synchronisation with the host, memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import distillation_oracle, relative_error
from tests.ranks import run_ranks
from tests.test_distillation import (
    DIVERGENCES,
    check_corners_and_combinations,
    exact_gradients,
)
from vocab_parallel import linear_distillation, linear_distillation_from_top_k

TOKENS, ROWS, K = 300, 1777, 16


def drawn(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    e = torch.randn(TOKENS, 136, device="cuda").to(dtype).requires_grad_()
    c = torch.randn(rows, 136, device="cuda").div(136**0.5).to(dtype).requires_grad_()
    teacher_e = torch.randn(TOKENS, 200, device="cuda").to(dtype)
    teacher_c = torch.randn(rows, 200, device="cuda").div(200**0.5).to(dtype)
    return e, c, teacher_e, teacher_c


def loss_of(form: str, given: tuple[Tensor, ...], log_q: Tensor, **options: Any) -> Tensor:
    e, c, teacher_e, teacher_c = given
    if form == "hidden":
        return linear_distillation(e, c, teacher_e, teacher_c, **options)
    best = log_q.topk(K)
    return linear_distillation_from_top_k(e, c, best.indices, best.values.float(), **options)


@pytest.mark.parametrize("form", ["hidden", "top-k"])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exact(form: str, name: str, dtype: torch.dtype) -> None:
    given = drawn(dtype)
    targets = torch.randint(ROWS, (TOKENS,), device="cuda")
    targets[::5] = -100
    options: dict[str, Any] = {"divergence": name, "targets": targets, "softcap": 20.0}
    options |= {"cross_entropy_weight": 0.3, "temperature": 2.0}
    logits = given[2].double() @ given[3].double().T / 2.0
    log_q = torch.log_softmax(logits, -1)
    # Several tiles on both sides.
    loss = loss_of(form, given, log_q, memory_budget=2**21, **options)
    found = torch.autograd.grad(loss, given[:2])
    if form == "top-k":
        best = log_q.topk(K)
        log_q = best.values.float()
        options |= {"ids": best.indices, "least": torch.finfo(torch.float32).eps}
    wanted = distillation_oracle(given[0], given[1], log_q, **options)
    # Float32 products may be rounded to TF32's operands by whoever sets that; not by us.
    assert relative_error(loss, wanted) < 1e-5
    bound = 1e-4 if dtype == torch.float32 else 2.0 * torch.finfo(dtype).eps
    for one, other in zip(found, exact_gradients(*given[:2], log_q, options), strict=True):
        assert relative_error(one, other) < bound


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("form", ["hidden", "top-k"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_synchronisation(form: str, name: str) -> None:
    given = drawn(torch.bfloat16)
    log_q = torch.log_softmax(given[2].float() @ given[3].float().T, -1)
    targets = torch.randint(ROWS, (TOKENS,), device="cuda")
    options: dict[str, Any] = {"divergence": name, "targets": targets, "shift": 1}
    options |= {"cross_entropy_weight": 0.3, "temperature": 2.0}
    loss_of(form, given, log_q, **options).backward()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = loss_of(form, given, log_q, **options)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_memory(name: str) -> None:
    """Beside the gradients and their float32 sums it holds what the budget says."""
    budget = 2**24
    given = drawn(torch.bfloat16, rows=65_536)
    assert 4 * budget < TOKENS * 65_536 * 4
    gradients = sum(t.numel() * (2 + 4) for t in given[:2])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_distillation(*given, divergence=name, memory_budget=budget).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= budget + gradients + 2**21, (peak, gradients)


@pytest.mark.parametrize("degree", [1, 2])
def test_nccl_ranks(degree: int) -> None:
    run_ranks(
        check_corners_and_combinations, degree, backend="nccl", timeout=240, degree=degree,
        examples=60,
    )  # fmt: skip
