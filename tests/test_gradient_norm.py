"""The norm of the whole model, each parameter counted once, however it is spread."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import VocabParallelClassifier, clip_grad_norm_

HIDDEN, VOCABULARY = 5, 11


def whole_gradients() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"body0": (4, 6), "body1": (7,), "head": (VOCABULARY, HIDDEN), "sharded": (6, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check_norm(data: int, pipeline: int, vocab: int) -> None:
    groups: StageGroups = build_stage_groups(pipeline, vocab, data=data, device_type="cpu")
    for max_norm, mixed, as_module in ((1e9, False, False), (0.5, True, False), (0.5, False, True)):
        whole = whole_gradients()
        stage = nn.Module()
        # Stage 0 has body0; the last stage body1, the classifier and a DTensor.
        if groups.pipeline_rank == 0:
            stage.body0 = nn.Parameter(torch.zeros(whole["body0"].shape))
            stage.body0.grad = whole["body0"].clone()
        if groups.pipeline_rank == pipeline - 1:
            stage.body1 = nn.Parameter(torch.zeros(whole["body1"].shape))
            stage.body1.grad = whole["body1"].clone()
            stage.head = VocabParallelClassifier(HIDDEN, VOCABULARY, group=groups.vocab_group)
            rows = slice(stage.head.start, stage.head.stop)
            stage.head.weight.grad = whole["head"][rows].clone()
            placements = [Shard(0), Replicate()] if mixed else [Replicate(), Shard(1)]
            mesh = groups.mesh["data", "vocab"]
            stage.sharded = nn.Parameter(distribute_tensor(torch.zeros(6, 4), mesh, placements))
            stage.sharded.grad = distribute_tensor(whole["sharded"], mesh, placements)
        norm = clip_grad_norm_(stage if as_module else stage.parameters(), max_norm, groups)

        plain = [nn.Parameter(torch.zeros_like(gradient)) for gradient in whole.values()]
        for parameter, gradient in zip(plain, whole.values(), strict=True):
            parameter.grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(plain, max_norm)
        assert relative_error(norm, expected) < 1e-6
        clipped = {name: p.grad for name, p in zip(whole, plain, strict=True)}
        for name, parameter in stage.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor()
            want = clipped["head"][rows] if name == "head.weight" else clipped[name]
            assert relative_error(gradient, want) < 1e-6, name
        ordinary = [p for p in stage.parameters() if not isinstance(p, DTensor)]
        if ordinary:
            torch.optim.AdamW(ordinary, foreach=True).step()
    wrong: Any
    for wrong in (0.0, math.nan, None, "1"):
        last = dist.get_rank() == dist.get_world_size() - 1  # one rank's mistake ends all
        with pytest.raises(ValueError, match="max_norm must be a positive number"):
            clip_grad_norm_([], wrong if last else 1.0, groups)


@pytest.mark.parametrize(("data", "pipeline", "vocab"), [(1, 1, 1), (1, 2, 2), (2, 1, 2)])
def test_norm(data: int, pipeline: int, vocab: int) -> None:
    run_ranks(check_norm, data * pipeline * vocab, data=data, pipeline=pipeline, vocab=vocab)


def check_partial_is_refused() -> None:
    groups = build_stage_groups(1, 2, device_type="cpu")
    from torch.distributed.tensor import Partial

    parameter = nn.Parameter(
        distribute_tensor(torch.zeros(4, 4), groups.mesh["vocab"], [Replicate()])
    )
    parameter.grad = DTensor.from_local(torch.ones(4, 4), groups.mesh["vocab"], [Replicate()])
    clip_grad_norm_([parameter], 1.0, groups)
    if dist.get_rank() == 1:  # one rank's mistake ends both
        object.__setattr__(
            parameter.grad,
            "_spec",
            DTensor.from_local(
                torch.ones(4, 4), groups.mesh["vocab"], [Partial()], run_check=False
            )._spec,
        )
    with pytest.raises(ValueError, match="has not been reduced"):
        clip_grad_norm_([parameter], 1.0, groups)
    assert dist.get_world_size() == 2


def test_partial_is_refused() -> None:
    run_ranks(check_partial_is_refused, 2)
