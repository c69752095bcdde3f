"""The Triton kernels against plain torch, in Triton's interpreter."""

import itertools
import warnings
from typing import Any

import pytest
import torch

from tests.cases import tiles_of
from tests.oracle import distillation_oracle, oracle, relative_error
from tests.ranks import run_ranks
from vocab_parallel import linear_cross_entropy, linear_distillation, plan_backward
from vocab_parallel.backends import registry
from vocab_parallel.backends.interface import ClassifierGrad, Shard, Transform, Upstream, Wanted
from vocab_parallel.backends.torch import TorchBackend
from vocab_parallel.layout import IGNORED, OUT_OF_RANGE, mark_labels
from vocab_parallel.statistics import (
    LARGEST_OTHER,
    LSE,
    MEAN_LOG_PROB,
    SUM,
    TARGET,
    Columns,
    count_lines,
)

INTERPRETED = {"TRITON_INTERPRET": "1"}


def drawn_shard(generator: torch.Generator, num_tokens: int, num_rows: int, **given: Any) -> Shard:
    drawn = {
        "hidden": torch.randn(num_tokens, 8, generator=generator),
        "classifier": torch.randn(num_rows, 8, generator=generator),
        "bias": None,
        "targets": torch.randint(-1, num_rows + 1, (num_tokens,), generator=generator),
        "sum_dtype": torch.float32,
    }
    return Shard.of(**{**drawn, **given})  # type: ignore[arg-type]


def spans(num_rows: int) -> list[slice]:
    """Two blocks of rows where there are two rows."""
    cut = num_rows // 2
    return [slice(0, cut), slice(cut, num_rows)] if cut else [slice(0, num_rows)]


def statistics_of(backend: TorchBackend, shard: Shard, raw: torch.Tensor) -> torch.Tensor:
    found = torch.full((count_lines(shard.columns), len(shard.hidden)), torch.nan)
    for rows in spans(len(shard.classifier)):
        logits, tokens = raw.clone()[:, rows], slice(0, len(shard.hidden))
        block, first = backend.block(shard, rows), rows.start == 0
        backend.add_statistics(found, logits, block, tokens, first=first)
    return found


def gradient_of(
    backend: TorchBackend,
    shard: Shard,
    statistics: torch.Tensor,
    grads: torch.Tensor,
    raw: torch.Tensor,
) -> list[torch.Tensor]:
    parts, found = [], []
    for rows in spans(len(shard.classifier)):
        # A kernel may touch what follows a tile in its row of the buffer.
        tile, tokens = raw.clone()[:, rows], slice(0, len(shard.hidden))
        wanted = Wanted(True, True, shard.bias is not None)
        upstream = Upstream(statistics, grads, wanted, ClassifierGrad(torch.float32))
        sums = backend.put_gradient(tile, backend.block(shard, rows), tokens, upstream, tile)
        parts.append(tile)
        found += [] if sums is None else [sums]
    return [torch.cat(parts, 1), *found]


COLUMNS: list[Columns] = [
    (LSE, TARGET),
    (LSE, TARGET, SUM),
    (LSE, TARGET, MEAN_LOG_PROB),
    (LSE, TARGET, SUM, MEAN_LOG_PROB, LARGEST_OTHER),
]
# Statistics, softcap, temperature, whether there is a bias.
# Every third: each value meets each of the others.
CASES = list(itertools.product(COLUMNS, (None, 1.5), (1.0, 0.7), (False, True)))[::3]


def drawn_bias(generator: torch.Generator, num_rows: int, case: Any) -> torch.Tensor | None:
    columns, softcap, _, has_bias = case
    if not has_bias:
        return None
    bias = torch.randn(num_rows, generator=generator)
    if softcap is None and SUM not in columns:
        bias[: num_rows // 2] = -torch.inf  # rows that are masked: a block of them, even
    return bias


def check_passes() -> None:
    from vocab_parallel.backends.triton import TritonBackend

    generator = torch.Generator().manual_seed(0)
    for turn, case in enumerate(CASES):
        columns, softcap, temperature, _ = case
        num_tokens, num_rows = (1, 5, 70)[turn % 3], (1, 37, 600)[turn % 3]
        bias = drawn_bias(generator, num_rows, case)
        transform = Transform(softcap, temperature)
        shard = drawn_shard(
            generator, num_tokens, num_rows, transform=transform, bias=bias, columns=columns
        )
        # The logits lie in a wider buffer.
        raw = torch.full((num_tokens, num_rows + 3), torch.nan)
        raw[:, :num_rows] = shard.hidden @ shard.classifier.T
        both = (TorchBackend(), TritonBackend())
        expected, found = (statistics_of(backend, shard, raw) for backend in both)
        finite = expected.isfinite()
        assert torch.equal(finite, found.isfinite()), case
        assert relative_error(found[finite], expected[finite]) < 1e-6, case

        grads = torch.randn(len(columns), num_tokens, generator=generator)
        gradients = [gradient_of(backend, shard, expected, grads, raw) for backend in both]
        for want, got in zip(*gradients, strict=True):
            known = want.isfinite()  # a target that is masked has no finite gradient
            assert torch.equal(known, got.isfinite()), case
            # 1 - tanh^2 of a saturated softcap cancels, here as there; of one logit, all of it.
            tolerance, floor = (2e-6, 0.0) if softcap is None else (5e-5, 0.1)
            assert relative_error(got[known], want[known], floor) < tolerance, case

        raw[0, num_rows - 1] = torch.nan  # is in the statistics of its token, and not hidden
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter says so, too
            spoiled = [statistics_of(backend, shard, raw) for backend in both]
        for statistics in spoiled:
            assert statistics[0].isnan().tolist() == [token == 0 for token in range(num_tokens)]


def check_whole_loss() -> None:
    """Every way through the kernels, in float32, with all options at once."""
    registry.choose = lambda hidden, classifier: "triton"
    torch.manual_seed(0)
    e, c, bias = torch.randn(20, 8), torch.randn(300, 8), torch.randn(300)
    targets = torch.randint(300, (20,))
    targets[::7] = -100
    count = torch.tensor([13])
    options: dict[str, Any] = {
        "softcap": 3.0,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "temperature": 0.8,
        "token_weight": torch.rand(20, 3)[:, 1],  # its numbers do not lie side by side
    }
    leaves = [t.double().requires_grad_() for t in (e, c, bias)]
    exact_loss, _ = oracle(leaves[0], leaves[1], targets, leaves[2], num_valid_tokens=13, **options)
    exact = torch.autograd.grad(exact_loss, leaves)
    partly = {"memory_budget": 20 * 256 * 4}
    plan = plan_backward(20, 300, 8, torch.float32, **partly)
    assert (plan.backward, plan.kept_rows) == ("recompute", 256), "one block of two"
    for backward, extra, tile in (
        ("auto", partly, ()),
        ("recompute", {}, ()),
        ("recompute", {}, (8, 128)),
        ("probs", {}, ()),
    ):
        own = [t.requires_grad_() for t in (e.clone(), c.clone(), bias.repeat_interleave(2)[::2])]
        given = count.clone()
        with tiles_of(*tile):
            loss = linear_cross_entropy(
                own[0], own[1], targets, own[2], backward=backward, num_valid_tokens=given,
                **extra, **options,
            )  # fmt: skip
            given.zero_()  # the caller's own: backward has what forward had
            (2.0 * loss).backward()
        assert relative_error(loss, exact_loss) < 1e-6
        for tensor, want in zip(own, exact, strict=True):
            assert relative_error(tensor.grad, 2.0 * want) < 5e-6, (backward, extra, tile)


def check_distillation() -> None:
    """Where kernels work, tensor operations divide its sum by the tokens that count."""
    registry.choose = lambda hidden, classifier: "triton"
    e, c, teacher_e, teacher_c = (torch.randn(rows, 8) for rows in (40, 150, 40, 150))
    targets = torch.randint(150, (40,))
    targets[::7] = -100
    log_q = torch.log_softmax(teacher_e.double() @ teacher_c.double().T, -1)
    exact = distillation_oracle(e, c, log_q, targets=targets)
    loss = linear_distillation(e, c, teacher_e, teacher_c, targets=targets)
    assert relative_error(loss, exact) < 1e-5


def check_dtypes() -> None:
    """Operands of two dtypes, and float32 logits of float16 operands."""
    from vocab_parallel.backends.triton import TritonBackend

    class LikeGpu(TritonBackend):
        """A GPU multiplies operands of half precision as they are."""

        def widened(self, operand: torch.Tensor, shard: Shard) -> torch.Tensor:
            return operand.to(shard.product_dtype)

    registry.backend_class = lambda name: LikeGpu
    torch.manual_seed(0)
    wide = torch.randn(40, 8), torch.randn(150, 8)
    targets = torch.randint(150, (40,))
    half, full = torch.float16, torch.float32
    recompute, float32 = {"backward": "recompute"}, {"logits_dtype": "float32"}
    for dtypes, tile, options in (
        ((full, half), (), {"backward": "probs"}),
        ((half, full), (16, 64), recompute),
        ((half, half), (16, 64), {**recompute, **float32}),
        ((half, half), (), {"backward": "auto", "memory_budget": 2**20, **float32}),
    ):
        own = [
            t.to(dtype, copy=True).requires_grad_() for t, dtype in zip(wide, dtypes, strict=True)
        ]
        exact = [t.detach().double().requires_grad_() for t in own]
        exact_loss, _ = oracle(*exact, targets)
        with tiles_of(*tile):
            loss: Any = linear_cross_entropy(*own, targets, softcap=None, **options)
            (2.0 * loss).backward()
        mixed = dtypes != (half, half)  # products of float16 round on a CPU
        assert relative_error(loss, exact_loss) < (1e-6 if mixed else 1e-3), (dtypes, options)
        grads = torch.autograd.grad(2.0 * exact_loss, exact)
        for tensor, want in zip(own, grads, strict=True):
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
            limit = torch.finfo(tensor.dtype).eps / 2 + 5e-6 if mixed else 4e-3
            assert relative_error(tensor.grad, want) < limit, (dtypes, options)


def check_labels() -> None:
    from vocab_parallel.kernels.labels import mark_and_shift

    marks = {"ignored": IGNORED, "out_of_range": OUT_OF_RANGE}
    for dtype, vocab_size, shift in itertools.product(
        (torch.int32, torch.int64), (None, 7), (0, 1, 3)
    ):
        labels = torch.randint(-3, 12, (3, 5), dtype=dtype)
        labels[0, 2] = -100
        expected = mark_labels(labels, -100, vocab_size, shift)
        found = mark_and_shift(
            labels, ignore_index=-100, vocab_size=vocab_size, shift=shift, **marks
        )
        assert torch.equal(found, expected), (dtype, vocab_size, shift)


def check_kernels() -> None:
    for check in (check_labels, check_passes, check_whole_loss, check_distillation, check_dtypes):
        check()


def test_kernels() -> None:
    pytest.importorskip("triton")
    run_ranks(check_kernels, 1, environment=INTERPRETED, timeout=110)


def test_what_a_start_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number's width and alignment and a tensor's address tell binaries apart; not on AMD."""
    knobs = pytest.importorskip("triton").knobs
    from vocab_parallel.kernels.launch import Kernel

    def function(tensor, number):  # type: ignore[no-untyped-def]
        pass

    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)  # a launch goes through triton
    own = torch.zeros(9)
    for hip, aligned, binaries in ((None, False, 2), (None, True, 6), ("7.0", True, 0)):
        monkeypatch.setattr(torch.version, "hip", hip)
        kernel = Kernel(function, aligned=aligned)
        kernel._jitted = {(1,): lambda *_: {(1, 1, 1): lambda *_: None}}
        for tensor, number in (
            (own, 0), (own, 1), (own, 17), (own, 18), (own, 2**31), (own[1:], 0), (own, 32),
        ):  # fmt: skip
            kernel.start(own, (1,), (tensor, number), ())
        assert len(kernel._started) == binaries, (hip, aligned)
