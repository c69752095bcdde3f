"""torchtitan's whole trainer, its debug model on CPU ranks: its own loss beside ours.

Run by `make test-clients`, in an environment that has torchtitan with all that it asks for.
"""

import json
import os
import random
from pathlib import Path

import pytest

from tests.ranks import ROOT, torchrun
from tests.small_tokenizer import WORDS, write_tokenizer

pytest.importorskip("torchtitan.trainer", reason="needs torchtitan 0.3 and what it asks for")

STEPS = 4
OURS = "vocab_parallel.torchtitan.cut_cross_entropy"
ATTENTION = "tests.clients.titan_attention.cpu_attention"
TRAINING = (
    "--training.local_batch_size 4 --training.disable_cuda_graphs "
    "--training.mixed_precision_param float32 --debug.seed 0 --debug.deterministic"
)
LAYOUTS = {
    "one_rank": (1, ""),
    "tp": (2, "tensor_parallel_degree=2"),
    "tp_dtensor": (2, "tensor_parallel_degree=2 spmd_backend=partial_dtensor"),
    "fsdp": (2, "data_parallel_shard_degree=2"),
    "fsdp_always": (2, "data_parallel_shard_degree=2 fsdp_reshard_after_forward=always"),
    "fsdp_tp": (4, "data_parallel_shard_degree=2 tensor_parallel_degree=2"),
    "pp": (2, "pipeline_parallel_degree=2 pipeline_parallel_schedule=1F1B"),
    "pp_tp": (
        4,
        "pipeline_parallel_degree=2 pipeline_parallel_schedule=1F1B tensor_parallel_degree=2",
    ),
    "cp": (2, "context_parallel_degree=2"),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a tokenizer and a text where its debug model looks for them."""
    folder: Path = tmp_path_factory.mktemp("titan")
    write_tokenizer(folder / "tests/assets/tokenizer")
    text = folder / "tests/assets/c4_test/data.json"
    text.parent.mkdir(parents=True)
    words, draw = WORDS.split(), random.Random(0)
    lines = [" ".join(draw.choices(words, k=200)) for _ in range(300)]
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def trained(assets: Path, name: str, *overrides: str) -> list[list[list[float]]]:
    """Train; return each rank's (loss, gradient norm) of each step."""
    ranks, layout = LAYOUTS[name]
    folder = assets / name / ("ours" if overrides else "stock")
    folder.mkdir(parents=True)
    options = [f"--parallelism.{option.replace('=', ' ')}" for option in layout.split()]
    if "pipeline" in layout:
        options.append("--parallelism.pipeline_parallel_microbatch_size 1")
    command = [
        *("-m", "tests.clients.titan_on_cpu", str(folder)),
        *("--module", "llama3", "--config", "llama3_debugmodel"),
        *("--training.steps", str(STEPS), "--dump_folder", str(folder)),
        # Under context parallelism each rank needs a block of its attention's masks.
        *("--training.seq_len", "256" if name == "cp" else "64"),
        *TRAINING.split(),
        *" ".join(options).split(),
        *("--override.imports", ATTENTION, *overrides),
    ]
    environment = {
        "TORCH_COMPILE_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    code, output = torchrun(ranks, command, timeout=300, environment=environment, cwd=assets)
    assert code == 0, output[-6000:]
    found = []
    for rank in range(ranks):
        lines = (folder / f"{rank}.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
        assert len(found[-1]) == STEPS, name
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradient_norms_are_its_own(assets: Path, name: str) -> None:
    stock, ours = trained(assets, name), trained(assets, name, OURS)
    largest = 0.0
    for theirs, own in zip(stock, ours, strict=True):
        for want, got in zip(theirs, own, strict=True):
            largest = max(largest, *(abs(a - b) / abs(a) for a, b in zip(want, got, strict=True)))
    print(f"{name}: losses and gradient norms of {STEPS} steps within {largest:.1e}; {ours[-1]}")
    assert stock[-1][-1][0] < stock[-1][0][0], "it must train"
    assert largest < 1e-6, (name, largest, stock, ours)
