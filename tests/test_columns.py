"""The body's gradients are summed over the columns, and columns that drift apart are found."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stage_groups import StageGroups, build_stage_groups
from tests.ranks import run_ranks
from vocab_parallel import VocabParallelClassifier, sum_over_columns, validate_columns
from vocab_parallel.modules.gradient_sums import sum_gradients


class Stage(nn.Module):
    """A replicated part, rows of the vocabulary, a shard over the data axis, and what is frozen."""

    def __init__(self, groups: StageGroups) -> None:
        super().__init__()
        torch.manual_seed(groups.pipeline_rank)  # one stage on all of its columns
        self.body = nn.Linear(4, 6)
        self.turned = nn.Parameter(torch.randn(3, 5).t())  # not contiguous
        self.expert = nn.Linear(2, 2, bias=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        data, both = groups.mesh["data"], groups.mesh["data", "vocab"]
        self.shard = nn.Parameter(distribute_tensor(torch.randn(4, 2), data, [Shard(0)]))
        whole = distribute_tensor(torch.randn(4, 2), both, [Shard(0), Replicate()])
        self.reduced = nn.Parameter(whole)  # over the columns too: whoever made it reduces it
        self.rows = VocabParallelClassifier(4, 7, group=groups.vocab_group)


def fill(parameter: Any, value: float) -> None:
    own = torch.full_like(parameter, value)
    parameter.grad = own


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_buckets() -> None:
    """Few collectives, whatever the sizes, dtypes and strides; and what one each would give."""
    groups = build_stage_groups(1, 2, data=2, device_type="cpu")
    column, calls = groups.vocab_rank, []
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        calls.append(tensor.nbytes)
        return plain(tensor, *arguments, **more)

    parameters = []
    shapes = [(3, 5), (7,), (0, 4), (40, 10), *[(2, 3)] * 50]
    for index, shape in enumerate(shapes):
        dtype = torch.bfloat16 if index % 5 == 4 else torch.float32
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(2 * index + other)).to(dtype)
            for other in range(2)
        ]
        total = drawn[0] + drawn[1]
        if index == 1:  # the other column's alone
            drawn[0], total = None, drawn[1]  # type: ignore[assignment]
        if index == 0:
            drawn = [gradient.t().contiguous().t() for gradient in drawn]
        parameter.grad = drawn[column]
        parameters.append((parameter, total))
    nobody = nn.Parameter(torch.zeros(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        every = [*(one for one, _ in parameters), nobody]
        sum_gradients(every, groups.columns_group, bucket_bytes=400)
    assert len(calls) < 12
    assert max(calls) == 1600, "alone: larger than a bucket"
    assert sorted(calls)[-2] <= 400
    for parameter, wanted in parameters:
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted)
    assert nobody.grad is None


def check_columns() -> None:
    check_buckets()
    groups = build_stage_groups(1, 2, data=2, device_type="cpu")
    stage = Stage(groups)
    column = groups.vocab_rank
    for parameter in stage.parameters():
        if parameter.requires_grad:
            fill(parameter, 10.0 * (1 + column))
    stage.unused.grad = None
    stage.expert.weight.grad = None if column == 0 else torch.full((2, 2), 5.0)
    sum_over_columns(stage, groups)
    for name, parameter in stage.named_parameters():
        expected = 30.0
        if name.startswith(("rows", "reduced")):
            expected = 10.0 * (1 + column)
        elif name.startswith("expert"):
            expected = 5.0
        elif name in ("frozen", "unused"):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        assert torch.equal(gradient, torch.full_like(gradient, expected)), name

    validate_columns(stage, groups)
    optimizer = torch.optim.SGD(stage.body.parameters(), lr=1e-3)
    for summed in (True, False):
        for _ in range(5):
            fill(stage.body.weight, 10.0 * (1 + column))
            fill(stage.body.bias, 0.0)
            if summed:
                sum_over_columns(stage, groups)
            optimizer.step()
        if summed:
            validate_columns(stage, groups)
        else:
            with pytest.raises(ValueError, match=r"norm of body\.weight .*sum_over_columns"):
                validate_columns(stage, groups)
            validate_columns(stage, groups, tolerance=1.0)
    with torch.no_grad():
        stage.body.weight.fill_(1.0)
        if dist.get_rank() == 3:
            stage.body.bias[0] = torch.nan
    if groups.data_rank == 1:
        with pytest.raises(ValueError, match=r"norm of body\.bias is \[.*nan"):
            validate_columns(stage, groups)
    else:  # another row of the mesh
        validate_columns(stage, groups)
    if dist.get_rank() == 3:
        del stage.expert
    if groups.data_rank == 1:
        with pytest.raises(ValueError, match=r"unlike parameters: \[7, 6\] of them"):
            validate_columns(stage, groups)

    # Where all stages carry the vocabulary, the columns are the mesh's all the same.
    spanning = build_stage_groups(2, 2, device_type="cpu", vocab_over="all_stages")
    body = nn.Linear(2, 2)
    for parameter in body.parameters():
        fill(parameter, 1.0 + dist.get_rank())
    sum_over_columns(body, spanning)
    expected = 3.0 if spanning.pipeline_rank == 0 else 7.0
    assert torch.equal(body.bias.grad, torch.full((2,), expected))

    alone = build_stage_groups(4, 1, device_type="cpu")
    sum_over_columns(body, alone)
    assert torch.equal(body.bias.grad, torch.full((2,), expected))
    validate_columns(body, alone)


def test_columns() -> None:
    run_ranks(check_columns, 4)
