"""Save and load a run: the model, its optimizer and the step, on whatever mesh there is.

A checkpoint is a folder ``step-000123`` that torch.distributed.checkpoint writes, with run.json
beside the tensors. It is written as ``step-000123.partial`` and renamed when every rank is done: a
save that is killed leaves a partial folder, which nobody reads and the next save of that step
replaces.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup

from launch.arguments import TrainArguments
from launch.model import CLASSIFIER, EMBEDDING, vocabulary_rows
from launch.optimizer import AdamW
from launch.training_pipeline import Pipeline
from vocab_parallel import rows_for_checkpoint

_KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step-"
# What must be equal for the steps of a text to be the same steps.
_DATA = ("batch", "sequence")


@dataclass
class _Saving:
    """A save under way."""

    future: Any
    partial: Path
    final: Path


class Checkpoints:
    """The checkpoints of one run.

    Args:
        arguments: of the run; its ``checkpoint`` is the folder.
        pipeline, optimizer: what is saved and loaded; of weights with float32 copies, these.
        group: of all ranks, on the CPU, used by nothing else: a save talks over it in the
            background.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        pipeline: Pipeline,
        optimizer: AdamW,
        group: ProcessGroup,
    ) -> None:
        assert arguments.checkpoint is not None
        self._folder, self._arguments, self._group = arguments.checkpoint, arguments, group
        self._pipeline, self._optimizer = pipeline, optimizer
        self._saving: _Saving | None = None

    def save(self, step: int) -> None:
        """Begin to save; training may go on when it returns. All ranks call it."""
        self.finish()
        final = self._folder / f"{_STEP}{step:06d}"
        partial = final.with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "run.json").write_text(json.dumps(self._identity() | {"step": step}))
        dist.barrier(self._group)
        future = dcp.async_save(
            self._state(), checkpoint_id=str(partial), process_group=self._group
        )
        self._saving = _Saving(future, partial, final)

    def finish(self) -> None:
        """Wait for a save under way, and make it the newest checkpoint. All ranks call it."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.future.result()
        dist.barrier(self._group)  # every rank has written its part
        if dist.get_rank() == 0:
            shutil.rmtree(saving.final, ignore_errors=True)
            saving.partial.rename(saving.final)
            for old in _complete(self._folder)[:-_KEPT]:
                shutil.rmtree(old)
        dist.barrier(self._group)

    def begin(self) -> None:
        """See that a run from its first step does not mix with another one's checkpoints.

        Raises:
            ValueError: the folder has finished checkpoints.
        """
        complete = _complete(self._folder)
        if complete:
            raise ValueError(
                f"--checkpoint {self._folder} has the checkpoint {complete[-1].name} of a run "
                f"before this one: go on from it with --resume, or give another folder"
            )

    def resume(self) -> int:
        """Load the newest checkpoint and return its step; 0 where there is none.

        Raises:
            ValueError: it is of another model or other data; nothing was loaded.
        """
        complete = _complete(self._folder)
        if not complete:
            return 0
        newest = complete[-1]
        run = json.loads((newest / "run.json").read_text())
        for name, own in self._identity().items():
            if run.get(name) != own:
                raise ValueError(
                    f"{newest} is of another run: its {name} is {run.get(name)}, but this one's "
                    f"is {own}; resume with the same, or give another --checkpoint folder"
                )
        if run["step"] >= self._arguments.steps and self._arguments.export is None:
            raise ValueError(
                f"{newest} has done all of --steps {self._arguments.steps}: ask for more steps, or "
                f"for --export FOLDER alone"
            )
        self._make_moments()
        dcp.load(self._state(), checkpoint_id=str(newest), process_group=self._group)
        self._optimizer.round_copies()
        return int(run["step"])

    def _identity(self) -> dict[str, Any]:
        config = self._pipeline.config
        names = (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "tie_word_embeddings",
        )
        data = {name: getattr(self._arguments, name) for name in _DATA}
        return {name: getattr(config, name, None) for name in names} | data

    def _state(self) -> dict[str, Tensor]:
        """Name every tensor of this rank as it is named in the whole model; rows as parts of it."""
        state: dict[str, Tensor] = {}
        owners = vocabulary_rows(self._pipeline.stages)
        for name, parameter in self._pipeline.stages.named_parameters():
            if self._pipeline.tied is not None and name == CLASSIFIER:
                name = EMBEDDING  # one weight, whichever end holds it
            trained = self._optimizer.trained(parameter)
            moments = self._optimizer.state[trained]
            for role, tensor in (
                ("model", trained.detach()),
                *((moment, moments[moment]) for moment in (*_MOMENTS, "step")),
            ):
                owner = owners.get(id(parameter)) if role != "step" else None
                state[f"{role}.{name}"] = (
                    tensor
                    if owner is None
                    else rows_for_checkpoint(tensor, owner.start, owner.vocab_size)
                )
        return state

    def _make_moments(self) -> None:
        """Give AdamW the state that it would make at its first step."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state[parameter]
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for moment in _MOMENTS:
                    state[moment] = torch.zeros_like(parameter)


def _complete(folder: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first, and nothing else that lies beside them."""
    found = [
        (int(match[1]), path)
        for path in folder.glob(f"{_STEP}*")
        if (match := re.fullmatch(rf"{_STEP}(\d{{6,}})", path.name))
        and (path / "run.json").is_file()
    ]
    return [path for _, path in sorted(found)]
