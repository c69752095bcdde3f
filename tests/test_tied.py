"""One weight at both ends of the pipeline: lookup, gradients, equality, the norm."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from stage_groups import build_stage_groups
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
    for layout in ("sharded", "replicated"):
        for vocabulary in (VOCABULARY, degree, 1):  # the last ranks may have no row
            module = VocabParallelEmbedding(
                HIDDEN, vocabulary, group=None, layout=layout, scale=1.5, dtype=torch.float64
            )  # type: ignore[arg-type]
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
            assert relative_error(module.weight.grad, exact) < 1e-14, (layout, vocabulary)
    with pytest.raises(ValueError, match='must be "sharded" or "replicated"'):
        VocabParallelEmbedding(4, 8, group=None, layout="sequence")  # type: ignore[arg-type]


@pytest.mark.parametrize("degree", [1, 3])
def test_lookup(degree: int) -> None:
    run_ranks(check_lookup, degree, degree=degree)


def check_ends() -> None:
    """50 steps of unlike gradients at both ends: the sum is exact, and the ends stay equal."""
    groups = build_stage_groups(2, 2, device_type="cpu")
    group = groups.vocab_group
    torch.manual_seed(7)
    whole = torch.randn(VOCABULARY, HIDDEN)
    is_first = groups.pipeline_rank == 0
    module = (VocabParallelEmbedding if is_first else VocabParallelClassifier)(
        HIDDEN, VOCABULARY, group=group
    )
    with torch.no_grad():
        module.weight.copy_(whole[module.start : module.stop])
    ends = (module, None) if is_first else (None, module)
    tied = TiedRows(*ends, groups.pipeline_group, first=0, last=1)  # type: ignore[arg-type]
    assert tied.parameter is module.weight
    single = whole.clone().requires_grad_()
    optimizers = [torch.optim.AdamW([p], lr=0.01, fused=True) for p in (module.weight, single)]
    for step in range(50):
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
            module.weight[0, 0] += 1e-3
    assert tied.differs(), "an end that strays is seen"
    with pytest.raises(ValueError, match="which alone has its end"):
        TiedRows(None, None, groups.pipeline_group, first=0, last=1)


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
    other = VocabParallelClassifier(HIDDEN, VOCABULARY + 1, group=groups.vocab_group)
    with pytest.raises(ValueError, match="give both the same vocabulary"):
        TiedRows(embedding, other, groups.pipeline_group, first=0, last=0)
