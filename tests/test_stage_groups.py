"""The mesh: who is in which group, which stages a rank runs, what is refused."""

import time
from datetime import timedelta
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from stage_groups import StageGroups, VocabOver, build_host_group, build_stage_groups
from stage_groups.placement import stages_of_rank
from tests.ranks import GROUP_TIMEOUT, run_ranks


@pytest.mark.parametrize("style", ["loop", "v"])
@pytest.mark.parametrize(("degree", "passes"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 2), (3, 3)])
def test_stages_are_partitioned(style: str, degree: int, passes: int) -> None:
    num_stages = degree * passes
    every = [stages_of_rank(rank, degree, num_stages, style) for rank in range(degree)]
    assert sorted(stage for stages in every for stage in stages) == list(range(num_stages))
    assert all(stages == sorted(stages) and len(stages) == passes for stages in every)


def test_styles() -> None:
    assert stages_of_rank(1, 4, 8, "loop") == [1, 5]
    assert stages_of_rank(1, 4, 8, "v") == [1, 6]
    assert stages_of_rank(0, 4, 8, "v") == [0, 7]  # the last stage is on pipeline rank 0
    with pytest.raises(ValueError, match="multiple of the pipeline degree 4, got 6"):
        stages_of_rank(0, 4, 6, "loop")
    with pytest.raises(ValueError, match=r'style must be "loop" or "v"'):
        stages_of_rank(0, 4, 8, "u")


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


def check_mesh() -> None:
    rank = dist.get_rank()
    groups = build_stage_groups(2, 2, device_type="cpu")
    assert (groups.pipeline_degree, groups.data_degree, groups.vocab_degree) == (2, 1, 2)
    assert rank == groups.pipeline_rank * 2 + groups.vocab_rank
    assert members(groups.vocab_group) == [[0, 1], [2, 3]][groups.pipeline_rank]
    assert members(groups.pipeline_group) == [[0, 2], [1, 3]][groups.vocab_rank]
    assert groups.stages(4, "v") == [[0, 3], [1, 2]][groups.pipeline_rank]
    assert groups.has_last_stage(4, "v") == (groups.pipeline_rank == 0)
    assert groups.has_last_stage(2) == (groups.pipeline_rank == 1)
    for group in (groups.vocab_group, groups.pipeline_group, build_host_group()):
        timeout = timeout_of(group)
        assert timeout == timedelta(seconds=GROUP_TIMEOUT), "the default group's is not inherited"

    groups = build_stage_groups(1, 2, data=2, device_type="cpu")
    assert rank == groups.data_rank * 2 + groups.vocab_rank
    assert groups.data_group is not None
    assert members(groups.data_group) == [[0, 2], [1, 3]][groups.vocab_rank]

    mesh = init_device_mesh("cpu", (1, 2, 1, 2), mesh_dim_names=("pp", "dp_a", "dp_b", "tp"))
    groups = StageGroups.from_mesh(mesh, vocab_dim="tp")
    assert (groups.pipeline_degree, groups.data_degree, groups.vocab_degree) == (1, 2, 2)
    assert groups.data_group is not None
    assert members(groups.data_group) == [[0, 2], [1, 3]][groups.vocab_rank]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "vocab"))
    groups = StageGroups.from_mesh(mesh)
    assert groups.data_group is None
    assert (groups.data_rank, groups.data_degree) == (0, 1)

    for bad in ({"vocab_dim": "tp"}, {"pipeline_dim": "stage"}, {"pipeline_dim": "vocab"}):
        with pytest.raises(ValueError, match=r"axis of the mesh|must be two axes"):
            StageGroups.from_mesh(mesh, **bad)
    swapped = {"pipeline_dim": "vocab", "vocab_dim": "pp"}
    with pytest.raises(ValueError, match=r"ranks ascend along 'vocab' .* name the pipeline first"):
        StageGroups.from_mesh(mesh, **swapped, vocab_over="all_stages")
    with pytest.raises(ValueError, match=r"3 x 2 x 2 = 12, but the world has 4 ranks"):
        build_stage_groups(2, 2, data=3)
    with pytest.raises(ValueError, match="vocab must be a positive integer, got 0"):
        build_stage_groups(2, 0)

    check_timeouts()


def check_timeouts() -> None:
    """A wait for one peer ends with the group's timeout, though the peer is alive."""
    made = {}
    for seconds in (1, 2):
        limit = timedelta(seconds=seconds)
        made[seconds] = [
            build_stage_groups(*degrees, device_type="cpu", timeout=limit, vocab_over=vocab_over)
            for degrees in ((2, 2), (4, 1))
            for vocab_over in get_args(VocabOver)
        ]
        assert all(timeout_of(groups.vocab_group) == limit for groups in made[seconds])
    for seconds, every in made.items():
        for groups in every:
            if groups.message_groups is None and groups.pipeline_rank == 0:
                start = time.monotonic()
                with pytest.raises(RuntimeError, match=f"Timed out waiting {seconds}000ms"):
                    dist.irecv(torch.zeros(1), group=groups.pipeline_group, group_src=1).wait()
                assert time.monotonic() - start < seconds + 5
    dist.barrier()  # the peers have stayed
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("pp", "vocab"))  # both make the world
    for vocab_over in get_args(VocabOver):
        kept = timeout_of(mesh.get_group("vocab"))
        StageGroups.from_mesh(mesh, vocab_over=vocab_over, timeout=timedelta(seconds=2))
        assert timeout_of(mesh.get_group("vocab")) == kept, "the mesh's groups keep their own"
    assert dist.group.WORLD is not None
    timeout = timeout_of(dist.group.WORLD)
    assert timeout == timedelta(seconds=GROUP_TIMEOUT), "the default group is as it was"


def test_mesh() -> None:
    run_ranks(check_mesh, 4)


def test_without_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        build_stage_groups(1, 1)
