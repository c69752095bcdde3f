"""Distillation against the float64 formula on real ranks; memory, communication and mistakes."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import GRAD_FLOOR, LOSS_FLOOR, TOLERANCE
from tests.oracle import distillation_oracle, relative_error
from tests.ranks import ROOT, rank_device, run_ranks
from tests.recording import AllocationRecorder, CollectiveRecorder
from tests.test_examples import python_blocks
from vocab_parallel import (
    VocabParallelOptions,
    linear_distillation,
    linear_distillation_from_top_k,
)
from vocab_parallel.distillation.arguments import marked_ids
from vocab_parallel.distillation.top_k_teacher import ABSENT

LAYOUTS = ("replicated", "sharded", "sequence")
DIVERGENCES = ("forward_kl", "reverse_kl", "js")


@dataclass(frozen=True)
class Case:
    """Operands, drawn from a seed, and the options of one call.

    Attributes:
        rows: how many rows each rank holds.
        k: of the teacher's top-k; None for hidden states and rows.
        batch, length, hidden, teacher_hidden: shapes; of one rank in the "sharded" layout.
        padding: how many of the last rows are no tokens.
        ignored: the share of labels that are ignored; None where there are no labels.
        absent: the share of the top-k's entries that are none.
        halves: whether backward comes in two halves, weights first.
    """

    rows: tuple[int, ...]
    k: int | None = None
    batch: int = 2
    length: int = 6
    hidden: int = 5
    teacher_hidden: int = 3
    padding: int = 0
    ignored: float | None = 0.3
    absent: float = 0.0
    seed: int = 0
    dtype: str = "float64"
    bias: bool = False
    teacher_bias: bool = False
    teacher_softcap: float | None = None
    weights: bool = False
    halves: bool = False
    options: dict[str, Any] = field(default_factory=dict)


class Whole:
    """What a case draws, the same on every rank; the first axis is the ranks' in "sharded"."""

    def __init__(self, case: Case, degree: int) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        dtype = getattr(torch, case.dtype)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        columns = degree if case.options.get("hidden_layout") == "sharded" else 1
        shape, total = (columns, case.batch, case.length), sum(case.rows)
        vocabulary = total - case.padding
        self.vocabulary = vocabulary
        self.e, self.c = normal(*shape, case.hidden), normal(total, case.hidden)
        self.teacher_e = normal(*shape, case.teacher_hidden)
        self.teacher_c = normal(total, case.teacher_hidden)
        self.bias = normal(total) if case.bias else None
        self.teacher_bias = normal(total) if case.teacher_bias else None
        self.weights = torch.rand(shape, generator=generator).to(dtype) if case.weights else None
        self.upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.targets: Tensor | None = None
        if case.ignored is not None:
            self.targets = torch.randint(vocabulary, shape, generator=generator)
            dropped = torch.rand(shape, generator=generator) < case.ignored
            self.targets[dropped] = case.options.get("ignore_index", -100)
        logits = self.teacher_e.double() @ self.teacher_c.double().T
        if self.teacher_bias is not None:
            logits = logits + self.teacher_bias.double()
        if case.teacher_softcap is not None:
            logits = case.teacher_softcap * torch.tanh(logits / case.teacher_softcap)
        logits = logits[..., :vocabulary] / case.options.get("temperature", 1.0)
        self.log_q, self.ids = torch.log_softmax(logits, -1), None
        if case.k is not None:
            noise = torch.rand(logits.shape, generator=generator)
            self.ids = noise.argsort(-1)[..., : min(case.k, vocabulary)]
            self.log_q = self.log_q.gather(-1, self.ids).to(dtype)
            gone = torch.rand(self.ids.shape, generator=generator) < case.absent
            gone[..., 0] = False
            self.log_q = self.log_q.masked_fill(gone, -torch.inf)


def own_tokens(whole: Tensor, case: Case, rank: int, degree: int, dim: int) -> Tensor:
    """Cut what is laid out as hidden states are, on a rank of the layout."""
    layout = case.options.get("hidden_layout", "replicated")
    if layout == "sharded":
        return whole[rank]
    return whole[0].chunk(degree, dim)[rank] if layout == "sequence" else whole[0]


def own_labels(whole: Tensor | None, case: Case, rank: int) -> Tensor | None:
    if whole is None:
        return None
    return whole[rank if case.options.get("hidden_layout") == "sharded" else 0].to(rank_device())


def call(
    case: Case,
    whole: Whole,
    leaves: tuple[Tensor, Tensor, Tensor | None],
    rank: int,
    degree: int,
    **extra: Any,
) -> Tensor:
    """Call either form with this rank's part."""
    start = sum(case.rows[:rank])
    stop = start + case.rows[rank]
    device = rank_device()
    shared = {
        "targets": own_labels(whole.targets, case, rank),
        "token_weight": own_labels(whole.weights, case, rank),
        "vocab_parallel_options": VocabParallelOptions(start, stop, vocab_size=whole.vocabulary),
        **case.options,
        **extra,
    }

    def own(tensor: Tensor) -> Tensor:
        return own_tokens(tensor, case, rank, degree, -2).to(device)

    if whole.ids is not None:
        return linear_distillation_from_top_k(
            leaves[0], leaves[1], own(whole.ids), own(whole.log_q), leaves[2], **shared
        )
    bias = whole.teacher_bias
    return linear_distillation(
        leaves[0], leaves[1], own(whole.teacher_e), whole.teacher_c[start:stop].to(device),
        leaves[2], None if bias is None else bias[start:stop].to(device),
        teacher_softcap=case.teacher_softcap, **shared,
    )  # fmt: skip


def differences(case: Case) -> dict[str, float]:
    """Return the relative errors of this rank's loss and gradients."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    whole = Whole(case, degree)
    options = {
        name: value
        for name, value in case.options.items()
        if name not in ("hidden_layout", "hidden_grad_scale", "memory_budget")
    }
    if options.get("beta", 0.5) is None:
        del options["beta"]
    wide = [t if t is None else t.double().requires_grad_() for t in (whole.e, whole.c, whole.bias)]
    wanted = distillation_oracle(
        wide[0], wide[1], whole.log_q, wide[2], ids=whole.ids, targets=whole.targets,
        token_weight=whole.weights, vocab_size=whole.vocabulary,
        least=torch.finfo(getattr(torch, case.dtype)).eps, **options,
    )  # fmt: skip
    shift, per_token = options.get("shift", 0), options.get("reduction") == "none"
    upstream = whole.upstream[..., : case.length - shift]
    ((wanted * upstream).sum() if per_token else wanted).backward()

    start = sum(case.rows[:rank])
    rows, device = slice(start, start + case.rows[rank]), rank_device()

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device).requires_grad_()

    def own_result(per_token: Tensor) -> Tensor:
        if case.options.get("hidden_layout") == "sequence":
            return torch.nn.functional.pad(per_token[0], (0, shift)).chunk(degree, -1)[rank]
        return own_tokens(per_token, case, rank, degree, -1)

    leaves = (
        leaf(own_tokens(whole.e, case, rank, degree, -2)),
        leaf(whole.c[rows]),
        None if whole.bias is None else leaf(whole.bias[rows]),
    )
    loss = call(case, whole, leaves, rank, degree)
    expected = own_result(wanted) if per_token else wanted
    grad = own_result(upstream).to(loss) if per_token else None
    present = [tensor for tensor in leaves if tensor is not None]
    if case.halves:  # a zero-bubble schedule's, in the order that is not its own
        weights = torch.autograd.grad(loss, present[1:], grad, retain_graph=True)
        found = [*torch.autograd.grad(loss, present[:1], grad), *weights]
    else:
        found = list(torch.autograd.grad(loss, present, grad))
    scale = case.options.get("hidden_grad_scale", 1.0)
    gradients = [
        t if t is None else (torch.zeros_like(t) if t.grad is None else t.grad) for t in wide
    ]
    errors = {"loss": relative_error(loss.cpu(), expected, LOSS_FLOOR)}
    own_grads = [scale * own_tokens(gradients[0], case, rank, degree, -2), gradients[1][rows]]
    if gradients[2] is not None:
        own_grads.append(gradients[2][rows])
    for name, one, other in zip(("e", "c", "bias"), found, own_grads, strict=False):
        errors[name] = relative_error(one.cpu(), other, GRAD_FLOOR)
    return errors


def check_case(case: Case) -> None:
    """Assert on every rank that the case is right; fails on all ranks where it fails on one."""
    fault = ""
    try:
        # A gradient has log-ratios of 10 and more as factors, and with them the logits' rounding.
        tolerance = 5.0 * TOLERANCE[getattr(torch, case.dtype)]
        wrong = {name: e for name, e in differences(case).items() if not e <= tolerance}
        fault = f"{case}: {wrong}" if wrong else ""
    except Exception as error:
        fault = f"{case}: {error!r}"
    faults: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    assert not any(faults), [f"rank {rank}: {text}" for rank, text in enumerate(faults) if text]


UNEVEN = {1: (11,), 2: (6, 5), 3: (5, 4, 2), 4: (4, 4, 3, 0)}


def named_cases(degree: int) -> list[Case]:
    """The corners, in every layout, divergence and form."""
    rows, cases = UNEVEN[degree], []
    for layout in LAYOUTS:
        for name in DIVERGENCES:
            tiny = {"hidden_layout": layout, "divergence": name, "memory_budget": 700}
            labels = {"cross_entropy_weight": 0.25, "temperature": 2.0, "shift": 1}
            cases.append(Case(rows, k=11, length=12, options={**tiny, "shift": 1}))  # all rows
            for k in (None, 4):
                case = {"k": k, "length": 12, "bias": True, "teacher_bias": True}
                cases += [
                    Case(rows, **case, options={**tiny, **labels}, halves=True, weights=True),
                    Case(rows, **case, ignored=1.0, options={**tiny, **labels}),
                    Case(rows, **case, ignored=None, options={**tiny, "shift": 1}),
                    Case(rows, k=k, length=degree, batch=1, options=tiny),  # one token a rank
                    Case(rows, **case, dtype="float32", options={**tiny, **labels}),
                ]
            cases.append(Case(rows, length=0, options=tiny))
            if name != "reverse_kl":
                options = {**tiny, "other": False}
                cases.append(Case(rows, k=4, length=12, absent=0.5, options=options))
    return cases


@st.composite
def drawn_cases(draw: st.DrawFn, degree: int) -> Case:
    """Draw shapes and a combination of options."""
    rows = draw(st.lists(st.integers(0, 9), min_size=degree, max_size=degree))
    rows[draw(st.integers(0, degree - 1))] += 1
    layout, name = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DIVERGENCES))
    length = draw(st.integers(0, 4)) * (degree if layout == "sequence" else 1)
    options: dict[str, Any] = {
        "hidden_layout": layout,
        "divergence": name,
        "beta": draw(st.sampled_from((None, 0.1, 0.9))) if name == "js" else None,
        "temperature": draw(st.sampled_from((1.0, 0.5, 3.0))),
        "softcap": draw(st.sampled_from((None, 0.5, 20.0))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "shift": draw(st.integers(0, max(length - 1, 0))),
        "hidden_grad_scale": draw(st.sampled_from((1.0, 2.0))),
        "memory_budget": draw(st.sampled_from((None, 100, 1000))),
    }
    ignored = draw(st.sampled_from((None, 0.0, 0.3, 1.0)))
    if ignored is not None:
        options["cross_entropy_weight"] = draw(st.sampled_from((0.0, 0.3)))
        options["ignore_index"] = draw(st.sampled_from((-100, 0)))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_valid_tokens"] = draw(st.integers(0, 50))
    k = draw(st.sampled_from((None, 1, 3, 50)))
    if k is not None and name != "reverse_kl":
        options["other"] = draw(st.booleans())
    return Case(
        tuple(rows),
        k=k,
        batch=draw(st.integers(1, 3)),
        length=length,
        hidden=draw(st.integers(1, 5)),
        teacher_hidden=draw(st.integers(1, 5)),
        padding=draw(st.integers(0, sum(rows) - 1)),
        ignored=ignored,
        absent=draw(st.sampled_from((0.0, 0.4))),
        seed=draw(st.integers(0, 10_000)),
        dtype=draw(st.sampled_from(("float64", "float32"))),
        bias=draw(st.booleans()),
        teacher_bias=draw(st.booleans()),
        teacher_softcap=draw(st.sampled_from((None, 2.0))),
        weights=draw(st.booleans()),
        halves=draw(st.booleans()),
        options=options,
    )


def check_corners_and_combinations(degree: int, examples: int, seed_value: int = 0) -> None:
    for case in named_cases(degree):
        check_case(case)

    # Seeded, so that every rank draws the same cases and shrinks a failure with the others.
    @seed(seed_value)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(drawn_cases(degree))
    def property_holds(case: Case) -> None:
        check_case(case)

    property_holds()
    if degree == 2 and dist.get_backend() == "gloo":
        check_what_is_communicated()
        check_what_nobody_checked_is_nan()
        check_mistakes()


def check_what_is_communicated() -> None:
    """One all-gather of the statistics, one sum of dE; for "js" one small gather between."""
    rank, tokens = dist.get_rank(), 12
    for name, k, lines in (
        ("forward_kl", None, 3), ("reverse_kl", None, 3), ("js", None, 2), ("js", 4, 5),
    ):  # fmt: skip
        for labels in (0, 2):  # how many statistics they add
            options: dict[str, Any] = {"divergence": name}
            options["cross_entropy_weight"] = 0.5 * (labels > 0)
            case = Case((6, 5), k=k, options=options)
            whole = Whole(case, 2)
            leaf = whole.e[0].clone().requires_grad_()
            start = (0, 6)[rank]
            rows = whole.c[start : start + (6, 5)[rank]].clone().requires_grad_()
            with CollectiveRecorder() as seen:
                loss = call(case, whole, (leaf, rows, None), rank, 2, validate=False)
            later = [("all_gather", (2, tokens))] if name == "js" and k is None else []
            found = [(each.name, each.shape) for each in seen.calls]
            assert found == [("all_gather", (lines + labels, tokens)), *later], (name, k, labels)
            with CollectiveRecorder() as seen:
                loss.backward()
            assert [(each.name, each.shape) for each in seen.calls] == [
                ("all_reduce", (tokens, case.hidden))
            ]


def check_what_nobody_checked_is_nan() -> None:
    """Where values are not read, as on a GPU, an id that is no token must not pass for one."""
    case = Case((6, 5), options={"cross_entropy_weight": 0.5})
    whole, rank = Whole(case, 2), dist.get_rank()
    assert whole.targets is not None
    whole.targets[0, 0, 0] = 11
    leaves = whole.e[0], whole.c[slice(0, 6) if rank == 0 else slice(6, 11)], None
    assert call(case, whole, leaves, rank, 2, validate=False).isnan()
    with pytest.raises(ValueError, match=r"lie in \[0, 11\)"):
        call(case, whole, leaves, rank, 2)
    # A CPU's values cost nothing to read, so that those of a top-k are always checked there.
    ids, log_q = marked_ids(
        torch.tensor([[3, 11, -1, -1]]), torch.tensor([[-1, -1, -1, -torch.inf]]), 11
    )
    assert log_q.isnan().tolist() == [[False, True, True, False]]
    assert ids[0, 3] == ABSENT


LABELLED = {"cross_entropy_weight": 0.5, "targets": torch.zeros(2, 6, dtype=torch.long)}
LOGITS = torch.zeros(2, 6, 4)
# On which rank, in which form, with what; what the error says.
MISTAKES: list[tuple[int | None, int | None, dict[str, Any], str]] = [
    (None, None, {"divergence": "kl"}, "unknown divergence 'kl': known are .*'js'"),
    (1, None, {"divergence": "kl"}, "rank 1 of the vocab group: unknown divergence"),
    (1, None, {"divergence": "js"}, r"divergence: \['forward_kl', 'js'\]"),
    (None, None, {"beta": 0.5}, 'beta is of divergence="js"'),
    (None, None, {"divergence": "js", "beta": 1.0}, "beta must lie between 0 and 1, got 1.0"),
    (1, None, {"divergence": "js", "beta": True}, "beta must lie between|beta is of"),
    (None, None, {"cross_entropy_weight": 1.0, **LABELLED} | {"cross_entropy_weight": 1.0},
     r"cross_entropy_weight must lie in \[0, 1\), got 1.0"),
    (None, None, {"cross_entropy_weight": 0.5, "targets": None}, "but targets is None"),
    (1, None, {**LABELLED}, r"cross_entropy_weight: \[0.0, 0.5\]"),
    (None, None, {"temperature": 0.0}, "temperature must be a positive number"),
    (None, None, {"teacher_softcap": -1.0}, "of the teacher's .*softcap must be a positive"),
    (1, None, {"teacher_softcap": 1.0}, r"teacher's softcap: \[None, 1.0\]"),
    (None, None, {"teacher_e": torch.zeros(2, 6, 4)}, "of the teacher's .*hidden size of e is 4"),
    (1, None, {"teacher_e": torch.zeros(2, 5, 3)}, r"teacher_e must be \[2, 6\] tokens"),
    (None, None, {"teacher_c": torch.zeros(3, 3)}, "of the teacher's .*c has 3 rows"),
    (None, None, {"teacher_bias": torch.zeros(3)}, "of the teacher's .*bias must be"),
    (None, None, {"memory_budget": 12}, "memory_budget is 12 bytes"),
    (1, None, {"shift": 6}, r"shift must be an integer in \[0, 6\)"),
    (None, None, {"shift": (1, 2)}, r"must be one integer, got \(1, 2\): call it once for each"),
    (None, None, {"e": None}, "e must be a tensor, got NoneType"),
    (None, 4, {"other": False, "divergence": "reverse_kl"}, "reverse_kl\" is infinite"),
    (None, 4, {"other": 1}, "other must be True or False"),
    (1, 4, {"other": False}, r"other: \[True, False\]"),
    (None, 4, {"teacher_logprobs": LOGITS}, "those of a position sum to 4: pass log_softmax"),
    (1, 4, {"teacher_logprobs": LOGITS}, "rank 1 .*: teacher_logprobs must be log-prob"),
    (None, 4, {"teacher_logprobs": LOGITS[:1]}, r"must be \[2, 6, 'k'\] for e"),
    (None, 4, {"teacher_ids": LOGITS}, "teacher_ids must be int32 or int64"),
    (None, 4, {"teacher_ids": LOGITS.long()}, "names a token twice at one position"),
    (1, 4, {"teacher_ids": LOGITS.long() + torch.arange(4)}, r"a checksum.*must agree|must agree"),
    (None, 4, {"teacher_ids": LOGITS.long() + torch.arange(8, 12)}, r"in \[0, 11\), got 8 to 11"),
    (1, 4, {"teacher_ids": LOGITS.long() - 1}, r"in \[0, 11\), got -1 to -1"),
    (None, 4, {"teacher_ids": [1]}, "teacher_ids must be a tensor, got list"),
]  # fmt: skip


def check_mistakes() -> None:
    """Every rank raises, with the same words, and the group works on afterwards."""
    rank = dist.get_rank()
    for where, k, changed, pattern in MISTAKES:
        case = Case((6, 5), k=k, dtype="float32", ignored=None)
        whole, start = Whole(case, 2), (0, 6)[rank]
        rows = slice(start, start + (6, 5)[rank])
        given: dict[str, Any] = {
            "e": whole.e[0],
            "c": whole.c[rows],
            "vocab_parallel_options": VocabParallelOptions.from_vocab(11),
        }
        if "targets" in changed or where is not None:
            given["targets"] = LABELLED["targets"]
        if k is None:
            given |= {"teacher_e": whole.teacher_e[0], "teacher_c": whole.teacher_c[rows]}
        else:
            assert whole.ids is not None
            given |= {"teacher_ids": whole.ids[0], "teacher_logprobs": whole.log_q[0]}
        function = linear_distillation if k is None else linear_distillation_from_top_k
        assert function(**given).isfinite()
        if where in (None, rank):
            given |= changed
        with pytest.raises(ValueError, match=pattern) as caught:
            function(**given)
        texts: list[str] = [""] * 2
        dist.all_gather_object(texts, str(caught.value))
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "degree", [1, 2, *(pytest.param(degree, marks=pytest.mark.slow) for degree in (3, 4))]
)
def test_corners_and_combinations(degree: int) -> None:
    run_ranks(check_corners_and_combinations, degree, timeout=110, degree=degree, examples=60)


def operands(dtype: torch.dtype, tokens: int = 24, rows: int = 40) -> tuple[Tensor, ...]:
    """Draw (e, c, teacher_e, teacher_c)."""
    torch.manual_seed(1)
    e, c = torch.randn(tokens, 8).to(dtype), torch.randn(rows, 8).to(dtype)
    teacher = torch.randn(tokens, 6).to(dtype), torch.randn(rows, 6).to(dtype)
    return e.requires_grad_(), c.requires_grad_(), *teacher


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Nothing is rounded but the gradients, at the end."""
    e, c, teacher_e, teacher_c = operands(dtype)
    targets = torch.arange(24)
    options: dict[str, Any] = {"divergence": name, "temperature": 2.0, "targets": targets}
    options["cross_entropy_weight"] = 0.3
    loss = linear_distillation(e, c, teacher_e, teacher_c, memory_budget=2**13, **options)
    found = torch.autograd.grad(loss, (e, c))
    log_q = torch.log_softmax(teacher_e.double() @ teacher_c.double().T / 2.0, -1)
    wanted = distillation_oracle(e, c, log_q, **options)
    assert loss.dtype == torch.float32
    assert relative_error(loss, wanted) < 1e-6
    for one, other in zip(found, exact_gradients(e, c, log_q, options), strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) < 2.0 * torch.finfo(dtype).eps


def exact_gradients(
    e: Tensor, c: Tensor, log_q: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    wide = (e.detach().double().requires_grad_(), c.detach().double().requires_grad_())
    return torch.autograd.grad(distillation_oracle(*wide, log_q, **options), wide)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_has_learned(name: str) -> None:
    """Of a divergence near 0 neither value nor gradient is lost in float32."""
    e, c, _, _ = operands(torch.float32)
    torch.manual_seed(2)
    teacher_e, teacher_c = (t.detach() + 1e-3 * torch.randn_like(t) for t in (e, c))
    loss = linear_distillation(e, c, teacher_e, teacher_c, divergence=name)
    log_q = torch.log_softmax(teacher_e.double() @ teacher_c.double().T, -1)
    wide = (e.detach().double().requires_grad_(), c.detach().double().requires_grad_())
    wanted = distillation_oracle(*wide, log_q, divergence=name)
    assert wanted < 1e-4
    if name == "js":
        assert relative_error(loss, wanted) < 1e-3
    # The two lse are rounded, to 5e-7, before their difference is taken.
    assert (loss.double() - wanted).abs() < 5e-7
    for one, other in zip(
        torch.autograd.grad(loss, (e, c)),
        exact_gradients(e, c, log_q, {"divergence": name}),
        strict=True,
    ):
        assert relative_error(one, other) < 5e-4


def test_parts_of_a_confident_student() -> None:
    """A part's share of the probability is rounded with its lse, but the mean is not so."""
    e, c, teacher_e, teacher_c = (torch.randn(size, 16) for size in (96, 600, 96, 600))
    e = (5.0 * e).requires_grad_()
    loss = linear_distillation(
        e, c, teacher_e, teacher_c, divergence="reverse_kl", memory_budget=2**16
    )
    wide = e.detach().double().requires_grad_()
    log_q = torch.log_softmax(teacher_e.double() @ teacher_c.double().T, -1)
    wanted = distillation_oracle(wide, c.double(), log_q, divergence="reverse_kl")
    found, exact = (torch.autograd.grad(*pair)[0] for pair in ((loss, e), (wanted, wide)))
    assert relative_error(found, exact) < 3e-5


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 40])
def test_logits_far_apart(name: str, k: int | None) -> None:
    """Where neither gives the other's token a probability that float32 has, nothing is NaN."""
    e, c, teacher_e, teacher_c = operands(torch.float32)
    log_q = torch.log_softmax(15.0 * teacher_e.double() @ teacher_c.double().T, -1)
    assert log_q.min() < -200.0
    options: dict[str, Any] = {"divergence": name}
    far = (15.0 * e).detach().requires_grad_()
    if k is None:
        loss = linear_distillation(far, c, 15.0 * teacher_e, teacher_c, **options)
    else:
        ids = torch.arange(40).expand(24, 40)
        loss = linear_distillation_from_top_k(far, c, ids, log_q.float(), **options)
    wide = (far.detach().double().requires_grad_(), c.detach().double().requires_grad_())
    wanted = distillation_oracle(*wide, log_q, **options)
    assert relative_error(loss, wanted) < 1e-5
    for one, other in zip(
        torch.autograd.grad(loss, (far, c)), torch.autograd.grad(wanted, wide), strict=True
    ):
        assert relative_error(one, other, GRAD_FLOOR) < 1e-4


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 3])
def test_masked_rows(name: str, k: int | None) -> None:
    """A bias of -inf takes a row out of both distributions."""
    e, c, teacher_e, teacher_c = operands(torch.float64)
    bias = torch.zeros(40, dtype=torch.float64)
    bias[30:] = -torch.inf
    options: dict[str, Any] = {"divergence": name, "memory_budget": 4096}
    log_q = torch.log_softmax(teacher_e @ teacher_c.T + bias, -1)
    if k is None:
        loss = linear_distillation(e, c, teacher_e, teacher_c, bias, bias, **options)
        wanted = distillation_oracle(e, c, log_q[:, :30], divergence=name, vocab_size=30)
    else:
        ids = torch.arange(27, 27 + k).expand(24, k)
        given = log_q.gather(-1, ids)
        loss = linear_distillation_from_top_k(e, c, ids, given, bias, **options)
        wanted = distillation_oracle(e, c, given, ids=ids, divergence=name, vocab_size=30)
    assert relative_error(loss, wanted) < 1e-12
    found, exact = (torch.autograd.grad(each, (e, c)) for each in (loss, wanted))
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", ["all but the k", "the k", "all but the k, of both"])
def test_masked_rows_of_a_top_k(name: str, dtype: torch.dtype, masked: str) -> None:
    """What the student's mask leaves to one side of a top-k alone is compared as what it is."""
    e, c, teacher_e, teacher_c = operands(dtype)
    bias = torch.zeros(40, dtype=dtype)
    bias[slice(4) if masked == "the k" else slice(4, None)] = -torch.inf
    own = bias if masked.endswith("of both") else torch.zeros_like(bias)
    log_q = torch.log_softmax(teacher_e @ teacher_c.T + own, -1)[:, :4].contiguous()
    ids = torch.arange(4).expand(24, 4)
    # The outcomes are five: the k, and the rest.
    wide = (e.detach().double().requires_grad_(), c.detach().double().requires_grad_())
    log_p = torch.log_softmax(wide[0] @ wide[1].T + bias, -1)
    rest = torch.zeros(24, 1) if masked != "the k" else log_p[:, 4:].exp().sum(-1, keepdim=True)
    p = torch.cat([log_p[:, :4].exp(), rest.double()], -1)
    q = log_q.double().exp()
    left = (1.0 - q.sum(-1, keepdim=True)) * (not masked.endswith("of both"))
    q = torch.cat([q, left], -1)
    m = 0.5 * q + 0.5 * p

    def kl(one: Tensor, two: Tensor) -> Tensor:
        there = one > 0
        return (one * (one.where(there, 1.0).log() - two.where(there, 1.0).log())).sum(-1).mean()

    wanted = {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "js": lambda: 0.5 * kl(q, m) + 0.5 * kl(p, m),
    }[name]()
    loss = linear_distillation_from_top_k(e, c, ids, log_q, bias, divergence=name)
    if name == "forward_kl" and not masked.endswith("of both"):
        assert wanted == loss == torch.inf
        return
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert 0.0 < wanted.item() < torch.inf
    assert relative_error(loss, wanted) < tolerance
    # A teacher that was run in float64 leaves what its numbers leave once they are the student's.
    wider = torch.log_softmax((teacher_e @ teacher_c.T + own).double(), -1)[:, :4]
    again = linear_distillation_from_top_k(e, c, ids, wider, bias, divergence=name)
    assert relative_error(again, wanted) < tolerance
    for one, other in zip(
        torch.autograd.grad(loss, (e, c)), torch.autograd.grad(wanted, wide), strict=True
    ):
        assert relative_error(one, other, GRAD_FLOOR) < tolerance


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("ignore_index", [0, 7, -100])
def test_without_targets_none_is_ignored(k: int | None, ignore_index: int) -> None:
    """Whatever label would be ignored: there are none."""
    e, c, teacher_e, teacher_c = operands(torch.float64)
    log_q = torch.log_softmax(teacher_e @ teacher_c.T, -1)
    options: dict[str, Any] = {"ignore_index": ignore_index}
    if k is None:
        loss = linear_distillation(e, c, teacher_e, teacher_c, **options)
        wanted = distillation_oracle(e, c, log_q)
    else:
        given, ids = log_q.topk(k)
        loss = linear_distillation_from_top_k(e, c, ids, given, **options)
        wanted = distillation_oracle(e, c, given, ids=ids)
    assert relative_error(loss, wanted) < 1e-12
    found, exact = (torch.autograd.grad(each, (e, c)) for each in (loss, wanted))
    for one, other in zip(found, exact, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_tile(name: str, k: int | None, dtype: torch.dtype) -> None:
    tokens, rows, budget = 256, 2048, 2**18
    e, c, teacher_e, teacher_c = operands(dtype, tokens, rows)
    targets = torch.randint(rows, (tokens,))
    options: dict[str, Any] = {"divergence": name, "memory_budget": budget, "softcap": 20.0}
    options |= {"targets": targets, "cross_entropy_weight": 0.5, "temperature": 2.0}
    ids = torch.randint(rows // 8, (tokens, 8)) + torch.arange(8) * (rows // 8)
    log_q = torch.full((tokens, 8), -3.0)
    with AllocationRecorder([e, c, teacher_e, teacher_c, targets, ids, log_q]) as seen:
        if k is None:
            loss = linear_distillation(e, c, teacher_e, teacher_c, **options)
        else:
            loss = linear_distillation_from_top_k(e, c, ids, log_q, **options)
        loss.backward()
    # A tile's tensors share the budget, 4 or more of them; dE and dC are smaller than that.
    assert tokens * rows * 4 > 4 * budget
    assert seen.largest.size <= budget // 4, seen.largest


@pytest.mark.parametrize("k", [None, 3])
def test_autograd(k: int | None) -> None:
    """Only what is asked for is computed, a graph may run twice, and there is no second one."""
    e, c, teacher_e, teacher_c = operands(torch.float64)
    teacher_e.requires_grad_()
    ids = torch.arange(3).expand(24, 3)
    log_q = torch.full((24, 3), -2.0, dtype=torch.float64)

    def loss_of(e: Tensor, c: Tensor) -> Tensor:
        if k is None:
            return linear_distillation(e, c, teacher_e, teacher_c)
        return linear_distillation_from_top_k(e, c, ids, log_q)

    loss = loss_of(e, c)
    first = torch.autograd.grad(loss, (e, c), retain_graph=True)
    again = torch.autograd.grad(3.0 * loss, (e, c), retain_graph=True)
    for one, other in zip(first, again, strict=True):
        assert relative_error(3.0 * one, other) < 1e-14
    loss.backward()
    assert teacher_e.grad is None
    assert not loss_of(e.detach(), c.detach()).requires_grad
    (frozen,) = torch.autograd.grad(loss_of(e, c.detach()), e)
    assert relative_error(frozen, first[0]) < 1e-14
    (twice,) = torch.autograd.grad(loss_of(e, c), e, create_graph=True)
    with pytest.raises(ValueError, match="no second derivative"):
        twice.sum().backward()


def test_autocast() -> None:
    e, c, teacher_e, teacher_c = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_distillation(e, c, teacher_e, teacher_c)
    rounded = [t.detach().bfloat16() for t in (e, c, teacher_e, teacher_c)]
    assert relative_error(loss, linear_distillation(*rounded)) < 1e-7


def test_page() -> None:
    """The snippets of docs/distillation.md run as they are printed."""
    for block in python_blocks((ROOT / "docs" / "distillation.md").read_text()):
        names: dict[str, Any] = {"__name__": "snippet"}
        exec(compile(block, "docs/distillation.md", "exec"), names)
        assert names["loss"].isfinite()
        assert names["hidden"].grad is not None
