"""Several predictions of each position in one pass, on 1 to 4 real ranks against the oracle."""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import multi_token_oracle, relative_error
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import (
    VocabParallelOptions,
    count_valid_tokens,
    linear_cross_entropy,
    multi_token_cross_entropy,
)

LAYOUTS = ("replicated", "sharded", "sequence")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 4e-3}
SHIFT, WEIGHTS = (1, 2, 3), (1.0, 0.3, 0.1)
UNEVEN = {1: (11,), 2: (6, 5), 3: (5, 4, 2), 4: (4, 4, 3, 0)}
TILES = {"impl": "chunked", "memory_budget": 320}  # some ten logits at a time


@dataclass(frozen=True)
class Case:
    """Operands, drawn from a seed, and the options of one call."""

    rows: tuple[int, ...]
    layout: str = "replicated"
    shift: tuple[int, ...] = SHIFT
    batch: int = 2
    length: int = 12
    ignored: float = 0.2
    padding: int = 0
    stacked: bool = False
    bias: bool = False
    weights: bool = False
    dtype: str = "float64"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def check_case(case: Case) -> None:
    """Assert the loss, the heads' own, and every gradient, in float64."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(case.seed)
    columns = degree if case.layout == "sharded" else 1
    shape = (columns, case.batch, case.length)
    dtype = getattr(torch, case.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(case.rows)
    e, c = normal(len(case.shift), *shape, 5), normal(total, 5)
    bias = normal(total) if case.bias else None
    token_weight = normal(*shape).abs() if case.weights else None
    targets = torch.randint(total - case.padding, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < case.ignored
    targets[ignored] = case.options.get("ignore_index", -100)
    upstream = normal(len(case.shift), *shape)

    whole = [None if t is None else t.double().clone().requires_grad_() for t in (e, c, bias)]
    formula = {
        name: value
        for name, value in case.options.items()
        if name not in (*TILES, "backward", "hidden_grad_scale")
    }
    per_token = case.options.get("reduction") == "none"
    want, want_heads = multi_token_oracle(
        whole[0], whole[1], targets, whole[2], shift=case.shift, token_weight=token_weight,
        vocab_size=total - case.padding, **formula,
    )  # fmt: skip
    (want * upstream).sum().backward() if per_token else want.backward()

    def own(tensor: Tensor, dim: int, column: int = 0) -> Tensor:
        """Cut (..., columns, batch, length, ...) to this rank's."""
        if case.layout == "sharded":
            return tensor.select(column, rank)
        tensor = tensor.select(column, 0)
        return tensor.chunk(degree, dim)[rank] if case.layout == "sequence" else tensor

    start = sum(case.rows[:rank])
    stop = start + case.rows[rank]
    stack = own(e, -2, 1).clone()
    heads = (
        [stack.requires_grad_()] if case.stacked else [h.clone().requires_grad_() for h in stack]
    )
    rows = c[start:stop].clone().requires_grad_()
    own_bias = None if bias is None else bias[start:stop].clone().requires_grad_()
    mine = rank if case.layout == "sharded" else 0
    result = multi_token_cross_entropy(
        heads[0] if case.stacked else heads,
        rows,
        targets[mine],
        own_bias,
        shift=case.shift,
        return_heads=not per_token,
        token_weight=None if token_weight is None else token_weight[mine],
        hidden_layout=case.layout,
        vocab_parallel_options=VocabParallelOptions(
            start, stop, None, vocab_size=total - case.padding
        ),
        **case.options,
    )
    tolerance = TOLERANCE[case.dtype]
    if per_token:
        assert relative_error(result, own(want, -1, 1), 1.0) < tolerance, case
        torch.autograd.backward(result, own(upstream, -1, 1).to(result.dtype))
    else:
        loss, found_heads = result
        assert relative_error(loss, want, 1.0) < tolerance, case
        assert relative_error(found_heads, want_heads, 1.0) < tolerance, case
        assert not found_heads.requires_grad
        loss.backward()
    found = heads[0].grad if case.stacked else torch.stack([head.grad for head in heads])
    scale = case.options.get("hidden_grad_scale", 1.0)
    assert relative_error(found, scale * own(whole[0].grad, -2, 1), 0.1) < tolerance, case
    assert relative_error(rows.grad, whole[1].grad[start:stop], 0.1) < tolerance, case
    if own_bias is not None:
        assert relative_error(own_bias.grad, whole[2].grad[start:stop], 0.1) < tolerance, case


def check_named_cases(degree: int) -> None:
    for layout, extra in product(
        LAYOUTS,
        (
            {},
            {"head_weights": WEIGHTS, "softcap": 3.0},
            {"head_weights": (1.0, 0.0, -0.5), "z_loss": 0.01, "temperature": 0.7},
            {"reduction": "sum", "head_weights": WEIGHTS, "label_smoothing": 0.1},
            {"reduction": "none", "head_weights": WEIGHTS},
            {"ignore_index": 0},
            {"num_valid_tokens": 17, "hidden_grad_scale": 2.0},
            {"num_valid_tokens": torch.tensor([9, 0, 14])},
        ),
    ):
        case = Case(UNEVEN[degree], layout, bias=True, weights="head_weights" in extra)
        for turn, way in enumerate(("reference", "recompute", "probs")):
            how = {"impl": way} if way == "reference" else {**TILES, "backward": way}
            check_case(replace(case, stacked=turn % 2 == 0, options={**extra, **how}))
    for layout in LAYOUTS:
        plain = Case(UNEVEN[degree], layout)
        check_case(replace(plain, dtype="float16"))
        check_case(replace(plain, dtype="float32", padding=2, stacked=True))
        check_case(replace(plain, ignored=1.0))
        check_case(replace(plain, shift=(0,)))
        check_case(replace(plain, shift=(11, 0, 0, 5)))


@st.composite
def drawn_cases(draw: st.DrawFn, degree: int) -> Case:
    rows = draw(st.lists(st.integers(0, 7), min_size=degree, max_size=degree))
    rows[draw(st.integers(0, degree - 1))] += 1
    layout = draw(st.sampled_from(LAYOUTS))
    length = draw(st.integers(0, 3)) * (degree if layout == "sequence" else 1)
    shift = draw(st.lists(st.integers(0, max(length - 1, 0)), min_size=1, max_size=4))
    options = {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "softcap": draw(st.sampled_from((None, 5.0))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
        "z_loss": draw(st.sampled_from((0.0, 0.02))),
        "hidden_grad_scale": draw(st.sampled_from((1.0, 2.0))),
    }
    if draw(st.booleans()):
        weight = st.floats(-2.0, 2.0, width=16)
        options["head_weights"] = draw(st.tuples(*[weight] * len(shift)))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_valid_tokens"] = draw(st.integers(0, 50))
    if draw(st.booleans()):
        ways = ("auto", "recompute", "probs")
        options |= {"impl": "chunked", "backward": draw(st.sampled_from(ways))}
        options["memory_budget"] = draw(st.integers(80, 1200))
    return Case(
        tuple(rows),
        layout,
        tuple(shift),
        batch=draw(st.integers(1, 3)),
        length=length,
        ignored=draw(st.sampled_from((0.0, 0.3, 1.0))),
        padding=draw(st.integers(0, sum(rows) - 1)),
        stacked=draw(st.booleans()),
        bias=draw(st.booleans()),
        weights=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
        options=options,
    )


def check_drawn_cases(degree: int) -> None:
    # Seeded: every rank draws the same. No shrinking, which ranks would do each by itself.
    @seed(0)
    @settings(
        max_examples=60,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(drawn_cases(degree))
    def property_holds(case: Case) -> None:
        check_case(case)

    property_holds()


def check_communication(degree: int) -> None:
    """One exchange of statistics and one reduction of dE, as many calls as one head has."""
    options = VocabParallelOptions.from_vocab(11)
    for layout in LAYOUTS:
        length = 12 // degree if layout == "sequence" else 12
        torch.manual_seed(0)
        e = torch.randn(3, 2, length, 5, requires_grad=True)
        c = torch.randn(options.stop - options.start, 5, requires_grad=True)
        known = {"vocab_parallel_options": options, "hidden_layout": layout, "validate": None}
        counts = []
        for several in (False, True):
            loss = multi_token_cross_entropy if several else linear_cross_entropy
            given = e if several else e[0]
            shift = SHIFT if several else 1
            targets = torch.arange(24).view(2, 12) % 11
            with CollectiveRecorder() as recorded:
                loss(given, c, targets, shift=shift, **known).backward()
            counts.append(Counter(call.name for call in recorded.calls))
        assert counts[0] == counts[1], (layout, counts)


def check_mistakes(degree: int) -> None:
    """A mistake of one rank alone ends every rank in the same sentence."""
    options = VocabParallelOptions.from_vocab(11)
    c = torch.randn(options.stop - options.start, 5)
    e, targets = torch.randn(3, 2, 6, 5), torch.zeros(2, 6, dtype=torch.int64)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([e[0], e[1], e[2, :1]], {}, r"of one shape, dtype and device.*\[1, 6, 5\]"),
        ([e[0], e[1], None], {}, "of one shape, dtype and device.*NoneType"),
        (7, {}, "several hidden states.*got int"),
        ([], {}, "several hidden states.*got none"),
        (e[:2], {}, "one hidden state for each of shift"),
        (e[0, 0], {}, r"expected hidden states e \[H, ..., T, D\]"),
        (e, {"shift": (1, 2, 6)}, "shift must be an integer in"),
        (e, {"shift": ()}, "at least one prediction"),
        (e, {"head_weights": (1.0, 2.0)}, "head_weights must be 3 finite numbers"),
        (e, {"head_weights": (1.0, 2.0, float("nan"))}, "head_weights must be 3 finite numbers"),
        (e, {"num_valid_tokens": torch.ones(2)}, "must hold one number, or 3"),
        (e, {"return_lse": True}, "has no return_lse"),
        (e, {"reduction": "none", "return_heads": True}, "leave out return_heads"),
        (e, {"colour": "blue"}, "colour"),
    ]
    for hidden, extra, words in wrong:
        if degree > 1 and dist.get_rank() == 0:  # whose arguments are right
            hidden, extra = e, {}
        with pytest.raises(ValueError, match=words):
            multi_token_cross_entropy(
                hidden, c, targets, vocab_parallel_options=options, **{"shift": SHIFT, **extra}
            )


def check_all(degree: int) -> None:
    check_named_cases(degree)
    check_drawn_cases(degree)
    check_communication(degree)
    check_mistakes(degree)


@pytest.mark.parametrize(
    "degree", [1, 2, *(pytest.param(degree, marks=pytest.mark.slow) for degree in (3, 4))]
)
def test_against_the_formula(degree: int) -> None:
    run_ranks(check_all, degree, timeout=110, degree=degree)


def test_one_tensor_is_read_in_place() -> None:
    e = torch.randn(3, 2, 6, 5)
    c, targets = torch.randn(7, 5), torch.zeros(2, 6, dtype=torch.int64)
    loss = multi_token_cross_entropy(e.requires_grad_(), c, targets, shift=SHIFT)
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved_tensors(loss.grad_fn)}
    assert e.untyped_storage().data_ptr() in kept


def saved_tensors(node: Any) -> list[Tensor]:
    own = [t for t in getattr(node, "saved_tensors", ()) if t is not None]
    return own + [t for after, _ in node.next_functions if after for t in saved_tensors(after)]


def test_tokens_are_counted_for_each_head() -> None:
    labels = torch.tensor([[1, -100, 2, 3], [1, 1, 1, -100]])
    assert count_valid_tokens(labels, shift=SHIFT).tolist() == [4, 3, 1]
    assert count_valid_tokens([labels, labels], shift=(0,)).tolist() == [12]
    assert count_valid_tokens(labels, shift=1).shape == ()
