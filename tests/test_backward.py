"""The three ways of backward: what each keeps, computes and communicates, and who chooses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import tiles_of
from tests.oracle import oracle, relative_error
from vocab_parallel import VocabParallelOptions, linear_cross_entropy, plan_backward
from vocab_parallel.backends.torch import Block, TorchBackend

BACKWARDS = ("recompute", "probs")
# A budget that keeps the logits of 8 of `drawn`'s 17 rows, in tiles of all tokens and 4 rows.
PARTLY: dict[str, Any] = {"backward": "auto", "memory_budget": 1600}
PARTLY_TILE = 12, 4
MIB = 2**20


def drawn(dtype: torch.dtype = torch.float64, tokens: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    e, c = torch.randn(tokens, 5).to(dtype), torch.randn(17, 5).to(dtype)
    targets = torch.randint(17, (tokens,))
    targets[1::4] = -100
    return e.requires_grad_(), c.requires_grad_(), targets


def exact(scale: float = 1.0, **options: Any) -> tuple[Tensor, ...]:
    e, c, targets = drawn()
    loss, _ = oracle(e, c, targets, **options)
    return torch.autograd.grad(scale * loss, (e, c))


@pytest.mark.parametrize(
    ("options", "tile"),
    [*(({"backward": way}, ()) for way in BACKWARDS), (PARTLY, PARTLY_TILE)],
)
def test_halves_in_any_order_and_again(options: dict[str, Any], tile: tuple[int, ...]) -> None:
    """Inputs' half, weights' half, either first, the whole after both: every time the same."""
    expected = exact(scale=-2.0, z_loss=0.1)
    for order in ((0, 1), (1, 0), (0, 0, 1, 1), (2, 0, 1), (0, 2), (1, 2, 2)):
        e, c, targets = drawn()
        with tiles_of(*tile):
            loss = -2.0 * linear_cross_entropy(e, c, targets, z_loss=0.1, **options)
        for half in order:
            wanted = [(e,), (c,), (e, c)][half]
            found = torch.autograd.grad(loss, wanted, retain_graph=True)
            kept = expected if half == 2 else (expected[half],)
            for got, want in zip(found, kept, strict=True):
                assert relative_error(got, want) < 1e-12, (options, order, half)


@pytest.mark.parametrize("backward", BACKWARDS)
def test_unlike_gradients_of_one_graph(backward: str) -> None:
    """A second backward with another gradient is not answered with the first one's."""
    e, c, targets = drawn()
    loss = linear_cross_entropy(e, c, targets, backward=backward)
    first = torch.autograd.grad(loss, c, retain_graph=True)[0].clone()
    second = torch.autograd.grad(5.0 * loss, (e, c))
    assert relative_error(second[1], 5.0 * first) < 1e-12


def test_what_is_no_longer_there() -> None:
    """An option that was removed says what to use in its place."""
    e, c, targets = drawn()
    with pytest.raises(ValueError, match='use "probs", which is as fast, or "auto"'):
        linear_cross_entropy(e, c, targets, backward="gradients")
    with pytest.raises(ValueError, match=r"one collective each way.*leave it out"):
        linear_cross_entropy(e, c, targets, overlap=True)
    for name in ("chunk_tokens", "chunk_rows"):
        for impl in ("auto", "chunked", "reference"):
            with pytest.raises(ValueError, match=rf"{name} is no longer .* memory_budget"):
                linear_cross_entropy(e, c, targets, impl=impl, **{name: 2})
    with pytest.raises(ValueError, match='impl="chunked" alone'):
        linear_cross_entropy(e, c, targets, impl="reference", backward="probs")


@pytest.mark.parametrize("attribute", ["grad", "main_grad"])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_accumulation(attribute: str, backward: str) -> None:
    """Two backwards add up where the parameter's gradient is kept; autograd gets none."""
    e, c, targets = drawn(torch.float32)
    seen: list[Tensor] = []
    c.register_hook(seen.append)
    if attribute == "main_grad":
        c.main_grad = torch.ones_like(c)
    else:
        c.grad = torch.ones_like(c)
    kept = getattr(c, attribute)
    for _ in range(2):
        with tiles_of(5):
            linear_cross_entropy(
                e, c, targets, backward=backward, accumulate_into=attribute
            ).backward()
    assert getattr(c, attribute) is kept
    assert relative_error(kept, 1.0 + 2.0 * exact()[1]) < 1e-6
    assert not any(grad is not None and grad.any() for grad in seen)
    if attribute == "main_grad":
        assert c.grad is None


def test_accumulation_begins_where_there_is_no_grad() -> None:
    e, c, targets = drawn(torch.float32)
    for count in (1, 2):
        linear_cross_entropy(e, c, targets, accumulate_into="grad").backward()
        assert relative_error(c.grad, count * exact()[1]) < 1e-6


@pytest.mark.parametrize("attribute", ["grad", "main_grad"])
@pytest.mark.parametrize("backward", BACKWARDS)
def test_accumulation_leaves_padding_rows_alone(attribute: str, backward: str) -> None:
    options = VocabParallelOptions(0, 17, vocab_size=15)
    e, c, targets = drawn(torch.float32)
    targets = targets.clamp(max=14)
    wide = [e.detach().double().requires_grad_(), c.detach().double().requires_grad_()]
    loss, _ = oracle(wide[0], wide[1], targets, vocab_size=15)
    exact = torch.autograd.grad(loss, wide[1])[0]
    if attribute == "main_grad":
        c.main_grad = torch.zeros_like(c)
    for _ in range(2):  # where there is no grad yet, autograd makes it
        with tiles_of(5):
            linear_cross_entropy(
                e, c, targets, vocab_parallel_options=options, backward=backward,
                accumulate_into=attribute,
            ).backward()  # fmt: skip
    found = getattr(c, attribute)
    assert relative_error(found, 2.0 * exact) < 1e-6
    assert not found[15:].any()


def test_accumulation_is_refused() -> None:
    e, c, targets = drawn()
    for given, into, match in (
        (c, "main_grad", r"needs c.main_grad \[17, 5\] in float32"),
        (c * 1.0, "grad", "not a plain leaf"),
        (c.detach(), "grad", "not a plain leaf"),
        (c, "momentum", "unknown accumulate_into"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(e, given, targets, accumulate_into=into)


def test_auto_takes_the_fastest_that_fits() -> None:
    shard = (8192, 37_984, 2048)
    logits = 8192 * (37_984 + 32) * 2  # lines of 64 logits
    for budget, in_flight, expected in (
        (logits, 1, "probs"),
        (logits - 1, 1, "recompute"),
        (logits, 2, "recompute"),
        (2 * logits, 2, "probs"),
        (None, 1, "recompute"),  # no whole shard of logits unless asked for
        (64 * MIB, 1, "recompute"),
    ):
        plan = plan_backward(*shard, memory_budget=budget, microbatches_in_flight=in_flight)
        assert plan.backward == expected, (budget, in_flight, plan)
    tight = plan_backward(*shard, backward="recompute", memory_budget=64 * MIB)
    assert tight.tile.tokens == 8192, "one product writes a block of rows"
    assert tight.logits_bytes <= 64 * MIB
    assert tight.float32_bytes == 8192 * 2048 * 4


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Tokens and rows of each tile of logits, from now on."""
    found: list[tuple[int, ...]] = []
    plain = TorchBackend.put_raw_logits

    def counting(self: TorchBackend, out: Tensor, block: Block, tokens: slice) -> Tensor:
        found.append(tuple(out.shape))
        return plain(self, out, block, tokens)

    monkeypatch.setattr(TorchBackend, "put_raw_logits", counting)
    return found


def test_what_fits_is_kept(made: list[tuple[int, ...]]) -> None:
    """Half of the rows' logits are kept: forward makes 5 tiles, backward the 3 that are gone."""
    e, c, targets = drawn()
    with tiles_of(*PARTLY_TILE):
        plan = plan_backward(12, 17, 5, torch.float64, device_type="cpu", **PARTLY)
        assert (plan.backward, plan.kept_rows, plan.tile.rows) == ("recompute", 8, 4)
        assert plan.kept_bytes == 12 * 8 * 8
        loss = linear_cross_entropy(e, c, targets, **PARTLY)
    first = [(12, 4), (12, 4), (12, 1)]
    assert made == [*first, (12, 4), (12, 4)], "what is kept comes last"
    found = torch.autograd.grad(loss, (e, c))
    assert made[5:] == first
    for got, want in zip(found, exact(), strict=True):
        assert relative_error(got, want) < 1e-12


def test_tiles(made: list[tuple[int, ...]]) -> None:
    """A small budget cuts both sides in two until a tile fits; tests may name the tile."""
    e, c, targets = drawn(tokens=11)
    wide = [t.detach().requires_grad_() for t in (e, c)]
    loss, _ = oracle(*wide, targets)
    want = torch.autograd.grad(loss, wide)
    for sides, budget, tokens, rows in (
        ((), 240, (3, 3, 3, 2), (3, 3, 3, 3, 3, 2)),  # ten logits, with two temporaries each
        ((5, 4), None, (5, 5, 1), (4, 4, 4, 4, 1)),
        ((None, 4), None, (11,), (4, 4, 4, 4, 1)),
        ((5,), None, (5, 5, 1), (17,)),
    ):
        made.clear()
        with tiles_of(*sides):
            ours = linear_cross_entropy(e, c, targets, backward="recompute", memory_budget=budget)
            found = torch.autograd.grad(ours, (e, c))
        assert made == 2 * [(n, r) for r in rows for n in tokens], (sides, budget)
        for got, exactly in zip(found, want, strict=True):
            assert relative_error(got, exactly) < 1e-12, (sides, budget)
    with pytest.raises(AssertionError, match="nobody asked"), tiles_of(5):
        linear_cross_entropy(e, c, targets, impl="reference")


def test_kept_bytes_fit() -> None:
    """On a GPU, whatever the budget and the microbatches in flight, and more is faster."""
    before = -1
    for budget in (16 * MIB, 64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB):
        plan = plan_backward(8192, 37_984, 5120, memory_budget=budget)
        assert plan.backward == "recompute"
        assert plan.kept_bytes + plan.logits_bytes <= budget
        assert plan.kept_rows > before
        before = plan.kept_rows
        several = plan_backward(8192, 37_984, 5120, memory_budget=budget, microbatches_in_flight=3)
        assert 3 * several.kept_bytes + several.logits_bytes <= budget
    named = plan_backward(8192, 37_984, 5120, memory_budget=256 * MIB, backward="recompute")
    assert (named.kept_rows, named.kept_bytes) == (0, 0), "who names it keeps nothing"
    with pytest.raises(ValueError, match="unknown backward 'gradients'"):
        plan_backward(8192, 37_984, 5120, backward="gradients")
    mistakes: dict[str, Any] = {
        "tokens": -1, "hidden_size": 0, "degree": 1.0, "microbatches_in_flight": 0,
        "memory_budget": "64MiB", "logits_dtype": "float16",
    }  # fmt: skip
    for name, value in mistakes.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            plan_backward(**{"tokens": 8192, "rows": 37_984, "hidden_size": 5120, name: value})
    tiny = plan_backward(8192, 37_984, 5120, memory_budget=2 * 200 * 200)
    assert tiny.tile == (200, 192), "kernels write whole sectors of a tile"
