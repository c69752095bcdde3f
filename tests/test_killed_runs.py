"""Runs that are killed, stopped and ended from outside: nothing saved is lost, nobody stays behind.

Each is launch.train as torchrun starts it, with a small vocabulary of token ids.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.checkpoint import complete_checkpoints
from launch.checksums import read_sums, verify_share
from launch.runtime import record
from tests.ranks import ROOT, torchrun_command

# Without the second, torch's ranks may look for one another where those before a restart were
# (pytorch issue 135712).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def arguments_of(mesh: tuple[int, int], folder: Path, steps: int, *more: str) -> list[str]:
    """Return launch.train's command of so many steps."""
    text = folder / "ids.npy"
    if not text.exists():
        np.save(text, np.random.default_rng(0).integers(0, 20_000, 4096))
    return [
        "-m", "launch.train", "--pipeline", str(mesh[0]), "--vocab", str(mesh[1]),
        "--microbatches", "2", "--batch", "4", "--sequence", "8", "--vocabulary", "20000",
        "--hidden", "32", "--layers", "2", "--text", str(text), "--steps", str(steps), *more,
    ]  # fmt: skip


@contextmanager
def started(ranks: int, command: list[str], output: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start torchrun, and leave nobody behind where the test fails."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            torchrun_command(ranks, command),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    seen: set[int] = set()
    try:
        seen |= workers(process)
        yield process
    finally:
        seen |= workers(process)
        if process.poll() is None:
            for pid in (process.pid, *seen):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def workers(process: "subprocess.Popen[bytes]") -> set[int]:
    """Return the ranks' process ids."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        return {int(pid) for pid in children.split() if "launch.train" in command_line(int(pid))}
    except (OSError, ValueError):
        return set()


def command_line(pid: int) -> str:
    """Return what a process was started as; "" where it is gone, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def wait_until(condition: Any, process: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"it ended:\n{output.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing happened:\n{output.read_text()[-4000:]}"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("mesh", "kills"),
    [
        pytest.param((1, 2), 1, marks=pytest.mark.slow),
        pytest.param((1, 2), 50, marks=pytest.mark.slow),
        pytest.param((2, 2), 50, marks=pytest.mark.slow),
    ],
)
def test_killed_saves(mesh: tuple[int, int], kills: int, tmp_path: Path) -> None:
    """kill -9 of a rank during saves: torchrun starts all again, with losses as if never killed."""
    checkpoints, steps = tmp_path / "checkpoints", 20 * kills
    output = tmp_path / "output"
    command = arguments_of(
        mesh, tmp_path, steps, "--checkpoint", str(checkpoints), "--checkpoint-every", "1",
        "--resume", "--out", str(tmp_path / "killed"),
    )  # fmt: skip
    done = -1
    in_saves = 0
    with started(mesh[0] * mesh[1], ["--max-restarts", str(kills), *command], output) as process:
        for _ in range(kills):

            def saves_again(done: int = done) -> bool:
                complete = complete_checkpoints(checkpoints)
                return bool(complete) and number_of(complete[-1]) > done

            wait_until(saves_again, process, output)
            time.sleep(random.random() * 0.03)
            wait_until(lambda: is_saving(checkpoints), process, output)
            now = workers(process)
            victim = random.choice(sorted(now))
            in_saves += is_saving(checkpoints)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda now=now: not any(map(command_line, now)), process, output)
            complete = complete_checkpoints(checkpoints)
            for path in complete:
                verify_share(path, read_sums(path), 0, 1)
            assert number_of(complete[-1]) > done, "what was saved is there"
            done = number_of(complete[-1])
        code = process.wait(timeout=180 + steps)
    assert code == 0, output.read_text()[-4000:]
    print(f"{kills} kills, {in_saves} of them while a save was under way")
    assert in_saves > 0
    names = [f"step-{step:06d}" for step in (steps - 1, steps)]
    assert sorted(os.listdir(checkpoints)) == ["lock", *names]

    command = arguments_of(mesh, tmp_path, steps, "--out", str(tmp_path / "whole"))
    with started(mesh[0] * mesh[1], command, output) as process:
        assert process.wait(timeout=180 + steps) == 0, output.read_text()[-4000:]
    killed, whole = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("killed", "whole")
    )
    assert killed["first_step"] >= done
    assert len(killed["losses"]) == steps
    assert killed["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def is_saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob("*.partial"))


@pytest.mark.slow
def test_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies while it writes them leaves nothing that torchrun would read."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))

    @record
    def fails() -> None:
        raise RuntimeError("as it may")

    with monkeypatch.context() as dying:
        dying.setattr(json, "dump", lambda document, file: file.write("{") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fails()
    assert not file.exists()
    with pytest.raises(RuntimeError, match="as it may"):
        fails()
    assert json.loads(file.read_text())["message"]["message"] == "RuntimeError: as it may"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "signal_name", [pytest.param("SIGSTOP", marks=pytest.mark.slow), "SIGTERM"]
)
def test_stopped(signal_name: str, tmp_path: Path) -> None:
    """A rank that stands still ends all others in the timeout; SIGTERM of torchrun ends all."""
    output, checkpoints = tmp_path / "output", tmp_path / "checkpoints"
    command = arguments_of(
        (2, 2), tmp_path, 100_000, "--checkpoint", str(checkpoints), "--checkpoint-every", "5",
        "--timeout", "10", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    with started(4, command, output) as process:
        wait_until(lambda: complete_checkpoints(checkpoints), process, output)
        ranks = workers(process)
        assert len(ranks) == 4
        began = time.monotonic()
        if signal_name == "SIGSTOP":
            os.kill(sorted(ranks)[1], signal.SIGSTOP)
        else:
            process.send_signal(signal.SIGTERM)
        # torchrun gives a rank 30 s to end after SIGTERM, which one that stands still lets pass
        code = process.wait(timeout=90)
        seconds = time.monotonic() - began
    assert code != 0
    assert not any(map(command_line, ranks)), "a rank is left"
    print(f"{signal_name}: all ended in {seconds:.0f} s")
    assert seconds < (60 if signal_name == "SIGSTOP" else 40)
    path = complete_checkpoints(checkpoints)[-1]
    verify_share(path, read_sums(path), 0, 1)


@contextmanager
def small_disk(at: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of some MB; who may not skips the test."""
    at.mkdir()
    if subprocess.run([*_mount(f"size={megabytes}m"), str(at)], capture_output=True).returncode:
        pytest.skip("mounts a file system, which this user may not")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


def _mount(options: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", options, "tmpfs"]


@pytest.mark.slow
def test_a_full_disk_and_one_that_takes_nothing(tmp_path: Path) -> None:
    """One sentence each; what was saved is whole, and with more room a resume ends as if unhurt."""
    output, disk = tmp_path / "output", tmp_path / "disk"

    def run(name: str, steps: int, *more: str) -> int:
        command = arguments_of((1, 2), tmp_path, steps, "--out", str(tmp_path / name), *more)
        with started(2, command, output) as process:
            return process.wait(timeout=180)

    def checked() -> list[str]:
        complete = complete_checkpoints(disk)
        for path in complete:
            verify_share(path, read_sums(path), 0, 1)
        return [path.name for path in complete]

    saving = ("--checkpoint", str(disk), "--checkpoint-every", "1")
    with small_disk(disk, 34):  # two checkpoints of 15 MB
        assert run("full", 6, *saving) != 0
        assert "cannot be saved: [Errno 28] No space left on device" in output.read_text()
        assert output.read_text().count("Traceback") == 1, "torchrun's own"
        assert checked() == ["step-000001", "step-000002"]
        assert sorted(os.listdir(disk)) == ["lock", *checked()], "nothing is left of the third"

        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run("nothing", 6, *saving, "--resume") != 0
        text = output.read_text()
        assert "cannot be written to: [Errno 30] Read-only file system" in text
        assert text.count("Traceback") == 1

        subprocess.run(["mount", "-o", "remount,rw,size=64m", str(disk)], check=True)
        assert run("resumed", 6, *saving, "--resume") == 0
        assert checked() == ["step-000005", "step-000006"]
    assert run("whole", 6) == 0
    resumed, whole = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("resumed", "whole")
    )
    assert resumed["first_step"] == 2
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-6)
