"""Run one test function, or a program, on several real ranks.

    def check_something(size: int) -> None:      # runs on every rank, and each asserts
        assert torch.distributed.get_world_size() == size

    def test_something() -> None:
        run_ranks(check_something, 2, size=2)
        code, output = run_program(2, ["-m", "launch.train", "--steps", "2"])

The function is found again by its module and name in each rank; its arguments travel as JSON.
Rendezvous takes a free port, so that two such tests run side by side. A hang fails: every
collective gives up after GROUP_TIMEOUT, and a rank after START_TIMEOUT.

Ranks on a CPU are started by torchrun's agent within the test's process, and forked from a server
that has imported torch: to import it takes each of them, and torchrun, longer than most tests.
CUDA does not outlive a fork, and Triton's interpreter is chosen before an import: those ranks are
started by the command, `torchrun`, and so are those whose ends or mistakes are tested.
"""

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).resolve().parent.parent
GROUP_TIMEOUT = 30  # seconds that a collective waits for a peer
START_TIMEOUT = 55  # seconds that a whole start may take
# What ranks find imported; nothing of it touches CUDA.
_PRELOADED = ["pytest", "vocab_parallel", "launch.training", "tests.ranks"]


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
    call = (backend, name, json.dumps(arguments))
    if backend == "gloo" and not environment:
        code, output = _forked(ranks, timeout, _main, *call)
    else:
        command = ["-m", "tests.ranks", *call]
        code, output = torchrun(ranks, command, timeout=timeout, environment=environment)
    assert code == 0, f"{name} failed on {ranks} ranks:\n{output[-6000:]}"
    if show:
        print(output)


def run_program(
    ranks: int, command: list[str], *, timeout: float = START_TIMEOUT, folder: Path = ROOT
) -> tuple[int, str]:
    """Run ranks of ``python COMMAND`` in a folder on the CPU; return (exit code, their output).

    What they printed stands last, that of the first rank before the others'.
    """
    return _forked(ranks, timeout, _program, str(folder), *command)


def _forked(
    ranks: int, timeout: float, function: Callable[..., None], *arguments: str
) -> tuple[int, str]:
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(folder, redirects=Std.ALL),
        )
        try:
            elastic_launch(config, _limited)(timeout, function, *arguments)
            code, reason = 0, ""
        except ChildFailedError as error:
            code, reason = 1, str(error)
        logs = sorted(Path(folder).rglob("*.log"), key=lambda path: (path.name, path))
        return code, "".join([*(path.read_text() for path in logs), reason])


def _limited(timeout: float, function: Callable[..., None], *arguments: str) -> None:
    """Call a function that may take so many seconds."""
    faulthandler.dump_traceback_later(timeout, exit=True)
    function(*arguments)


def _program(folder: str, *command: str) -> None:
    os.chdir(folder)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


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
    cwd: Path = ROOT,
) -> tuple[int, str]:
    """Start ranks of ``python COMMAND`` and return (exit code, their output)."""
    process = subprocess.Popen(
        torchrun_command(ranks, command),
        cwd=cwd,
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
