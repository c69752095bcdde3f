"""One weight at both ends of the pipeline: lookup, gradients, equality, the norm."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    TiedRows,
    VocabParallelClassifier,
    VocabParallelEmbedding,
    clip_grad_norm_,
)

VOCABULARY, HIDDEN, LENGTH = 23, 5, 6


def check_lookup(degree: int) -> None:
    """Rows and their gradient are those of a whole embedding, whatever the layout."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (degree, 2, LENGTH), generator=generator)
    upstream = torch.randn(degree, 2, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    rank = dist.get_rank()
    uneven = [[0] * (degree - 1) + [VOCABULARY], [9] + [0] * (degree - 2) + [VOCABULARY - 9]]
    for layout in ("sharded", "replicated"):
        for vocabulary, rows in (
            *((size, None) for size in (VOCABULARY, degree, 1)),  # the last ranks may have no row
            *((VOCABULARY, rows) for rows in uneven if len(rows) == degree),
        ):
            module = VocabParallelEmbedding(
                HIDDEN, vocabulary, group=None, rows=rows, layout=layout, scale=1.5,
                dtype=torch.float64,
            )  # fmt: skip
            with torch.no_grad():
                module.weight.copy_(whole[module.start : module.stop])
            own_ids = ids % vocabulary
            leaf = whole[:vocabulary].clone().requires_grad_()
            mine = rank if layout == "sharded" else 0
            found = module(own_ids[mine])
            expected = 1.5 * F.embedding(own_ids, leaf)
            assert torch.equal(found, expected[mine])
            found.backward(upstream[mine])
            share = upstream if layout == "sharded" else torch.zeros_like(upstream)
            share[0] = upstream[0]
            exact = torch.autograd.grad(expected, leaf, share)[0][module.start : module.stop]
            assert module.weight.grad is not None
            assert relative_error(module.weight.grad, exact) < 1e-14, (layout, vocabulary, rows)
    with pytest.raises(ValueError, match='must be "sharded" or "replicated"'):
        VocabParallelEmbedding(4, 8, group=None, layout="sequence")
    check_shapes()
    check_mistaken_ids(degree)
    check_ids_without_validation(degree)


def check_shapes() -> None:
    for layout in ("sharded", "replicated"):
        module = VocabParallelEmbedding(HIDDEN, VOCABULARY, group=None, layout=layout)
        for shape in ((), (0,), (3, 0), (1, 2, 3)):
            for dtype in (torch.int32, torch.int64):
                found = module(torch.full(shape, VOCABULARY - 1, dtype=dtype))
                assert found.shape == (*shape, HIDDEN)
                found.sum().backward()
        assert module.weight.grad is not None
        if dist.get_rank() == 0:  # a shape is nothing that ranks communicate about
            ids = torch.zeros(2, 3, dtype=torch.int64)
            for found in (module(ids.to("meta")), module.to("meta")(ids)):
                assert found.is_meta
                assert found.requires_grad
                assert found.shape == (2, 3, HIDDEN)


def check_mistaken_ids(degree: int) -> None:
    """A mistake of the last rank alone ends every rank, in the same words."""
    module = VocabParallelEmbedding(HIDDEN, VOCABULARY, group=None)
    same = VocabParallelEmbedding(HIDDEN, VOCABULARY, group=None, layout="replicated")
    right = torch.tensor([[0, 1], [VOCABULARY - 1, 2]])
    of_one: list[tuple[Any, str]] = [
        (right + 1, rf"ids of the embedding must lie in \[0, {VOCABULARY}\), got {VOCABULARY}:"),
        (right.int() - 100, rf"must lie in \[0, {VOCABULARY}\), got -100"),
        (right.double(), "int32 or int64 tensor, got torch.float64"),
        ([0, 1], "int32 or int64 tensor, got list"),
    ]
    of_several: list[tuple[Any, str]] = [
        (right[:, :1], r"tokens of ids: \[4, .*2\]"),
        (right.int(), r"dtype of ids: \[torch.int64, .*torch.int32\]"),
    ]
    for owner, mistakes in (
        (module, of_one),
        (same, of_one),
        (module, of_several if degree > 1 else []),
        (same, [*of_several, (right.flip(0), "ids, which differ in")] if degree > 1 else []),
    ):
        for wrong, pattern in mistakes:
            with pytest.raises(ValueError, match=pattern) as caught:
                owner(wrong if dist.get_rank() == degree - 1 else right)
            words: list[str] = [""] * degree
            dist.all_gather_object(words, str(caught.value))
            assert len(set(words)) == 1, words
            assert owner(right).isfinite().all(), "the ranks still meet"


def check_ids_without_validation(degree: int) -> None:
    """Its token is NaN on every rank that sees it, and no other token is."""
    for layout in ("sharded", "replicated"):
        for vocabulary in (VOCABULARY, 1):
            module = VocabParallelEmbedding(
                HIDDEN, vocabulary, group=None, layout=layout, validate=False, scale=2.0
            )
            for wrong in (-1, -100, vocabulary, 2**40):
                ids = torch.tensor([0, wrong, vocabulary - 1])
                if layout == "sharded" and dist.get_rank() != degree - 1:
                    ids[1] = 0
                found = module(ids)
                assert found[ids == wrong].isnan().all()
                assert found[ids != wrong].isfinite().all()
                found.sum().backward()
                assert module.weight.grad is not None
                assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize("degree", [1, 3])
def test_lookup(degree: int) -> None:
    run_ranks(check_lookup, degree, degree=degree)


def check_ends() -> None:
    groups = build_stage_groups(2, 2, device_type="cpu")
    for rows, steps in ((None, 50), ([VOCABULARY, 0], 5)):
        check_training_ends(groups, rows, steps)


def check_training_ends(groups: StageGroups, rows: list[int] | None, steps: int) -> None:
    """Unlike gradients at both ends: the sum is exact, and the ends stay equal."""
    group = groups.vocab_group
    torch.manual_seed(7)
    whole = torch.randn(VOCABULARY, HIDDEN)
    is_first = groups.pipeline_rank == 0
    end = VocabParallelEmbedding if is_first else VocabParallelClassifier
    check_unlike_ends(end, groups)
    module = end(HIDDEN, VOCABULARY, group=group, device="meta", rows=rows)
    ends = (module, None) if is_first else (None, module)
    tied = TiedRows(*ends, groups.pipeline_group, first=0, last=1)
    module.to_empty(device="cpu")  # another parameter, which both know
    with torch.no_grad():
        module.weight.copy_(whole[module.start : module.stop])
    assert tied.parameter is module.weight
    single = whole.clone().requires_grad_()
    optimizers = [torch.optim.AdamW([p], lr=0.01, fused=True) for p in (module.weight, single)]
    for step in range(steps):
        uses = torch.randn(2, VOCABULARY, HIDDEN)  # equal on all ranks
        module.weight.grad = uses[int(not is_first), module.start : module.stop].clone()
        if step == 3 and is_first:
            module.weight.grad = None  # a microbatch may leave an end without
        single.grad = uses.sum(0) if step != 3 else uses[1].clone()
        tied.sum_gradients()
        norm = clip_grad_norm_([module.weight], 2.0, groups)
        expected = torch.nn.utils.clip_grad_norm_([single], 2.0)
        assert relative_error(norm, expected) < 1e-6, "the weight counts once"
        for optimizer in optimizers:
            optimizer.step()
        assert not tied.differs(), step
    assert relative_error(module.weight, single[module.start : module.stop]) < 1e-5
    with torch.no_grad():
        if is_first:
            module.weight[:1, 0] += 1e-3
    assert tied.differs() == (module.weight.numel() > 0), "an end that strays is seen"
    check_copied_ends(module, tied, groups)
    with pytest.raises(ValueError, match="which alone has its end"):
        TiedRows(None, None, groups.pipeline_group, first=0, last=1)


def check_unlike_ends(end: Any, groups: StageGroups) -> None:
    """Ends of unlike rows are refused on every rank of the columns that have them."""
    is_first = groups.pipeline_rank == 0
    rows = [8, VOCABULARY - 8] if is_first else [9, VOCABULARY - 9]
    module = end(HIDDEN, VOCABULARY, group=groups.vocab_group, rows=rows)
    ends = (module, None) if is_first else (None, module)
    with pytest.raises(ValueError, match=r"have the rows \[.* and \[.*the same counts of rows"):
        TiedRows(*ends, groups.pipeline_group, first=0, last=1)
    foreign: Any = nn.Embedding(VOCABULARY, HIDDEN)
    ends = (foreign, None) if is_first else (None, module)
    with pytest.raises(ValueError, match=r"of a Embedding, which is no module of this library's"):
        TiedRows(*ends, groups.pipeline_group, first=0, last=1)
    ends = (module, None) if is_first else (None, None)
    with pytest.raises(
        ValueError, match=r"last stage is on pipeline rank 1, .* from the ranks \[\]"
    ):
        TiedRows(*ends, groups.pipeline_group, first=0, last=1)


def check_copied_ends(module: Any, tied: TiedRows, groups: StageGroups) -> None:
    """Ends stay ends through a deep copy and through other parameters in their place."""
    copied, tied = copy.deepcopy((module, tied))
    for _ in range(2):
        assert tied.parameter is copied.weight
        assert copied.weight is not module.weight
        copied.weight.grad = torch.ones_like(copied.weight)
        tied.sum_gradients()
        assert (copied.weight.grad == 2.0).all()
        norm = clip_grad_norm_([copied.weight], 1e9, groups)
        assert relative_error(norm, torch.tensor(4.0 * VOCABULARY * HIDDEN).sqrt()) < 1e-6
        state = {"weight": module.weight.detach().clone()}
        copied.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match="TiedRows holds a process group, which cannot be pickled"):
        pickle.dumps(tied)


def test_ends() -> None:
    run_ranks(check_ends, 4)


def test_one_rank_shares_one_parameter() -> None:
    run_ranks(check_shared, 1)


def check_shared() -> None:
    groups = build_stage_groups(1, 1, device_type="cpu")
    embedding = VocabParallelEmbedding(HIDDEN, VOCABULARY, group=groups.vocab_group)
    classifier = VocabParallelClassifier(HIDDEN, VOCABULARY, group=groups.vocab_group)
    tied = TiedRows(embedding, classifier, groups.pipeline_group, first=0, last=0)
    assert embedding.weight is classifier.weight
    tied.sum_gradients()  # nothing to do
    copied, _, again = copy.deepcopy((embedding, classifier, tied))
    again.sum_gradients()  # the copies share one parameter too
    copied.weight = nn.Parameter(copied.weight.detach().clone())
    for call in (again.sum_gradients, again.differs):
        with pytest.raises(ValueError, match="must be one parameter, but to_empty"):
            call()
    other = VocabParallelClassifier(HIDDEN, VOCABULARY + 1, group=groups.vocab_group)
    with pytest.raises(ValueError, match="give both the same vocabulary"):
        TiedRows(embedding, other, groups.pipeline_group, first=0, last=0)
