"""Products and passes in one kernel, against products and passes one after the other."""

from typing import Any

import pytest
import torch

from benchmarks.contestants import Operands, other_targets
from tests.cases import tiles_of
from tests.oracle import oracle, relative_error
from vocab_parallel import linear_cross_entropy
from vocab_parallel.backends import registry

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="the kernels are made for Hopper",
)

EVERY: dict[str, Any] = {
    "softcap": 4.0,
    "temperature": 0.7,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
}


@hopper
@pytest.mark.parametrize(
    ("dtype", "shape", "given"),
    [
        (torch.bfloat16, (700, 3001, 136), {}),
        (torch.bfloat16, (700, 3001, 136), EVERY),
        (torch.bfloat16, (700, 3001, 136), {"softcap": 4.0, "temperature": 0.7, "z_loss": 1e-3}),
        (torch.float16, (129, 4096, 512), EVERY),
        (torch.bfloat16, (1, 5, 8), {}),
    ],
)
def test_no_worse_than_two_kernels(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    given: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ragged tiles, a bias, every option, each way; tokens of which half are confident."""
    tokens, rows, hidden = shape
    torch.manual_seed(0)
    c = torch.randn(rows, hidden, device="cuda") / hidden**0.5
    targets = torch.randint(rows, (tokens,), device="cuda")
    e = torch.randn(tokens, hidden, device="cuda")
    e[::2] = 12.0 * c[targets][::2] + 0.3 * e[::2]
    bias = torch.randn(rows, device="cuda")
    leaves = [t.to(dtype).requires_grad_() for t in (e, c, bias)]
    if tokens > 1:
        targets[::9] = -100
    assert registry.choose(leaves[0], leaves[1]) == "hopper"
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets, wide[2], **given)[0], wide)

    def errors(extra: dict[str, Any], tile: tuple[int | None, ...]) -> list[float]:
        with tiles_of(*tile):
            got = linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], **given, **extra)
            found = torch.autograd.grad(got, leaves)
        return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]

    extra: dict[str, Any]
    for extra, tile in (
        ({"backward": "recompute"}, (None, 1024)),
        ({"backward": "recompute"}, (200, 999)),
        ({"memory_budget": tokens * rows}, ()),
        ({"backward": "probs"}, ()),
    ):
        found = errors(extra, tile)
        with monkeypatch.context() as patch:
            patch.setattr(registry, "choose", lambda hidden, classifier: "triton")
            apart = errors(extra, tile)
        print(dtype, shape, given, extra, tile, found, apart)
        # What two kernels sum of the bias's gradient is float32; what is kept is rounded before.
        for ours, theirs, factor in zip(found, apart, (1.1, 1.1, 1.3), strict=True):
            assert ours <= factor * theirs + 1e-4, (given, extra, tile)


@hopper
@pytest.mark.parametrize("backward", ["recompute", "probs"])
def test_confident_tokens(backward: str) -> None:
    """No way rounds a logit before its statistics: well below the error of eager bfloat16's."""
    torch.manual_seed(0)
    c = torch.randn(4096, 512, device="cuda") / 512**0.5
    targets = torch.randint(4096, (1024,), device="cuda")
    e = 16.0 * c[targets] + 0.3 * torch.randn(1024, 512, device="cuda")
    leaves = [t.bfloat16().requires_grad_() for t in (e, c)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
    logits = torch.nn.functional.linear(*leaves).float()
    peers = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), leaves)
    loss = linear_cross_entropy(leaves[0], leaves[1], targets, backward=backward)
    for ours, peer, want in zip(torch.autograd.grad(loss, leaves), peers, exact, strict=True):
        print(relative_error(ours, want), relative_error(peer, want))
        assert relative_error(ours, want) < 0.5 * relative_error(peer, want)


@hopper
@pytest.mark.parametrize("backward", ["recompute", "probs"])
def test_logits_far_apart(backward: str) -> None:
    """Logits hundreds of nats apart, targets that have none of the probability."""
    torch.manual_seed(0)
    e = torch.randn(700, 256, device="cuda")
    e[::3] *= 60.0
    c = torch.randn(3000, 256, device="cuda") / 16.0
    c[1234] *= 40.0  # one row that no sample has
    bias = torch.randn(3000, device="cuda")
    targets = torch.randint(3000, (700,), device="cuda")
    targets[::11] = 1234
    leaves = [t.bfloat16().requires_grad_() for t in (e, c, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = oracle(wide[0], wide[1], targets, wide[2])[0]
    logits = torch.nn.functional.linear(*leaves).float()
    peer = torch.nn.functional.cross_entropy(logits, targets)
    loss = linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], backward=backward)
    assert exact > 88.0
    assert relative_error(loss, exact) <= 1.1 * relative_error(peer, exact) + 1e-5
    for ours, theirs, want in zip(
        torch.autograd.grad(loss, leaves),
        torch.autograd.grad(peer, leaves),
        torch.autograd.grad(exact, wide),
        strict=True,
    ):
        print(relative_error(ours, want), relative_error(theirs, want))
        assert relative_error(ours, want) <= 1.1 * relative_error(theirs, want) + 1e-4


@hopper
def test_what_tma_cannot_read_goes_by_products_alone() -> None:
    for hidden, offset in ((60, 0), (64, 1)):
        torch.manual_seed(0)
        e = torch.randn(300, hidden, device="cuda").bfloat16().requires_grad_()
        storage = torch.randn(500 * hidden + offset, device="cuda").div(hidden**0.5).bfloat16()
        c = storage[offset:].view(500, hidden).requires_grad_()
        assert registry.choose(e, c) == "triton"
        targets = torch.randint(500, (300,), device="cuda")
        wide = [t.detach().double().requires_grad_() for t in (e, c)]
        exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
        logits = torch.nn.functional.linear(e, c).float()
        peers = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), (e, c))
        found = torch.autograd.grad(linear_cross_entropy(e, c, targets), (e, c))
        for got, peer, want in zip(found, peers, exact, strict=True):
            assert relative_error(got, want) <= 1.1 * relative_error(peer, want)


@hopper
@pytest.mark.parametrize("hidden", [2048, 5120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_targets_part_of_rows(hidden: int, dtype: torch.dtype) -> None:
    """Each row as often, as in text, one alone, and a shard of half of the tokens' targets.

    Against float64 on the rows that are somebody's target; no other row is touched.
    """
    from vocab_parallel.kernels.target_rows import add_to_target_rows

    tokens, rows = 8192, 4748
    device = torch.device("cuda")
    torch.manual_seed(0)
    values = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    before = torch.randn(rows, hidden, device=device).to(dtype)
    uniform = torch.randint(rows, (tokens,), device=device)
    drawn = Operands(values, before, uniform)
    kinds = {"uniform": uniform} | {k: one.targets for k, one in other_targets(drawn).items()}
    kinds["half of them"] = torch.where(torch.rand(tokens, device=device) < 0.5, uniform, -1)
    for kind, targets in kinds.items():
        weight = torch.randn(tokens, device=device)
        own = targets >= 0
        weight[~own] = torch.nan
        want = before.double()
        want.index_add_(0, targets[own], (weight.double().unsqueeze(1) * values)[own])
        twice = [before.clone(), before.clone()]
        for found in twice:
            add_to_target_rows(found, values, weight, targets.int())
        assert torch.equal(*twice), "bits"
        touched = torch.zeros(rows, dtype=torch.bool, device=device)
        touched[targets[own]] = True
        assert torch.equal(twice[0][~touched], before[~touched])
        error = relative_error(twice[0][touched], want[touched])
        assert error < (2e-3 if dtype == torch.bfloat16 else 1e-6), (kind, error)
