"""Save and load a run: model, optimizer, step and losses, on whatever mesh there is.

A checkpoint is a folder ``step-000123``:

    __0_0.distcp ...    the tensors, by torch.distributed.checkpoint
    tensors.json        where in them each tensor lies (`launch/tensor_files.py`)
    run.json            which run, at which step
    history.json        its losses so far
    SHA256SUMS          of all of these

Beside them a file ``lock`` is held by the run that uses the folder (`launch/disk.py`).

It is written as ``step-000123.partial`` and renamed when every rank is done and all of it is on the
disk: a save that is killed leaves a partial folder, which nobody reads and the next save of that
step replaces.
"""

import json
import re
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from launch.arguments import TrainArguments
from launch.checksums import SUMS, read_sums, sync_folder, verify_share, write_sums
from launch.checksums import write_synced as write
from launch.command import raised_on_all
from launch.data.batches import Batches
from launch.disk import as_values, lock_folder, try_to_write
from launch.model import CLASSIFIER, EMBEDDING, vocabulary_rows
from launch.optimizer import AdamW
from launch.tensor_files import TENSORS, CheckedReader, CheckedWriter
from launch.training_pipeline import Pipeline
from vocab_parallel import rows_for_checkpoint

_OF_MODEL = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
_OF_ARGUMENTS = ("sequence", "seed")


_KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_RUN, _HISTORY = "run.json", "history.json"
_STEP = "step-"


@dataclass(frozen=True)
class History:
    """A run up to some step; what it has saved, or nothing.

    Attributes:
        losses, seconds: of each step.
        tokens: that all steps have read.
        mesh: that saved it, in words; empty where that is not known.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    mesh: str = ""

    @property
    def step(self) -> int:
        """How many steps were done."""
        return len(self.seconds)


@dataclass(frozen=True)
class _Saving:
    """A save under way."""

    future: Any
    writer: CheckedWriter
    stager: DefaultStager
    history: History


class Checkpoints:
    """The checkpoints of one run.

    Every error of one rank's disk is a `UserError` on all of them.

    Args:
        arguments: of the run; its ``checkpoint`` is the folder.
        pipeline, optimizer: what is saved and loaded; of weights with float32 copies, these.
        batches: what the run reads.
        group: of all ranks, on the CPU, used by nothing else: a save talks over it in the
            background.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        pipeline: Pipeline,
        optimizer: AdamW,
        batches: Batches,
        group: ProcessGroup,
    ) -> None:
        assert arguments.checkpoint is not None
        self._folder, self._arguments, self._group = arguments.checkpoint, arguments, group
        self._pipeline, self._optimizer = pipeline, optimizer
        self._text = batches.tokens.digest
        self._run = uuid.uuid4().hex  # rank 0's counts; a resumed run keeps its own
        self._saving: _Saving | None = None
        self._lock: IO[str] | None = None

    def save(self, losses: list[float], seconds: list[float], tokens: int) -> None:
        """Begin to save; training may go on when it returns. All ranks call it.

        Args:
            losses: of every step of the run, where the last stage is.
            seconds: of every step of the run.
            tokens: that all of them have read.
        """
        self.finish()
        final = self._folder / f"{_STEP}{len(seconds):06d}"
        partial = final.with_suffix(".partial")
        with raised_on_all(self._group), as_values(f"{final} cannot be saved"):
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self._make_moments()  # of weights that no step has had a gradient for
        writer = CheckedWriter(partial)
        # The writer would keep tensors that are on the CPU already as they are, without a copy.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        future = dcp.async_save(
            self._state(), storage_writer=writer, process_group=self._group, async_stager=stager
        )
        history = History(list(losses), list(seconds), tokens)
        self._saving = _Saving(future, writer, stager, history)

    def finish(self) -> None:
        """Wait for a save under way, and make it the newest checkpoint. All ranks call it.

        Raises:
            UserError: the disk did not take it; what was saved before is as it was.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        partial = saving.writer.folder
        words = f"{partial.with_suffix('')} cannot be saved"
        try:
            with raised_on_all(self._group), as_values(words):
                saving.future.result()
            told: list[Any] = [None] * dist.get_world_size()
            # Only ranks of the last stage know losses.
            own = (saving.writer.sums, saving.history.losses)
            dist.all_gather_object(told, own, group=self._group)
            with raised_on_all(self._group), as_values(words):
                if dist.get_rank() == 0:
                    sums = {name: digest for sums, _ in told for name, digest in sums.items()}
                    losses = max((losses for _, losses in told), key=len)
                    self._complete(partial, sums, replace(saving.history, losses=losses))
        except ValueError:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            saving.stager.close()

    def begin(self) -> History:
        """See that a run from its first step does not mix with another one's checkpoints.

        All ranks call it.

        Raises:
            UserError: the folder has finished checkpoints, cannot be written to, or is another
                run's at this time.
        """
        with raised_on_all():
            self._open_folder()
            complete = complete_checkpoints(self._folder)
            if complete:
                raise ValueError(
                    f"--checkpoint {self._folder} has the checkpoint {complete[-1].name} of a run "
                    f"before this one: go on from it with --resume, or give another folder"
                )
        return History()

    def resume(self) -> History:
        """Load the newest checkpoint, if there is one. All ranks call it.

        Nothing is read of it before its checksums have been compared, by each rank those of some
        of its files; nothing in it is executed.

        Raises:
            UserError: it is damaged, or of another model, seed or text, or another run has the
                folder at this time; nothing was loaded.
        """
        with raised_on_all():
            self._open_folder()
            complete = complete_checkpoints(self._folder)
        newest = self._agree_on(complete[-1].name if complete else None)
        if newest is None:
            return History()
        other = "; move it elsewhere to go on from the checkpoint before it"
        sums: dict[str, str] = {}
        with raised_on_all(), as_values(f"{newest} cannot be read", other):
            sums = read_sums(newest)
            unsaid = sorted({_RUN, _HISTORY, TENSORS} - sums.keys())
            if unsaid:
                raise ValueError(f"{newest / SUMS} is damaged: it has no checksum of {unsaid[0]}")
            verify_share(newest, sums, dist.get_rank(), dist.get_world_size())
        with raised_on_all(), as_values(f"{newest} cannot be read"):
            history = self._read_run(newest)
            reader = CheckedReader(newest, sums)
        self._make_moments()
        with raised_on_all(), as_values(f"{newest} cannot be loaded"):
            dcp.load(self._state(), storage_reader=reader, process_group=self._group)
        self._optimizer.round_copies()
        return history

    def _open_folder(self) -> None:
        """See that the folder takes files, and on rank 0 that no other run uses it."""
        try_to_write(self._folder, "--checkpoint")
        if dist.get_rank() == 0:
            with as_values(f"--checkpoint {self._folder} cannot be written to"):
                self._lock = lock_folder(self._folder, "--checkpoint")

    def _agree_on(self, name: str | None) -> Path | None:
        """Return the checkpoint that rank 0 sees.

        Raises:
            UserError: another rank does not see it, and would begin anew.
        """
        told = [name]
        dist.broadcast_object_list(told, 0, group=self._group)
        if told[0] is None:
            return None
        newest = self._folder / told[0]
        with raised_on_all():
            if not newest.is_dir():
                raise ValueError(
                    f"rank {dist.get_rank()} does not see {newest}, which rank 0 does: "
                    f"--checkpoint must be a folder that all machines share"
                )
        return newest

    def _complete(self, partial: Path, sums: dict[str, str], history: History) -> None:
        """Write what rank 0 alone writes, give the folder its name, and drop older ones."""
        final = partial.with_suffix("")
        run = self._identity() | {
            "batch": self._arguments.batch,
            "step": history.step,
            "text": self._text,
            "shuffle": self._arguments.shuffle,
            "tokens_read": history.tokens,
            "run": self._run,
            "mesh": self._arguments.mesh,
        }
        lists = {"losses": history.losses, "seconds": history.seconds}
        sums[_RUN] = write(partial / _RUN, json.dumps(run, indent=1))
        sums[_HISTORY] = write(partial / _HISTORY, json.dumps(lists))
        write_sums(partial, sums)
        sync_folder(partial)
        if final.exists():  # what is no checkpoint of this run: nothing of another's is lost
            final.rename(_free_name(final))
        partial.rename(final)
        sync_folder(self._folder)
        # What a rank that was killed as it dropped one has left of it: at the last an empty folder.
        for left in filter(Path.is_dir, self._folder.glob(f"{_STEP}*.partial")):
            if _run_of(left) == self._run or not any(left.iterdir()):
                _drop(left)
        own = [path for path in complete_checkpoints(self._folder) if _run_of(path) == self._run]
        for old in own[:-_KEPT]:
            going = old.with_suffix(".partial")  # no checkpoint, should this end in the middle
            shutil.rmtree(going, ignore_errors=True)
            _drop(old.rename(going))

    def _read_run(self, newest: Path) -> History:
        """Return the history of the run that a checkpoint is of.

        Raises:
            ValueError: it is not this run, or has done all of its steps.
        """
        run, lists = (json.loads((newest / name).read_text()) for name in (_RUN, _HISTORY))
        history = History(
            list(map(float, lists["losses"])),
            list(map(float, lists["seconds"])),
            int(run.get("tokens_read", 0)),
            str(run.get("mesh", "")),
        )
        if not len(history.losses) == len(history.seconds) == run["step"]:
            raise ValueError(f"{newest / _HISTORY} has not as many steps as {_RUN} says")
        other = f"{newest} is of another run: "
        for name, own in self._identity().items():
            if run.get(name) != own:
                raise ValueError(
                    f"{other}its {name} is {run.get(name)}, but this one's is {own}; resume with "
                    f"the same, or give another --checkpoint folder"
                )
        if history.step >= self._arguments.steps:
            if self._arguments.export is not None:  # of what is there: nothing is read
                return history
            raise ValueError(
                f"{newest} has done all of --steps {self._arguments.steps}: ask for more steps, or "
                f"for --export FOLDER alone"
            )
        if "tokens_read" not in run:
            raise ValueError(
                f"{newest} does not say how far its text was read, as an older version saved it: "
                f"--steps {history.step} --resume --export FOLDER writes its weights; train on "
                f"with --model FOLDER and another --checkpoint"
            )
        if (run["text"], run["shuffle"]) != (self._text, self._arguments.shuffle):
            raise ValueError(
                f"{other}it has read other tokens than this one's, or in another order; resume "
                f"with the same --text and --tokenizer, and what says how they are read, or give "
                f"another --checkpoint folder"
            )
        if run["batch"] != self._arguments.batch and not self._arguments.new_batch:
            raise ValueError(
                f"{newest} is of a run whose batch is {run['batch']}, but this one's is "
                f"{self._arguments.batch}; resume with the same, or give --new-batch to go on "
                f"behind what was read with this one"
            )
        self._run = str(run["run"])
        return history

    def _identity(self) -> dict[str, Any]:
        """Return what must be equal for one start to go on where another has ended."""
        config, arguments = self._pipeline.config, self._arguments
        of_model = {name: getattr(config, name, None) for name in _OF_MODEL}
        return of_model | {name: getattr(arguments, name) for name in _OF_ARGUMENTS}

    def _state(self) -> dict[str, Tensor]:
        """Name every tensor of this rank as it is named in the whole model; rows as parts of it."""
        state: dict[str, Tensor] = {}
        owners = vocabulary_rows(self._pipeline.stages)
        for name, parameter in self._pipeline.stages.named_parameters():
            if self._pipeline.tied is not None and name == CLASSIFIER:
                name = EMBEDDING  # one weight, whichever end holds it
            trained = self._optimizer.trained(parameter)
            moments = self._optimizer.state[trained]
            owner = owners.get(id(parameter))
            for role, tensor in {"model": trained.detach(), **moments}.items():
                if owner is not None and role != "step":
                    tensor = rows_for_checkpoint(tensor, owner.start, owner.vocab_size)
                state[f"{role}.{name}"] = tensor
        return state

    def _make_moments(self) -> None:
        """Give AdamW the state that it would make at its first step, where it has none."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                if state:
                    continue
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for moment in _MOMENTS:
                    state[moment] = torch.zeros_like(parameter)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first, and nothing else that lies beside them."""
    found = [
        (int(match[1]), path)
        for path in folder.glob(f"{_STEP}*")
        if (match := re.fullmatch(rf"{_STEP}(\d{{6,}})", path.name))
        # Either will do: with one of them lost it is damaged, and not overlooked.
        and ((path / SUMS).is_file() or (path / _RUN).is_file())
    ]
    return [path for _, path in sorted(found)]


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint; what says whose it is goes last, should this end in the middle."""
    for path in checkpoint.iterdir():
        if path.name != _RUN:
            path.unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _run_of(checkpoint: Path) -> str | None:
    """Return which run saved a checkpoint; None where that cannot be told."""
    try:
        run: str = json.loads((checkpoint / _RUN).read_text())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run


def _free_name(path: Path) -> Path:
    """Return a name beside a path that nothing has."""
    names = (path.with_suffix(f".replaced-{number}") for number in range(1, 10**6))
    return next(name for name in names if not name.exists())
