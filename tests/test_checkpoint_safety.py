"""Damage, malice, other runs and disks that take nothing: refused on all ranks, nothing lost.

Two real ranks and a model of a few weights, of which many checkpoints are saved and loaded.
"""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch.arguments import TrainArguments
from launch.checkpoint import Checkpoints, complete_checkpoints
from launch.checksums import SUMS, checksum
from launch.command import UserError
from launch.optimizer import AdamW
from stage_groups import build_host_group
from tests.batches import batches_of_ids
from tests.ranks import ROOT, run_ranks
from vocab_parallel import VocabParallelClassifier

CONFIG = SimpleNamespace(model_type="toy", vocab_size=11, hidden_size=3)
STEPS = 4


class Run:
    """A start of a run: what a rank of the trainer holds."""

    def __init__(self, folder: Path, ids: torch.Tensor, **arguments: Any) -> None:
        torch.manual_seed(dist.get_rank())
        body = nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in body.parameters():
                dist.broadcast(parameter, 0)
        self.model = nn.Sequential(body, VocabParallelClassifier(3, 11, group=None))
        self.optimizer = AdamW(
            self.model.parameters(),
            learning_rate=0.1,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            copies=True,
        )
        given = TrainArguments(checkpoint=folder, **{"steps": 8} | arguments)
        pipeline: Any = SimpleNamespace(stages=self.model, tied=None, config=CONFIG)
        batches = batches_of_ids(ids)
        self.checkpoints = Checkpoints(given, pipeline, self.optimizer, batches, build_host_group())
        self.losses: list[float] = []

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) * (1 + len(self.losses))
        self.optimizer.step()
        self.losses.append(12.0 - len(self.losses))

    def save(self) -> None:
        # The last stage's ranks alone know the losses.
        losses = self.losses if dist.get_rank() == 1 else []
        self.checkpoints.save(losses, [0.5] * len(self.losses), 6 * len(self.losses))

    def weights(self) -> list[torch.Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [weight.detach().clone() for weight in (*self.model.parameters(), *moments)]


def once(work: Any) -> None:
    """Do something to a folder on rank 0 alone."""
    dist.barrier()
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def flip_a_bit(folder: Path, draws: random.Random) -> str:
    """Flip one of all files' bits, and return where."""
    files = sorted(folder.iterdir())
    file = draws.choices(files, [one.stat().st_size for one in files])[0]
    if draws.random() < 0.5:  # the small ones, too
        file = draws.choice(files)
    data = bytearray(file.read_bytes())
    place = draws.randrange(len(data))
    data[place] ^= 1 << draws.randrange(8)
    file.write_bytes(data)
    return f"{file.name}, byte {place}"


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, with its checksum, as whoever can write to the folder can."""
    (folder / name).write_bytes(data)
    text = (folder / SUMS).read_text()
    lines = [line for line in text.splitlines() if not line.endswith(f"  {name}")]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}")
    (folder / SUMS).write_text("".join(f"{line}\n" for line in lines))


def assert_refused(run: Run, match: str) -> None:
    """Resume fails on this rank, and so does it on the other, before anything is loaded."""
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(UserError, match=match):
        run.checkpoints.resume()
    for old, now in zip(before, run.model.parameters(), strict=True):
        assert torch.equal(old, now)


def check_damage(folder: str, seed: int, flips: int) -> None:
    kept, ids = Path(folder) / "kept", torch.arange(STEPS * 6).view(STEPS, 2, 3)
    run = Run(kept, ids)
    assert run.checkpoints.begin().step == 0
    for _ in range(3):
        run.step()
        run.save()
    run.checkpoints.finish()
    assert [path.name for path in complete_checkpoints(kept)] == ["step-000002", "step-000003"]
    saved = kept / "step-000003"
    again = Run(kept, ids)
    history = again.checkpoints.resume()
    assert (history.losses, history.seconds) == ([12.0, 11.0, 10.0], [0.5] * 3)
    for own, loaded in zip(run.weights(), again.weights(), strict=True):
        assert torch.equal(own, loaded)

    copy = Path(folder) / "copy"
    newest = copy / "step-000003"
    draws = random.Random(seed)
    for number in range(flips):
        once(lambda: shutil.copytree(saved, newest))
        where = [flip_a_bit(newest, draws) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(where, 0)
        try:
            assert_refused(Run(copy, ids), "step-000003.*move it elsewhere")
        except BaseException as error:
            raise AssertionError(f"flip {number}: {where[0]}") from error
        once(lambda: shutil.rmtree(copy))

    def lose(name: str) -> None:
        shutil.copytree(saved, newest)
        (newest / name).unlink()

    for name in ("__1_0.distcp", "run.json", "tensors.json", SUMS):
        once(lambda name=name: lose(name))  # type: ignore[misc]
        assert_refused(Run(copy, ids), f"{name} is missing|has no {SUMS}")
        once(lambda: shutil.rmtree(copy))


@pytest.mark.parametrize("flips", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_damage(flips: int, tmp_path: Path) -> None:
    """Of bits flipped anywhere in a checkpoint none loads, and no lost file either."""
    seed = random.randrange(10**6)
    run_ranks(check_damage, 2, timeout=170, folder=str(tmp_path), seed=seed, flips=flips)


class Hostile:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def check_malice(folder: str) -> None:
    kept, ids = Path(folder) / "kept", torch.arange(STEPS * 6).view(STEPS, 2, 3)
    run = Run(kept, ids)
    run.step()
    run.save()
    run.checkpoints.finish()
    saved, marker = kept / "step-000001", Path(folder) / "executed"
    tensors: dict[str, Any] = json.loads((saved / "tensors.json").read_text())
    written = (saved / "__0_0.distcp").read_bytes()
    name, rows = "model.0.weight", "model.1.weight"
    part = tensors[name]["parts"][0]
    evil = pickle.dumps(Hostile(marker))
    once(lambda: pickle.loads(evil))
    assert marker.exists()  # it does what it is for
    once(lambda: os.rmdir(marker))

    def changed(**change: Any) -> bytes:
        return json.dumps(tensors | {name: tensors[name] | change}).encode()

    shorter = tensors | {rows: tensors[rows] | {"parts": tensors[rows]["parts"][:1]}}
    bytes_of = json.dumps({**tensors, name: {"type": "bytes", "parts": [part]}}).encode()
    for file, data, match in (
        ("tensors.json", changed(parts=[[*part[:2], "../../secret", *part[3:]]]), "no checksum"),
        ("tensors.json", changed(parts=[[*part[:2], "/etc/passwd", *part[3:]]]), "no checksum"),
        ("tensors.json", changed(size=[3, 4]), "not the whole"),
        ("tensors.json", changed(size=[10**9, 10**9]), "not the whole"),
        ("tensors.json", changed(dtype="object"), "cannot be read"),
        ("tensors.json", changed(parts=[[*part[:3], 10**15, 5]]), "cannot be loaded"),
        ("tensors.json", changed(parts=[[*part[:3], -1, 5]]), "are not sizes"),
        ("tensors.json", json.dumps(shorter).encode(), "not the whole"),
        ("tensors.json", bytes_of, "cannot be read"),
        ("tensors.json", b"[" * 10**5, "cannot be read"),
        ("tensors.json", b"[1, 2]", "cannot be read"),
        ("tensors.json", evil, "cannot be read"),
        ("run.json", b"[1, 2]", "cannot be read"),
        ("history.json", b'{"losses": 1, "seconds": [2]}', "cannot be read"),
        ("history.json", b'{"losses": [], "seconds": []}', "as many steps"),
        ("__0_0.distcp", evil + written[len(evil) :], "cannot be loaded"),
    ):
        copy = Path(folder) / "copy"

        def prepare(copy: Path = copy, file: str = file, data: bytes = data) -> None:
            shutil.copytree(kept, copy)
            rewrite(copy / "step-000001", file, data)

        once(prepare)
        with pytest.raises(UserError, match=match):
            Run(copy, ids).checkpoints.resume()
        once(lambda: shutil.rmtree(Path(folder) / "copy"))
    once(lambda: (saved / SUMS).write_text(f"{'0' * 64}  ../outside\n"))
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        Run(kept, ids).checkpoints.resume()
    once(lambda: (saved / SUMS).unlink())
    once(lambda: [(saved / SUMS).write_text(f"{checksum(saved / 'run.json')}  run.json\n")])
    with pytest.raises(UserError, match=r"no checksum|cannot be read"):
        Run(kept, ids).checkpoints.resume()
    assert not marker.exists()


def check_hostile_metadata(folder: str) -> None:
    """torch's own metadata may be anything: it is not read."""
    kept, marker = Path(folder) / "kept", Path(folder) / "executed"
    ids = torch.arange(STEPS * 6).view(STEPS, 2, 3)
    run = Run(kept, ids)
    run.step()
    run.save()
    run.checkpoints.finish()
    once(lambda: rewrite(kept / "step-000001", ".metadata", pickle.dumps(Hostile(marker))))
    again = Run(kept, ids)
    again.checkpoints.resume()
    assert not marker.exists()
    for own, loaded in zip(run.weights(), again.weights(), strict=True):
        assert torch.equal(own, loaded)


def check_everything_else(folder: str) -> None:
    check_malice(folder)
    check_hostile_metadata(f"{folder}/metadata")
    check_other_runs(f"{folder}/others")
    check_disks(f"{folder}/disks")
    check_two_runs(f"{folder}/two")
    check_sums_without_a_line(f"{folder}/sums")


def check_other_runs(folder: str) -> None:
    kept, ids = Path(folder), torch.arange(STEPS * 6).view(STEPS, 2, 3)
    first = Run(kept, ids)
    first.checkpoints.begin()
    for _ in range(2):
        first.step()
        first.save()
    first.checkpoints.finish()
    with pytest.raises(UserError, match="has the checkpoint step-000002 of a run before"):
        Run(kept, ids).checkpoints.begin()
    assert_refused(Run(kept, ids, seed=1), "its seed is 0, but this one's is 1")
    for run in (
        Run(kept, ids + 1),
        Run(kept, torch.cat([ids, ids])),
        Run(kept, ids, shuffle=False),
    ):
        assert_refused(
            run, "other tokens than this one's, or in another order; resume with the same"
        )
    assert_refused(Run(kept, ids, batch=16), "whose batch is 8, .* is 16; .* or give --new-batch")
    assert Run(kept, ids, batch=16, new_batch=True).checkpoints.resume().tokens == 12
    assert_refused(Run(kept, ids, steps=2), "has done all of --steps 2")

    newest = kept / "step-000002"
    run_json = (newest / "run.json").read_bytes()
    older = {n: value for n, value in json.loads(run_json).items() if n != "tokens_read"}
    once(lambda: rewrite(newest, "run.json", json.dumps(older).encode()))
    assert_refused(Run(kept, ids), "does not say how far its text was read, .*--steps 2 --resume")
    once(lambda: rewrite(newest, "run.json", run_json))

    stranger = kept / "step-000001"
    shutil.copytree(stranger, kept / "step-000001.bak") if dist.get_rank() == 0 else None

    def of_another() -> None:  # somebody put it here
        run = json.loads((stranger / "run.json").read_text())
        rewrite(stranger, "run.json", json.dumps(run | {"run": "other"}).encode())
        (kept / "step-000003").mkdir()
        (kept / "step-000003" / "notes").write_text("mine")
        (kept / "step-000004").write_text("a file")

    once(of_another)
    second = Run(kept, ids)
    second.losses = second.checkpoints.resume().losses
    for _ in range(3):
        second.step()
        second.save()
    second.checkpoints.finish()
    assert sorted(os.listdir(kept)) == [
        "lock", "step-000001", "step-000001.bak", "step-000003.replaced-1", "step-000004",
        "step-000004.replaced-1", "step-000005",
    ]  # fmt: skip
    assert (kept / "step-000003.replaced-1" / "notes").read_text() == "mine"
    assert (kept / "step-000004.replaced-1").read_text() == "a file"
    assert Run(kept, ids).checkpoints.resume().losses == [12.0, 11.0, 10.0, 9.0, 8.0]


def check_disks(folder: str) -> None:
    """A disk that is full on one rank, or takes nothing, ends both, and what was saved stays."""
    kept, ids = Path(folder), torch.arange(STEPS * 6).view(STEPS, 2, 3)
    run = Run(kept, ids)
    run.checkpoints.begin()
    run.step()
    run.save()
    run.checkpoints.finish()
    run.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:  # as a full disk, but for the error's number
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    run.save()
    with pytest.raises(UserError, match=r"step-000002 cannot be saved: .*File too large"):
        run.checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert sorted(os.listdir(kept)) == ["lock", "step-000001"]  # the partial one is gone
    dist.barrier()
    run.save()
    run.checkpoints.finish()
    assert Run(kept, ids).checkpoints.resume().step == 2
    nowhere = kept / "step-000002" / "run.json" / "below a file"
    for call in (Run(nowhere, ids).checkpoints.begin, Run(nowhere, ids).checkpoints.resume):
        with pytest.raises(UserError, match=r"cannot be written to: .*Not a directory"):
            call()


def check_two_runs(folder: str) -> None:
    """A folder is one run's at a time, until the process that has it ends, however it does."""
    kept, ids = Path(folder), torch.arange(STEPS * 6).view(STEPS, 2, 3)
    holder: subprocess.Popen[str] | None = None
    if dist.get_rank() == 0:
        kept.mkdir()
        hold = (
            "import sys, pathlib; from launch.disk import lock_folder\n"
            "held = lock_folder(pathlib.Path(sys.argv[1]), '--checkpoint')\n"
            "print('held', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", hold, folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
    dist.barrier()
    for call in (Run(kept, ids).checkpoints.begin, Run(kept, ids).checkpoints.resume):
        with pytest.raises(UserError, match=r"is in use by another run, process \d+ on .*: wait"):
            call()
    if holder is not None:
        holder.kill()
        holder.communicate()
    dist.barrier()
    assert Run(kept, ids).checkpoints.begin().step == 0


def check_sums_without_a_line(folder: str) -> None:
    """What SHA256SUMS does not name was not compared; numbers that no float is are no history."""
    kept, ids = Path(folder), torch.arange(STEPS * 6).view(STEPS, 2, 3)
    run = Run(kept, ids)
    run.checkpoints.begin()
    run.step()
    run.save()
    run.checkpoints.finish()
    newest = kept / "step-000001"
    sums = newest / SUMS
    text = sums.read_text() if dist.get_rank() == 0 else ""
    for name in ("run.json", "history.json", "tensors.json"):
        lines = [line for line in text.splitlines() if not line.endswith(f"  {name}")]
        once(lambda lines=lines: sums.write_text("".join(f"{line}\n" for line in lines)))
        assert_refused(Run(kept, ids), rf"SHA256SUMS is damaged: it has no checksum of {name}")
    once(lambda: sums.write_text(text))
    history = b'{"losses": [1' + b"0" * 400 + b'], "seconds": [1.0]}'
    once(lambda: rewrite(newest, "history.json", history))
    assert_refused(Run(kept, ids), r"step-000001 cannot be read: OverflowError")


def test_malice_other_runs_and_disks(tmp_path: Path) -> None:
    run_ranks(check_everything_else, 2, folder=str(tmp_path))
