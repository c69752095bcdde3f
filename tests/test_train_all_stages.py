"""launch.train where all stages carry the vocabulary: one process's training, and any mesh's."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.arguments import TrainArguments
from tests.test_checkpoint import FOLDER_SIZES, VOCABULARY, train, weights_of, write_model


def test_meshes_and_checkpoints(tmp_path: Path) -> None:
    """A tied model over four stages, filled rows; its checkpoint goes on on other meshes."""
    source = write_model(tmp_path / "model", tied=True)
    options = [*FOLDER_SIZES, "--model", str(source), "--clip-norm", "0.5", "--steps", "4"]
    spans = ["--vocab-over", "all-stages", "--rows", "filled"]
    saves = ["--checkpoint", str(tmp_path / "saved"), "--checkpoint-every", "2"]
    whole = train(
        (4, 1), tmp_path / "whole", *options, *spans, *saves, "--check",
        "--export", str(tmp_path / "exported"),
    )  # fmt: skip
    assert whole["check"]["passed"]
    assert "model.embed_tokens.weight" in whole["check"]["gradients"]
    held = [rank["rows"] for rank in whole["ranks"]]
    assert held[0][0] == 0
    assert held[-1][1] == VOCABULARY
    assert all(one[1] == other[0] for one, other in itertools.pairwise(held))
    exported = weights_of(tmp_path / "exported")
    assert exported.keys() == weights_of(source).keys()
    for name, ranks, mesh in (
        ("last stage", (1, 2), []),
        ("V", (2, 2), [*spans, "--schedule", "ZBVZeroBubble"]),
    ):
        shutil.copytree(tmp_path / "saved" / "step-000002", tmp_path / name / "step-000002")
        run = train(
            ranks, tmp_path / f"run {name}", *options, *mesh, "--checkpoint",
            str(tmp_path / name), "--resume", "--export", str(tmp_path / f"exported {name}"),
        )  # fmt: skip
        assert run["first_step"] == 2
        assert run["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        for key, tensor in weights_of(tmp_path / f"exported {name}").items():
            torch.testing.assert_close(tensor, exported[key], rtol=0.02, atol=1e-4)
    assert json.loads((tmp_path / "saved/step-000004/run.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "DualPipeV", "vocab_over": "all-stages"}, "cannot let all stages carry"),
        ({"rows": "filled"}, "--rows filled is of --vocab-over all-stages"),
    ],
)
def test_arguments(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainArguments(**options).validate()  # type: ignore[arg-type]
