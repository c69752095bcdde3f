"""One process that holds the whole vocabulary, with no process group at all."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.oracle import relative_error
from tests.recording import ProductRecorder
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelOptions,
    available_impls,
    count_valid_tokens,
    linear_cross_entropy,
    linear_distillation,
    linear_distillation_from_top_k,
    multi_token_cross_entropy,
    predict,
    score_tokens,
    token_logprobs,
)

IMPLS = ("chunked", "reference")


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    e = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    return e, c, torch.randint(7, (2, 5))


def test_options_may_be_left_out() -> None:
    e, c, targets = drawn()
    whole = linear_cross_entropy(e, c, targets)
    same = linear_cross_entropy(
        e, c, targets, vocab_parallel_options=VocabParallelOptions.from_vocab(7)
    )
    assert torch.equal(whole, same)
    assert torch.allclose(whole, F.cross_entropy((e @ c.T).flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str) -> None:
    e, c, targets = drawn()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(
            leaves[0], leaves[1], targets, leaves[2], softcap=2.0, shift=1, reduction="none",
            return_lse=True, label_smoothing=0.1, z_loss=0.1, temperature=0.8, impl=impl,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (e, c, bias))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_that_is_not_needed(impl: str, needs: tuple[bool, bool]) -> None:
    e, c, targets = drawn()
    full = torch.autograd.grad(linear_cross_entropy(e, c, targets, impl=impl), (e, c))
    e, c = e.detach().requires_grad_(needs[0]), c.detach().requires_grad_(needs[1])
    linear_cross_entropy(e, c, targets, impl=impl).backward()
    for leaf, needed, expected in zip((e, c), needs, full, strict=True):
        assert torch.equal(leaf.grad, expected) if needed else leaf.grad is None


def product_flops(impl: str, needs: tuple[bool, bool], backward: str) -> tuple[int, int]:
    """Count the flops of the products of a forward and of its backward."""
    e, c, targets = drawn()
    e, c = e.detach().requires_grad_(needs[0]), c.detach().requires_grad_(needs[1])
    with ProductRecorder() as before:
        loss = linear_cross_entropy(e, c, targets, impl=impl, backward=backward)
    with ProductRecorder() as after:
        loss.backward()
    return before.flops, after.flops


@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_product_is_not_computed(impl: str) -> None:
    """Forward is one product; backward is that again and one for each gradient that is needed.

    Kept logits spare the second.
    """
    one = 2 * 10 * 4 * 7  # 2 T D V
    for needs, count in (((True, True), 2), ((True, False), 1), ((False, True), 1)):
        assert product_flops(impl, needs, "recompute") == (one, (1 + count) * one)
        if impl == "chunked":
            assert product_flops(impl, needs, "probs") == (one, count * one)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_any_grad_output(impl: str) -> None:
    e, c, targets = drawn()
    loss = linear_cross_entropy(e, c, targets, impl=impl)
    assert isinstance(loss, Tensor)
    once = torch.autograd.grad(loss, (e, c), retain_graph=True)
    scaled = torch.autograd.grad(loss, (e, c), torch.tensor(-3.0, dtype=torch.float64))
    for a, b in zip(once, scaled, strict=True):
        assert torch.allclose(-3 * a, b)


def test_no_grad() -> None:
    e, c, targets = drawn()
    with torch.no_grad():
        loss = linear_cross_entropy(e, c, targets)
    assert not loss.requires_grad


def test_torch_compile() -> None:
    if available_impls()["torch_compile"] != "ready":
        pytest.skip(available_impls()["torch_compile"])
    e, c, targets = drawn()
    found = [
        torch.autograd.grad(
            linear_cross_entropy(e, c, targets, softcap=3.0, shift=1, impl=impl),
            (e, c),
        )
        for impl in ("torch_compile", "reference")
    ]
    for ours, expected in zip(*found, strict=True):
        assert torch.allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_ignored(impl: str) -> None:
    e, c, targets = drawn()
    loss = linear_cross_entropy(e, c, torch.full_like(targets, -100), impl=impl)
    assert loss.detach() == 0.0
    for gradient in torch.autograd.grad(loss, (e, c)):
        assert not gradient.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [slice(5, 7), slice(0, 2)])
def test_masked_rows_by_bias(impl: str, masked: slice) -> None:
    """A bias of -inf removes a row, as it does from a softmax: whole tiles of them, too."""
    e, c, targets = drawn()
    targets = targets % 3 + 2
    bias = torch.zeros(7, dtype=torch.float64)
    bias[masked] = -torch.inf
    bias.requires_grad_()
    cut = {"memory_budget": 200} if impl == "chunked" else {}  # tiles of 3 tokens and 2 rows
    loss = linear_cross_entropy(e, c, targets, bias, impl=impl, **cut)
    logprobs, entropy = token_logprobs(e, c, targets, bias, return_entropy=True, impl=impl, **cut)
    kept = [row for row in range(7) if bias[row] == 0.0]
    log_p = torch.log_softmax(e @ c[kept].T, -1)
    chosen = log_p.gather(-1, (targets - kept[0])[..., None]).squeeze(-1)
    exact = (-chosen.mean(), chosen, -(log_p.exp() * log_p).sum(-1))
    for ours, want in zip((loss, logprobs, entropy), exact, strict=True):
        assert torch.allclose(ours, want)
        found = torch.autograd.grad(ours.sum(), (e, c, bias), retain_graph=True)
        wanted = torch.autograd.grad(want.sum(), (e, c), retain_graph=True)
        assert torch.allclose(found[0], wanted[0])
        assert torch.allclose(found[1], wanted[1])
        assert not found[2][masked].any()


@pytest.mark.parametrize(
    ("impl", "backward"),
    [
        *(("chunked", backward) for backward in ("auto", "recompute", "probs")),
        *(("reference", backward) for backward in ("auto", "recompute")),
    ],
)
@pytest.mark.parametrize("where", ["e", "c"])
def test_a_nan_is_never_hidden(impl: str, backward: str, where: str) -> None:
    """A NaN in the hidden states or in a row that is nobody's target is in loss and gradients."""
    e, c, targets = drawn()
    with torch.no_grad():
        if where == "e":
            e[0, 3, 1] = torch.nan
        else:
            c[6, 2] = torch.nan
    loss = linear_cross_entropy(e, c, targets % 6, impl=impl, backward=backward)
    assert torch.isnan(loss)
    e_grad, c_grad = torch.autograd.grad(loss, (e, c))
    assert torch.isnan(e_grad[0, 3]).all()
    assert torch.isnan(c_grad).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_ignored_target_counts_for_nothing(impl: str) -> None:
    """Whatever its weight is: a NaN times 0 is not 0."""
    e, c, targets = drawn()
    targets[0, 1] = -100
    weight = torch.rand(2, 5, dtype=torch.float64)
    expected = linear_cross_entropy(e, c, targets, token_weight=weight, impl=impl)
    spoiled = weight.clone()
    spoiled[0, 1] = torch.nan
    found = linear_cross_entropy(e, c, targets, token_weight=spoiled, impl=impl)
    assert torch.equal(found, expected)
    pairs = (torch.autograd.grad(loss, (e, c)) for loss in (found, expected))
    for ours, want in zip(*pairs, strict=True):
        assert torch.equal(ours, want)


def test_an_ignore_index_beyond_the_labels_dtype() -> None:
    """It ignores nothing; as a number of int32 it would be another token."""
    e, c, _ = drawn()
    targets = torch.arange(10, dtype=torch.int32).view(2, 5) % 7
    per_token = F.cross_entropy((e @ c.T).mT, targets.long(), reduction="none")
    for wraps_to in (0, 3):
        given = {"ignore_index": 2**40 + wraps_to}
        assert torch.allclose(linear_cross_entropy(e, c, targets, **given), per_token.mean())
        assert torch.allclose(token_logprobs(e, c, targets, **given), -per_token)
        assert torch.allclose(
            multi_token_cross_entropy([e], c, targets, shift=(0,), **given), per_token.mean()
        )
        assert torch.allclose(CCEPipelineLoss(c, shift=0, **given)(e, targets), per_token.mean())
        assert int(count_valid_tokens(targets, **given)) == 10
        scores = score_tokens(e, c, targets, **given)
        assert int(scores.count) == 10
        assert torch.allclose(scores.nll, per_token.sum())
    with pytest.raises(ValueError, match="ignore_index must fit int64"):
        linear_cross_entropy(e, c, targets, ignore_index=2**63)


def test_a_divisor_of_one_element() -> None:
    """A tensor of shape [1] makes no loss of that shape."""
    e, c, targets = drawn()
    loss = linear_cross_entropy(e, c, targets, num_valid_tokens=torch.tensor([20]))
    assert isinstance(loss, Tensor)
    assert loss.shape == ()
    assert torch.allclose(2 * loss, linear_cross_entropy(e, c, targets))
    with pytest.raises(ValueError, match="at least 0, got -5"):
        linear_cross_entropy(e, c, targets, num_valid_tokens=torch.tensor(-5))
    with pytest.raises(ValueError, match="at least 0 or a tensor, got True"):
        linear_cross_entropy(e, c, targets, num_valid_tokens=True)
    # On one rank arguments are always checked, but on a GPU no value is read.
    from vocab_parallel.token_loss import at_least_one

    assert at_least_one(torch.tensor([-5]), torch.float32).isnan()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(default: torch.dtype) -> None:
    """Whatever torch.set_default_dtype says; a count in bfloat16 would be rounded, too."""
    torch.manual_seed(0)
    e, c = (torch.randn(n, 4, dtype=torch.float32, requires_grad=True) for n in (301, 9))
    targets, ids = torch.arange(301) % 9, torch.arange(602).view(301, 2) % 9
    log_q = torch.full((301, 2), -1.5, dtype=torch.float32)
    seven = torch.tensor(7)

    def results() -> list[Tensor]:
        scores = score_tokens(e, c, targets)
        loss, lse, metrics = linear_cross_entropy(
            e, c, targets, return_lse=True, return_metrics=True, z_loss=0.1
        )
        differentiable = [
            loss,
            lse,
            linear_cross_entropy(e, c, targets),
            linear_cross_entropy(e, c, targets, num_valid_tokens=seven, backward="probs"),
            linear_cross_entropy(e, c, targets, num_valid_tokens=7, label_smoothing=0.1),
            linear_cross_entropy(e, c, targets, reduction="none", impl="reference"),
            *token_logprobs(e, c, targets, return_entropy=True),
            multi_token_cross_entropy([e, e], c, targets, shift=(0, 1), head_weights=(1.0, 0.3)),
            CCEPipelineLoss(c, shift=0)(e, targets),
            linear_distillation(e, c, e.detach().flip(-1), c.detach()),
            linear_distillation_from_top_k(e, c, ids, log_q, targets=targets),
        ]
        grads = [
            torch.autograd.grad(each.sum(), (e, c), retain_graph=True) for each in differentiable
        ]
        assert all(each.dtype == torch.float32 for each in differentiable)
        others = [metrics.accuracy, metrics.entropy, scores.nll, predict(e, c).lse]
        return [*differentiable, *others, *(t for pair in grads for t in pair)]

    expected = results()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    for ours, want in zip(found, expected, strict=True):
        assert ours.dtype == want.dtype
        assert torch.equal(ours, want)
    exact = F.cross_entropy(e.double() @ c.double().T, targets)
    assert relative_error(found[2], exact) < 1e-6


def test_autocast() -> None:
    e, c, targets = (t.detach().float() if t.is_floating_point() else t for t in drawn())
    e.requires_grad_()
    c.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(e, c, targets)
        expected = linear_cross_entropy(e.bfloat16(), c.bfloat16(), targets)
    assert torch.equal(loss, expected)
    loss.backward()
    assert e.grad is not None
    assert e.grad.dtype == torch.float32
    # Products are of what is widened, in backward too, where a schedule's step is under autocast.
    for impl, dtype in itertools.product(("chunked", "reference"), (torch.bfloat16, torch.float32)):
        found = []
        for casts in (True, False):
            operands = [t.detach().bfloat16().to(dtype).requires_grad_() for t in (e, c)]
            cast = operands if dtype == torch.bfloat16 else [t.bfloat16() for t in operands]
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                loss = linear_cross_entropy(*(operands if casts else cast), targets, impl=impl)
                loss.backward()
            found.append((loss.detach(), *(t.grad for t in operands)))
        for inside, outside in zip(*found, strict=True):
            assert torch.equal(inside, outside), (impl, dtype)
    # torch stacks no float64 under autocast, nor what is its other half precision.
    for other in (torch.float64, torch.float16):
        given = [e.detach().to(other)] * 2, c.detach().to(other), targets
        with torch.autocast("cpu", torch.bfloat16):
            loss = multi_token_cross_entropy(*given, shift=(0, 1))
        assert loss.isfinite()


def test_a_target_that_nobody_checked_is_nan() -> None:
    """Without validation an id beyond the vocabulary is loud, not another token's loss."""
    from vocab_parallel.layout import mark_labels
    from vocab_parallel.token_loss import TokenLoss

    marked = mark_labels(torch.tensor([0, 6, 7, -1, -100, 2**40]), -100, 7)
    assert marked.tolist() == [0, 6, -2, -2, -1, -2]
    losses = TokenLoss(marked, None, 0.0, 7, 0.0, None, kernels=False)(torch.randn(2, 6))
    assert losses.isnan().tolist() == [False, False, True, True, False, True]
    e, c, targets = drawn()
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 7\)"):
        linear_cross_entropy(e, c, targets + 2)


def test_transforms() -> None:
    """What autograd has beside a backward: each is right, or refused in words."""
    e, c, targets = drawn()
    loss = linear_cross_entropy(e, c, targets)
    expected = torch.autograd.grad(loss, (e, c))
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(e, c, targets), loss)
        assert predict(e, c).ids.shape == (2, 5, 1)
        again = linear_cross_entropy(e.clone(), c, targets)  # an inference tensor
        assert torch.equal(again, loss)
    for reentrant in (False, True):
        for backward in ("recompute", "probs"):
            run = functools.partial(linear_cross_entropy, targets=targets, backward=backward)
            outer = checkpoint(run, e, c, use_reentrant=reentrant)
            for found in (outer, 3.0 * outer):
                if reentrant and found is not outer:
                    continue  # torch's reentrant checkpoint runs backward() alone, once
                e.grad = c.grad = None
                found.backward(retain_graph=not reentrant)
                scale = 1.0 if found is outer else 3.0
                assert torch.allclose(e.grad, scale * expected[0])
                assert torch.allclose(c.grad, scale * expected[1])
    for backward in ("recompute", "probs"):
        loss = linear_cross_entropy(e, c, targets, backward=backward)
        first = torch.autograd.grad(loss, e, create_graph=True)[0]
        with pytest.raises(ValueError, match="has no second derivative"):
            (first.square().sum() + loss).backward()
    with pytest.raises(ValueError, match=r"inside of a transform of torch\.func"):
        torch.func.grad(lambda e: linear_cross_entropy(e, c, targets))(e)


def test_float16_with_a_grad_scaler() -> None:
    """A scaled loss in float16 gives the gradients of the unscaled one, scaled."""
    e, c, targets = drawn()
    half = [t.detach().half().requires_grad_() for t in (e, c)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for backward in ("recompute", "probs", "auto"):
        loss = linear_cross_entropy(half[0], half[1], targets, backward=backward)
        found = torch.autograd.grad(scaler.scale(loss), half)
        exact = torch.autograd.grad(linear_cross_entropy(e, c, targets), (e, c))
        for ours, want in zip(found, exact, strict=True):
            assert relative_error(ours.double() / scaler.get_scale(), want) < 3e-3


def test_available_impls() -> None:
    impls = available_impls()
    assert impls["chunked"] == impls["reference"] == "ready"
