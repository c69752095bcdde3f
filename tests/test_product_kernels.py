"""The kernels that multiply and finish in one, against plain torch, in Triton's interpreter."""

import functools
import warnings
from typing import Any

import pytest
import torch

from tests.cases import tiles_of
from tests.oracle import metrics_oracle, oracle, relative_error
from tests.ranks import run_ranks
from tests.test_kernels import CASES, INTERPRETED, drawn_bias, drawn_shard
from vocab_parallel import linear_cross_entropy
from vocab_parallel.backends import registry
from vocab_parallel.backends.interface import ClassifierGrad, Shard, Transform, Upstream, Wanted
from vocab_parallel.backends.torch import TorchBackend
from vocab_parallel.plan import row_blocks
from vocab_parallel.statistics import LARGEST_OTHER, LSE, MEAN_LOG_PROB, TARGET, Columns, names_of

HALF = torch.float16  # the interpreter has no bfloat16


@functools.cache
def interpreted() -> Any:
    """Return the class of Hopper's backend on a CPU, in float16; it loads triton."""
    from vocab_parallel.backends.hopper import HopperBackend

    class Interpreted(HopperBackend):
        """A CPU widens operands before its products, these kernels do not."""

        keeps = True

        def widened(self, operand: torch.Tensor, shard: Shard) -> torch.Tensor:
            return operand

        def keeps_exponentials(self, shard: Shard) -> bool:
            return self.keeps

    return Interpreted


def use_interpreted() -> None:
    registry.choose = lambda hidden, classifier: "hopper"
    registry.backend_class = lambda name: interpreted()


def check_product_kernels() -> None:
    """Every option, several tiles with ragged edges, a hidden size that no step divides."""
    from vocab_parallel.kernels import product

    product.num_programs = lambda device, num_tiles: min(num_tiles, 2)
    generator = torch.Generator().manual_seed(0)
    for turn, case in enumerate(CASES):
        columns, softcap, temperature, _ = case
        num_tokens, num_rows = (1, 130, 70)[turn % 3], (5, 150, 300)[turn % 3]
        bias = drawn_bias(generator, num_rows, case)
        shard = drawn_shard(
            generator,
            num_tokens,
            num_rows,
            hidden=torch.randn(num_tokens, 72, generator=generator).to(HALF),
            classifier=(torch.randn(num_rows, 72, generator=generator) / 8).to(HALF),
            transform=Transform(softcap, temperature),
            columns=columns,
            bias=bias,
        )
        plain, ours = TorchBackend(), interpreted()()
        raw = shard.hidden.float() @ shard.classifier.float().T
        tokens = slice(0, num_tokens)
        want = torch.empty(len(columns), num_tokens)
        whole = plain.block(shard, slice(0, num_rows))
        plain.add_statistics(want, raw.clone(), whole, tokens, first=True)
        found = torch.full_like(want, torch.nan)
        num_kept = min(num_rows, 256)
        kept = torch.zeros(num_tokens, 320, dtype=HALF)
        memory = 4 * 64 * len(columns)  # some tokens at a time
        # several launches, and groups of several widths
        product._TILES_A_PROGRAM, product._SWIZZLE = 1 + turn % 2, 1 + turn % 3
        ours.put_statistics(found, shard, None, kept[:, :num_kept], memory)
        finite = want.isfinite()
        assert torch.equal(finite, found.isfinite()), case
        assert relative_error(found[finite], want[finite]) < 1e-6, case
        assert relative_error(kept[:, :num_kept], raw[:, :num_kept]) < 1e-3, case
        assert not kept[:, num_kept:].any(), "others are not touched"

        spoiled = shard.hidden.clone()
        spoiled[0, 3] = torch.nan  # is in the statistics of its token, and not hidden
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the interpreter says so, too
            ours.put_statistics(
                found, shard._replace(hidden=spoiled), None, kept[:, :num_kept], memory
            )
        assert found[0].isnan().tolist() == [token == 0 for token in range(num_tokens)], case

        grads = torch.randn(len(columns), num_tokens, generator=generator)
        cut = num_rows // 16 * 8  # a block of rows begins at 16 bytes
        for rows in (slice(0, cut), slice(cut, num_rows)) if cut else (slice(0, num_rows),):
            tile, wanted = raw.clone()[:, rows], Wanted(True, True, bias is not None)
            upstream = Upstream(want, grads, wanted, ClassifierGrad(HALF))
            out = torch.zeros(num_tokens, 320, dtype=HALF)
            own = out[:, : tile.shape[1]]
            sums, got = (
                backend.put_gradient(to, backend.block(shard, rows), tokens, upstream, logits)
                for backend, to, logits in ((plain, tile, tile), (ours, own, None))
            )
            known = tile.isfinite()  # a target that is masked has no finite gradient
            assert relative_error(own[known], tile[known]) < 1e-3, case
            assert not out[:, tile.shape[1] :].any(), "others are not touched"
            assert (got is None) == (sums is None)
            if sums is not None and got is not None:
                known = sums.isfinite()
                assert relative_error(got[known], sums[known]) < 1e-5, case


def check_kept_probabilities() -> None:
    """Statistics and gradients of tokens near their reference, far from it, and of one alone."""
    from vocab_parallel.backends.hopper import rescaled
    from vocab_parallel.kernels.product_statistics import product_statistics
    from vocab_parallel.kernels.scaling import scale_tokens
    from vocab_parallel.kernels.target_rows import add_to_target_rows

    generator = torch.Generator().manual_seed(1)
    ours, plain = interpreted()(), TorchBackend()
    for turn, (softcap, temperature, has_bias) in enumerate(
        ((None, 1.0, False), (30.0, 0.7, True), (None, 0.7, True), (None, 1.0, True))
    ):
        num_tokens, num_rows = (70, 1, 130, 70)[turn], (600, 5, 150, 300)[turn]
        received: Columns = (LSE, TARGET)
        columns = received if turn == 3 else (*received, MEAN_LOG_PROB, LARGEST_OTHER)
        case = (columns, softcap, temperature, has_bias)
        shard = drawn_shard(
            generator,
            num_tokens,
            num_rows,
            hidden=torch.randn(num_tokens, 72, generator=generator).to(HALF),
            classifier=(torch.randn(num_rows, 72, generator=generator) / 8).to(HALF),
            transform=Transform(softcap, temperature),
            columns=columns,
            grad_columns=received,
            bias=drawn_bias(generator, num_rows, case),
        )
        # Nobody's reference is near these tokens' logits, above or below.
        shard.hidden[1::40] *= 300.0
        reference = ours.reference(shard)
        assert reference is not None
        reference[::7] -= 200.0
        reference[3::7] += 200.0
        tokens, whole = slice(0, num_tokens), slice(0, num_rows)
        raw = shard.hidden.float() @ shard.classifier.float().T
        want = torch.empty(len(columns), num_tokens)
        block = plain.block(shard, whole)
        plain.add_statistics(want, raw.clone(), block, tokens, first=True)
        found = torch.full_like(want, torch.nan)
        kept = torch.full((num_tokens, 640), torch.nan)  # float32: the interpreter's bfloat16
        product_statistics(
            shard.hidden, shard.classifier, shard.bias, shard.targets, reference, found,
            names_of(columns), kept[:, :num_rows], shard.transform,
        )  # fmt: skip
        finite = want.isfinite()
        assert torch.equal(finite, found.isfinite()), case
        tolerance = 1e-6 if softcap is None else 1e-5  # a sigmoid's, times the cap
        assert relative_error(found[finite], want[finite]) < tolerance, case
        assert kept[:, num_rows:].isnan().all(), "others are not touched"

        want, found = want[:2], found[:2]
        grads = torch.randn(2, num_tokens, generator=generator)
        grads[0, ::5] = 0.0  # the target's logit alone receives something
        grads[:, 2::5] = 0.0  # nothing does
        upstream = Upstream(want, grads, Wanted(True, True, False), ClassifierGrad(HALF))
        plain.put_gradient(raw, block, tokens, upstream, raw)
        known = raw.isfinite()
        upstream = upstream._replace(statistics=found)
        for _ in range(2):  # as each half of a split backward
            scale, own_entry = rescaled(kept[:, :num_rows], reference, shard, upstream)
        gradient = kept[:, :num_rows] * scale[:, None]
        # What one token gives to its target's row is that row's entry, and what it gets of it.
        eye = torch.eye(num_tokens)
        own = torch.zeros(num_rows, num_tokens)
        add_to_target_rows(own, eye, own_entry, shard.targets)
        assert not (gradient.T * own)[known.T].any(), case
        whole_gradient = torch.empty_like(gradient)
        scale_tokens(
            kept[:, :num_rows], scale, whole_gradient, targets=shard.targets, own=own_entry,
            rows=torch.eye(num_rows),
        )  # fmt: skip
        gradient += own.T
        assert torch.equal(whole_gradient[known], gradient[known]), case
        assert gradient[known].isfinite().all(), case
        for token in range(num_tokens):
            own = known[token]
            error = relative_error(gradient[token][own], raw[token][own], 1e-6)
            assert error < 2e-4, (case, token, error)
        out = torch.empty(num_tokens, num_rows, dtype=HALF)
        scale_tokens(kept[:, :num_rows], scale, out)
        others = known & (kept[:, :num_rows] != 0.0)
        assert relative_error(out[others], raw[others]) < 1e-3
        entries = torch.arange(float(num_tokens))
        scale_tokens(kept[:, :num_rows], scale, out, targets=shard.targets, own=entries)
        for token, target in enumerate(shard.targets.tolist()):
            if 0 <= target < num_rows:
                assert out[token, target] == token


def check_target_rows() -> None:
    """Rows of one token, of some, and of all; runs that begin and end anywhere in the blocks."""
    from vocab_parallel.kernels import target_rows

    generator = torch.Generator().manual_seed(2)
    num_rows, width = 40, 5
    for num_tokens in (1, 33, 150):
        uniform = torch.randint(-2, num_rows + 2, (num_tokens,), generator=generator)
        text = torch.rand(num_tokens, generator=generator).pow(5).mul(num_rows).long()
        one = torch.full((num_tokens,), 7)
        for targets in (uniform, text, one):
            own = (targets >= 0) & (targets < num_rows)
            weight = torch.randn(num_tokens, generator=generator)
            weight[~own] = torch.nan  # may be anything
            values = torch.randn(num_tokens, width, generator=generator)
            found = torch.randn(num_rows, width, generator=generator)
            want = found.double()
            want.index_add_(0, targets[own], (weight.double().unsqueeze(1) * values)[own])
            target_rows.add_to_target_rows(found, values, weight, targets.int())
            assert relative_error(found, want) < 1e-6, (num_tokens, targets)
    for most in (target_rows._MOST_COMPARED, 0):  # compared, and sorted by torch
        target_rows._MOST_COMPARED = most
        targets = torch.randint(-2, 60, (600,), generator=generator).int()
        in_order, tokens = targets.sort(stable=True)
        order = target_rows.order_by_target(targets)
        assert torch.equal(order.targets, in_order)
        assert torch.equal(order.tokens.long(), tokens)


def check_references() -> None:
    """The largest logits of 64 rows, or of all where there are fewer; no logits are held."""
    generator = torch.Generator().manual_seed(3)
    ours = interpreted()()
    for num_tokens, num_rows, softcap in ((70, 300, None), (1, 5, 3.0), (65, 1000, 3.0)):
        shard = drawn_shard(
            generator,
            num_tokens,
            num_rows,
            hidden=torch.randn(num_tokens, 72, generator=generator).to(HALF),
            classifier=(torch.randn(num_rows, 72, generator=generator) / 8).to(HALF),
            transform=Transform(softcap, 0.7),
            bias=torch.randn(num_rows, generator=generator),
        )
        logits = shard.hidden.float() @ shard.classifier.float().T + shard.bias
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        step = max(num_rows // 64, 1)
        want = logits[:, : 64 * step : step].amax(1) / 0.7
        found = ours.reference(shard)
        assert found is not None
        assert relative_error(found, want) < 1e-5


def check_whole_loss() -> None:
    """Every way, in float16, no worse than float16 can be."""
    use_interpreted()
    torch.manual_seed(0)
    e, c = torch.randn(140, 64).to(HALF), (torch.randn(300, 64) / 8).to(HALF)
    targets = torch.randint(300, (140,))
    bias = torch.randn(300).to(HALF)
    targets[1::3] = (e.double() @ c.double().T + bias).argmax(-1)[1::3]
    targets[::7] = -100
    leaves = [t.double().requires_grad_() for t in (e, c, bias)]
    exact_loss, _ = oracle(leaves[0], leaves[1], targets, leaves[2], softcap=3.0, z_loss=0.01)
    exact = torch.autograd.grad(exact_loss, leaves)
    exact_metrics = metrics_oracle(e, c, targets, bias, softcap=3.0)
    partly, extra = {"memory_budget": 140 * 300 * 2}, {}
    tile: tuple[int | None, ...]
    for backward, extra, tile, keeps in (
        ("auto", partly, (None, 128), False),
        ("auto", partly, (None, 128), True),
        ("auto", partly, (60, 128), True),
        ("recompute", {}, (), True),
        ("recompute", {}, (100, 128), True),
        ("auto", {"logits_dtype": "float32"}, (), False),
        ("probs", {}, (), False),
        ("probs", {}, (), True),
    ):
        interpreted().keeps = keeps
        own = [t.clone().requires_grad_() for t in (e, c, bias)]
        case = backward, extra, tile, keeps
        with tiles_of(*tile):
            loss, metrics = linear_cross_entropy(
                own[0], own[1], targets, own[2], backward=backward, softcap=3.0, z_loss=0.01,
                return_metrics=True, **extra,
            )  # fmt: skip
            (64.0 * loss).backward()
        for found, counted in zip(metrics, exact_metrics, strict=True):
            assert relative_error(found, counted) < 1e-5, case
        assert relative_error(loss, exact_loss) < 1e-5, case
        for tensor, want in zip(own, exact, strict=True):
            error = relative_error(tensor.grad, 64.0 * want)
            assert error < 2e-3, (case, error)


def check_tiles_in_the_gradient() -> None:
    """Tiles longer than the budget's, in rows of dC that are still to be written."""
    use_interpreted()
    torch.manual_seed(0)
    num_tokens, num_rows, hidden_size, size = 16, 3000, 64, 512
    lent = (num_tokens, hidden_size)
    lengths = [s.stop - s.start for s in row_blocks(num_rows, size, aligned=True, lent=lent)]
    assert lengths == [2048, 512, 440], lengths
    e, c = torch.randn(num_tokens, hidden_size).to(HALF), torch.randn(num_rows, hidden_size) / 8
    own = [t.to(HALF).requires_grad_() for t in (e, c)]
    wide = [t.detach().double().requires_grad_() for t in own]
    targets = torch.randint(num_rows, (num_tokens,))
    exact = torch.autograd.grad(oracle(wide[0], wide[1], targets)[0], wide)
    budget = num_tokens * size * HALF.itemsize
    loss = linear_cross_entropy(*own, targets, memory_budget=budget)
    found = torch.autograd.grad(64.0 * loss, own)
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, 64.0 * want) < 2e-3


def check_small_logits() -> None:
    """Tokens whose target is no row here, with a lse far below the 0 of a target that is none."""
    use_interpreted()
    torch.manual_seed(0)
    e, c = torch.randn(70, 64).to(HALF), (torch.randn(150, 64) / 8).to(HALF)
    targets = torch.randint(150, (70,))
    targets[::7] = -100
    found = []
    for bias in (torch.full((150,), -150.0), torch.zeros(150)):
        own = [t.to(HALF, copy=True).requires_grad_() for t in (e, c, bias)]
        interpreted().keeps = True
        loss = linear_cross_entropy(own[0], own[1], targets, own[2], backward="probs")
        found.append(torch.autograd.grad(loss, own))
    for shifted, plain in zip(*found, strict=True):  # a softmax does not see what all have
        assert relative_error(shifted, plain) < 2e-3


def check_benchmark() -> None:
    """What benchmarks.products times beside each other gives the same."""
    from benchmarks.products import contestants

    entered = contestants(70, 24, 200, 130, HALF, torch.device("cpu"))
    for two, one in (
        ("and their statistics", "statistics in one kernel"),
        ("and its gradient", "gradient in one kernel"),
    ):
        expected = entered[two].call()
        assert isinstance(expected, torch.Tensor)
        expected = expected.clone()  # the two write to one buffer
        assert relative_error(entered[one].call(), expected) < 1e-3


def check_kernels() -> None:
    check_benchmark()
    check_product_kernels()
    check_target_rows()
    check_references()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter says of each overflow
        check_kept_probabilities()
        check_small_logits()
    check_whole_loss()
    check_tiles_in_the_gradient()


def test_product_kernels() -> None:
    pytest.importorskip("triton.tools.tensor_descriptor")
    run_ranks(check_kernels, 1, environment=INTERPRETED, timeout=110)
