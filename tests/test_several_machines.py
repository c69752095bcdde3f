"""Two agents of two ranks, each in a network namespace of its own: two machines, nearly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SIZES = [
    *("--pipeline", "2", "--vocab", "2", "--hidden", "32", "--layers", "2", "--batch", "8"),
    *("--sequence", "16", "--microbatches", "2", "--timeout", "25"),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces joined by a virtual cable; skips where this user may not make them."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command")
    names = [f"vp{os.getpid()}n{index}" for index in range(2)]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth",
               "peer", "name", "cable", "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def start(machines: list[str], index: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """Start one machine's agent; what it and its ranks say goes to a file."""
    agent = [
        "ip", "netns", "exec", machines[index],
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400",
        "--rdzv-conf", f"is_host={int(index == 0)},join_timeout=40",
        "--local-addr", ADDRESSES[index], "--max-restarts", "0",
    ]  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(
            [*agent, "-m", "launch.train", *SIZES, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(agents: list[subprocess.Popen], timeout: float) -> list[int]:
    """Wait for all agents; end them where they hang."""
    deadline = time.monotonic() + timeout
    try:
        return [agent.wait(max(1.0, deadline - time.monotonic())) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)
                agent.wait(30)


@pytest.mark.slow
def test_one_machine_dies_and_both_start_again(machines: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    run = ["--checkpoint", str(folder), "--checkpoint-every", "2", "--out", str(tmp_path / "out")]
    agents = [start(machines, index, [*run, "--steps", "5000"], logs[index]) for index in range(2)]
    deadline = time.monotonic() + 90
    while not (done := [path for path in folder.glob("step-*") if path.suffix != ".partial"]):
        assert time.monotonic() < deadline, logs[0].read_text()[-3000:]
        assert all(agent.poll() is None for agent in agents), logs[0].read_text()[-3000:]
        time.sleep(0.1)
    # Machine 1 loses its power: agent and ranks at once.
    found = subprocess.run(
        ["ip", "netns", "pids", machines[1]], capture_output=True, text=True, check=True
    )
    for process in found.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    agents[1].wait(10)
    code = finish(agents[:1], timeout=60)
    said = logs[0].read_text()
    assert code != [0], "the other machine's agent ends with an error"
    assert "most likely one of them died" in said or "onnection" in said, said[-3000:]

    done = [path for path in folder.glob("step-*") if path.suffix != ".partial"]
    step = max(int(path.name.removeprefix("step-")) for path in done)
    again = [*run, "--resume", "--steps", str(step + 2)]
    agents = [start(machines, index, again, logs[index]) for index in range(2)]
    assert finish(agents, timeout=90) == [0, 0], logs[0].read_text()[-3000:]
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(result["losses"]) == 2
    assert len(result["ranks"]) == 4
