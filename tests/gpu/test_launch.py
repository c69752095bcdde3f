"""What torchrun starts, with two NCCL ranks."""

from pathlib import Path

import numpy as np
import pytest

from tests.ranks import torchrun

# Both wait in the second barrier for ever, but for torchrun, if rank 0's error does not end it.
_ONE_RANK_FAILS = """
import os
import torch.distributed as dist
from launch.runtime import process_group, record

@record
def main():
    with process_group(300.0):
        dist.barrier()
        if os.environ["RANK"] == "0":
            raise RuntimeError("of rank 0 alone")
        dist.barrier()

main()
"""


def test_an_error_of_one_rank_ends_the_run(tmp_path: Path) -> None:
    script = tmp_path / "one_rank_fails.py"
    script.write_text(_ONE_RANK_FAILS)
    code, output = torchrun(2, [str(script)], timeout=90)
    assert code != 0
    assert "of rank 0 alone" in output


@pytest.mark.parametrize("vocab_over", ["last-stage", "all-stages"])
def test_train(tmp_path: Path, vocab_over: str) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 1000, 4096))
    sizes = "--layers 2 --hidden 64 --vocabulary 1000 --sequence 64 --microbatches 2 --batch 2"
    command = f"-m launch.train --pipeline 2 --vocab 1 --vocab-over {vocab_over} {sizes} --check"
    where = ["--text", str(ids), "--cache", str(tmp_path / "tokens"), "--out", str(tmp_path)]
    code, output = torchrun(2, [*command.split(), "--steps", "3", *where], timeout=150)
    assert code == 0, output
    assert (tmp_path / "run.json").is_file()
