"""The planner: what was measured, what must hold, and what is refused."""

import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM

from launch.arguments import TrainArguments
from launch.configs import load_config
from launch.model import layers_of_stage
from launch.plan import start_command
from launch.planning.advice import more_microbatches, other_schedule
from launch.planning.balance import layer_counts
from launch.planning.command import PlanArguments, parse_bytes, plan
from launch.planning.estimate import Job, Mesh, estimate_stages
from launch.planning.hardware import Hardware
from launch.planning.loss_time import LAUNCHES, loss_seconds, passes_seconds
from launch.planning.meshes import MeshPlanner, best_of, least_gpus, plan_meshes
from launch.planning.orders import alone, most_in_flight, stages_of, tasks_of
from launch.planning.picture import plot_plan
from launch.planning.published import PUBLISHED
from launch.planning.rank_work import RankWork, Rows, filling_helps
from launch.planning.schedules import SCHEDULES
from launch.planning.shape import ModelShape
from launch.planning.spanning import SpanningPlanner
from launch.planning.table import utilisation, verdict
from launch.planning.unpiped import without_pipeline
from tests.ranks import ROOT
from vocab_parallel import plan_backward
from vocab_parallel.pipeline.spanning.order import Costs, best_order, one_forward_one_backward
from vocab_parallel.pipeline.spanning.validation import SCHEDULES as SPANNING

MIB = 2**20
HELD = [name for name, one in SCHEDULES.items() if one.held]
MEASURED = ROOT / "benchmarks" / "results" / "2026-11-29-loss-h200.json"


def test_memory_of_measured_ranks() -> None:
    """Qwen3-1.7B, eager, on 2 x 1 and 2 x 2 ranks of one H200: both stages within 2%."""
    job = Job(ModelShape.load("qwen3-1.7b"), 4096, 1, 8, "1f1b")
    for vocab, parameters, measured in (
        (1, [1_166_876_928, 864_862_976], (24_211 * MIB, 12_412 * MIB)),
        (2, [1_011_294_464, 709_280_512], (23_022 * MIB, 11_022 * MIB)),
    ):
        stages = estimate_stages(job, Mesh(1, 2, vocab), Hardware.load("h200"))
        assert [stage.layers for stage in stages] == [17, 11]
        assert [int(stage.parameters) for stage in stages] == parameters
        for stage, held in zip(stages, measured, strict=True):
            assert stage.memory == pytest.approx(held, rel=0.02)


def test_memory_of_compiled_ranks() -> None:
    """The runs of launch.train whose lines are in the file, each on two H200s: within 2%."""
    path = ROOT / "benchmarks" / "results" / "2026-11-29-all-stages-2xh200.json"
    runs, hardware = json.loads(path.read_text())["runs"], Hardware.load("h200")
    for name, pipeline, vocab, microbatch in (
        ("last stage, layers rebalanced", 2, 1, 1),
        ("pipeline 2 x vocab 1", 2, 1, 2),
        ("pipeline 1 x vocab 2", 1, 2, 1),
    ):
        job = Job(
            ModelShape.load("qwen3-1.7b"), 4096, microbatch, 8, "1f1b",
            state_bytes=12, memory_budget=2**32, compile=True,
        )  # fmt: skip
        stages = estimate_stages(job, Mesh(1, pipeline, vocab), hardware)
        planned_bytes = [stage.memory for stage in stages for _ in range(vocab)]
        held = [MIB * each for each in runs[name]["peak_mib"]]
        assert planned_bytes == pytest.approx(held, rel=0.02), name
    splits = replace(job, schedule="zbvzerobubble")
    assert not splits.compiled
    assert splits.activation_bytes(hardware) > job.activation_bytes(hardware)
    assert splits.layer_seconds(hardware) > job.layer_seconds(hardware)


@pytest.mark.parametrize(("way", "budget"), [("probs", 3e9), ("recompute", 64 * MIB)])
def test_time_of_the_measured_loss(way: str, budget: float) -> None:
    """Against benchmarks.loss on the card that the hardware file is of."""
    found = json.loads(MEASURED.read_text())["shapes"]
    for shape, rows_found in found.items():
        hidden, rows = map(int, shape.split("x"))
        sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
        sizes |= {"vocab_size": rows, "hidden_size": hidden, "intermediate_size": hidden}
        model = ModelShape.of("", sizes)
        job = Job(model, 8192, 1, 1, "1f1b", memory_budget=int(budget))
        stage = estimate_stages(job, Mesh(1, 1, 1), Hardware.load("h200"))[-1]
        assert stage.loss_way == way
        measured = rows_found["rows"][f"ours, {way}"]["milliseconds"]
        assert 1e3 * stage.loss_seconds == pytest.approx(measured, rel=0.1), shape


def test_scaling_study() -> None:
    """Against benchmarks.scaling: the times of up to 16 shards within 10%, memory within 1%."""
    found = json.loads((MEASURED.parent / "2026-11-29-scaling-h200.json").read_text())
    hidden = {"qwen3-8b": 4096, "qwen3-32b": 5120, "248,320 rows": 5120}
    hardware, tokens = Hardware.load("h200"), found["tokens"]
    shards = {}
    for model, size in hidden.items():
        for row in found["models"][model]:
            shape = (tokens, row["rows"], size)
            shards[model, row["degree"]] = shape
            one = plan_backward(*shape, backward=row["way"])
            predicted = 1e3 * loss_seconds(one, *shape, 2, hardware)
            # The smallest are bound by what is no product.
            within = 0.1 if row["degree"] <= 16 else 0.15
            assert predicted == pytest.approx(row["milliseconds"], rel=within), (model, row)
    assert len(found["memory"]) == 3
    for row in found["memory"]:
        plan = plan_backward(*shards[row["model"], row["degree"]], degree=row["degree"])
        assert plan.peak_bytes == pytest.approx(row["bytes"], rel=0.01)


def planned(**given: Any) -> Any:
    values = {
        "model": "qwen3-32b", "gpus": 64, "gpu_memory": "80GB", "microbatches": 16,
        "vocab_over": "last-stage", **given,
    }  # fmt: skip
    return plan(PlanArguments(**values))[1]


def test_every_mesh() -> None:
    plans = planned()
    meshes = {(one.mesh.data, one.mesh.pipeline, one.mesh.vocab) for one in plans}
    # torch's 1F1B takes no more stages than microbatches, 16.
    assert len(meshes) == len(plans) == 25
    assert {pipeline for _, pipeline, _ in meshes} == {1, 2, 4, 8, 16}
    assert {one.mesh.pipeline for one in planned(schedule="gpipe")} == {1, 2, 4, 8, 16, 32, 64}
    assert all(d * p * v == 64 for d, p, v in meshes)
    fitting = [one for one in plans if one.fits]
    assert fitting
    assert fitting == plans[: len(fitting)], "those that fit stand first"
    speeds = [one.tokens_per_second for one in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert not next(one for one in plans if one.mesh.pipeline == 1).fits
    assert any(one.recompute_layers for one in fitting), "long stages keep their inputs alone"
    for one in plans:
        assert sum(stage.layers for stage in one.stages) == 64
        assert 0 <= one.bubble < 1
        assert one.stages[-1].rows == -(-151_936 // one.mesh.vocab)


def test_sharding_the_vocabulary_relieves_the_last_stage() -> None:
    by_mesh = {one.mesh: one for one in planned()}
    for vocab in (2, 4, 8):
        wide, narrow = by_mesh[Mesh(8, 8, 1)], by_mesh[Mesh(8 // vocab, 8, vocab)]
        assert narrow.stages[-1].classifier == pytest.approx(wide.stages[-1].classifier / vocab)
        assert narrow.stages[-1].memory < wide.stages[-1].memory


def test_timeline() -> None:
    """Equal stages: the bubble is (P - 1) / (M + P - 1); with two stages a rank it is half."""
    for schedule in SCHEDULES:
        ranks, microbatches = 4, 8
        stages = [stage for own in stages_of(schedule, ranks) for stage in own]
        share = ranks / len(stages)
        times = [(share, share, share)] * len(stages)
        order = alone(schedule, ranks, microbatches, times, 0.0)
        spans = order.passes
        work = {(span.stage, span.kind, span.microbatch) for span in spans}
        assert len(work) == len(spans), "nothing twice"
        for stage, microbatch in itertools.product(stages, range(microbatches)):
            kinds = {kind for s, kind, m in work if (s, m) == (stage, microbatch)}
            assert kinds == {"F", "I", "W"} or kinds == {"F", "B"}
            assert SCHEDULES[schedule].splits or "B" in kinds
        for rank in range(ranks):
            own = sorted((span.start, span.end) for span in spans if span.ranks == (rank,))
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))
        total = order.finish
        if SCHEDULES[schedule].stages == 1:
            assert total == pytest.approx(3.0 * (microbatches + ranks - 1))
        else:
            assert 3.0 * microbatches <= total < 3.0 * (microbatches + ranks - 1)


def test_in_flight() -> None:
    """1F1B keeps P - stage microbatches, GPipe all, and a V-shaped rank those of both stages."""
    order = tasks_of("1f1b", 4, 8)
    assert [most_in_flight(order[r], {r: 1.0})[r] for r in range(4)] == [4, 3, 2, 1]
    assert most_in_flight(tasks_of("gpipe", 4, 8)[3], {3: 1.0}) == {3: 8}
    found = most_in_flight(tasks_of("zbvzerobubble", 4, 8)[0], {0: 1.0, 7: 1.0})
    assert sum(found.values()) == 8, "as much as 1F1B's first rank, whose stages are twice as long"


def whole_mesh(
    model: str, mesh: Mesh, microbatches: int, schedule: str = "1f1b", **given: Any
) -> tuple[Job, Mesh, SpanningPlanner]:
    job = Job(ModelShape.load(model), 4096, 1, microbatches, schedule, **given)
    return job, mesh, SpanningPlanner(Hardware.load("h100"))


def test_memory_of_measured_ranks_of_all_stages() -> None:
    """Qwen3-1.7B, 2 x 1 ranks on two H100s, docs/all-stages.md: both ranks within 5%."""
    for budget, measured in (
        (4096 * MIB, (27_523_089_920, 22_319_456_256)),
        (64 * MIB, (26_916_455_936, 20_608_368_640)),
    ):
        job, mesh, planner = whole_mesh("qwen3-1.7b", Mesh(1, 2, 1), 8, memory_budget=budget)
        step = planner.step(job, mesh, "balanced", simulated=True)
        for stage, held in zip(step.stages, measured, strict=True):
            assert stage.memory == pytest.approx(held, rel=0.05)


def test_memory_of_all_stages() -> None:
    """Parameters, microbatches in flight and the loss's bytes, each added up here."""
    for model, ends in (("qwen3-8b", 2), ("qwen3-1.7b", 1)):  # the second is tied
        job, mesh, planner = whole_mesh(model, Mesh(1, 4, 2), 8, memory_budget=10**9)
        step = planner.step(job, mesh, "balanced", simulated=True)
        shape, rows = job.shape, -(-151_936 // 8)
        tokens = 2 * 4096
        for rank, stage in enumerate(step.stages):
            assert stage.rows == rows
            norm = shape.hidden if rank == 3 else 0
            body = stage.layers * shape.layer_parameters[0] + norm
            assert stage.parameters == body + ends * rows * shape.hidden
            assert stage.weights == 2 * stage.parameters
            assert stage.in_flight == 4 - rank + 1, "one more than 1F1B's own"
            assert stage.loss_way == "probs"
            # Three microbatches' hidden states, shares of dE and logits, and one dE in float32.
            numbers = tokens * shape.hidden
            plan_of_rows = plan_backward(
                tokens, rows, shape.hidden, backward="probs", microbatches_in_flight=3, degree=8
            )
            beside = plan_of_rows.peak_bytes - 2 * rows * shape.hidden
            # Where a stage holds most of its layers, a microbatch or more of the loss is done.
            fewer = [4 * numbers * n + plan_of_rows.kept_bytes * n for n in range(3)]
            most = 3 * numbers * (2 + 4) + beside + plan_of_rows.kept_bytes / 4
            assert stage.loss in [most - less for less in fewer]
            assert beside >= 3 * plan_of_rows.kept_bytes + 4 * numbers
        assert step.hidden_held == 3
        last_stage = estimate_stages(job, mesh, Hardware.load("h100"))
        if ends == 2:
            lost = last_stage[0].parameters - step.stages[0].parameters
            whole = (151_936 - 2 * rows) * shape.hidden
            own = last_stage[0].layers - step.stages[0].layers
            assert lost == whole + own * shape.layer_parameters[0], "no whole embedding"


def test_seconds_of_passes() -> None:
    """Three products where logits are kept, four where T makes them again."""
    rates = replace(
        Hardware.load("h100"),
        copy_bytes=1e30,
        loss_overhead={"probs": 1.0, "recompute": 1.0},
    )
    shape = (8192, 16_384, 4096)
    product = 2.0 * math.prod(shape) / rates.product_flops

    def passes(backward: str, budget: int | None) -> tuple[float, ...]:
        one = plan_backward(*shape, backward=backward, memory_budget=budget)
        s, t = passes_seconds(one, *shape, 2, rates)
        return (s - LAUNCHES) / product, (t - LAUNCHES / 2) / product

    assert passes("probs", 10**9) == pytest.approx((2.0, 1.0))
    assert passes("recompute", None) == pytest.approx((2.0, 2.0))


def test_order_of_all_stages() -> None:
    """What is planned is what `order.py` orders; its counts in flight are in the memory."""
    job, mesh, planner = whole_mesh("qwen3-8b", Mesh(1, 4, 1), 8)
    step = planner.step(job, mesh, "balanced", simulated=True)
    first = step.stages[0]
    link = 4096 * 4096 / 450e9
    costs = Costs(
        forward=lambda stage: step.stages[stage].forward_seconds,
        backward_input=lambda stage: step.stages[stage].forward_seconds,
        backward_weight=lambda stage: step.stages[stage].forward_seconds,
        statistics=[stage.statistics_seconds for stage in step.stages],
        gradients=[stage.gradients_seconds for stage in step.stages],
        message=2 * link,
        broadcast=2 * link,
        exchange=4 * link + 8 * 4 * 4096 / 450e9,
    )
    order = best_order(one_forward_one_backward(4, 8), costs)
    assert step.seconds == pytest.approx(order.finish)
    assert {n: stage.in_flight for n, stage in enumerate(step.stages)} == order.in_flight
    assert step.hidden_held == order.hidden_held
    assert first.statistics_seconds > first.gradients_seconds
    for found, event in zip(step.passes, order.passes, strict=True):
        assert found[:4] == event[:4]
        assert found.start == pytest.approx(event.start)
    assert 1 - step.bubble == pytest.approx(sum(order.busy) / 4 / order.finish)


@pytest.mark.parametrize("schedule", HELD)
def test_fewer_microbatches_and_the_formula(schedule: str) -> None:
    """Against the whole order: what is left out of the simulation, and what stands for it."""
    for model, rows in (("qwen3-32b", "balanced"), ("qwen3-8b", "filled")):
        job, mesh, planner = whole_mesh(
            model, Mesh(1, 4 if rows == "balanced" else 8, 1), 32, schedule
        )
        expected = planner.step(job, mesh, rows, simulated=False)
        found = planner.step(job, mesh, rows, simulated=True)
        work = RankWork(job, mesh, Hardware.load("h100"), rows)
        order = best_order(tasks_of(schedule, mesh.pipeline, 32), work.costs())
        assert found.seconds == pytest.approx(order.finish, rel=0.01)
        # Two stages of a rank with different layers: filled rows do not even both phases out.
        error = 0.1 if (schedule, rows) == ("loopedbfs", "filled") else 0.05
        assert expected.seconds == pytest.approx(order.finish, rel=error)
        assert found.hidden_held == order.hidden_held
        fullest = max(expected.rank_memory)
        assert max(found.rank_memory) == pytest.approx(fullest, rel=0.05)
        # With the ratio that was found, the formula says the same of another vocab degree.
        wide = Mesh(1, mesh.pipeline, 4)
        again = planner.step(job, wide, rows, simulated=False).seconds
        assert again == pytest.approx(
            planner.step(job, wide, rows, simulated=True).seconds, rel=0.02
        )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-32b", "qwen3-8b", "gemma-2-2b"])
@pytest.mark.parametrize("schedule", HELD)
def test_approximations(schedule: str, model: str) -> None:
    """What docs/planning.md says of the formula, and of what is left out of a simulation."""
    hardware = Hardware.load("h100")
    shapes = ((2, 8, 1), (4, 8, 1), (8, 8, 1), (4, 32, 1), (8, 64, 1), (8, 64, 16), (16, 64, 1))
    for pipeline, microbatches, vocab in shapes:
        job, mesh, _ = whole_mesh(model, Mesh(1, pipeline, vocab), microbatches, schedule)
        if len(stages_of(schedule, pipeline)[0]) * pipeline > job.shape.layers:
            continue
        rules: list[Rows] = ["balanced"] + ["filled"] * filling_helps(job, pipeline)
        for rows in rules:
            costs = RankWork(job, mesh, hardware, rows).costs()
            whole = best_order(tasks_of(schedule, pipeline, microbatches), costs).finish
            expected = SpanningPlanner(hardware).step(job, mesh, rows, simulated=False)
            found = SpanningPlanner(hardware).step(job, mesh, rows, simulated=True)
            uneven = rows == "filled" and SCHEDULES[schedule].stages == 2
            assert found.seconds == pytest.approx(whole, rel=0.04 if uneven else 0.01)
            assert (0.88 if uneven else 0.95) <= expected.seconds / whole <= 1.05


@pytest.mark.parametrize("schedule", ["1f1b", "interleavedzerobubble", "zbvzerobubble"])
def test_filled_rows_even_out_layers(schedule: str) -> None:
    for model in ("qwen3-8b", "gemma-2-2b"):
        job, mesh, planner = whole_mesh(model, Mesh(1, 8, 1), 16, schedule)
        assert filling_helps(job, 8)
        steps = [planner.step(job, mesh, rows, simulated=True) for rows in ("balanced", "filled")]
        assert steps[1].seconds <= 1.001 * steps[0].seconds
        rows = [steps[1].stages[own[0]].rows for own in steps[1].ranks]
        layers = [sum(steps[1].stages[n].layers for n in own) for own in steps[1].ranks]
        assert sum(rows) == job.shape.vocabulary
        assert min(n for n, own in zip(rows, layers, strict=True) if own == min(layers)) > max(
            n for n, own in zip(rows, layers, strict=True) if own == max(layers)
        )


@pytest.mark.parametrize("pipeline", [8, 16])
def test_all_stages_share_the_loss(pipeline: int) -> None:
    """Qwen3-32B under 1F1B: within 3% of (layers + loss) / P and the schedule's own bubble."""
    job, mesh, planner = whole_mesh("qwen3-32b", Mesh(1, pipeline, 1), 8 * pipeline)
    step = planner.step(job, mesh, "balanced", simulated=True)
    hardware = Hardware.load("h100")
    whole = estimate_stages(job, mesh, hardware)[-1].loss_seconds
    layers = 64 * 3 * job.shape.layer_flops(4096, 4096) / hardware.layer_flops
    ideal = job.microbatches * (layers + whole) / pipeline + (pipeline - 1) * layers / pipeline
    assert ideal <= step.seconds <= 1.03 * ideal


def test_both_places() -> None:
    """Every mesh stands twice but for those of one stage, and the best is of a simulated order."""
    plans = planned(vocab_over="both", hardware="h100")
    places = [(one.mesh, one.vocab_over) for one in plans]
    assert len(set(places)) == len(places)
    spanning = {mesh for mesh, place in places if place == "all-stages"}
    on_last = {mesh for mesh, place in places if place == "last-stage"}
    assert {mesh for mesh in spanning if mesh.pipeline <= 16} == {
        mesh for mesh in on_last if mesh.pipeline > 1
    }
    assert max(mesh.pipeline for mesh in spanning) == 64
    best = best_of(plans, "all-stages")
    assert best is plans[0]
    assert best.simulated
    assert best.passes
    assert verdict(plans).startswith("Give the vocabulary to all stages, ")
    again = planned(vocab_over="all-stages", hardware="h100")
    assert [one.mesh for one in again] == [
        one.mesh for one in plans if one.vocab_over == "all-stages"
    ]
    assert verdict(again) == ""
    assert not best_of(planned(schedule="gpipe", vocab_over="both"), "all-stages")


def test_verdict() -> None:
    """One sentence, whoever wins and whatever fits."""
    plans = planned(vocab_over="both", hardware="h100", gpus=16)
    last, everywhere = best_of(plans, "last-stage"), best_of(plans, "all-stages")
    assert last
    assert everywhere
    even = replace(everywhere, tokens_per_second=1.009 * last.tokens_per_second)
    assert verdict([last, even]).startswith("No difference, less than 1%: ")
    slow = replace(everywhere, tokens_per_second=last.tokens_per_second / 1.25)
    assert verdict([last, slow]).startswith("Rebalance layers instead, 25.0% faster: ")
    alone = replace(last, mesh=Mesh(16, 1, 1))
    assert verdict([alone, slow]).startswith("Do without a pipeline, 25.0% faster: ")
    fast = replace(everywhere, mesh=last.mesh, tokens_per_second=1.5 * last.tokens_per_second)
    assert verdict([last, fast]).startswith("Give the vocabulary to all stages, 50.0% faster: ")
    elsewhere = replace(fast, mesh=Mesh(1, 16, 1))  # which the last stage is not planned on
    assert verdict([last, elsewhere]).startswith("Give the vocabulary to all stages, 50.0%")
    full = replace(last, missing=3e9)
    assert verdict([everywhere, full]).startswith("Only the vocabulary on all stages fits: ")
    assert verdict([last, replace(everywhere, missing=1.0)]).startswith(
        "Only the vocabulary on the last stage fits: "
    )
    assert "Nothing fits" in verdict([full, replace(everywhere, missing=1.0)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str) -> None:
    plans = planned(schedule=schedule, gpus=16, gpu_memory="141GB", vocab_over="both")
    spanning = [one for one in plans if one.vocab_over == "all-stages"]
    assert bool(spanning) == (schedule in HELD)
    assert any(one.fits for one in plans)
    for one in plans:
        assert sorted(stage for own in one.ranks for stage in own) == list(range(len(one.stages)))
        assert sum(one.rank_memory) == pytest.approx(sum(stage.memory for stage in one.stages))


@pytest.mark.slow
def test_calibration(tmp_path: Path) -> None:
    """On two ranks of this machine: what comes out is read back, and can be planned with."""
    path = tmp_path / "here.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2"]  # fmt: skip
    command = [*start, "-m", "launch.plan", "--calibrate", "--out", str(path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    found = Hardware.load(str(path))
    assert found == Hardware(**json.loads(shown.stdout.splitlines()[-1]))
    assert 0 < found.layer_flops < 3 * found.product_flops
    assert found.copy_bytes > 1e8
    assert found.link_bytes > 1e6
    assert "all-gather of 2 ranks" in found.sources["link_bytes"]
    assert all(0.3 < factor < 30 for factor in found.loss_overhead.values())
    assert planned(hardware=str(path), gpu_memory="80GB")[0].fits


def test_bytes_of_the_optimizer() -> None:
    """launch.train's own, docs/training.md: 16 bytes a parameter, and 8 without copies."""
    for given, each in (
        ({}, 16),
        ({"float32_weights": False}, 8),
        ({"dtype": "float32"}, 16),
        ({"state_bytes": 1}, 5),
    ):
        stage = planned(**given)[0].stages[0]
        held = stage.weights + stage.gradients + stage.optimizer
        assert held == pytest.approx(each * stage.parameters)


def test_balance() -> None:
    assert layer_counts(28, 2, 311 / 50.3) == [17, 11]
    assert layer_counts(8, 1, 5.0) == [8]
    with pytest.raises(ValueError, match="3 stages need at least as many layers, got 2"):
        layer_counts(2, 3, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "qwen4"}, "--model qwen4 is neither a folder nor a published model"),
        ({"model": None}, "--model and --gpus are needed"),
        ({"schedule": "dualpipev", "microbatches": 1}, "dualpipev runs on no mesh of 64 GPUs"),
        ({"gpus": 0}, "--gpus must be at least 1, got 0"),
        ({"gpu_memory": "2GB", "hardware": "h100"}, "below one layer of qwen3-32b"),
        ({"gpu_memory": "lots"}, "'lots' is no size"),
        ({"gpu_memory": "80"}, "--gpu-memory 80 has no unit: give 80GB"),
        ({"memory_budget": "64"}, "--memory-budget 64 has no unit"),
        ({"hardware": "abacus"}, r"unknown hardware 'abacus': give a file, or one of \['a100'"),
        (
            {"gpu_memory": "200GB"},
            "200GB is of no GPU whose speed is known here .*h200 141GB.*: give --hardware FILE",
        ),
        ({"node_gpus": 0}, "--node-gpus must be at least 1, got 0"),
        ({"node_bandwidth": "50"}, "--node-bandwidth 50 has no unit"),
        ({"node_bandwidth": "0GB"}, "--node-bandwidth 0GB is nothing"),
        ({"state_bytes": -4}, "--state-bytes must be at least 0, got -4"),
        ({"gpu_memory": "24GB"}, "--gpu-memory 24GB is of no GPU whose speed is known here"),
        ({"schedule": "2f2b"}, "--schedule 2f2b is unknown: give one of 1F1B, GPipe, "),
        ({"batch": 64}, "--batch and --microbatches say the same in two ways"),
        ({"batch_tokens": 5000, "microbatches": None}, "5000 is no multiple of --sequence 4096"),
        ({"batch": 0, "microbatches": None}, "--batch must be at least 1, got 0"),
        (
            {"batch": 3, "microbatches": None, "gpus": 64, "microbatch": 2},
            "a batch of 3 sequences is no multiple of data x vocab x --microbatch",
        ),
        ({"sequence": 0}, "--sequence must be at least 1"),
        ({"schedule": "gpipe", "vocab_over": "all-stages"}, "gpipe has the vocabulary on the last"),
        ({"gpus": 1, "vocab_over": "all-stages"}, "all-stages needs at least 2 pipeline ranks"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**given)


@pytest.mark.parametrize(
    ("memory", "name"),
    [(None, "NVIDIA H200"), ("80GB", "NVIDIA H100 SXM"), ("64GiB", "NVIDIA H100 SXM"),
     ("80GiB", "NVIDIA H100 SXM"), ("141GB", "NVIDIA H200")],
)  # fmt: skip
def test_hardware_has_the_memory(memory: str | None, name: str) -> None:
    _, _, hardware = plan(PlanArguments(model="qwen3-1.7b", gpus=2, gpu_memory=memory))
    assert hardware.name == name


STARTED = [
    {"model": "qwen3-32b", "gpus": 16, "microbatch": 2},
    {
        "model": "qwen3-8b",
        "gpus": 8,
        "float32_weights": False,
        "schedule": "zbvzerobubble",
        "vocab_over": "last-stage",
        "shard_body": True,
    },
    {"model": "qwen3-1.7b", "gpus": 2, "dtype": "float32", "memory_budget": "32MiB"},
]


@pytest.mark.parametrize("given", STARTED)
def test_command_line_of_every_mesh(given: dict[str, Any]) -> None:
    """What is printed is read by launch.train as the plan's mesh and work; or it says why not."""
    arguments = PlanArguments(**{"gpu_memory": "80GB", "sequence": 512, **given})
    job, plans, _ = plan(arguments)
    run = 0
    for one in plans:
        line = start_command(one, job, arguments)
        if line.startswith("launch.train does not do this: "):
            assert one.recompute_layers, "--recompute of a backward that is split"
            continue
        torchrun, options = line.split(" -m launch.train ")
        found = tyro.cli(TrainArguments, args=options.split())
        found.validate()
        assert Mesh(found.data, found.pipeline, found.vocab) == one.mesh
        assert (found.vocab_over, found.rows) == (one.vocab_over, one.rows)
        assert found.schedule.lower() == job.schedule
        assert found.model == arguments.model
        assert (found.recompute == "all") == one.recompute_layers
        assert found.float32_weights == arguments.float32_weights
        assert found.batch == found.columns * one.microbatches * job.microbatch
        assert found.shard_body == (arguments.shard_body and one.mesh.data > 1)
        assert (found.sequence, found.dtype) == (512, arguments.dtype)
        assert found.loss_memory == (32 if "memory_budget" in given else 64)
        counts = [int(n) for n in re.findall(r"--n(?:nodes|proc-per-node) (\d+)", torchrun)]
        found.validate_ranks(math.prod(counts))
        run += 1
    assert run


def test_equal_batch() -> None:
    """Every mesh has the batch, in microbatches of its own; tokens say the same."""
    plans = planned(microbatches=None, batch=128, vocab_over="both", gpus=16)
    for one in plans:
        mesh = one.mesh
        assert one.microbatches * mesh.data * mesh.vocab == 128
        assert one.tokens_per_second == pytest.approx(128 * 4096 / one.step_seconds)
    assert len({one.microbatches for one in plans}) > 3
    assert planned(microbatches=None, batch_tokens=128 * 4096, vocab_over="both", gpus=16) == plans
    # Not over 8 columns or 16.
    uneven = planned(microbatches=None, batch=12, gpus=16, schedule="gpipe")
    assert {one.mesh.data * one.mesh.vocab for one in uneven} == {1, 2, 4}


def test_utilisation() -> None:
    """Six flops a parameter and token, and causal attention, over the data sheet's peak."""
    _, plans, hardware = plan(PlanArguments(model="qwen3-8b", gpus=8, gpu_memory="80GB"))
    best, shape = plans[0], ModelShape.load("qwen3-8b")
    products = 36 * (2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 12_288) + 151_936 * 4096
    assert products == 36 * shape.layer_products + shape.vocabulary_parameters
    of_token = 6 * products + 36 * 6 * 4096 * 32 * 128  # queries and keys, weights and values
    expected = of_token * best.tokens_per_second / (8 * 989e12)
    assert utilisation(best, hardware) == pytest.approx(expected)
    assert utilisation(best, replace(hardware, name="mine")) is None


def test_advice() -> None:
    """What is said of microbatches and schedules is what a plan with them has."""
    given: dict[str, Any] = {"model": "qwen3-32b", "gpus": 16, "gpu_memory": "141GB"}
    job, plans, hardware = plan(PlanArguments(**given))
    best = plans[0]
    said = more_microbatches(job, best, hardware)
    found = re.match(
        r"--microbatches (\d+), a batch of ([\d,]+) sequences, would bring the bubble from "
        r"(\d+)% to (\d+)%\.$", said,
    )  # fmt: skip
    assert found, said
    count = int(found[1])
    again = plan(PlanArguments(**given, microbatches=count))[1]
    same = next(one for one in again if (one.mesh, one.vocab_over) == (best.mesh, best.vocab_over))
    assert int(found[2].replace(",", "")) == count * best.mesh.data * best.mesh.vocab
    assert int(found[3]) == round(100 * best.bubble)
    assert int(found[4]) == pytest.approx(100 * same.bubble, abs=1)
    assert same.bubble < best.bubble / 2
    few = next(one for one in plans if one.mesh.pipeline == 1)
    assert more_microbatches(job, few, hardware) == ""
    assert other_schedule(job, few, hardware) == ""

    said = other_schedule(job, best, hardware)
    assert {SCHEDULES[name].name for name in HELD} == set(SPANNING)
    named = re.match(r"--schedule (\w+) would be ([\d.]+)% faster on that mesh", said)
    assert named, said
    alike = plan(PlanArguments(**given, schedule=named[1], vocab_over=best.vocab_over))[1]
    faster = next(one for one in alike if one.mesh == best.mesh)
    gain = faster.tokens_per_second / best.tokens_per_second - 1
    assert float(named[2]) == pytest.approx(100 * gain, abs=2)
    assert gain > 0.01


def test_without_a_pipeline() -> None:
    """FSDP2 alone, and x TP: bytes and FLOPs counted by hand, at the batch that is given."""
    shape, batch, gpus = ModelShape.load("qwen3-8b"), 32, 8
    job = Job(shape, 4096, 1, 8, "1f1b", state_bytes=12, memory_budget=10**9)
    body = 36 * (2 * 4096 * 128 * 40 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128) + 4096
    rows = 151_936 * 4096
    parameters = body + 2 * rows
    inputs, kept = 2 * 2 * 4096, 6 * (2 * 4096 + 40 * 128) + 8 * 32 * 128 + 8 * 12_288
    fast = replace(Hardware.load("h100"), link_bytes=1e30, memory=1e15)
    for one, least in zip(without_pipeline(job, gpus, batch, fast), (1, 2), strict=True):
        degree, tensor = one.mesh.data, one.mesh.vocab
        assert degree * tensor == 8
        assert tensor >= least
        assert not one.recompute_layers, "there is room"
        assert one.microbatch * one.count * degree == batch
        tokens = 4096 * one.microbatch
        plan_of_rows = plan_backward(
            tokens, 151_936 // tensor, 4096, memory_budget=10**9, degree=tensor
        )
        layer = 2 * (body - 4096) / 36 / tensor
        whole = max(4 * layer, layer + 2 * rows / tensor + plan_of_rows.peak_bytes)
        activations = 36 * tokens * (inputs + kept / tensor)
        assert one.memory == pytest.approx(16 * parameters / 8 + whole + activations)
        flops = 3 * 36 * (2 * tokens * (body - 4096) / 36 + 2 * tokens * 4096 * 32 * 128) / tensor
        flops -= 3 * 36 * 2 * tokens * (2 * 4096 + 2 * 128) / tensor  # norms multiply nothing
        loss = loss_seconds(plan_of_rows, tokens, 151_936 // tensor, 4096, 2, fast)
        assert one.step_seconds == pytest.approx(one.count * (flops / fast.layer_flops + loss))
        assert one.waits == pytest.approx(0.0)
    # Over a slow link nothing hides: three times the weights; and TP's messages besides.
    slow = replace(Hardware.load("h100"), link_bytes=1e6, memory=1e15)
    alone, product = without_pipeline(job, gpus, batch, slow)
    assert (alone.name, alone.count) == ("FSDP2 alone", 1)
    assert alone.step_seconds == pytest.approx(3 * 2 * parameters * (7 / 8) / 1e6)
    data, tensor = product.mesh.data, product.mesh.vocab
    gathers = 3 * 2 * parameters / tensor * (1 - 1 / data)
    messages = 8 * 36 * 2 * 4096 * 4096 * batch / data * (1 - 1 / tensor)
    assert product.step_seconds == pytest.approx((gathers + messages) / 1e6, rel=1e-3)
    # A GPU that has no room for activations has them made again; a batch of 12 is not shared by 8.
    tight = without_pipeline(job, gpus, batch, replace(fast, memory=70e9))[0]
    assert tight.missing <= 0
    assert tight.recompute_layers or tight.count > 1
    fast = replace(fast, memory=80e9)
    assert [one.mesh.vocab > 1 for one in without_pipeline(job, gpus, 12, fast)] == [True]


@pytest.mark.slow
def test_the_table_without_a_pipeline() -> None:
    """docs/planning.md: the row in the middle; each cell is a plan of seconds."""
    page = (ROOT / "docs" / "planning.md").read_text()
    rows = re.findall(
        r"^\| ([\d,]+)(?: sequences)? \| (.*) / (.*) \| (.*) / (.*) \| (.*) / (.*) \|$", page, re.M
    )
    assert [row[0] for row in rows] == ["64", "256", "1,024"]
    for batch, *cells in rows[1:2]:
        for index, rate in enumerate((None, "12.5GB", "3GB")):
            given = {"node_bandwidth": rate, "batch": int(batch.replace(",", ""))}
            arguments = PlanArguments(model="qwen3-32b", gpus=64, gpu_memory="80GB", **given)  # type: ignore[arg-type]
            job, plans, hardware = plan(arguments)
            found = without_pipeline(job, 64, given["batch"], hardware)  # type: ignore[arg-type]
            ratios = [one.tokens_per_second / plans[0].tokens_per_second for one in found]
            expected = [float(cell) for cell in cells[2 * index : 2 * index + 2]]
            assert ratios == pytest.approx(expected, abs=0.006)


def test_least_gpus() -> None:
    """So many have a mesh that fits; one fewer has none."""
    for model, memory in (("qwen3-8b", 80e9), ("qwen3-32b", 141e9)):
        job = Job(ModelShape.load(model), 4096, 1, 8, "1f1b", state_bytes=12)
        hardware = replace(Hardware.load("h100"), memory=memory)
        least = least_gpus(job, hardware, ("last-stage", "all-stages"))
        assert least is not None
        assert plan_meshes(job, least, hardware)[0].fits
        for fewer in range(1, least):
            assert not plan_meshes(job, fewer, hardware)[0].fits
    long = replace(job, sequence=2**22)
    assert least_gpus(long, replace(hardware, memory=80e9), ("last-stage",)) is None


def test_memory_of_a_sharded_body() -> None:
    """4 + 14 / N bytes a parameter of the body, docs/training.md; rows keep all 16."""
    for model, vocab_over in (("qwen3-8b", "last-stage"), ("qwen3-1.7b", "all-stages")):
        given: dict[str, Any] = {"model": model, "gpus": 16, "vocab_over": vocab_over}
        whole, sharded = planned(**given), planned(**given, shard_body=True)
        shape = ModelShape.load(model)
        for one in sharded:
            alike = next(other for other in whole if other.mesh == one.mesh)
            copies, last = one.mesh.data, len(one.stages) - 1
            for index, (stage, other) in enumerate(zip(one.stages, alike.stages, strict=True)):
                body = stage.layers * shape.layer_parameters[0]
                body += shape.norm_parameters * (index == last)
                if vocab_over == "last-stage":
                    body += shape.vocabulary_parameters * (index == 0)
                held = stage.weights + stage.gradients + stage.optimizer
                each = 16 if copies == 1 else 4 + 14 / copies
                assert held == pytest.approx(16 * (stage.parameters - body) + each * body)
                assert stage.parameters == other.parameters


def test_the_example_of_the_page() -> None:
    """docs/planning.md shows a mesh whose vocab degree is above 1, with what is printed of it."""
    page = (ROOT / "docs" / "planning.md").read_text()
    section = page.partition("## Where a vocab degree wins")[2]
    shown = re.search(r"python -m launch\.plan (.*)\n", section)
    assert shown is not None
    arguments = tyro.cli(PlanArguments, args=shown[1].split())
    job, plans, _ = plan(arguments)
    best = plans[0]
    assert best.fits
    assert best.mesh.vocab > 1
    without = next(one for one in plans if one.mesh.vocab == 1 and one.fits)
    assert best.tokens_per_second > 1.1 * without.tokens_per_second
    text = " ".join(page.split())
    assert verdict(plans) in text
    assert start_command(best, job, arguments) in text


SIZES = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip


def write_config(folder: Path, family: str, **given: Any) -> str:
    """Write a config.json by hand: what transformers saves leaves no key out."""
    folder.mkdir(exist_ok=True)
    values = {"model_type": family, **SIZES, **given}
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return str(folder)


def parameters_of(folder: str) -> int:
    """Count transformers' own model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
        ("gpt_oss", {"num_key_value_heads": 2, "num_local_experts": 8, "head_dim": 16}),
        ("qwen3_next", {"num_key_value_heads": 2, "num_experts": 16}),
        ("deepseek_v3", {"num_key_value_heads": 4, "n_routed_experts": 16, "n_group": 4,
                         "first_k_dense_replace": 1}),
        ("llama", {}), ("qwen2", {"num_key_value_heads": 2}), ("gemma2", {}), ("gemma2", {
            "tie_word_embeddings": False}), ("qwen3", {}),
    ],
)  # fmt: skip
def test_parameters_of_every_family(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    """All stages together have what the model has, and a tied embedding once more a stage."""
    folder = write_config(tmp_path / family, family, **given)
    right = parameters_of(folder)
    shape = ModelShape.load(folder)
    job = Job(shape, 16, 1, 4, "1f1b")
    for stages, vocab in ((1, 1), (2, 1), (2, 2), (4, 1)):
        found = estimate_stages(job, Mesh(1, stages, vocab), Hardware.load("h200"))
        total = sum(stage.parameters for stage in found)
        rows = 1000 - 1000 // vocab  # the last stage's, that other ranks have
        first = rows if shape.tied else 0
        twice = 1000 if shape.tied and stages > 1 else 0
        assert total == right + 64 * (twice - rows - first), (stages, vocab)
    spanning = SpanningPlanner(Hardware.load("h200"))
    step = spanning.step(job, Mesh(1, 4, 1), "balanced", simulated=True)
    assert sum(stage.parameters for stage in step.stages) == right


def test_layers_that_differ_stand_on_their_own_stage(tmp_path: Path) -> None:
    """DeepSeek's first layer is dense; the others have experts, of which a token passes 2."""
    folder = write_config(
        tmp_path / "deep", "deepseek_v3", num_key_value_heads=4, n_routed_experts=16, n_group=4,
        first_k_dense_replace=1, num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    shape = ModelShape.load(folder)
    dense, *experts = shape.layer_parameters
    expert = 3 * 64 * 32
    assert len(set(experts)) == 1
    router, ours = 16 * 64, 3 * 64 * 128
    assert experts[0] - dense == 16 * expert + expert + router - ours, "one is shared"
    passed = (ours + 3 * (3 * expert + router)) / 4
    assert shape.intermediate == round(passed / (3 * 64))
    stages = estimate_stages(Job(shape, 16, 1, 4, "1f1b"), Mesh(1, 4, 1), Hardware.load("h200"))
    assert [stage.layers for stage in stages] == [1, 1, 1, 1]
    assert stages[0].parameters == dense + 1000 * 64
    assert stages[1].parameters == experts[0]


def test_experts_that_a_token_passes(tmp_path: Path) -> None:
    """Time is that of the top-k; memory that of all."""
    shapes = [
        ModelShape.load(write_config(tmp_path / str(number), "mixtral", num_local_experts=number))
        for number in (2, 8)
    ]
    few, many = shapes
    router = 6 * 64
    assert many.layer_products - few.layer_products == router
    assert many.layer_parameters[0] - few.layer_parameters[0] == 6 * 3 * 64 * 128 + router
    one = ModelShape.load(
        write_config(tmp_path / "one", "mixtral", num_local_experts=8, num_experts_per_tok=1)
    )
    assert many.layer_products - one.layer_products == 3 * 64 * 128


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_published_names_are_what_transformers_counts(model: str) -> None:
    """Published names are data: no transformers counts them, yet every size is the same."""
    config = AutoConfig.for_model(**PUBLISHED[model])
    assert ModelShape.load(model) == ModelShape.of_config(model, config)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("gemma2", (4, 256, True)), ("qwen3", (32, 128, False)), ("qwen2", (32, 8, False)),
     ("llama", (4, 16, False))],
)  # fmt: skip
def test_keys_left_out_are_the_familys(
    family: str, expected: tuple[int, int, bool], tmp_path: Path
) -> None:
    """Key-value heads, their size and tying, of a config.json without any of the three."""
    heads = {"num_attention_heads": 32, "hidden_size": 256} if family == "qwen2" else {}
    shape = ModelShape.load(write_config(tmp_path / family, family, **heads))
    assert (shape.kv_heads, shape.head_size, shape.tied) == expected


def test_the_trainer_cuts_what_was_planned(tmp_path: Path) -> None:
    for family in ("mixtral", "qwen3_next"):
        folder = write_config(tmp_path / family, family, num_hidden_layers=9)
        config = load_config(folder)[0]
        for stages in (1, 2, 3):
            cut = [len(layers_of_stage(stage, stages, config)) for stage in range(stages)]
            assert cut == ModelShape.load(folder).layer_counts(stages)


def test_config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_config(tmp_path / "there", "llama")
    assert ModelShape.load(f"{folder}/config.json") == ModelShape.load(folder)
    assert ModelShape.load(folder).name == "there"
    for family, given, message in (
        ("llama", {"vocab_size": None}, "has no vocab_size"),
        ("gpt2", {}, r"GPT2LMHeadModel of there cannot be planned: .*'transformer\.wte\.weight'"),
        ("phi", {}, r"PhiForCausalLM of there cannot be planned: .*model\.final_layernorm"),
        ("bert", {"is_decoder": True}, "BertLMHeadModel of there cannot be planned"),
        ("llava", {}, "of there cannot be planned|cannot be built|cannot be read"),
        ("nothing", {}, "cannot be read: .*`nothing`"),
        ("mixtral", {"num_experts_per_tok": "two"}, "cannot be read|cannot be planned"),
    ):
        write_config(tmp_path / "there", family, **given)
        with pytest.raises(ValueError, match=message):
            ModelShape.load(folder)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no config\.json: give one"):
        ModelShape.load(str(tmp_path / "other.json"))
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "launch.configs")
    with pytest.raises(ValueError, match="transformers counts, and it is not installed"):
        ModelShape.load(folder)
    assert ModelShape.load("qwen3-8b").layers == 36


def test_sizes_have_units() -> None:
    assert parse_bytes("--x", "64MiB") == 64 * MIB
    assert parse_bytes("--x", "1.5 GB") == 1.5e9
    assert parse_bytes("--x", "1000B") == 1000
    with pytest.raises(ValueError, match="--x 80 has no unit: give 80GB, 80MiB or 80B"):
        parse_bytes("--x", "80")


def test_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's name above, and the card's memory as a line."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    best = planned(gpus=16)[0]
    plot_plan(best, Path("plan.png"), "qwen3-32b", 80e9)
    bars = figures[0].axes[0]
    assert bars.get_title().startswith("qwen3-32b: data ")
    assert [list(line.get_ydata()) for line in bars.lines] == [[80.0, 80.0]]
    heights = [0.0] * len(best.ranks)
    for part in bars.containers:
        heights = [low + bar.get_height() for low, bar in zip(heights, part, strict=True)]
    assert heights == pytest.approx([held / 1e9 for held in best.rank_memory])


def test_nodes() -> None:
    """Vocab groups, columns and pipelines that leave a node pay its rate, and no others."""
    given: dict[str, Any] = {"gpus": 16, "vocab_over": "both"}
    fast = planned(**given)
    slow = planned(**given, node_bandwidth="1GB")
    by_mesh = {(one.mesh, one.vocab_over): one for one in slow}
    for one in fast:
        other = by_mesh[one.mesh, one.vocab_over]
        inside = one.mesh.vocab <= 8
        for stage, same in zip(one.stages, other.stages, strict=True):
            if one.vocab_over == "last-stage" and inside:
                assert stage.collective_seconds == same.collective_seconds
            elif stage.collective_seconds:
                assert same.collective_seconds == pytest.approx(450 * stage.collective_seconds)
        assert other.step_seconds > one.step_seconds
    assert planned(gpus=8, node_bandwidth="1GB") == planned(gpus=8)
    mesh, hardware = Mesh(4, 2, 1), replace(Hardware.load("h100"), node_bytes=1e9, node_gpus=4)
    job = Job(ModelShape.load("qwen3-1.7b"), 4096, 1, 8, "1f1b")
    one = MeshPlanner(hardware).plan(job, mesh, "last-stage")
    whole = MeshPlanner(Hardware.load("h100")).plan(job, mesh, "last-stage")
    # Columns stay within a node of four; messages of stages leave it.
    assert one.step_seconds - one.seconds == whole.step_seconds - whole.seconds
    assert one.seconds > whole.seconds


def test_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "launch.plan", *arguments]
        return subprocess.run(start, cwd=ROOT, capture_output=True, text=True)

    picture = tmp_path / "plan.png"
    shown = command(
        "--model", "qwen3-32b", "--gpus", "4096", "--gpu-memory", "80GB", "--plot", str(picture),
        "--schedule", "1F1B",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "data x pipeline x vocab" in shown.stdout
    assert "data sheet" in " ".join(shown.stdout.split()), "what was not measured is told"
    assert picture.stat().st_size > 1000
    assert "Only the vocabulary on all stages fits: " in " ".join(shown.stdout.split())
    assert "would bring the bubble from" in " ".join(shown.stdout.split())
    nowhere = command("--calibrate", "--out", str(picture / "mine.json"))
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    assert "launch.plan: --out" in nowhere.stderr
    document = json.loads(command("--model", "qwen3-1.7b", "--gpus", "8", "--json").stdout)
    assert document["verdict"]
    best = document["meshes"][0]
    assert best["fits"]
    assert {one["vocab_over"] for one in document["meshes"]} == {"last-stage", "all-stages"}
    others = document["without_pipeline"]
    assert [one["name"] for one in others] == ["FSDP2 alone", "FSDP2 x TP, 4 x 2"]
    faster = [one for one in others if one["step_seconds"] < best["step_seconds"] / 1.01]
    assert [sentence.partition(",")[0] for sentence in document["advice"]] == (
        ["FSDP2 alone"] if faster else []
    )
    assert 0 < best["utilisation"] < 1
    assert {"rows", "simulated", "hidden_held", "ranks", "bubble", "rank_memory"} <= set(best)
    for name in ("rows", "in_flight", "memory", "statistics_seconds", "gradients_seconds"):
        assert all(name in stage for one in document["meshes"] for stage in one["stages"])
    assert document["hardware"] == "NVIDIA H200"
    assert document["command"].count("torchrun ") == 1
    full = command("--model", "qwen3-32b", "--gpus", "2", "--gpu-memory", "80GB", "--show", "1")
    assert full.returncode == 1
    assert full.stdout.endswith("No mesh fits. 8 GPUs with 80 GB each are the least that do.\n")
    bad = command("--model", "qwen3-32b", "--gpus", "0")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "--gpus must be at least 1" in bad.stderr
