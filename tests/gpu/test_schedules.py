"""Three schedules on 4 NCCL ranks that share a card: our own products, Apple's kernels."""

import pytest
import torch

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.toy_pipeline import Pipeline, Setting, draw_batch, one_process

SCHEDULES = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
# float64 is exact; in bfloat16 the whole model rounds, body and all.
TOLERANCE = {"float64": 1e-11, "bfloat16": 6e-2}


def check_schedules(impl: str, dtype: str) -> None:
    groups = build_stage_groups(2, 2, device_type="cuda")
    device = torch.device("cuda", 0)
    for schedule in SCHEDULES:
        for layout in ("replicated", "sharded"):
            setting = Setting(schedule, layout=layout, vocabulary=23, impl=impl, dtype=dtype)
            batch = draw_batch(setting, 2 if layout == "sharded" else 1, 1)
            losses, expected = one_process(setting, [batch])
            pipeline = Pipeline(setting, groups, device)
            found = pipeline.step(*batch)
            for got, want in zip(found, losses[0] if pipeline.has_last else [], strict=True):
                assert relative_error(got.cpu(), want, 1.0) < TOLERANCE[dtype]
            errors = pipeline.compare_gradients(expected)
            assert max(errors.values()) < TOLERANCE[dtype], (setting, errors)


@pytest.mark.parametrize(("impl", "dtype"), [("chunked", "float64"), ("cce", "bfloat16")])
def test_schedules(impl: str, dtype: str) -> None:
    run_ranks(check_schedules, 4, backend="nccl", timeout=170, impl=impl, dtype=dtype)
