"""A rank that dies, raises or never comes: the others end with an error that names the group."""

import json
import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from stage_groups import build_stage_groups
from tests.ranks import torchrun
from vocab_parallel import (
    CCEPipelineLoss,
    SpanningSchedule,
    VocabParallelClassifier,
    VocabParallelOptions,
    linear_cross_entropy,
)


def check_failure(how: str) -> None:
    """Fail on rank 1 between forward and backward."""
    groups = build_stage_groups(1, 2, device_type="cpu", timeout=timedelta(seconds=5))
    options = VocabParallelOptions.from_vocab(10, groups.vocab_group)
    e = torch.randn(4, 3, requires_grad=True)
    c = torch.randn(options.stop - options.start, 3, requires_grad=True)
    loss = linear_cross_entropy(e, c, torch.arange(4), vocab_parallel_options=options)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # let this rank have its say
        loss.backward()
        raise AssertionError("the reduction of dE came back without its peer")
    if how == "raise":
        raise KeyError("the data loader of rank 1 is broken")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(20)


def check_spanning_failure() -> None:
    """Die on rank 1 between its share of a microbatch's loss and the exchange of it."""
    groups = build_stage_groups(
        2, 1, device_type="cpu", timeout=timedelta(seconds=5), vocab_over="all_stages"
    )
    rows = VocabParallelClassifier(3, 10, group=groups.vocab_group)
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), rows)
    stage = PipelineStage(
        module, groups.pipeline_rank, 2, torch.device("cpu"), group=groups.pipeline_group
    )
    schedule = SpanningSchedule(stage, 4, CCEPipelineLoss(rows), groups)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # let this rank have its say
    else:
        statistics = schedule._loss.statistics

        def die(microbatch: int, *rest: object) -> None:
            statistics(microbatch, *rest)
            if microbatch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        schedule._loss.statistics = die  # type: ignore[method-assign, assignment]
    torch.manual_seed(0)
    hidden, labels = torch.randn(4, 5, 3), torch.randint(10, (4, 5))
    schedule.step(*([hidden] if groups.pipeline_rank == 0 else []), target=labels)
    raise AssertionError("the step came to its end without a rank")


def test_a_rank_dies_where_all_stages_carry_the_vocabulary() -> None:
    began = time.monotonic()
    command = ["-m", "tests.ranks", "gloo", "tests.test_failures:check_spanning_failure", "{}"]
    code, output = torchrun(2, command)
    assert code not in (0, -1), output
    assert time.monotonic() - began < 45
    assert "over the group of ranks [0, 1] failed on rank 0" in output
    assert "most likely one of them died or raised" in output


@pytest.mark.parametrize("how", ["raise", "die", "never come"])
def test_failure(how: str) -> None:
    began = time.monotonic()
    code, output = torchrun(
        2,
        [
            "-m",
            "tests.ranks",
            "gloo",
            "tests.test_failures:check_failure",
            json.dumps({"how": how}),
        ],
    )
    assert code not in (0, -1), output
    assert time.monotonic() - began < 45
    assert "the all-reduce of a gradient over the group of ranks [0, 1] failed on rank 0" in output
    assert "most likely one of them died or raised" in output
    if how == "raise":
        assert "the data loader of rank 1 is broken" in output
