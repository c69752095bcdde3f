"""One process that holds the whole vocabulary, with no process group at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recording import ProductRecorder
from vocab_parallel import VocabParallelOptions, available_impls, linear_cross_entropy

IMPLS = ("chunked", "reference")


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    e = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    return e, c, torch.randint(7, (2, 5))


def test_options_may_be_left_out() -> None:
    e, c, targets = problem()
    whole = linear_cross_entropy(e, c, targets)
    same = linear_cross_entropy(
        e, c, targets, vocab_parallel_options=VocabParallelOptions.from_vocab(7)
    )
    assert torch.equal(whole, same)  # type: ignore[arg-type]
    assert torch.allclose(whole, F.cross_entropy((e @ c.T).flatten(0, 1), targets.flatten()))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    e, c, targets = problem()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(  # type: ignore[return-value]
            leaves[0], leaves[1], targets, leaves[2], softcap=2.0, shift=1, reduction="none",
            return_lse=True, label_smoothing=0.1, z_loss=0.1, temperature=0.8, impl=impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (e, c, bias))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_that_is_not_needed(impl: str, needs: tuple[bool, bool]) -> None:
    e, c, targets = problem()
    full = torch.autograd.grad(linear_cross_entropy(e, c, targets, impl=impl), (e, c))
    e, c = e.detach().requires_grad_(needs[0]), c.detach().requires_grad_(needs[1])
    linear_cross_entropy(e, c, targets, impl=impl).backward()  # type: ignore[union-attr]
    for leaf, needed, expected in zip((e, c), needs, full, strict=True):
        assert torch.equal(leaf.grad, expected) if needed else leaf.grad is None


def product_flops(impl: str, needs: tuple[bool, bool], backward: str) -> tuple[int, int]:
    """Count the flops of the products of a forward and of its backward."""
    e, c, targets = problem()
    e, c = e.detach().requires_grad_(needs[0]), c.detach().requires_grad_(needs[1])
    with ProductRecorder() as before:
        loss = linear_cross_entropy(e, c, targets, impl=impl, backward=backward)
    with ProductRecorder() as after:
        loss.backward()  # type: ignore[union-attr]
    return before.flops, after.flops


@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_product_is_not_computed(impl: str) -> None:
    """Forward is one product; backward is that again and one for each gradient that is needed.

    Kept logits spare the second, and gradients in forward leave nothing for backward.
    """
    one = 2 * 10 * 4 * 7  # 2 T D V
    for needs, count in (((True, True), 2), ((True, False), 1), ((False, True), 1)):
        assert product_flops(impl, needs, "recompute") == (one, (1 + count) * one)
        if impl == "chunked":
            assert product_flops(impl, needs, "probs") == (one, count * one)
            assert product_flops(impl, needs, "gradients") == ((1 + count) * one, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_any_grad_output(impl: str) -> None:
    e, c, targets = problem()
    loss = linear_cross_entropy(e, c, targets, impl=impl)
    assert isinstance(loss, Tensor)
    once = torch.autograd.grad(loss, (e, c), retain_graph=True)
    scaled = torch.autograd.grad(loss, (e, c), torch.tensor(-3.0, dtype=torch.float64))
    for a, b in zip(once, scaled, strict=True):
        assert torch.allclose(-3 * a, b)


def test_no_grad() -> None:
    e, c, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(e, c, targets)
    assert not loss.requires_grad  # type: ignore[union-attr]


def test_torch_compile() -> None:
    if available_impls()["torch_compile"] != "ready":
        pytest.skip(available_impls()["torch_compile"])
    e, c, targets = problem()
    found = [
        torch.autograd.grad(
            linear_cross_entropy(e, c, targets, softcap=3.0, shift=1, impl=impl),  # type: ignore[arg-type]
            (e, c),
        )
        for impl in ("torch_compile", "reference")
    ]
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl: str) -> None:
    e, c, targets = problem()
    loss = linear_cross_entropy(e, c, torch.full_like(targets, -100), impl=impl)
    assert loss.detach() == 0.0  # type: ignore[union-attr]
    for gradient in torch.autograd.grad(loss, (e, c)):  # type: ignore[arg-type]
        assert not gradient.any()


def test_masked_rows_by_bias() -> None:
    """A bias of -inf removes a row, as it does from a softmax."""
    e, c, targets = problem()
    targets = targets.clamp(max=4)
    bias = torch.zeros(7, dtype=torch.float64)
    bias[5:] = -torch.inf
    loss = linear_cross_entropy(e, c, targets, bias, chunk_rows=2)
    assert torch.allclose(loss, linear_cross_entropy(e, c[:5], targets))  # type: ignore[arg-type]


def test_autocast() -> None:
    e, c, targets = (t.detach().float() if t.is_floating_point() else t for t in problem())
    e.requires_grad_()
    c.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(e, c, targets)
        expected = linear_cross_entropy(e.bfloat16(), c.bfloat16(), targets)
    assert torch.equal(loss, expected)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[union-attr]
    assert e.grad is not None
    assert e.grad.dtype == torch.float32


def test_a_target_that_nobody_checked_is_nan() -> None:
    """Without validation an id beyond the vocabulary is loud, not another token's loss."""
    from vocab_parallel.layout import mark_labels

    marked = mark_labels(torch.tensor([0, 6, 7, -1, -100, 2**40]), -100, 7)
    assert marked.tolist() == [0, 6, -2, -2, -1, -2]


def test_available_impls() -> None:
    impls = available_impls()
    assert impls["chunked"] == impls["reference"] == "ready"
