"""token_logprobs, predict and count_valid_tokens on real ranks against whole logits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    VocabParallelOptions,
    available_impls,
    count_valid_tokens,
    linear_cross_entropy,
    predict,
    token_logprobs,
)

BATCH, LENGTH, HIDDEN = 2, 12, 5
ROWS = {1: (11,), 3: (5, 6, 0)}
PADDING = 1  # rows of no token, at the end


def own_part(whole: Tensor, layout: str, dim: int) -> Tensor:
    """Cut (columns, ...) to this rank's hidden states or results."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    if layout == "sharded":
        return whole[rank]
    return whole[0].chunk(degree, dim)[rank] if layout == "sequence" else whole[0]


def check_relatives(degree: int) -> None:
    rank = dist.get_rank()
    total = sum(ROWS[degree])
    start = sum(ROWS[degree][:rank])
    stop = start + ROWS[degree][rank]
    options = VocabParallelOptions(start, stop, vocab_size=total - PADDING)
    for layout in ("replicated", "sharded", "sequence"):
        columns = degree if layout == "sharded" else 1
        torch.manual_seed(7)
        e = torch.randn(columns, BATCH, LENGTH, HIDDEN, dtype=torch.float64)
        c = torch.randn(total, HIDDEN, dtype=torch.float64)
        bias = torch.randn(total, dtype=torch.float64)
        targets = torch.randint(total - PADDING, (columns, BATCH, LENGTH))
        targets[..., ::5] = -100
        weight_logprob, weight_entropy = torch.randn(2, columns, BATCH, LENGTH, dtype=torch.float64)

        whole = [t.clone().requires_grad_() for t in (e, c, bias)]
        logits = 4.0 * torch.tanh((whole[0] @ whole[1].T + whole[2]) / 4.0) / 0.7
        logits = logits[..., : total - PADDING]
        log_p = torch.log_softmax(logits, -1)
        valid = targets != -100
        chosen = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * valid
        entropy = -(log_p.exp() * log_p).sum(-1) * valid
        expected = torch.autograd.grad(
            (chosen * weight_logprob + entropy * weight_entropy).sum(), whole
        )
        known = {
            "vocab_parallel_options": options,
            "hidden_layout": layout,
            "temperature": 0.7,
            "softcap": 4.0,
        }
        labels = targets[rank if layout == "sharded" else 0]
        # 500 bytes of tiles of float64 cut both sides.
        for impl, extra in (("reference", {}), ("chunked", {"memory_budget": 500})):
            own = [
                t.clone().requires_grad_()
                for t in (own_part(e, layout, -2), c[start:stop], bias[start:stop])
            ]
            logprobs, entropies = token_logprobs(
                own[0], own[1], labels, own[2], return_entropy=True, impl=impl, **known, **extra
            )
            assert relative_error(logprobs, own_part(chosen, layout, -1)) < 1e-12
            assert relative_error(entropies, own_part(entropy, layout, -1)) < 1e-12
            torch.autograd.backward(
                (logprobs, entropies),
                (own_part(weight_logprob, layout, -1), own_part(weight_entropy, layout, -1)),
            )
            for leaf, want in zip(
                own,
                (
                    own_part(expected[0], layout, -2),
                    expected[1][start:stop],
                    expected[2][start:stop],
                ),
                strict=True,
            ):
                assert relative_error(leaf.grad, want, 1e-3) < 1e-10, (layout, impl)

        alone = token_logprobs(
            own_part(e, layout, -2), c[start:stop], labels, bias[start:stop], **known
        )
        assert isinstance(alone, Tensor)
        assert relative_error(alone, own_part(chosen, layout, -1)) < 1e-12

        for k, budget in ((1, None), (4, 96), (total - PADDING, None)):
            found = predict(
                own_part(e, layout, -2), c[start:stop], bias[start:stop], k=k,
                memory_budget=budget, **known,
            )  # fmt: skip
            best = own_part(logits.detach(), layout, -2).topk(k)
            assert torch.equal(found.ids, best.indices), (layout, k)
            assert relative_error(found.scores, best.values) < 1e-12
            assert not found.scores.requires_grad
            lse = own_part(torch.logsumexp(logits.detach(), -1), layout, -1)
            assert relative_error(found.lse, lse) < 1e-12
        check_masked_predictions(e, c, layout, options)
        for k in (0, total):
            with pytest.raises(ValueError, match=r"k must be an integer in \[1, 10\]"):
                predict(own_part(e, layout, -2), c[start:stop], bias[start:stop], k=k, **known)
        unknown = SimpleNamespace(
            start=start, stop=stop, group=options.group, reduce_e_grad=True, vocab_size=None
        )
        with pytest.raises(ValueError, match=rf"k must be an integer in \[1, {total}\]"):
            predict(
                own_part(e, layout, -2), c[start:stop], k=total + 1,
                vocab_parallel_options=unknown, hidden_layout=layout,
            )  # fmt: skip


def check_masked_predictions(e: Tensor, c: Tensor, layout: str, options: Any) -> None:
    """Beside tokens that are masked k ids are k tokens, on ranks with nothing but these too."""
    rows, vocabulary = slice(options.start, options.stop), options.vocab_size
    for kept in ([3], [0, 7, 9], []):
        bias = torch.full((c.shape[0],), -torch.inf, dtype=torch.float64)
        bias[kept] = 0.5
        logits = own_part(e, layout, -2) @ c[:vocabulary].T + bias[:vocabulary]
        for k, budget in ((1, None), (4, 96), (vocabulary, 96)):
            found = predict(
                own_part(e, layout, -2), c[rows], bias[rows], k=k, memory_budget=budget,
                vocab_parallel_options=options, hidden_layout=layout,
            )  # fmt: skip
            wanted = logits.topk(k).values
            assert torch.allclose(found.scores, wanted, rtol=1e-12, atol=0.0)
            ids = found.ids.sort(-1).values
            assert bool((ids[..., 1:] > ids[..., :-1]).all()), (layout, kept, k)
            assert int(ids.min()) >= 0, (layout, kept, k)
            assert int(ids.max()) < vocabulary, (layout, kept, k)
            assert torch.equal(logits.gather(-1, found.ids), wanted)


def check_a_rank_that_is_masked(impls: list[str]) -> None:
    """A bias of -inf on every row of one rank takes these rows out of the softmax, and no more."""
    torch.manual_seed(11)
    e = torch.randn(6, HIDDEN, dtype=torch.float64)
    c = torch.randn(11, HIDDEN, dtype=torch.float64)
    options = VocabParallelOptions.from_vocab(11)
    rows = slice(options.start, options.stop)
    kept = slice(6, 11)  # rank 0 of 2 has the first 6 rows
    bias = torch.full((11,), -torch.inf, dtype=torch.float64)
    bias[kept] = torch.randn(5, dtype=torch.float64)
    targets = torch.arange(6) % 5 + 6
    whole = [t.clone().requires_grad_() for t in (e, c, bias[kept])]
    log_p = torch.log_softmax(whole[0] @ whole[1][kept].T + whole[2], -1)
    chosen = log_p.gather(1, targets[:, None] - 6).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    weights = torch.randn(2, 6, dtype=torch.float64)
    total = (torch.stack((chosen, entropy)) * weights).sum()
    expected = [torch.autograd.grad(each, whole, retain_graph=True) for each in (total, -chosen[1])]
    for impl in impls:
        own = [t.clone().requires_grad_() for t in (e, c[rows], bias[rows])]
        results = token_logprobs(
            own[0], own[1], targets, own[2], return_entropy=True, impl=impl,
            vocab_parallel_options=options,
        )  # fmt: skip
        loss = linear_cross_entropy(
            own[0], own[1], targets, own[2], impl=impl, token_weight=torch.eye(6)[1],
            reduction="sum", vocab_parallel_options=options,
        )  # fmt: skip
        assert relative_error(torch.stack(results), torch.stack((chosen, entropy))) < 1e-12
        for result, want in zip(
            ((torch.stack(results) * weights).sum(), loss), expected, strict=True
        ):
            found = torch.autograd.grad(result, own)
            assert relative_error(found[0], want[0]) < 1e-12, impl
            assert relative_error(found[1], want[1][rows], 1.0) < 1e-12, impl
            unmasked = found[2][bias[rows].isfinite()]
            assert relative_error(unmasked, want[2][: len(unmasked)], 1.0) < 1e-12, impl
            assert not found[2][bias[rows] == -torch.inf].any(), impl


@pytest.mark.parametrize(
    "impls",
    [["chunked", "reference"], pytest.param(["torch_compile"], marks=pytest.mark.slow)],
)
def test_a_rank_that_is_masked(impls: list[str]) -> None:
    if impls == ["torch_compile"] and available_impls()["torch_compile"] != "ready":
        pytest.skip(available_impls()["torch_compile"])
    run_ranks(check_a_rank_that_is_masked, 2, impls=impls)


def check_entropy_keeps_its_digits(degree: int) -> None:
    """An offset of all logits costs the entropy what it costs torch's log_softmax, not its digits.

    float32 holds a number of the offset's size to ``unit``, which no lse can be better than.
    """
    offset = 1000.0
    unit = torch.finfo(torch.float32).eps * offset
    torch.manual_seed(13)
    e, c = torch.randn(32, 16), 0.4 * torch.randn(600, 16)
    bias, upstream = torch.full((600,), offset), torch.randn(32)
    targets = torch.randint(600, (32,))
    options = VocabParallelOptions.from_vocab(600)
    rows = slice(options.start, options.stop)

    def by_torch(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (e, c)]
        log_p = torch.log_softmax(leaves[0] @ leaves[1].T + bias, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return entropy, *torch.autograd.grad((entropy * upstream).sum(), leaves)

    exact, single = by_torch(torch.float64), by_torch(torch.float32)
    for impl, extra in (("reference", {}), ("chunked", {}), ("chunked", {"memory_budget": 2**16})):
        known = {"vocab_parallel_options": options, "impl": impl, **extra}
        own = [e.clone().requires_grad_(), c[rows].clone().requires_grad_()]
        _, entropy = token_logprobs(*own, targets, bias[rows], return_entropy=True, **known)
        assert relative_error(entropy, exact[0]) < unit, (impl, extra)
        found = torch.autograd.grad((entropy * upstream).sum(), own)
        for ours, theirs, want in zip(found, single[1:], exact[1:], strict=True):
            part = rows if len(want) == 600 else slice(None)
            allowed = relative_error(theirs[part], want[part]) + unit
            assert relative_error(ours, want[part]) < allowed, (impl, extra)
        _, metrics = linear_cross_entropy(*own, targets, bias[rows], return_metrics=True, **known)
        assert relative_error(metrics.entropy, exact[0].mean()) < unit, (impl, extra)


def check_all_relatives(degree: int) -> None:
    check_relatives(degree)
    check_entropy_keeps_its_digits(degree)


@pytest.mark.parametrize("degree", [1, 3])
def test_relatives(degree: int) -> None:
    run_ranks(check_all_relatives, degree, degree=degree)


def check_counting() -> None:
    """The loss and its gradients do not depend on how a batch is cut into microbatches."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    e = torch.randn(degree, 6, 5, HIDDEN, dtype=torch.float64)
    c = torch.randn(13, HIDDEN, dtype=torch.float64)
    targets = torch.randint(13, (degree, 6, 5))
    targets[torch.rand(targets.shape) < 0.4] = -100
    options = VocabParallelOptions.from_vocab(13)
    rows = slice(options.start, options.stop)
    expected_count = int((targets[..., 1:] != -100).sum())
    groups = [dist.group.WORLD, None]
    results = []
    for pieces in (1, 2, 3, 6):
        labels = targets[rank].chunk(pieces)
        count = count_valid_tokens(labels, groups, shift=1)
        assert int(count) == expected_count
        own_e, own_c = e[rank].clone().requires_grad_(), c[rows].clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for hidden, own_labels in zip(own_e.chunk(pieces), labels, strict=True):
            part = linear_cross_entropy(
                hidden, own_c, own_labels, shift=1, num_valid_tokens=count,
                vocab_parallel_options=options, hidden_layout="sharded",
            )  # fmt: skip
            assert isinstance(part, Tensor)
            part.backward()
            loss += part.detach()
        results.append((loss, own_e.grad, own_c.grad))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert relative_error(one, same) < 1e-13
    assert int(count_valid_tokens(targets[rank])) == int((targets[rank] != -100).sum())
    mistakes: Any = ([], None, [1, 2])
    for labels in mistakes:
        with pytest.raises(ValueError, match="needs labels as a tensor or several"):
            count_valid_tokens(labels)
    no_groups: Any = None
    with pytest.raises(ValueError, match="groups must be several"):
        count_valid_tokens(targets[rank], no_groups)
    with pytest.raises(ValueError, match="shift must be an integer of at least 0"):
        count_valid_tokens(targets[rank], shift=-1)


def test_counting() -> None:
    run_ranks(check_counting, 2)


def check_smoothing_is_global() -> None:
    """Smoothing spreads over the whole vocabulary.

    The mistake that this catches: each rank averages its own log-probabilities and divides by its
    own row count, which is right on one rank alone.
    """
    rank, degree = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(5)
    e, c = torch.randn(6, HIDDEN, dtype=torch.float64), torch.randn(12, HIDDEN, dtype=torch.float64)
    targets = torch.arange(6)
    options = VocabParallelOptions.from_vocab(12)
    rows = slice(options.start, options.stop)
    loss = linear_cross_entropy(
        e, c[rows], targets, label_smoothing=0.2, vocab_parallel_options=options
    )
    exact = torch.nn.functional.cross_entropy(e @ c.T, targets, label_smoothing=0.2)
    assert relative_error(loss, exact) < 1e-14

    log_p = torch.log_softmax(e @ c.T, -1)
    local = -0.8 * log_p.gather(1, targets.unsqueeze(1)).mean() - 0.2 * log_p[:, rows].mean()
    assert relative_error(local, exact) > 1e-3, (rank, degree)


def test_smoothing_is_global() -> None:
    run_ranks(check_smoothing_is_global, 2)
