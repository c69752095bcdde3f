"""log.jsonl, and what draws its numbers besides: the packages themselves are not installed here."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.arguments import TrainArguments
from launch.progress import StepLog

TIMEOUT = 60.0


class Wandb(SimpleNamespace):
    """What of wandb is used."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    def __init__(self, works: bool) -> None:
        super().__init__(works=works, drawn=[])

    Settings = SimpleNamespace

    def init(self, *, settings: Any, **given: Any) -> Any:
        assert 0 < settings.init_timeout < TIMEOUT
        if not self.works:
            raise self.errors.Error("No API key configured.\nSee the documentation.")
        assert given["config"]["tracker"] == "wandb"
        drawn = self.drawn
        return SimpleNamespace(
            log=lambda numbers, step: drawn.append((step, numbers)),
            finish=lambda: drawn.append("finished"),
        )


def test_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run keeps the lines up to its first step; unknown numbers are not drawn."""
    arguments = TrainArguments(out=tmp_path, tracker="wandb", timeout=TIMEOUT)
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb(works=True))
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = StepLog(arguments, first)
        for step in steps:
            log.write(step, {"loss": step + 0.5, "accuracy": None})
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": n, "loss": n + 0.5, "accuracy": None} for n in (1, 2, 3, 4)]
    drawn = [(n, {"loss": n + 0.5}) for n in (1, 2, 3)]
    assert wandb.drawn == [*drawn, "finished", *drawn[2:], (4, {"loss": 4.5}), "finished"]

    monkeypatch.setitem(sys.modules, "wandb", Wandb(works=False))
    with pytest.raises(ValueError, match=r"cannot start: No API key configured; or set WANDB_MODE"):
        StepLog(arguments, 0)


def test_scores(tmp_path: Path) -> None:
    """A resumed run knows the evaluations before its first step, and none of later ones."""
    arguments = TrainArguments(out=tmp_path)
    for first, expected in ((0, []), (2, [(2, 2.5)])):
        log = StepLog(arguments, first)
        assert log.scores == expected
        for step in (2, 4):
            log.write(step, {"loss": 1.0})
            log.write(step, {"eval_loss": step + 0.5, "eval_accuracy": 0.5})
        log.close()
        assert log.scores == [*expected, (2, 2.5), (4, 4.5)]
