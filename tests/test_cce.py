"""Apple's own kernels on each rank's rows, under Triton's interpreter on the CPU, in float16."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.interpreter import INTERPRETED, KERNELS, prepare
from tests.oracle import oracle, relative_error
from tests.ranks import ROOT, run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import CCEPipelineLoss, VocabParallelOptions, available_impls
from vocab_parallel import linear_cross_entropy as ours

pytest.importorskip("triton")
pytest.importorskip("cut_cross_entropy")

TOKENS, HIDDEN, VOCABULARY = 72, 40, 601


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(TOKENS, HIDDEN, generator=generator).half()
    c = torch.randn(VOCABULARY, HIDDEN, generator=generator).div(3).half()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::7] = -100
    return e, c, targets


def check_against_float64(degree: int) -> None:
    launches = prepare()
    e, c, targets = draw(degree)
    options = VocabParallelOptions.from_vocab(VOCABULARY)
    rows = slice(options.start, options.stop)
    first = VOCABULARY // degree - 1
    only_first = targets.clamp(max=first)  # the other ranks own no target
    cases: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("cce_exact", targets, {}),
        ("cce", targets, {"filter_eps": 1e-6}),
        ("cce_exact", targets, {"softcap": 2.0, "shift": 1}),
        ("cce_exact", only_first, {"reduction": "sum", "z_loss": 1e-3, "softcap": 5.0}),
        ("cce_exact", targets, {"reduction": "none", "return_lse": True}),
        ("cce_exact", torch.full_like(targets, -100), {}),
    ]
    for impl, labels, extra in cases:
        if "softcap" in extra and 256 * degree > VOCABULARY:
            continue  # the kernel gets whole blocks of rows alone
        launches.clear()
        exact_e, exact_c = (t.double().requires_grad_() for t in (e, c))
        known = {k: v for k, v in extra.items() if k not in ("filter_eps", "return_lse")}
        exact, exact_lse = oracle(exact_e, exact_c, labels, **known)
        expected = torch.autograd.grad(exact.sum() + exact_lse.sum(), (exact_e, exact_c))
        if "return_lse" not in extra:
            expected = torch.autograd.grad(
                oracle(exact_e, exact_c, labels, **known)[0], (exact_e, exact_c)
            )

        own_e, own_c = e.clone().requires_grad_(), c[rows].clone().requires_grad_()
        with CollectiveRecorder() as forward:
            found = ours(
                own_e,
                own_c,
                labels,
                impl=impl,
                vocab_parallel_options=options,
                validate=False,
                **extra,
            )
        objective = sum(part.sum() for part in found) if isinstance(found, tuple) else found.sum()
        with CollectiveRecorder() as backward:
            objective.backward()
        loss = found[0] if isinstance(found, tuple) else found

        scale = exact.detach().norm().clamp(min=1.0)
        assert float((loss.detach() - exact.detach()).norm() / scale) < 1e-4, (impl, extra)
        errors = (
            relative_error(own_e.grad, expected[0], 1e-3),
            relative_error(own_c.grad, expected[1][rows], 1e-3),
        )
        assert max(errors) < 3e-3, (impl, extra, errors)
        assert launches == dict.fromkeys(KERNELS.values(), 1), "Apple's kernels did the work"
        if degree > 1:
            assert [(call.name, call.size) for call in forward.calls] == [
                ("all_gather", 2 * 4 * TOKENS)
            ]
            sums = [("all_reduce", 4 * TOKENS * HIDDEN)]
            if TOKENS % degree == 0:
                gathered = ("all_gather", 2 * TOKENS * HIDDEN // degree)
                sums = [("reduce_scatter", 4 * TOKENS * HIDDEN), gathered]
            assert [(call.name, call.size) for call in backward.calls] == sums


SLOW = [pytest.param(degree, marks=pytest.mark.slow) for degree in (3, 4)]


@pytest.mark.parametrize("degree", [1, 2, *SLOW])
def test_against_float64(degree: int) -> None:
    run_ranks(check_against_float64, degree, environment=INTERPRETED, timeout=110, degree=degree)


def check_corners() -> None:
    """An empty shard, layouts that gather, gradients that nobody wants, the pipeline loss."""
    launches = prepare()
    rank = dist.get_rank()
    e, c, targets = draw(9)
    start, stop = [(0, VOCABULARY), (VOCABULARY, VOCABULARY)][rank]
    options = VocabParallelOptions(start, stop, vocab_size=VOCABULARY)
    exact_e, exact_c = (t.double().requires_grad_() for t in (e, c))
    expected = torch.autograd.grad(oracle(exact_e, exact_c, targets)[0], (exact_e, exact_c))
    own_e, own_c = e.clone().requires_grad_(), c[start:stop].clone().requires_grad_()
    ours(own_e, own_c, targets, impl="cce_exact", vocab_parallel_options=options).backward()
    assert relative_error(own_e.grad, expected[0]) < 3e-3
    assert relative_error(own_c.grad, expected[1][start:stop]) < 3e-3
    assert sum(launches.values()) == (3 if rank == 0 else 0)

    # Other tokens on each rank; one rank's e and c alone need a gradient.
    options = VocabParallelOptions.from_vocab(VOCABULARY)
    rows = slice(options.start, options.stop)
    halves = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    for needs_e, needs_c in ((True, True), (True, False), (False, True)):
        own_e, own_c = (
            e[halves].clone().requires_grad_(needs_e),
            c[rows].clone().requires_grad_(needs_c),
        )
        ours(
            own_e, own_c, targets[halves], impl="cce_exact", vocab_parallel_options=options,
            hidden_layout="sharded",
        ).backward()  # fmt: skip
        if needs_e:
            assert relative_error(own_e.grad, expected[0][halves]) < 3e-3
        assert own_c.grad is None or relative_error(own_c.grad, expected[1][rows]) < 3e-3

    # As the design documents show it.
    launches.clear()
    weight = torch.nn.Parameter(c.clone())
    loss = CCEPipelineLoss(weight, None, impl="cce")(e, targets)
    loss.backward()
    shifted = F.cross_entropy(e.double()[:-1] @ c.double().T, targets[1:])
    assert relative_error(loss, shifted) < 1e-4
    assert launches == dict.fromkeys(KERNELS.values(), 1)

    filtered = c.clone().requires_grad_()
    ours(e, filtered, targets, impl="cce", filter_eps=2.0).backward()
    assert not filtered.grad.any(), "no entry of a gradient is above 2"

    auto = ours(e, c, targets)
    assert torch.equal(auto, ours(e, c, targets, impl="chunked"))


@pytest.mark.slow
def test_corners() -> None:
    run_ranks(check_corners, 2, environment=INTERPRETED, timeout=110)


def check_refusals() -> None:
    from vocab_parallel.backends import cce_kernels

    e, c, targets = draw(0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"impl": "cce", "filter_eps": -1.0}, "filter_eps must be"),
        (
            {"impl": "cce", "filters": 1},
            r"unknown option 'filters'.* impl 'cce' has \['accum_c_fp32'",
        ),
        ({"impl": "cce", "temperature": 2.0}, 'impl "cce" has no temperature'),
        ({"impl": "cce_exact", "label_smoothing": 0.1}, 'impl "cce_exact" has no label_smoothing'),
        ({"impl": "cce", "e": e.bfloat16(), "c": c.bfloat16()}, "right in float16 alone"),
    ]
    if not cce_kernels.is_newer():
        bias = torch.zeros(VOCABULARY).half()
        refused.append(({"impl": "cce", "bias": bias}, "has no bias: install cut-cross-entropy"))
        refused.append(({"impl": "cce_kahan"}, "too old: it needs 25.6"))
        refused.append(({"impl": "cce_kahan_full_c"}, "too old: it needs 25.6"))
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            ours(**{"e": e, "c": c, "targets": targets, **given})


def test_refusals() -> None:
    run_ranks(check_refusals, 1, environment=INTERPRETED)


def test_unavailable_without_a_gpu() -> None:
    """Each name that does not work says why, and asking for it gives that reason."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels work here")
    e, c, targets = draw(0)
    impls = available_impls()
    assert {"cce", "cce_exact", "cce_kahan", "torch_compile", "chunked", "reference"} <= set(impls)
    for name, state in impls.items():
        if name.startswith("cce"):
            assert state.startswith("no CUDA device")
            with pytest.raises(ValueError, match=f"impl '{name}' does not work here: no CUDA"):
                ours(e, c, targets, impl=name)


@pytest.mark.parametrize("missing", ["triton", "cut_cross_entropy"])
def test_a_missing_package_is_named(missing: str) -> None:
    code = (
        "import importlib.util, vocab_parallel\n"
        "find = importlib.util.find_spec\n"
        f"hidden = '{missing}'\n"
        "importlib.util.find_spec = lambda name, *a: None if name == hidden else find(name, *a)\n"
        "print(vocab_parallel.available_impls()['cce'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{missing} is not installed: pip install")


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert available_impls()["cce"] == "the GPU is older than Ampere: Tesla T4"
