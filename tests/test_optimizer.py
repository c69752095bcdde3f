"""What launch.train does between the last backward and the next step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import get_scheduler

from launch.arguments import TrainArguments
from launch.checkpoint import Checkpoints
from launch.model import build_stage
from launch.optimizer import AdamW, LearningRate
from launch.progress import step_flops, utilisation
from launch.readings import Readings
from launch.training_pipeline import build_pipeline, model_of
from stage_groups import build_host_group, build_stage_groups
from tests.batches import batches_of_ids
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import clip_grad_norm_

CPU = torch.device("cpu")


def optimizer_of(parameters: list[nn.Parameter], *, copies: bool, rate: float) -> AdamW:
    return AdamW(parameters, learning_rate=rate, betas=(0.8, 0.95), weight_decay=0.1, copies=copies)


@pytest.mark.parametrize("widened", [2**28, 100])
def test_float32_copies(widened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are a float32 run's, rounded; without copies small updates are lost.

    However few gradients are widened at a time; what is float32 already takes one update a step.
    """
    monkeypatch.setattr("launch.optimizer.WIDENED_BYTES", widened)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).bfloat16() for shape in ((6, 4), (5,), (3,))]
    gradients = [[torch.randn(w.shape, generator=generator).bfloat16() for w in start]] * 8
    start[2] = start[2].float()
    for rate in (1e-1, 1e-5):
        exact = [nn.Parameter(weight.float()) for weight in start]
        decayed, plain = {"params": exact[:1]}, {"params": exact[1:], "weight_decay": 0.0}
        reference = torch.optim.AdamW(
            [decayed, plain], lr=rate, betas=(0.8, 0.95), weight_decay=0.1
        )
        found = [nn.Parameter(weight.clone()) for weight in start]
        optimizer = optimizer_of(found, copies=True, rate=rate)
        alone = [nn.Parameter(weight.clone()) for weight in start]
        without = optimizer_of(alone, copies=False, rate=rate)
        for step in gradients:
            for weights, cast in ((exact, torch.float32), (found, None), (alone, None)):
                for weight, gradient in zip(weights, step, strict=True):
                    weight.grad = gradient.to(cast or weight.dtype)
            for one in (reference, optimizer, without):
                one.step()
                one.zero_grad()
        for weight, wanted in zip(found, exact, strict=True):
            copy = optimizer.trained(weight)
            assert relative_error(copy, wanted) < 1e-6
            assert weight.grad is None
            assert torch.equal(weight, copy.to(weight.dtype))
        assert [weight.dtype for weight in found] == [torch.bfloat16] * 2 + [torch.float32]
        if rate == 1e-5:
            assert all(torch.equal(*pair) for pair in zip(alone[:2], start[:2], strict=True))
            assert not torch.equal(optimizer.trained(found[0]), start[0].float())


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate(name: Any, warmup: int) -> None:
    """A function of the step: transformers' schedule, wherever one begins."""
    arguments = TrainArguments(
        learning_rate=2e-4, learning_rate_schedule=name, warmup=warmup, steps=9
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    full = "constant_with_warmup" if name == "constant" else name
    schedule = get_scheduler(full, optimizer, warmup, 9)
    wanted = []
    for _ in range(9):
        wanted.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = LearningRate(arguments)
    assert [found(step) for step in reversed(range(9))] == pytest.approx(wanted[::-1])
    assert found.set(optimizer, 5) == optimizer.param_groups[0]["lr"] == found(5)


def test_readings_come_one_step_late() -> None:
    readings = Readings(CPU)
    assert readings.finish() is None
    found = []
    for step in (1, 2, 3):
        readings.begin()
        found.append(readings.end(step, torch.tensor([float(step), 0.5])))
    found.append(readings.finish())
    assert found[0] is None
    assert [(one.step, one.values) for one in found[1:] if one] == [
        (step, [float(step), 0.5]) for step in (1, 2, 3)
    ]
    assert all(one.seconds >= 0 for one in found[1:] if one)
    assert readings.finish() is None


def test_flops_are_those_that_torch_counts() -> None:
    """Of products, forward and backward; attention, which it counts whole, is small here."""
    arguments = TrainArguments(vocabulary=300, hidden=64, layers=2, batch=16, sequence=4)
    config, source = model_of(arguments)
    stage = build_stage(config, source, 0, 1, None, device=CPU, dtype=torch.float32)
    hidden = torch.randn(16, 4, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        stage.lm_head(stage.hidden_states(hidden)).sum().backward()
    flops = step_flops(arguments, config)
    assert flops is not None
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert utilisation(flops, 2.0, 4, flops) == 1 / 8
    assert utilisation(flops, 2.0, 4, None) is None


def check_resume(folder: str) -> None:
    """bfloat16 weights go on from their float32 copies, bitwise; clipping by infinity measures.

    The first weight has no gradient: it is saved all the same, and does not decay.
    """
    groups = build_stage_groups(2, 1, device_type="cpu")
    arguments = TrainArguments(
        pipeline=2, vocab=1, microbatches=2, batch=2, sequence=8, steps=4, vocabulary=97,
        hidden=32, dtype="bfloat16", checkpoint=Path(folder), learning_rate=1e-5,
    )  # fmt: skip
    host = build_host_group()
    batches = batches_of_ids(torch.arange(4 * 2 * 8).view(4, 2, 8))

    def start() -> tuple[Any, AdamW, Checkpoints]:
        pipeline = build_pipeline(arguments, *model_of(arguments), groups, CPU)
        optimizer = AdamW.of(arguments, pipeline.parameters())
        return pipeline, optimizer, Checkpoints(arguments, pipeline, optimizer, batches, host)

    def train(pipeline: Any, optimizer: AdamW, step: int) -> None:
        _, *reached = pipeline.parameters()
        for index, parameter in enumerate(reached):
            seed = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=seed).bfloat16()
        before = [parameter.grad.clone() for parameter in reached]
        norm = clip_grad_norm_(pipeline.stages, math.inf, groups)
        own = torch.cat([gradient.double().flatten() for gradient in before]).norm().square()
        dist.all_reduce(own)
        assert relative_error(norm, own.sqrt()) < 1e-6
        for parameter, gradient in zip(reached, before, strict=True):
            assert torch.equal(parameter.grad, gradient)
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer, checkpoints = start()
    first = next(whole.parameters()).clone()
    train(whole, optimizer, 0)
    checkpoints.save([12.0], [0.5], 16)
    checkpoints.finish()
    train(whole, optimizer, 1)
    again, other, resumed = start()
    assert resumed.resume().losses == [12.0]
    train(again, other, 1)
    assert torch.equal(first, next(again.parameters()))
    for index, (one, two) in enumerate(zip(whole.parameters(), again.parameters(), strict=True)):
        assert torch.equal(optimizer.trained(one), other.trained(two))
        assert torch.equal(one, two)
        if index > 0:
            assert not torch.equal(other.trained(two), two.float()), "more than bfloat16 went on"


def test_resume(tmp_path: Path) -> None:
    run_ranks(check_resume, 2, folder=str(tmp_path / "saved"))
