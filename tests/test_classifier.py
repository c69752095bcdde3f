"""The module that owns a rank's rows."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import CCEPipelineLoss, VocabParallelClassifier, linear_cross_entropy
from vocab_parallel.arguments import Operands, prepare
from vocab_parallel.settings import LossSettings

HIDDEN = 6
# Rows of each rank, by degree; ranks without any at the beginning, in the middle and at the end.
PARTITIONS: dict[int, list[list[int]]] = {
    1: [[9]],
    2: [[0, 5], [11, 4]],
    3: [[5, 0, 11], [0, 16, 0], [1, 2, 13]],
}


def check_classifier(degree: int) -> None:
    check_default_partition(degree)
    for rows in PARTITIONS[degree]:
        check_partition(rows)
    check_plans(degree)
    check_unlike_partitions(degree)


def check_partition(rows: Sequence[int]) -> None:
    """Logits, loss and gradients are those of one process, wherever the rows lie."""
    rank, degree = dist.get_rank(), len(rows)
    torch.manual_seed(0)
    whole = nn.Linear(HIDDEN, sum(rows), bias=True, dtype=torch.float64)
    classifier = VocabParallelClassifier.from_linear(whole, None, rows=rows)
    own = slice(classifier.start, classifier.stop)
    assert classifier.weight.shape[0] == own.stop - own.start == rows[rank]
    assert torch.equal(classifier.weight, whole.weight[own])
    for parameter, expected in zip(classifier.parameters(), whole.parameters(), strict=True):
        assert torch.equal(classifier.gather_rows(parameter), expected)
    narrow = classifier.weight.detach().bfloat16()
    assert torch.equal(classifier.gather_rows(narrow), whole.weight.detach().bfloat16())
    fresh = VocabParallelClassifier(HIDDEN, sum(rows), group=None, rows=rows, bias=True)
    assert fresh.row_counts == tuple(rows)
    assert fresh.bias.shape == classifier.bias.shape
    assert fresh.gather_rows(fresh.weight).unique().numel() == HIDDEN * sum(rows), "own draws"

    hidden = torch.randn(degree, 5, HIDDEN, dtype=torch.float64)
    labels = torch.randint(sum(rows), (degree, 5))
    upstream = torch.randn(degree, 5, sum(rows), dtype=torch.float64)

    def gradients(
        objective: torch.Tensor, e: torch.Tensor, module: nn.Module, **given: Any
    ) -> list[torch.Tensor]:
        return list(torch.autograd.grad(objective, [e, *module.parameters()], **given))

    e = hidden.clone().requires_grad_()
    classifier.pipeline_mode = False
    logits = classifier(e)
    found = [logits.detach(), *gradients(logits, e, classifier, grad_outputs=upstream)]
    expected_logits = whole(e)
    exact = [
        expected_logits.detach(),
        *gradients(expected_logits, e, whole, grad_outputs=upstream, retain_graph=True),
    ]
    of_loss = F.cross_entropy(expected_logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    exact += [of_loss.detach(), *gradients(of_loss, e, whole)]
    classifier.pipeline_mode = True
    loss = CCEPipelineLoss(classifier)(e, labels)
    found += [loss.detach(), *gradients(loss, e, classifier)]
    for position in (2, 3, 6, 7):  # of weight and bias
        exact[position] = exact[position][own]
    for got, want in zip(found, exact, strict=True):
        assert relative_error(got, want) < 1e-13, rows

    # Each rank has its own sequence, and wants its gradient alone.
    e = hidden[rank : rank + 1].clone().requires_grad_()
    loss = CCEPipelineLoss(classifier, hidden_layout="sharded")(e, labels[rank : rank + 1])
    exact[5] = exact[5][rank : rank + 1]
    for got, want in zip([loss.detach(), *gradients(loss, e, classifier)], exact[4:], strict=True):
        assert relative_error(got, want) < 1e-13, rows


def check_plans(degree: int) -> None:
    """What ranks notice of one another's plans is alike; no shard takes more than the budget."""
    rows = [64 * 2**rank for rank in range(degree)]
    num_tokens, own_rows = 256, rows[dist.get_rank()]
    torch.manual_seed(0)
    whole = nn.Linear(HIDDEN, sum(rows), bias=False, dtype=torch.float64)
    classifier = VocabParallelClassifier.from_linear(whole, None, rows=rows)
    hidden = torch.randn(num_tokens, HIDDEN, dtype=torch.float64)
    labels = torch.randint(sum(rows), (num_tokens,))
    F.cross_entropy(whole(hidden), labels).backward()
    exact = whole.weight.grad[classifier.start : classifier.stop]
    seen = set()
    for kib, reduction in product((8, 60, 120, 200, 400, 600, 1800), ("mean", "none")):
        budget = kib * 2**10
        settings = LossSettings(reduction=reduction, memory_budget=budget)
        plan = prepare(
            Operands.of(hidden, classifier.weight.detach(), labels),
            settings,
            classifier.options,
            validate=None,
        ).bound.plan
        assert plan.kept_bytes + plan.logits_bytes <= budget
        if plan.backward == "probs":
            assert plan.kept_bytes >= num_tokens * own_rows * 8
        told: list[Any] = [None] * degree
        dist.all_gather_object(told, plan.backward)
        ways = tuple(told)
        seen.add(ways)
        if reduction == "mean":
            loss = CCEPipelineLoss(classifier, shift=0, memory_budget=budget)(hidden, labels)
            found = torch.autograd.grad(loss, classifier.weight)[0]
            assert relative_error(found, exact) < 1e-13, (kib, ways)
    assert {("probs",) * degree, ("recompute",) * degree} <= seen
    assert degree == 1 or any(len(set(ways)) > 1 for ways in seen), "small shards keep more"


def check_unlike_partitions(degree: int) -> None:
    """What one rank does not know is known together, and ends every rank."""
    if degree != 2:
        return
    rows = [[3, 5], [5, 3]][dist.get_rank()]
    classifier = VocabParallelClassifier(HIDDEN, 8, group=None, rows=rows)
    hidden, labels = torch.randn(2, 4, HIDDEN), torch.randint(8, (2, 4))
    with pytest.raises(ValueError, match=r"leave a gap at row 3: \[0, 3\), \[5, 8\)"):
        CCEPipelineLoss(classifier)(hidden, labels)
    with pytest.raises(ValueError, match=r"must agree.*partition: \[\(3, 5\), \(5, 3\)\]"):
        classifier.gather_rows(classifier.weight)
    classifier = VocabParallelClassifier(HIDDEN, 8, group=None, rows=[3, 5])
    tensor = classifier.weight if dist.get_rank() == 0 else torch.zeros(1, HIDDEN)
    with pytest.raises(ValueError, match=r"on rank 1.*expected a plain tensor of the rows \[3, 8"):
        classifier.gather_rows(tensor)
    missing: Any = classifier.weight if dist.get_rank() == 0 else classifier.bias
    with pytest.raises(ValueError, match=r"on rank 1.*of the rows \[3, 8\), got NoneType"):
        classifier.gather_rows(missing)


def check_default_partition(degree: int) -> None:
    mesh = init_device_mesh("cpu", (degree,), mesh_dim_names=("vocab",))
    group = mesh.get_group()
    rank = dist.get_rank()
    for vocab_size in (degree, 7, 12, 151_936 // 1000):
        torch.manual_seed(0)
        whole = nn.Linear(HIDDEN, vocab_size, bias=True, dtype=torch.float64)
        hidden = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
        labels = torch.randint(vocab_size, (2, 5))
        classifier = VocabParallelClassifier.from_linear(whole, group)
        rows = slice(classifier.start, classifier.stop)
        sharded = distribute_tensor(whole.weight.detach(), mesh, [Shard(0)])
        assert torch.equal(sharded.to_local(), classifier.weight.detach()), "DTensor's own rows"
        assert torch.equal(
            DTensor.from_local(
                classifier.weight.detach(),
                mesh,
                [Shard(0)],
                shape=whole.weight.shape,
                stride=(HIDDEN, 1),
            ).full_tensor(),
            whole.weight.detach(),
        )

        assert classifier(hidden) is hidden, "pipeline mode is the identity"
        classifier.pipeline_mode = False
        ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
        logits = classifier(ours)
        upstream = torch.randn(logits.shape, dtype=torch.float64)
        logits.backward(upstream)
        expected = whole(theirs)
        expected.backward(upstream)
        assert relative_error(logits.detach(), expected.detach()) < 1e-14
        assert relative_error(ours.grad, theirs.grad) < 1e-14
        assert relative_error(classifier.weight.grad, whole.weight.grad[rows]) < 1e-14
        assert relative_error(classifier.bias.grad, whole.bias.grad[rows]) < 1e-14

        classifier.pipeline_mode = True
        expected_loss = F.cross_entropy(
            whole(hidden)[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
        ).detach()
        # The module, the DTensor that holds the same rows, and the plain function.
        parameter = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))
        for loss in (
            CCEPipelineLoss(classifier)(hidden, labels),
            CCEPipelineLoss(parameter, classifier.bias)(hidden, labels),
            linear_cross_entropy(
                hidden, classifier.weight, labels, classifier.bias, shift=1,
                vocab_parallel_options=classifier.options,
            ),
        ):  # fmt: skip
            assert relative_error(loss.detach(), expected_loss) < 1e-14
        CCEPipelineLoss(parameter, classifier.bias)(hidden, labels).backward()
        CCEPipelineLoss(classifier)(hidden, labels).backward()
        assert isinstance(parameter.grad, DTensor)
        classifier.zero_grad()
        CCEPipelineLoss(classifier)(hidden, labels).backward()
        assert torch.equal(parameter.grad.to_local(), classifier.weight.grad)

    on_meta = VocabParallelClassifier(HIDDEN, 12, group=group, bias=True, device="meta")
    on_meta.pipeline_mode = False
    for hidden in (torch.randn(2, 5, HIDDEN), torch.empty(2, 5, HIDDEN, device="meta")):
        if rank == 0:  # a shape is nothing that ranks communicate about
            assert on_meta(hidden).shape == (2, 5, 12)
            assert on_meta(hidden).is_meta
            assert on_meta(hidden).requires_grad

    torch.manual_seed(0)  # the same default seed on every rank, as most programs have it
    first = VocabParallelClassifier(HIDDEN, 4 * degree, group=group)
    drawn = [torch.empty(4, HIDDEN) for _ in range(degree)]
    dist.all_gather(drawn, first.weight.detach())
    assert len({float(block.sum()) for block in drawn}) == degree, "each rank has its own rows"
    assert float(first.weight.detach().abs().max()) <= HIDDEN**-0.5
    states: list[float] = [0.0] * degree
    dist.all_gather_object(states, float(torch.rand(())))
    assert len(set(states)) == 1, "the default generators have not moved apart"
    assert f"rows=[{4 * rank}, {4 * rank + 4})" in repr(first)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_classifier(degree: int) -> None:
    run_ranks(check_classifier, degree, degree=degree)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, got 0"):
        VocabParallelClassifier(HIDDEN, 0, group=None)


def test_loss_arguments() -> None:
    linear = nn.Linear(HIDDEN, 9)
    with pytest.raises(ValueError, match="tensor or a module with a weight, got str"):
        CCEPipelineLoss("lm_head")
    with pytest.raises(ValueError, match="a schedule needs a scalar loss"):
        CCEPipelineLoss(linear, reduction="none")
    with pytest.raises(ValueError, match="return_lse is not an option"):
        CCEPipelineLoss(linear, return_lse=True)
    hidden, labels = torch.randn(2, 4, HIDDEN), torch.randint(9, (2, 4))
    loss = CCEPipelineLoss(linear)(hidden, labels)
    expected = F.cross_entropy(linear(hidden)[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1))
    assert torch.allclose(loss, expected)
