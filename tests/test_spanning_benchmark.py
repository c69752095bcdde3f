"""The studies of the vocabulary on all stages: small sizes run, and known numbers come out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.all_stages import measure_all_stages
from benchmarks.cases import Case
from benchmarks.spanning import MODELS
from benchmarks.steps import Pieces, Pipeline, equal, ideal, rebalanced, spanning, spread
from launch.planning.hardware import Hardware
from launch.planning.shape import ModelShape
from tests.ranks import ROOT


def by_flops(model: str) -> Pieces:
    """Pieces of a model in thirds of a layer, by their flops; links take 0.02 layers."""
    shape = ModelShape.of(model, MODELS[model])
    loss = 3 * 2.0 * 4096 * shape.vocabulary_parameters / shape.layer_flops(4096, 4096)
    whole = {shape.vocabulary: (2 * loss / 3, loss / 3)}
    return Pieces(shape.layers, shape.vocabulary, 1.0, 2.0, loss, loss, whole, *[0.06] * 3, 0.0)


@pytest.mark.parametrize(
    ("model", "ranks", "layers", "over_balanced", "over_filled", "of_ideal"),
    [
        ("qwen3-32b", 8, 7, 1.08, 1.08, 1.001),
        ("qwen3-32b", 16, 3, 1.18, 1.18, 1.001),
        ("qwen3-8b", 8, 2, 0.96, 1.02, 1.02),
        ("18 x 2048, 256k rows", 8, 0, 1.29, 1.48, 1.05),
        ("gemma-2-2b", 8, 0, 1.44, 1.63, 1.001),
    ],
)
def test_steps_by_flops(
    model: str,
    ranks: int,
    layers: int,
    over_balanced: float,
    over_filled: float,
    of_ideal: float,
) -> None:
    """Against a simulation of its own, written before this one: the best rebalancing over ours."""
    pieces, pipeline = by_flops(model), Pipeline("1f1b", ranks, 8 * ranks)
    best, counts = rebalanced(pieces, pipeline)
    assert (counts[-1], sum(counts)) == (layers, pieces.layers)
    balanced, filled = (spanning(pieces, pipeline, filled=way) for way in (False, True))
    assert best / balanced.milliseconds == pytest.approx(over_balanced, abs=0.01)
    assert best / filled.milliseconds == pytest.approx(over_filled, abs=0.01)
    assert best <= equal(pieces, pipeline)
    assert filled.milliseconds <= 1.001 * balanced.milliseconds
    assert filled.milliseconds <= of_ideal * ideal(pieces, pipeline)
    assert filled.milliseconds <= 1.03 * ideal(pieces, pipeline, whole_layers=True)
    assert sum(filled.rows) == pieces.vocabulary
    assert ranks + 1 <= balanced.in_flight <= ranks + 3


@pytest.mark.parametrize("schedule", ["interleaved1f1b", "zbvzerobubble"])
def test_two_stages_a_rank_and_stages_without_layers(schedule: str) -> None:
    pieces, pipeline = by_flops("gemma-2-2b"), Pipeline(schedule, 16, 32)  # 26 layers, 32 stages
    assert spread(26, 32)[-6:] == [0] * 6
    best, counts = rebalanced(pieces, pipeline)
    assert (len(counts), sum(counts)) == (32, 26)
    found = spanning(pieces, pipeline, filled=True).milliseconds
    assert ideal(pieces, pipeline) < found < best


def test_rows_between_measured_numbers() -> None:
    pieces = Pieces(2, 100, 1.0, 2.0, 9.0, 9.0, {10: (2.0, 1.0), 50: (6.0, 5.0)}, 0, 0, 0, 0)
    assert pieces.passes_of(5) == (1.0, 0.5)
    assert pieces.passes_of(10) == (2.0, 1.0)
    assert pieces.passes_of(30) == (4.0, 3.0)
    assert pieces.passes_of(90) == (10.0, 9.0)


@pytest.mark.slow
def test_spanning_command(tmp_path: Path) -> None:
    """On this machine's CPU: everything is measured, simulated, printed and drawn."""
    command = [
        sys.executable, "-m", "benchmarks.spanning", "--models", "small", "--pipelines", "2", "4",
        "--sequence", "64", "--rounds", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout.splitlines()[-1])
    found = document["models"]["small"]
    assert set(found["pieces"]["passes"]) == {"250", "500", "1000"}
    assert [(row["schedule"], row["ranks"], row["microbatches"]) for row in found["rows"]] == [
        ("1f1b", 2, 16), ("1f1b", 4, 32), ("interleaved1f1b", 2, 16), ("zbvzerobubble", 2, 16),
    ]  # fmt: skip
    for row in found["rows"]:
        assert 0 < row["rebalanced"] <= row["equal"]
        assert row["filled"]["milliseconds"] > 0
        assert row["ideal"] <= row["whole layers"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_all_stages_beside_the_last_stage() -> None:
    """The contestant (e) of benchmarks.last_stage, with its layers' and its rows' memory."""
    case = Case("small", MODELS["small"], pipeline=2, vocab=2, again=False)
    row = measure_all_stages(
        case,
        1.0,
        sequence=64,
        microbatches=4,
        rounds=1,
        hardware=Hardware.load("h200"),
        device=torch.device("cpu"),
    )
    assert row.layers == [2, 3]
    assert row.first_milliseconds > 0
    assert row.loss_milliseconds > 0
    assert row.step_seconds > 4 * (row.last_milliseconds - row.loss_milliseconds) / 1e3
    # Three microbatches of two columns: hidden states and the float32 share of dE; and activations.
    loss = 3 * 128 * 64 * (4 + 4)
    assert row.first_peak > loss + 2 * 3 * 64 * 4 * 64
