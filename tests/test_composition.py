"""The loss beside what else a training program does: data parallelism, checkpointing, TP."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from stage_groups import StageGroups, build_stage_groups
from tests.ranks import run_ranks
from tests.toy_pipeline import Pipeline, Setting, ToyStage, draw_batch, one_process

CPU = torch.device("cpu")


def check_data_parallel(wrapper: str, schedule: str) -> None:
    """A data x pipeline x vocab mesh: gradients are the mean over the data axis."""
    groups = build_stage_groups(2, 2, data=2, device_type="cpu")
    setting = Setting(schedule, layout="sharded", vocabulary=23, static_shapes=True)

    def wrap(module: nn.Module) -> nn.Module:
        if wrapper == "ddp":
            return DistributedDataParallel(module, process_group=groups.data_group)
        return fully_shard(module, mesh=groups.mesh["data"], ignored_params=set(rows(module)))

    def rows(module: nn.Module) -> list[nn.Parameter]:
        return [] if module.head is None else list(module.head.parameters())

    batches = [draw_batch(setting, 2, seed) for seed in (1, 2)]  # one for each data rank
    _, expected = one_process(setting, batches)
    for parameter in expected.parameters():
        parameter.grad /= 2
    pipeline = Pipeline(setting, groups, CPU, wrap)
    pipeline.step(*batches[groups.data_rank])
    if wrapper == "fsdp":  # the rows are plain parameters, which the caller reduces
        for module in pipeline.modules.values():
            for parameter in rows(module):
                dist.all_reduce(parameter.grad, group=groups.data_group)
                parameter.grad /= 2
    errors = pipeline.compare_gradients(expected)
    assert max(errors.values()) < 1e-11, errors


def check_wrappers() -> None:
    for wrapper in ("ddp", "fsdp"):
        for schedule in ("GPipe", "1F1B"):
            check_data_parallel(wrapper, schedule)


def test_data_parallel() -> None:
    run_ranks(check_wrappers, 8, timeout=110)


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in backward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, hidden: Tensor) -> Tensor:
        result = checkpoint(
            nn.functional.linear, hidden, self.weight, self.bias, use_reentrant=False
        )
        assert isinstance(result, Tensor)
        return result


def check_checkpointing() -> None:
    groups = build_stage_groups(2, 2, device_type="cpu")

    def wrap(module: nn.Module) -> nn.Module:
        assert isinstance(module, ToyStage)
        module.layer = Checkpointed(module.layer)
        return module

    for schedule in ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"):
        check_against_one_process(Setting(schedule, vocabulary=23), groups, wrap)


def check_against_one_process(
    setting: Setting, groups: StageGroups, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    batch = draw_batch(setting, 1, 5)
    _, expected = one_process(setting, [batch])
    pipeline = Pipeline(setting, groups, CPU, wrap)
    pipeline.step(*batch)
    errors = pipeline.compare_gradients(expected)
    assert max(errors.values()) < 1e-11, (setting, errors)


def check_tensor_parallel() -> None:
    """The body's tensor-parallel group is the loss's vocab group, as torchtitan has it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    groups = StageGroups.from_mesh(mesh, vocab_dim="tp")

    def wrap(module: nn.Module) -> nn.Module:
        parallelize_module(module.layer, mesh["tp"], ColwiseParallel(output_layouts=Replicate()))
        return module

    for schedule in ("1F1B", "Interleaved1F1B"):
        check_against_one_process(Setting(schedule, vocabulary=23), groups, wrap)


def check_bodies() -> None:
    check_checkpointing()
    check_tensor_parallel()


def test_checkpointed_and_tensor_parallel_bodies() -> None:
    run_ranks(check_bodies, 4)
