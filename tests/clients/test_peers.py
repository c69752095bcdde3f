"""Tests of other libraries' losses, with ours in the place of theirs.

Their sources are not here: CUT_CROSS_ENTROPY_SOURCE and LIGER_KERNEL_SOURCE name clones of Apple's
ml-cross-entropy and of Liger-Kernel. torch's own samples of F.linear_cross_entropy are in torch.
`make test-clients` prints what passed, and what is skipped and why.
"""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.clients import peers
from tests.oracle import relative_error
from tests.ranks import ROOT

CUDA = torch.cuda.is_available()


def source(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no clone")
    path = Path(folder).expanduser().resolve()
    assert path.is_dir(), f"{variable}={folder} is no folder"
    return path


def run_copies(folder: Path, library: str, files: list[Path], *paths: Path) -> dict[str, int]:
    """Run copies of test files with ours in place of a library's; print and return the counts."""
    for file in files:
        text = file.read_text()
        if file.name.startswith("test_"):
            text = f"from tests.clients import peers\n\npeers.replace({library!r})\n{text}"
        if not CUDA and file.name.startswith("test_cce_loss"):  # they ask for a GPU by name
            text = text.replace('"cuda"', '"cpu"').replace("cuda.manual_seed", "manual_seed")
            text = text.replace("not torch.cuda.is_available()", "False")
        (folder / file.name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(folder)]
    search = [ROOT, *paths, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in search)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    print(f"{library}: {output.strip().splitlines()[-1]}", *lines, sep="\n")
    assert done.returncode == 0, output[-6000:]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|skipped)", output)}
    assert counts.get("passed"), output[-2000:]
    return counts


@pytest.mark.parametrize(
    "name",
    [
        "test_cce_loss_forward",
        "test_cce_loss_backward",
        "test_compute_z_loss",
        "test_vocab_parallel",
    ],
)
def test_of_cut_cross_entropy(name: str, tmp_path: Path) -> None:
    clone = source("CUT_CROSS_ENTROPY_SOURCE")
    counts = run_copies(tmp_path, "cut_cross_entropy", [clone / f"tests/{name}.py"], clone)
    assert "skipped" not in counts


def test_of_liger(tmp_path: Path) -> None:
    clone = source("LIGER_KERNEL_SOURCE")
    names = ("conftest.py", "transformers/test_fused_linear_cross_entropy.py")
    files = [clone / "test" / name for name in names]
    run_copies(tmp_path, "liger_kernel", files, clone, clone / "src")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="since torch 2.13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_torch(dtype: torch.dtype) -> None:
    """torch's own samples: losses and gradients of ours beside those of F.linear_cross_entropy."""
    from torch.testing._internal.common_methods_invocations import op_db

    counts: collections.Counter[str] = collections.Counter()
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    device = "cuda" if CUDA else "cpu"
    for op in (op for op in op_db if op.name == "nn.functional.linear_cross_entropy"):
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            problem = peers.torch_sample_problem(sample)
            if problem is not None:
                counts[problem] += 1
                continue
            bias: Any = sample.kwargs.get("linear_bias")
            ours, theirs = (peers.leaves_of(sample.input, sample.args[0], bias) for _ in range(2))
            found = peers.torch_sample_loss(sample, (ours[0], ours[1]), *ours[2:])
            options = {**sample.kwargs, **({} if bias is None else {"linear_bias": theirs[2]})}
            want = F.linear_cross_entropy(theirs[0], theirs[1], sample.args[1], **options)
            if peers.is_nan_mean_of_nothing(sample):
                assert bool(want.isnan())
                assert not bool(found)
                counts["a mean of no token: NaN there, 0 here"] += 1
                continue
            assert relative_error(found, want) < bound, sample
            upstream = torch.rand_like(want)
            grads = (
                torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
                for loss, leaves in ((found, ours), (want, theirs))
            )
            for own, peer in zip(*grads, strict=True):
                assert relative_error(own, peer, 1e-3) < bound, sample
            counts["passed"] += 1
    print(f"torch {torch.__version__}, {dtype}: {dict(counts)}")
    assert counts["passed"] > 0
