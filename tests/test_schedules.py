"""All seven schedules of torch.distributed.pipelining on 2 x 2 ranks against one process.

The page docs/schedules.md is made from what passes here: `make docs`.
"""

import os
import warnings
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stage_groups import build_stage_groups
from tests.interpreter import INTERPRETED, prepare
from tests.oracle import relative_error
from tests.ranks import ROOT, run_ranks
from tests.recording import CollectiveRecorder
from tests.toy_pipeline import (
    MICROBATCHES,
    SCHEDULES,
    SPLIT_BACKWARD,
    V_SHAPED,
    Pipeline,
    Setting,
    draw_batch,
    one_process,
)
from vocab_parallel.backends.torch import TorchBackend

PAGE = ROOT / "docs" / "schedules.md"
LAYOUTS = ("replicated", "sharded", "sequence")
CPU = torch.device("cpu")
# torch's own eval() of the V-shaped schedules asserts that there is a backward.
EVALUATES = [schedule for schedule in SCHEDULES if schedule not in V_SHAPED]


def check_setting(setting: Setting, groups) -> None:
    """Two steps with an evaluation between them.

    Without scale_grads the gradients of both add up. With it they must not: the schedule would
    divide what the first step left once more.
    """
    columns = groups.vocab_degree if setting.layout == "sharded" else 1
    batches = [draw_batch(setting, columns, seed) for seed in (1, 2)]
    expected_losses, expected = one_process(setting, batches)
    if setting.scale_grads:
        expected = one_process(setting, batches[1:])[1]
    pipeline = Pipeline(setting, groups, CPU)
    for turn, batch in enumerate(batches):
        losses = pipeline.step(*batch)
        if turn == 0:
            if setting.scale_grads:
                for module in pipeline.modules.values():
                    module.zero_grad()
            if setting.schedule in EVALUATES:
                evaluated = pipeline.step(*batch, evaluate=True)
                assert [float(x.detach()) for x in evaluated] == [float(x.detach()) for x in losses]
        if pipeline.has_last:
            for found, want in zip(losses, expected_losses[turn], strict=True):
                assert relative_error(found, want, 1.0) < 1e-12, setting
    errors = pipeline.compare_gradients(expected)
    assert max(errors.values()) < 1e-11, (setting, errors)


def check_matrix(path: str, whole: bool) -> None:
    """Run the matrix: the whole one, or a fourth of it.

    Of that, static shapes are where rows are uneven, and DTensors where gradients are scaled.
    """
    groups = build_stage_groups(2, 2, device_type="cpu")
    passed: Counter[tuple[str, str]] = Counter()
    for schedule, scale, layout, vocabulary, static, dtensor in product(
        SCHEDULES, (True, False), LAYOUTS, (24, 23), (False, True), (False, True)
    ):
        if not whole and (static, dtensor) != (vocabulary == 23, scale):
            continue
        check_setting(Setting(schedule, scale, layout, vocabulary, static, dtensor), groups)
        passed[schedule, layout] += 1
    if dist.get_rank() == 0:
        rows = [
            f"| {schedule} | "
            + ("two halves" if schedule in SPLIT_BACKWARD else "whole")
            + " | "
            + " | ".join(str(passed[schedule, layout]) for layout in LAYOUTS)
            + " |"
            for schedule in SCHEDULES
        ]
        Path(path).write_text("\n".join(rows) + "\n")


def test_matrix(tmp_path: Path) -> None:
    """Every case passes, and the table on the page says how many there are."""
    made = tmp_path / "table.md"
    run_ranks(check_matrix, 4, timeout=280, path=str(made), whole=False)
    begin, end = "<!-- made by make docs -->\n", "<!-- end -->\n"
    page = PAGE.read_text()
    head, rest = page.split(begin)
    table = "| schedule | backward | replicated | sharded | sequence |\n|---|---|---|---|---|\n"
    written = head + begin + table + made.read_text() + end + rest.split(end)[1]
    if os.environ.get("WRITE_DOCS") == "1":
        PAGE.write_text(written)
    assert PAGE.read_text() == written, "docs/schedules.md is stale: run `make docs`"


@pytest.mark.slow
def test_whole_matrix(tmp_path: Path) -> None:
    run_ranks(check_matrix, 4, timeout=280, path=str(tmp_path / "table.md"), whole=True)


class Work:
    """Counts what the local implementation is asked for."""

    def __init__(self) -> None:
        self.forwards = 0
        self.waiting = self.most_waiting = 0  # forwards whose backward is not finished
        self.backwards: Counter[tuple[bool, bool]] = Counter()


def watch(work: Work) -> None:
    forward, backward = TorchBackend.statistics, TorchBackend.gradients

    def counted_forward(self, shard, plan):
        work.forwards += 1
        work.waiting += 1
        work.most_waiting = max(work.most_waiting, work.waiting)
        return forward(self, shard, plan)

    def counted_backward(self, shard, plan, upstream):
        work.backwards[upstream.wanted.hidden, upstream.wanted.classifier] += 1
        work.waiting -= upstream.wanted.classifier
        return backward(self, shard, plan, upstream)

    TorchBackend.statistics, TorchBackend.gradients = counted_forward, counted_backward


def check_work(private_query: bool) -> None:
    """Each half does its own product once; one reduction of dE a microbatch."""
    if private_query:
        check_every_schedule(private_query)
        return
    del torch._C._will_engine_execute_node
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        check_every_schedule(private_query)
    texts = [str(warning.message) for warning in said if "split backward" in str(warning.message)]
    assert len(texts) <= 1, "it is said once"


def check_every_schedule(private_query: bool) -> None:
    groups = build_stage_groups(2, 2, device_type="cpu")
    work = Work()
    watch(work)
    for schedule in SCHEDULES:
        setting = Setting(schedule, static_shapes=True, vocabulary=23)
        batch = draw_batch(setting, 1, 3)
        _, expected = one_process(setting, [batch])
        pipeline = Pipeline(setting, groups, CPU)
        pipeline.step(*draw_batch(setting, 1, 4))  # the first call agrees on the arguments
        for module in pipeline.modules.values():
            module.zero_grad()
        work.__init__()
        with CollectiveRecorder() as recorded:
            pipeline.step(*batch)
        errors = pipeline.compare_gradients(expected)
        assert max(errors.values()) < 1e-11, (schedule, errors)
        if not pipeline.has_last:
            continue
        calls = Counter(
            call.name for call in recorded.calls if call.name in ("all_reduce", "reduce_scatter")
        )
        assert work.forwards == MICROBATCHES
        if private_query:  # what auto counts on
            told = pipeline.loss._options["microbatches_in_flight"]
            assert work.most_waiting == told, (schedule, work.most_waiting, told)
        asked = dict(work.backwards)
        if schedule not in SPLIT_BACKWARD:
            assert asked == {(True, True): MICROBATCHES}, (schedule, asked)
            assert calls == {"all_reduce": MICROBATCHES}
        elif private_query:
            whole = asked.pop((True, True), 0)  # a schedule may leave some backwards whole
            halves = MICROBATCHES - whole
            assert asked == {(True, False): halves, (False, True): halves}, (schedule, asked)
            assert halves > 0, schedule
            assert calls == {"all_reduce": MICROBATCHES}
        else:  # right, but twice the work
            assert set(asked) == {(True, True)}, (schedule, asked)
            assert MICROBATCHES < asked[True, True] <= 2 * MICROBATCHES
            assert calls == {"all_reduce": asked[True, True]}


@pytest.mark.parametrize("private_query", [True, False])
def test_work_is_done_once(private_query: bool) -> None:
    run_ranks(check_work, 4, private_query=private_query)


def check_apple_kernels() -> None:
    """cut-cross-entropy's kernels in the interpreter, float16, under two kinds of schedule."""
    prepare()
    groups = build_stage_groups(2, 2, device_type="cpu")
    for schedule, layout in (("1F1B", "sharded"), (SPLIT_BACKWARD[0], "replicated")):
        # Shapes are static: to infer them a schedule calls the loss on uninitialised hidden states,
        # whose NaN the interpreter warns of.
        setting = Setting(
            schedule, layout=layout, vocabulary=23, static_shapes=True, impl="cce", dtype="float16"
        )
        batch = draw_batch(setting, 2 if layout == "sharded" else 1, 1)
        _, expected = one_process(setting, [batch])
        pipeline = Pipeline(setting, groups, CPU)
        pipeline.step(*batch)
        errors = pipeline.compare_gradients(expected)
        assert max(errors.values()) < 4e-3, (setting, errors)


@pytest.mark.slow
def test_apple_kernels() -> None:
    for package in ("triton", "cut_cross_entropy"):
        pytest.importorskip(package)
    run_ranks(check_apple_kernels, 4, environment=INTERPRETED, timeout=110)
