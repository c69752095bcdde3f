"""The planner: what was measured, what must hold, and what is refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.planning.balance import layer_counts
from launch.planning.command import PlanArguments, parse_bytes, plan
from launch.planning.estimate import Job, Mesh, estimate_stages, loss_seconds
from launch.planning.hardware import Hardware
from launch.planning.orders import SCHEDULES, SINGLE, most_in_flight, orders, stages_of
from launch.planning.shape import ModelShape
from launch.planning.timeline import StageTimes, simulate
from tests.ranks import ROOT
from vocab_parallel import plan_backward

MIB = 2**20
MEASURED = ROOT / "benchmarks" / "results" / "2026-11-25-loss-h200.json"


def test_memory_of_measured_ranks() -> None:
    """Qwen3-1.7B on 2 x 1 and 2 x 2 ranks of one H200, docs/qwen3.md: both stages within 2%."""
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


@pytest.mark.parametrize(("way", "budget"), [("probs", 3e9), ("recompute", 64 * MIB)])
def test_time_of_the_measured_loss(way: str, budget: float) -> None:
    """Against benchmarks.loss on the card that the hardware file is of."""
    found = json.loads(MEASURED.read_text())["shapes"]
    for shape, rows_found in found.items():
        hidden, rows = map(int, shape.split("x"))
        model = ModelShape("", rows, hidden, hidden, 1, 1, 1, hidden, False, False)
        job = Job(model, 8192, 1, 1, "1f1b", memory_budget=int(budget))
        stage = estimate_stages(job, Mesh(1, 1, 1), Hardware.load("h200"))[-1]
        assert stage.loss_way == way
        measured = rows_found["rows"][f"ours, {way}"]["milliseconds"]
        assert 1e3 * stage.loss_seconds == pytest.approx(measured, rel=0.1), shape


def test_scaling_study() -> None:
    """Against benchmarks.scaling: time within 10% and memory within 5%, every row of it."""
    found = json.loads((MEASURED.parent / "2026-11-25-scaling-h200.json").read_text())
    hidden = {"qwen3-8b": 4096, "qwen3-32b": 5120, "llama-3.1-70b": 8192, "248,320 rows": 5120}
    hardware, tokens = Hardware.load("h200"), found["tokens"]
    for model, size in hidden.items():
        for row in found["models"][model]:
            shape = (tokens, row["rows"], size)
            one = plan_backward(*shape, backward=row["way"])
            predicted = 1e3 * loss_seconds(one, *shape, 2, hardware)
            assert predicted == pytest.approx(row["milliseconds"], rel=0.1), (model, row)
    assert len(found["memory"]) == 8
    for row in found["memory"]:
        assert row["predicted_bytes"] == pytest.approx(row["bytes"], rel=0.05)


def planned(**given: Any) -> Any:
    values = {"model": "qwen3-32b", "gpus": 64, "gpu_memory": "80GB", "microbatches": 16, **given}
    return plan(PlanArguments(**values))[0]


def test_every_mesh() -> None:
    plans = planned()
    meshes = {(one.mesh.data, one.mesh.pipeline, one.mesh.vocab) for one in plans}
    assert len(meshes) == len(plans) == 28
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
        times = [StageTimes(share, 2 * share, share)] * len(stages)
        spans = simulate(schedule, ranks, microbatches, times, 0.0)
        work = {(span.stage, span.kind, span.microbatch) for span in spans}
        assert len(work) == len(spans), "nothing twice"
        for stage, microbatch in itertools.product(stages, range(microbatches)):
            kinds = {kind for s, kind, m in work if (s, m) == (stage, microbatch)}
            assert kinds in ({"forward", "backward"}, {"forward", "inputs", "weights"})
        for rank in range(ranks):
            own = sorted((span.start, span.stop) for span in spans if span.rank == rank)
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(own))
        total = max(span.stop for span in spans)
        if schedule in SINGLE:
            assert total == pytest.approx(3.0 * (microbatches + ranks - 1))
        else:
            assert 3.0 * microbatches <= total < 3.0 * (microbatches + ranks - 1)


def test_in_flight() -> None:
    """1F1B keeps P - stage microbatches, GPipe all, and a V-shaped rank those of both stages."""
    order = orders("1f1b", 4, 8)
    assert [most_in_flight(order[r], {r: 1.0})[r] for r in range(4)] == [4, 3, 2, 1]
    assert most_in_flight(orders("gpipe", 4, 8)[3], {3: 1.0}) == {3: 8}
    found = most_in_flight(orders("zbvzerobubble", 4, 8)[0], {0: 1.0, 7: 1.0})
    assert sum(found.values()) == 8, "as much as 1F1B's first rank, whose stages are twice as long"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str) -> None:
    plans = planned(schedule=schedule, gpus=16, gpu_memory="141GB")
    assert any(one.fits for one in plans)
    for one in plans:
        assert sorted(stage for own in one.ranks for stage in own) == list(range(len(one.stages)))
        assert sum(one.rank_memory) == pytest.approx(sum(stage.memory for stage in one.stages))


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
        ({"gpu_memory": "2GB"}, "below one layer of qwen3-32b"),
        ({"gpu_memory": "lots"}, "'lots' is no size"),
        ({"hardware": "abacus"}, r"unknown hardware 'abacus': give a file, or one of \['a100'"),
        ({"sequence": 0}, "--sequence must be at least 1"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**given)


def test_config_files(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ModelShape.load(str(tmp_path))
    assert (shape.kv_heads, shape.head_size, shape.tied) == (4, 16, False)
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no \['vocab_size'\]"):
        ModelShape.load(str(tmp_path / "config.json"))
    assert parse_bytes("--x", "64MiB") == 64 * MIB
    assert parse_bytes("--x", "1.5 GB") == 1.5e9


def test_command(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-m", "launch.plan", *arguments]
        return subprocess.run(start, cwd=ROOT, capture_output=True, text=True)

    picture = tmp_path / "plan.png"
    shown = command(
        "--model", "qwen3-32b", "--gpus", "4096", "--gpu-memory", "80GB", "--plot", str(picture)
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "data x pipeline x vocab" in shown.stdout
    assert "data sheet" in shown.stdout, "what was not measured is told"
    assert picture.stat().st_size > 1000
    document = json.loads(command("--model", "qwen3-1.7b", "--gpus", "8", "--json").stdout)
    assert document[0]["fits"]
    bad = command("--model", "qwen3-32b", "--gpus", "0")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "--gpus must be at least 1" in bad.stderr
