"""Packed documents: no prediction, whatever its shift, is of a token of another document."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.data.tokenizers import Document
from tests.batches import batches_of_documents
from tests.oracle import multi_token_oracle, oracle, relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    LogprobsPipelineLoss,
    VocabParallelOptions,
    count_valid_tokens,
    linear_cross_entropy,
    multi_token_cross_entropy,
    score_tokens,
    token_logprobs,
)

ROWS, HIDDEN, BATCH, LENGTH = 11, 5, 3, 8
SHIFT, WEIGHTS = (1, 2, 3), (1.0, 0.4, 0.2)
LAYOUTS = ("replicated", "sharded", "sequence")


def test_as_separate_sequences() -> None:
    """Documents of 3, 4 and 1 tokens, their first tokens marked as a collator marks them."""
    torch.manual_seed(0)
    e = torch.randn(2, 8, HIDDEN, dtype=torch.float64, requires_grad=True)
    c = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])  # a document is a run: ids may come again
    targets = torch.randint(ROWS, (8,)).masked_fill(
        torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]) > 0, -100
    )
    losses, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for part in (slice(0, 3), slice(3, 7)):  # the third has nothing to predict
        for head, shift in enumerate((1, 2)):
            own, _ = oracle(e[head, part], c, targets[part], shift=shift, reduction="sum")
            losses[head] += own
            counts[head] += int((targets[part][shift:] != -100).sum())
    exact = (losses / counts).sum()
    known = {"shift": (1, 2), "document_ids": ids}
    assert count_valid_tokens(targets, **known).tolist() == counts.tolist()
    across = multi_token_cross_entropy(e, c, targets, shift=(1, 2))
    assert relative_error(across, exact) > 1e-3, "labels alone do not say it"
    stacked = torch.stack((targets, ids))
    for found in (
        multi_token_cross_entropy(e, c, targets, **known),
        CCEPipelineLoss(c, shift=(1, 2))((e[0], e[1]), stacked),
        CCEPipelineLoss(c, shift=(1, 2))(e, stacked),
    ):
        assert relative_error(found, exact) < 1e-12
        grads = torch.autograd.grad(found, (e, c))
        for ours, want in zip(
            grads, torch.autograd.grad(exact, (e, c), retain_graph=True), strict=True
        ):
            assert relative_error(ours, want) < 1e-12


def test_the_trainers_packing() -> None:
    """What launch packs: position ids begin again with each document, and say its ids."""
    documents = [
        Document([1, 2, 3]),
        Document([4, 5, 6, 7]),
        Document([8]),
        Document(list(range(9))),
    ]
    batch = batches_of_documents(documents, steps=1, batch=2, sequence=8, packed=True)[0]
    assert batch.position_ids is not None
    ids = (batch.position_ids == 0).cumsum(-1)
    torch.manual_seed(1)
    e = torch.randn(2, 2, 8, HIDDEN, dtype=torch.float64)
    c = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    total, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    for row, parts in enumerate(((slice(0, 3), slice(3, 7), slice(7, 8)), (slice(0, 8),))):
        for part in parts:
            for head, shift in enumerate((1, 2)):
                if part.stop - part.start > shift:
                    own, _ = oracle(
                        e[head, row, part], c, batch.ids[row, part], shift=shift, reduction="sum"
                    )
                    total[head] += own
                    counts[head] += part.stop - part.start - shift
    found = CCEPipelineLoss(c, shift=(1, 2))(e, torch.stack((batch.labels, ids), -2))
    assert relative_error(found, (total / counts).sum()) < 1e-12


def check_layout(layout: str) -> None:
    rank, degree = dist.get_rank(), dist.get_world_size()
    options = VocabParallelOptions.from_vocab(ROWS)
    rows = slice(options.start, options.stop)
    columns = degree if layout == "sharded" else 1
    torch.manual_seed(LAYOUTS.index(layout))
    e = torch.randn(3, columns, BATCH, LENGTH, HIDDEN, dtype=torch.float64)
    c = torch.randn(ROWS, HIDDEN, dtype=torch.float64)
    targets = torch.randint(ROWS, (columns, BATCH, LENGTH))
    targets[torch.rand(targets.shape) < 0.2] = -100
    weight = torch.rand(targets.shape, dtype=torch.float64)
    ids = (torch.rand(targets.shape) < 0.3).cumsum(-1)
    mine = rank if layout == "sharded" else 0
    labels, documents, weights = targets[mine], ids[mine], weight[mine]
    hidden = e[:, mine]
    if layout == "sequence":
        hidden = hidden.chunk(degree, -2)[rank]
    known: dict[str, Any] = {"vocab_parallel_options": options, "hidden_layout": layout}
    packed = {"document_ids": documents, "token_weight": weights}
    whole = {"document_ids": ids, "token_weight": weight}
    stacked = torch.stack((labels, documents), -2)
    groups = [dist.group.WORLD] if layout == "sharded" else []

    def compare(found: Tensor, leaves: list[Tensor], exact: Tensor, several: bool) -> None:
        want = torch.autograd.grad(exact, (wide_e, wide_c), retain_graph=True)
        grads = torch.autograd.grad(found, leaves)
        assert relative_error(found, exact) < 1e-12, layout
        own = want[0][:, mine] if several else want[0][0, mine]
        if layout == "sequence":
            own = own.chunk(degree, -2)[rank]
        assert relative_error(grads[0], own) < 1e-12, layout
        assert relative_error(grads[1], want[1][rows]) < 1e-12, layout

    wide_e, wide_c = e.clone().requires_grad_(), c.clone().requires_grad_()
    exact, _ = multi_token_oracle(
        wide_e, wide_c, targets, shift=SHIFT, head_weights=WEIGHTS, **whole
    )
    for way in ({"impl": "reference"}, {"backward": "recompute"}, {"backward": "probs"}):
        leaves = [hidden.clone().requires_grad_(), c[rows].clone().requires_grad_()]
        found = multi_token_cross_entropy(
            leaves[0],
            leaves[1],
            labels,
            shift=SHIFT,
            head_weights=WEIGHTS,
            **packed,
            **known,
            **way,
        )
        compare(found, leaves, exact, several=True)
    leaves = [hidden.clone().requires_grad_(), c[rows].clone().requires_grad_()]
    loss = CCEPipelineLoss(
        leaves[1], shift=SHIFT, head_weights=WEIGHTS, token_weight=weights, **known
    )
    loss.num_valid_tokens = count_valid_tokens(
        [labels], groups, shift=SHIFT, document_ids=[documents]
    )
    compare(loss(leaves[0], stacked), leaves, exact, several=True)
    for shift in (0, 2):
        exact, _ = oracle(wide_e[0], wide_c, targets, shift=shift, **whole)
        leaves = [hidden[0].clone().requires_grad_(), c[rows].clone().requires_grad_()]
        found = linear_cross_entropy(*leaves, labels, shift=shift, **packed, **known)
        compare(found, leaves, exact, several=False)
        pipeline = CCEPipelineLoss(leaves[1], shift=shift, token_weight=weights, **known)
        compare(pipeline(leaves[0], stacked), leaves, exact, several=False)
        per_token, _ = oracle(
            wide_e[0], wide_c, targets, shift=shift, document_ids=ids, reduction="none"
        )
        logprobs = token_logprobs(*leaves, labels, shift=shift, document_ids=documents, **known)
        total = per_token.sum()
        policy = LogprobsPipelineLoss(leaves[1], lambda p, _, batch: -p.sum(), shift=shift, **known)
        target = policy.load(labels, document_ids=documents)
        assert relative_error(policy(leaves[0], target), total) < 1e-12
        if layout == "replicated":
            assert relative_error(-logprobs, per_token[0]) < 1e-12
            scores = score_tokens(*leaves, labels, shift=shift, document_ids=documents, **known)
            assert relative_error(scores.nll, total) < 1e-12
            count = int((per_token != 0.0).sum())
            assert int(scores.count) == count
            assert int(count_valid_tokens(labels, shift=shift, document_ids=documents)) == count


def check_mistakes() -> None:
    """On every rank, where one has a mistake."""
    options = VocabParallelOptions.from_vocab(ROWS)
    e, c = torch.randn(2, 6, HIDDEN), torch.randn(options.stop - options.start, HIDDEN)
    targets, right = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64)
    other = right.clone()
    other[0, 3:] = 1
    for wrong, words in (
        (right[:, :5], r"document_ids must be \[2, 6\]"),
        (right.double(), "document_ids must be int32 or int64"),
        ([0, 1], "document_ids must be a tensor, got list"),
        (other, "must agree.*document_ids"),
        (None, "must agree.*document_ids"),
    ):
        given = wrong if dist.get_rank() == 1 else right
        with pytest.raises(ValueError, match=words):
            linear_cross_entropy(
                e, c, targets, shift=2, document_ids=given, vocab_parallel_options=options
            )
    with pytest.raises(ValueError, match="document_ids is not an option"):
        CCEPipelineLoss(c, document_ids=right)
    with pytest.raises(ValueError, match="document_ids must be given as the labels are"):
        count_valid_tokens(targets, shift=2, document_ids=[right, right])


def check_all() -> None:
    for layout in LAYOUTS:
        check_layout(layout)
    if dist.get_world_size() > 1:
        check_mistakes()


@pytest.mark.parametrize("degree", [1, 2])
def test_documents(degree: int) -> None:
    run_ranks(check_all, degree)
