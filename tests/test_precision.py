"""Hidden states and rows of two dtypes: against float64, and the table of docs/precision.md.

`make docs` writes the table anew; the test fails where the page is off by more than chance.
"""

import itertools
import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import Case, differences
from tests.oracle import oracle, relative_error
from tests.ranks import ROOT, run_ranks
from vocab_parallel import linear_cross_entropy, plan_backward, predict, token_logprobs
from vocab_parallel.backends import registry

PAGE = ROOT / "docs" / "precision.md"
DTYPES = ("bfloat16", "float16", "float32")
PAIRS = list(itertools.product(DTYPES, DTYPES))
ROWS = (9, 0, 14)
LAYOUTS = ("replicated", "sharded", "sequence")
WAYS: list[dict[str, Any]] = [
    {"backward": "recompute", "memory_budget": 240},  # twenty logits at a time
    {"backward": "probs", "softcap": 2.0},
    {"label_smoothing": 0.1, "return_lse": True, "shift": 1},
    {"impl": "reference", "z_loss": 0.01},
    {"logits_dtype": "float32", "temperature": 0.7},
]


def rounding(dtype: str) -> float:
    """What rounding a result once may cost, and float32's sums."""
    return torch.finfo(getattr(torch, dtype)).eps / 2 + 1e-5


def check_pairs() -> None:
    """A gradient is the exact one, rounded once, in the dtype of what it is of."""
    for turn, (pair, layout) in enumerate(itertools.product(PAIRS, LAYOUTS)):
        for way, options in enumerate(WAYS):
            case = Case(
                ROWS, length=6, dtype=pair[0], row_dtype=pair[1], bias=turn % 2 == 0, padding=2,
                seed=turn, options={**options, "hidden_layout": layout},
            )  # fmt: skip
            errors = differences(case)
            limits = {
                "loss": 1e-5, "lse": 1e-5, "e": rounding(pair[0]), "c": rounding(pair[1]),
                "bias": rounding(pair[0]),
            }  # fmt: skip
            wrong = {name: each for name, each in errors.items() if not each <= limits[name]}
            assert not wrong, (str(case), way, wrong)


def check_disagreement() -> None:
    """Ranks whose rows have unlike dtypes would plan unlike."""
    dtype = torch.bfloat16 if dist.get_rank() else torch.float32
    case = Case((5, 5, 5), dtype="float32", row_dtype=str(dtype).removeprefix("torch."))
    with pytest.raises(ValueError, match=r"must agree.*dtype of c"):
        differences(case)


def check_ranks() -> None:
    check_pairs()
    check_disagreement()


def test_on_ranks() -> None:
    run_ranks(check_ranks, 3)


@pytest.mark.parametrize("pair", PAIRS)
def test_relatives(pair: tuple[str, str]) -> None:
    """Log-probabilities with entropy, predictions, and an accumulator in float32."""
    torch.manual_seed(0)
    own = [t.to(getattr(torch, d)) for t, d in zip(drawn()[:2], pair, strict=True)]
    targets = drawn()[2]
    e, c = (t.clone().requires_grad_() for t in own)
    logprobs, entropy = token_logprobs(e, c, targets, return_entropy=True)
    wide = [t.double().requires_grad_() for t in own]
    log_p = torch.log_softmax(wide[0] @ wide[1].T, -1)
    exact = log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for found, want in zip((logprobs, entropy), exact, strict=True):
        assert relative_error(found, want) < 1e-6
    (logprobs + entropy).sum().backward()
    sum(exact).sum().backward()  # type: ignore[union-attr]
    for found, want, dtype in zip((e, c), wide, pair, strict=True):
        assert found.grad is not None
        assert want.grad is not None
        assert relative_error(found.grad, want.grad) < rounding(dtype)
    assert torch.equal(predict(own[0], own[1]).ids[:, 0], log_p.argmax(-1))
    rows: Any = nn.Parameter(own[1])
    rows.main_grad = torch.zeros(rows.shape)
    linear_cross_entropy(own[0], rows, targets, accumulate_into="main_grad").backward()
    (want,) = torch.autograd.grad(oracle(own[0], wide[1], targets)[0], wide[1])
    assert relative_error(rows.main_grad, want) < 1e-5, "never rounded to the rows' dtype"


def test_plans() -> None:
    """Tiles whose operands are copied are small; what is kept is wide."""
    sizes: dict[str, Any] = {"tokens": 8192, "rows": 75_968, "hidden_size": 4096}
    whole = plan_backward(**sizes, backward="probs")
    for given, bytes_kept in (
        ({"classifier_dtype": torch.float32}, 4), ({"logits_dtype": "float32"}, 4)
    ):  # fmt: skip
        for backward in ("recompute", "probs"):
            plan = plan_backward(**sizes, backward=backward, **given)
            assert plan.tile.tokens <= 2048, (given, backward)
            assert plan.tile.rows <= 4096, (given, backward)
        plan = plan_backward(**sizes, backward="probs", **given)
        assert plan.kept_bytes == bytes_kept // 2 * whole.kept_bytes
        assert plan.tile.tokens * plan.tile.rows * 6 <= 64 * 2**20
    on_cpu = plan_backward(**sizes, device_type="cpu")
    assert on_cpu == plan_backward(**sizes, device_type="cpu", logits_dtype="float32")


def test_kept_logits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Hopper's kernels would keep logits in the operands' dtype, they are not kept."""
    monkeypatch.setattr(registry, "choose", lambda hidden, classifier: "hopper")
    e, c, targets = drawn()
    for dtype, options in ((torch.float16, {}), (torch.bfloat16, {"label_smoothing": 0.1})):
        with pytest.raises(ValueError, match=r"keeps logits in torch.*float16 on a GPU"):
            linear_cross_entropy(
                e.to(dtype), c.to(dtype), targets, logits_dtype="float32", backward="probs",
                **options,
            )  # fmt: skip


def test_refusals() -> None:
    e, c, targets = drawn()
    with pytest.raises(ValueError, match='logits_dtype must be None or "float32"'):
        linear_cross_entropy(e, c, targets, logits_dtype="bfloat16")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"both float64, got torch.float32 and torch.float64"):
        linear_cross_entropy(e, c.double(), targets)
    with pytest.raises(ValueError, match=r"makes logits in torch.float16, as its operands are"):
        linear_cross_entropy(
            e.half(), c.half(), targets, impl="torch_compile", logits_dtype="float32"
        )


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(192, 64, generator=generator)
    c = torch.randn(1500, 64, generator=generator) / 8
    return e, c, torch.randint(1500, (192,), generator=generator)


def errors_of(loss: Any, e: Tensor, c: Tensor, want: list[Tensor]) -> list[float]:
    """Return the errors of the targets' log-probabilities, dE and dC."""
    logprobs = loss(e, c)
    grads = torch.autograd.grad(logprobs.mean(), (e, c))
    return [relative_error(x, y) for x, y in zip((logprobs, *grads), want, strict=True)]


def table() -> list[str]:
    """Compare with float64 what this library does, and what a cast to the narrower dtype does."""
    targets = drawn()[2]
    lines = [
        "| e, dE | c, dC | log-probabilities | dE | dC | cast: log-probabilities | dE | dC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        e, c = (
            t.to(getattr(torch, d)).requires_grad_() for t, d in zip(drawn()[:2], pair, strict=True)
        )
        wide = [t.detach().double().requires_grad_() for t in (e, c)]
        exact = torch.log_softmax(wide[0] @ wide[1].T, -1)[torch.arange(192), targets]
        want = [exact.detach(), *torch.autograd.grad(exact.mean(), wide)]
        narrow = next(getattr(torch, d) for d in DTYPES if d in pair)

        def ours(e: Tensor, c: Tensor) -> Tensor:
            return token_logprobs(e, c, targets)

        def eager(e: Tensor, c: Tensor, dtype: torch.dtype = narrow) -> Tensor:
            logits = F.linear(e.to(dtype), c.to(dtype))
            return -F.cross_entropy(logits.float(), targets, reduction="none")

        found = [errors_of(way, e, c, want) for way in (ours, eager)]
        cells = [f"{error:.0e}" for errors in found for error in errors]
        lines.append(f"| {pair[0]} | {pair[1]} | " + " | ".join(cells) + " |")
    return lines


def test_page_says_what_was_measured() -> None:
    made, text = table(), PAGE.read_text()
    if os.environ.get("WRITE_DOCS") == "1":
        before, _, rest = text.partition("| e, dE")
        after = rest.partition("\n\n")[2]
        text = before + "\n".join(made) + "\n\n" + after
        PAGE.write_text(text)
    numbers = r"(\d)e-(\d\d)"
    for line in made[2:]:
        pair = line.split("|")[1:3]
        (said,) = [each for each in text.splitlines() if each.split("|")[1:3] == pair]
        for a, b in zip(re.findall(numbers, line), re.findall(numbers, said), strict=True):
            ratio = float("e-".join(a)) / float("e-".join(b))
            assert 0.4 < ratio < 2.5, f"docs/precision.md is stale: run `make docs`: {line}"
