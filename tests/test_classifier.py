"""The module that owns a rank's rows."""

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

HIDDEN = 6


def check_classifier(degree: int) -> None:
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
