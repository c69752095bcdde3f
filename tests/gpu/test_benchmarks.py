"""`benchmarks.several_gpus` and `benchmarks.host` on the cards that are here, a rank a card."""

import json
from pathlib import Path

import torch

from benchmarks import contestants, host, several_gpus
from tests.ranks import torchrun


def test_several_gpus(tmp_path: Path) -> None:
    ranks = min(2, torch.cuda.device_count())
    command = ["-m", "benchmarks.several_gpus", "--shapes", "512x256x4096", "--rounds", "2"]
    code, output = torchrun(ranks, [*command, "--out", str(tmp_path)], timeout=300)
    assert code == 0, output[-6000:]
    (found,) = json.loads(output[output.rindex('\n{"date"') :])["shapes"].values()
    names = [name for name in found["rows"] if name.startswith("ours")]
    assert len(names) == len(several_gpus.WAYS) * len(several_gpus.LAYOUTS)
    for name in names:
        row = found["rows"][name]
        assert row["same_in_two_calls"]
        assert row["same_on_all_ranks"] is not False
        assert max(row["errors"].values()) < 5e-2, row  # bfloat16


def test_host_times() -> None:
    operands = contestants.draw(512, 256, 4096, torch.bfloat16, torch.device("cuda"))
    forwards = host.contestants(operands)
    for one in host.measure(forwards, operands, microbatches=4, loops=2).values():
        both = one.forward_microseconds + one.backward_microseconds
        assert 0 < both < 2e3 * one.microbatch_milliseconds
