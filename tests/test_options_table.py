"""Options x implementations: the table of docs/options.md, made from what passes here.

`make docs` writes the table anew; the test fails where the page says something else.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import TOLERANCE, Case, differences
from tests.interpreter import INTERPRETED, prepare
from tests.oracle import metrics_oracle, multi_token_oracle, relative_error
from tests.ranks import ROOT, run_ranks
from tests.test_distillation import Case as Distillation
from tests.test_distillation import differences as distillation_errors
from vocab_parallel import (
    VocabParallelOptions,
    linear_cross_entropy,
    multi_token_cross_entropy,
    token_logprobs,
)

pytest.importorskip("triton")
pytest.importorskip("cut_cross_entropy")

PAGE = ROOT / "docs" / "options.md"
IMPLS = ("chunked", "reference", "cce")
ROWS = (20, 21)
WHOLE_BLOCKS = (260, 261)  # with a softcap the kernel gets whole blocks of rows alone
BASE = Case(ROWS, length=6, hidden=24, dtype="float16", ignored=0.2)

# Each option on top of the plain loss; what it is called, and the case.
OPTIONS: dict[str, Case] = {
    "mean of the valid tokens": BASE,
    '`reduction="sum"`': Case(**{**BASE.__dict__, "options": {"reduction": "sum"}}),
    '`reduction="none"`': Case(**{**BASE.__dict__, "options": {"reduction": "none"}}),
    "`ignore_index=0`": Case(**{**BASE.__dict__, "options": {"ignore_index": 0}}),
    "all labels ignored": Case(**{**BASE.__dict__, "ignored": 1.0}),
    "a rank that owns no target": Case(**{**BASE.__dict__, "owned": (0,)}),
    "a rank without rows": Case(**{**BASE.__dict__, "rows": (41, 0)}),
    "`bias`": Case(**{**BASE.__dict__, "bias": True}),
    "`softcap=3`": Case(**{**BASE.__dict__, "rows": WHOLE_BLOCKS, "options": {"softcap": 3.0}}),
    "`temperature=0.7`": Case(**{**BASE.__dict__, "options": {"temperature": 0.7}}),
    "`shift=1`": Case(**{**BASE.__dict__, "options": {"shift": 1}}),
    "`token_weight`": Case(**{**BASE.__dict__, "weights": True}),
    "`num_valid_tokens`": Case(**{**BASE.__dict__, "options": {"num_valid_tokens": 7}}),
    "`return_lse`, differentiated": Case(**{**BASE.__dict__, "options": {"return_lse": True}}),
    "`z_loss=0.01`": Case(**{**BASE.__dict__, "options": {"z_loss": 0.01}}),
    "`label_smoothing=0.1`": Case(**{**BASE.__dict__, "options": {"label_smoothing": 0.1}}),
    "padded vocabulary": Case(**{**BASE.__dict__, "padding": 9}),
    '`hidden_layout="sharded"`': Case(
        **{**BASE.__dict__, "options": {"hidden_layout": "sharded", "shift": 1}}
    ),
    '`hidden_layout="sequence"`': Case(
        **{**BASE.__dict__, "options": {"hidden_layout": "sequence", "shift": 1}}
    ),
    "`hidden_grad_scale=2`": Case(**{**BASE.__dict__, "options": {"hidden_grad_scale": 2.0}}),
    "hidden states that are not contiguous": Case(**{**BASE.__dict__, "noncontiguous": True}),
    "rows in float32, hidden states in float16": Case(**{**BASE.__dict__, "row_dtype": "float32"}),
    '`logits_dtype="float32"`': Case(**{**BASE.__dict__, "options": {"logits_dtype": "float32"}}),
    "int32 labels": Case(**{**BASE.__dict__, "label_dtype": "int32"}),
}


# Of `linear_distillation`, in both of its forms.
DISTILLATION: dict[str, dict[str, Any]] = {
    '`divergence="forward_kl"`': {"options": {"divergence": "forward_kl"}},
    '`divergence="reverse_kl"`': {"options": {"divergence": "reverse_kl"}},
    '`divergence="js"`': {"options": {"divergence": "js", "beta": 0.3}},
    "`temperature=0.7`": {"options": {"temperature": 0.7}},
    "`softcap=3`": {"options": {"softcap": 3.0}},
    "`teacher_softcap=2`": {"teacher_softcap": 2.0},
    "`bias`": {"bias": True},
    "`teacher_bias`": {"teacher_bias": True},
    "without targets": {"ignored": None},
    "all labels ignored": {"ignored": 1.0},
    "`cross_entropy_weight=0.3`": {"options": {"cross_entropy_weight": 0.3}},
    "the same with `temperature=2`": {"options": {"cross_entropy_weight": 0.3, "temperature": 2.0}},
    "`token_weight`": {"weights": True},
    '`reduction="sum"`': {"options": {"reduction": "sum"}},
    '`reduction="none"`': {"options": {"reduction": "none"}},
    "`num_valid_tokens`": {"options": {"num_valid_tokens": 7}},
    "`shift=1`": {"options": {"shift": 1}},
    "padded vocabulary": {"padding": 9},
    "a rank without rows": {"rows": (41, 0)},
    '`hidden_layout="sharded"`': {"options": {"hidden_layout": "sharded", "shift": 1}},
    '`hidden_layout="sequence"`': {"options": {"hidden_layout": "sequence", "shift": 1}},
    "`hidden_grad_scale=2`": {"options": {"hidden_grad_scale": 2.0}},
    "weights' half of backward first": {"halves": True},
}


def entry(run: Callable[[], dict[str, float]], dtype: torch.dtype = torch.float16) -> str:
    """Return "yes" where the results are right, or the words of the refusal."""
    try:
        errors = run()
    except ValueError as error:
        words = str(error).split("; or use")[0]
        return words.partition('" ')[2] if words.startswith("impl ") else words
    tolerance = TOLERANCE[dtype]
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    return "yes"


def option_errors(case: Case, impl: str) -> dict[str, float]:
    extra: dict[str, Any] = {"filter_eps": 1e-7} if impl == "cce" else {}
    return differences(
        Case(**{**case.__dict__, "options": {**case.options, "impl": impl, **extra}})
    )


def entropy_errors(impl: str) -> dict[str, float]:
    options = VocabParallelOptions.from_vocab(sum(ROWS))
    torch.manual_seed(0)
    e, c = torch.randn(12, 24).half(), torch.randn(sum(ROWS), 24).half()
    leaf = e.clone().requires_grad_()
    _, entropy = token_logprobs(
        leaf, c[options.start : options.stop], torch.arange(12), return_entropy=True, impl=impl,
        vocab_parallel_options=options,
    )  # fmt: skip
    entropy.sum().backward()
    wide = e.double().requires_grad_()
    log_p = torch.log_softmax(wide @ c.double().T, -1)
    exact = -(log_p.exp() * log_p).sum(-1)
    exact.sum().backward()
    assert isinstance(wide.grad, Tensor)
    return {"entropy": relative_error(entropy, exact), "e": relative_error(leaf.grad, wide.grad)}


def metrics_errors(impl: str) -> dict[str, float]:
    options = VocabParallelOptions.from_vocab(sum(ROWS))
    torch.manual_seed(0)
    e, c = torch.randn(12, 24).half(), torch.randn(sum(ROWS), 24).half()
    targets = (e.double() @ c.double().T).argmax(-1)
    targets[::3] = torch.arange(4)
    _, metrics = linear_cross_entropy(
        e, c[options.start : options.stop], targets, impl=impl, vocab_parallel_options=options,
        return_metrics=True,
    )  # fmt: skip
    exact = metrics_oracle(e, c, targets)
    return {
        name: relative_error(found, want)
        for name, found, want in zip(metrics._fields, metrics, exact, strict=True)
    }


def heads_errors(impl: str, document_ids: Tensor | None = None) -> dict[str, float]:
    options = VocabParallelOptions.from_vocab(sum(ROWS))
    torch.manual_seed(0)
    e, c = torch.randn(3, 12, 24).half(), torch.randn(sum(ROWS), 24).half()
    leaf, shift = e.clone().requires_grad_(), (1, 2, 3)
    extra: dict[str, Any] = {"filter_eps": 1e-7} if impl == "cce" else {}
    loss = multi_token_cross_entropy(
        leaf, c[options.start : options.stop], torch.arange(12), shift=shift, impl=impl,
        vocab_parallel_options=options, document_ids=document_ids, **extra,
    )  # fmt: skip
    loss.backward()
    wide = e.double().requires_grad_()
    exact, _ = multi_token_oracle(wide, c, torch.arange(12), shift=shift, document_ids=document_ids)
    exact.backward()
    assert isinstance(wide.grad, Tensor)
    return {"loss": relative_error(loss, exact), "e": relative_error(leaf.grad, wide.grad)}


FORMS: tuple[tuple[int | None, bool | None], ...] = ((None, None), (4, True), (4, False))


def distillation_entry(changed: dict[str, Any], k: int | None, other: bool | None) -> str:
    if k is not None and any(name.startswith("teacher") for name in changed):
        return "in `teacher_logprobs`"
    options = {**changed.get("options", {}), **({} if other is None else {"other": other})}
    case = Distillation(**{"rows": ROWS, **changed, "k": k, "options": options})
    return entry(lambda: distillation_errors(case), torch.float64)


def make_page(path: str) -> None:
    prepare()
    lines = [
        "# Options x implementations",
        "",
        "What each implementation does under sharding: made by `make docs` from what passes on two",
        "ranks against float64, gradients included, each option by itself; where an implementation",
        "refuses, the words of its ValueError. `tests/test_loss_ranks.py` draws combinations.",
        "The column `cce` is the registry's cut-cross-entropy 25.1.1, and `cce_exact` the same",
        "kernels; docs/cut-cross-entropy.md says what newer versions add. `torch_compile` does",
        "what `reference` does, but for `logits_dtype`.",
        "",
        "| | " + " | ".join(f"`{impl}`" for impl in IMPLS) + " |",
        "|---|" + "---|" * len(IMPLS),
    ]
    for name, case in OPTIONS.items():
        cells = [entry(lambda case=case, impl=impl: option_errors(case, impl)) for impl in IMPLS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = [entry(lambda impl=impl: heads_errors(impl)) for impl in IMPLS]
    lines.append("| several predictions, `multi_token_cross_entropy` | " + " | ".join(cells) + " |")
    documents = torch.tensor([4, 3, 5, 0]).repeat_interleave(torch.tensor([5, 1, 2, 4]))
    cells = [entry(lambda impl=impl: heads_errors(impl, documents)) for impl in IMPLS]
    lines.append("| the same of packed documents, `document_ids` | " + " | ".join(cells) + " |")
    cells = [entry(lambda impl=impl: entropy_errors(impl)) for impl in IMPLS]
    lines.append("| entropy, `token_logprobs` | " + " | ".join(cells) + " |")
    cells = [entry(lambda impl=impl: metrics_errors(impl)) for impl in IMPLS]
    lines.append("| accuracy and entropy, `return_metrics=True` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Those of `linear_distillation` (hidden states and rows of a teacher) and of",
        "`linear_distillation_from_top_k`, in float64.",
        "",
        "| | hidden states and rows | top-k, `other=True` | top-k, `other=False` |",
        "|---|---|---|---|",
    ]
    for name, changed in DISTILLATION.items():
        cells = [distillation_entry(changed, k, other) for k, other in FORMS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if dist.get_rank() == 0:
        Path(path).write_text("\n".join(lines) + "\n")


def test_page_says_what_passes(tmp_path: Path) -> None:
    if importlib.util.find_spec("cut_cross_entropy.cce_utils") is not None:
        pytest.skip("the page is about the registry's release")
    made = tmp_path / "options.md"
    run_ranks(make_page, 2, environment=INTERPRETED, timeout=150, path=str(made))
    if os.environ.get("WRITE_DOCS") == "1":
        PAGE.write_text(made.read_text())
    assert PAGE.read_text() == made.read_text(), "docs/options.md is stale: run `make docs`"
