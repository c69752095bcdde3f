"""Run one test function on several real ranks, started by torchrun.

    def check_something(size: int) -> None:      # runs on every rank, and each asserts
        assert torch.distributed.get_world_size() == size

    def test_something() -> None:
        run_ranks(check_something, 2, size=2)

The function is found again by its module and name in each rank; its arguments travel as JSON.
Rendezvous takes a free port, so that two such tests run side by side. A hang fails: every
collective gives up after GROUP_TIMEOUT, and torchrun is ended after START_TIMEOUT.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

ROOT = Path(__file__).resolve().parent.parent
GROUP_TIMEOUT = 30  # seconds that a collective waits for a peer
START_TIMEOUT = 55  # seconds that a whole start may take


def run_ranks(
    function: Callable[..., None],
    ranks: int,
    *,
    backend: str = "gloo",
    timeout: float = START_TIMEOUT,
    environment: Mapping[str, str] | None = None,
    show: bool = False,
    **arguments: Any,
) -> None:
    """Run ``function(**arguments)`` on every rank; fail with their output where one fails."""
    name = f"{function.__module__}:{function.__qualname__}"
    command = ["-m", "tests.ranks", backend, name, json.dumps(arguments)]
    code, output = torchrun(ranks, command, timeout=timeout, environment=environment)
    assert code == 0, f"{name} failed on {ranks} ranks:\n{output[-6000:]}"
    if show:
        print(output)


def torchrun_command(ranks: int, command: list[str]) -> list[str]:
    """Return what starts ranks of ``python COMMAND``, on a free port."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    start = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
    return [*start, "--nproc-per-node", str(ranks), *command]


def torchrun(
    ranks: int,
    command: list[str],
    *,
    timeout: float = START_TIMEOUT,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Start ranks of ``python COMMAND`` and return (exit code, their output)."""
    process = subprocess.Popen(
        torchrun_command(ranks, command),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Not SIGKILL, which would orphan the workers.
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        return -1, f"{output}\nended after {timeout} s: it hangs"
    return process.returncode, output


def rank_device() -> torch.device:
    """Return the device of this rank's tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@record
def _main(backend: str, name: str, arguments: str) -> None:
    module, function = name.split(":")
    # What is allocated and not written shows as NaN.
    torch.use_deterministic_algorithms(True)
    device = None
    if backend == "nccl":
        device = torch.device("cuda", 0)
        # NCCL takes ranks with different host ids on one GPU for ranks of different machines.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products
        os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=GROUP_TIMEOUT), device_id=device)
    check = getattr(importlib.import_module(module), function)
    warnings.simplefilter("error")
    # torch's own compiler uses what torch deprecates.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    check(**json.loads(arguments))
    # A group that is referenced until the interpreter ends may abort it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
