"""Long calls: the tokens a span at a time, equal to one span and to float64, in bounded memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import long_call
from tests.cases import Case, check_case, spans_of, tiles_of
from tests.oracle import oracle, relative_error
from tests.ranks import run_ranks
from tests.recording import AllocationRecorder, CollectiveRecorder
from vocab_parallel import (
    VocabParallelOptions,
    linear_cross_entropy,
    multi_token_cross_entropy,
    plan_backward,
)

MIB = 2**20
LAYOUTS = ("replicated", "sharded", "sequence")
ROWS = (7, 4, 0)  # a rank without rows reduces as often as the others
WAYS: tuple[dict[str, Any], ...] = (
    {"backward": "recompute"},
    {"backward": "recompute", "memory_budget": 200},  # several tiles on both sides
    {"backward": "probs"},
)


def ways(layout: str, budget: int) -> Iterator[dict[str, Any]]:
    """Yield all ways, and one where ranks differ: the first keeps some rows, the second all."""
    yield from WAYS
    with tiles_of(rows=2):
        yield {"memory_budget": (len(ROWS) if layout == "sharded" else 1) * budget}


def check_against_the_oracle() -> None:
    """Every layout and way, spans that end within a rank's tokens, and a last one that is short."""
    for layout in LAYOUTS:
        for way in ways(layout, 1000):
            for extra in (
                {"shift": 1},
                {"label_smoothing": 0.1, "softcap": 3.0, "hidden_grad_scale": 2.0},
                {"return_lse": True, "reduction": "none"},
                {"z_loss": 0.01},
            ):
                options = {"hidden_layout": layout, **way, **extra}
                with spans_of(7):
                    check_case(Case(ROWS, length=12, bias=True, options=options))


class Drawn:
    """One rank's operands of a call, drawn anew from a seed at each use."""

    def __init__(self, layout: str, dtype: torch.dtype) -> None:
        rank, degree = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(1)
        start = sum(ROWS[:rank])
        self.options = VocabParallelOptions(start, start + ROWS[rank], vocab_size=sum(ROWS))
        self._columns = torch.randn(degree, 30, 6, generator=generator).to(dtype)
        self._rows = torch.randn(sum(ROWS), 6, generator=generator).to(dtype)
        targets = torch.randint(sum(ROWS), (degree, 30), generator=generator)
        column = rank if layout == "sharded" else 0
        own = slice(rank * 10, rank * 10 + 10) if layout == "sequence" else slice(None)
        self._hidden, self.targets = self._columns[column][own], targets[column]
        self._layout = layout

    def run(self, halves: tuple[str, ...] = ("ec",), **options: Any) -> dict[str, Tensor]:
        """Return loss and gradients, of the halves of a backward one after the other."""
        e = self._hidden.clone().requires_grad_()
        c = self._rows[self.options.start : self.options.stop].clone().requires_grad_()
        if options.get("accumulate_into") == "main_grad":
            c.main_grad = torch.zeros(c.shape)
        if options.get("accumulate_into") == "grad":
            c.grad = torch.zeros_like(c)
        loss = linear_cross_entropy(
            e, c, self.targets, vocab_parallel_options=self.options, hidden_layout=self._layout,
            **options,
        )  # fmt: skip
        found = {"loss": loss.detach()}
        if "accumulate_into" in options:
            loss.backward()
            found["e"] = e.grad
            found["c"] = getattr(c, options["accumulate_into"])
            return found
        for half in halves:
            wanted = [{"e": e, "c": c}[name] for name in half]
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True)
            found.update(zip(half, gradients, strict=True))
        return found


def check_equal(found: dict[Any, Tensor], expected: dict[Any, Tensor], tolerance: float) -> None:
    for name, want in expected.items():
        error = relative_error(found[name].float(), want.float())
        assert error < tolerance or not want.numel(), (name, error)


def check_split_and_accumulated() -> None:
    """Halves in any order and again, accumulators of both dtypes: as in one span."""
    for layout in LAYOUTS:
        wide = Drawn(layout, torch.float32)
        half = Drawn(layout, torch.bfloat16)
        for way in ways(layout, 700):
            with spans_of(None):
                expected = wide.run(**way)
                rounded = half.run(**way)
            with spans_of(4):
                for halves in (("ec",), ("e", "c"), ("c", "e"), ("e", "c", "ec")):
                    check_equal(wide.run(halves, **way), expected, 1e-5)
                check_equal(half.run(**way), rounded, 1e-2)
                for into in ("grad", "main_grad"):
                    check_equal(half.run(accumulate_into=into, **way), rounded, 1e-2)
                    check_equal(wide.run(accumulate_into=into, **way), expected, 1e-5)


def check_calls() -> None:
    """The statistics go at once, dE span by span, in as many calls on every rank."""
    for layout, dtype, names in (
        # 30 tokens: 6 a span, each rank sums its share, and the rounded sums are gathered.
        ("replicated", torch.bfloat16, ["all_gather", *["reduce_scatter", "all_gather"] * 5]),
        ("replicated", torch.float32, ["all_gather", *["all_reduce"] * 5]),
        # 10 tokens a rank: two of the spans have two ranks' tokens.
        ("sequence", torch.bfloat16, [*["all_gather"] * 2, *["reduce"] * 7]),
        ("sharded", torch.bfloat16, [*["all_gather"] * 3, *["reduce"] * 15]),
    ):
        drawn = Drawn(layout, dtype)
        for way in ({"backward": "recompute"}, {"backward": "probs"}):
            with spans_of(6), CollectiveRecorder() as recorded:
                drawn.run(validate=False, **way)
            assert [call.name for call in recorded.calls] == names, (layout, way)
            sums = [call for call in recorded.calls if call.name.startswith(("reduce", "all_red"))]
            tokens = 90 if layout == "sharded" else 30
            assert sum(call.size for call in sums) == 4 * 6 * tokens, "in float32, each once"
    with spans_of(13):  # the first rank's 10 tokens lie within one
        own = Drawn("sequence", torch.float32).run()["e"]
    assert own.untyped_storage().nbytes() == own.nbytes, "it holds no other tokens' gradient"


def check_heads() -> None:
    """Several predictions of a position are tokens as others are."""
    options = Drawn("replicated", torch.float64).options
    generator = torch.Generator().manual_seed(2)
    given = torch.randn(2, 3, 12, 6, generator=generator).double()
    rows = torch.randn(sum(ROWS), 6, generator=generator).double()
    targets = torch.randint(sum(ROWS), (3, 12), generator=generator)
    found: list[tuple[Tensor, ...]] = []
    for span in (None, 7):
        e = given.clone().requires_grad_()
        c = rows[options.start : options.stop].clone().requires_grad_()
        with spans_of(span):
            loss = multi_token_cross_entropy(
                e, c, targets, shift=(1, 2), vocab_parallel_options=options
            )
        assert isinstance(loss, Tensor)
        found.append((loss.detach(), *torch.autograd.grad(loss, (e, c))))
    for got, want in zip(found[1], found[0], strict=True):
        assert relative_error(got, want) < 1e-12 or not want.numel()


def check_long_calls() -> None:
    check_calls()
    check_against_the_oracle()
    check_split_and_accumulated()
    check_heads()
    dist.barrier()


def test_long_calls() -> None:
    run_ranks(check_long_calls, 3, timeout=110)


def test_one_rank_holds_no_sum_of_all_tokens() -> None:
    """The largest tensor beside inputs and gradients is that of a span, or of the rows."""
    tokens, rows, hidden = 1024, 48, 64
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    c = torch.randn(rows, hidden, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(rows, (tokens,), generator=generator)
    wide = [t.detach().double().requires_grad_() for t in (e, c)]
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
    for span, most in ((64, 2 * tokens), (None, 4 * tokens)):
        with spans_of(span), AllocationRecorder([e, c, targets]) as seen:
            loss = linear_cross_entropy(
                e, c, targets, backward="recompute", memory_budget=64 * rows * 12
            )  # of 64 tokens, with two temporaries in float32
            found = torch.autograd.grad(loss, (e, c))
        # The gradient itself is of 2 bytes; what is summed in one span of 4.
        assert seen.largest.size == hidden * most, (span, seen.largest)
        for got, want in zip(found, exact, strict=True):
            assert relative_error(got, want) < 5e-3


def test_partial_gradients_stay_partial() -> None:
    """Where nobody sums them, each rank's are its own; here it is alone."""
    e = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)
    c = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    options = VocabParallelOptions(0, 9, reduce_e_grad=False)
    targets = torch.randint(9, (40,))
    exact = torch.autograd.grad(oracle(e, c, targets)[0], (e, c))
    with spans_of(7):
        loss = linear_cross_entropy(e, c, targets, vocab_parallel_options=options)
        found = torch.autograd.grad(loss, (e, c))
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < 1e-12


LONG = (262_144, 75_968, 2048)


@pytest.mark.parametrize("degree", [1, 2, 8])
def test_plan_of_a_long_call(degree: int) -> None:
    """262,144 tokens, 151,936 rows over two: at most 1 GiB beside both gradients, added up here."""
    tokens, rows, hidden = LONG
    plan = plan_backward(*LONG, degree=degree)
    assert (plan.backward, plan.span, plan.tile) == ("recompute", 8192, (8192, 4096))
    span, row_sums = 8192 * hidden * 4, rows * hidden * 4
    under_way = span + span // degree if degree > 1 else 0
    assert plan.float32_bytes == span + under_way + row_sums
    assert plan.logits_bytes == 64 * MIB
    assert plan.float32_bytes + plan.logits_bytes + plan.kept_bytes <= 2**30
    gradients = (tokens + rows) * hidden * 2
    # At the end the rows' sums are rounded; before it they are not there twice.
    assert plan.peak_bytes == gradients + row_sums
    kept = plan_backward(*LONG, degree=degree, has_main_grad=True)
    assert kept.float32_bytes == span + under_way
    assert kept.peak_bytes == tokens * hidden * 2 + span + under_way + 64 * MIB
    whole = plan_backward(*LONG, degree=degree, in_spans=False)
    assert whole.span == tokens
    assert whole.peak_bytes - gradients >= 2**31 - row_sums // 2


def test_which_calls_are_long() -> None:
    """Those of more than 32,768 tokens in which spans hold less, as all ranks know alike."""
    for shape, more, long in (
        ((32_768, 1000, 2048), {}, False),
        ((32_769, 1000, 2048), {}, True),
        ((65_536, 75_968, 2048), {}, False),  # the rows' sums are the larger ones
        ((65_536, 75_968, 2048), {"has_main_grad": True}, True),
        ((65_536, 75_968, 2048), {"dtype": torch.float32}, True),  # the sums are the gradient
        ((92_352, 75_968, 2048), {}, False),
        ((92_353, 75_968, 2048), {}, True),
    ):
        assert (plan_backward(*shape, **more).span < shape[0]) == long, (shape, more)


def test_benchmark() -> None:
    """Its contestants make the same gradients, and it says what each held."""
    arguments = long_call.Arguments(tokens=320, part=100, hidden=16, rows=40, rounds=1)
    with spans_of(100):
        document = long_call.measure(arguments)
        operands = long_call.draw(arguments, torch.device("cpu"))
        found = []
        for call in long_call.contestants(arguments, operands).values():
            *e_grads, c_grad = call()
            c_grad = operands.accumulating.main_grad.clone() if c_grad is None else c_grad
            found.append((torch.cat(e_grads), c_grad))
    assert document["span"] == 100
    assert list(document["contestants"]) == [
        "one call", "4 calls of 100", "one call, main_grad", "4 calls of 100, main_grad",
    ]  # fmt: skip
    assert all(row["bytes_beside_gradients"] > 0 for row in document["contestants"].values())
    for pair in found[1:]:
        check_equal(dict(enumerate(pair)), dict(enumerate(found[0])), 1e-2)
