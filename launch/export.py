"""Write a trained model as a Hugging Face folder, one file for each pipeline rank.

It is not by torch's HuggingFaceStorageWriter, which holds two more copies of a rank's weights, as
the bytes of its file, and whose consolidation lets one rank read and write all files once more.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from launch.arguments import TrainArguments
from launch.command import UserError, raised_on_all
from launch.conversion import stored_form
from launch.data.tokenizers import save_tokenizer
from launch.disk import as_values
from launch.model import CLASSIFIER, EMBEDDING, stored_buffers, vocabulary_rows
from launch.sharded_body import whole
from launch.training_pipeline import Pipeline

_GENERATION = "generation_config.json"


def export_model(pipeline: Pipeline, arguments: TrainArguments) -> None:
    """Write ``--export``, a folder that transformers opens: all that ``save_pretrained`` writes.

    All ranks call it. The rows of a vocabulary are gathered over its group, and a sharded body over
    the data group, one weight at a time; the first vocab rank of each pipeline rank writes what
    that one holds. The tokenizer, and the generation config of the --model folder, lie beside the
    weights. The folder appears when it is whole.

    Raises:
        UserError: the disk does not take it; nothing of it is left.
    """
    folder, groups = arguments.export, pipeline.groups
    assert folder is not None
    partial = folder.with_name(folder.name + ".partial")
    dtype = _stored_dtype(pipeline, arguments)
    place, places = groups.pipeline_rank + 1, groups.pipeline_degree
    file = f"model-{place:05d}-of-{places:05d}.safetensors" if places > 1 else "model.safetensors"
    try:
        with _taken(arguments):
            if dist.get_rank() == 0:
                partial.mkdir(parents=True, exist_ok=True)
                _write_beside(pipeline, arguments, dtype, partial)
        tensors = _whole_tensors(pipeline, dtype)
        sizes = {}
        with _taken(arguments):
            if groups.column_rank == 0 and groups.data_rank == 0:
                save_file(tensors, partial / file, metadata={"format": "pt"})
                sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        told = [(file, sizes)] * dist.get_world_size()
        dist.all_gather_object(told, (file, sizes))
        with _taken(arguments):
            if dist.get_rank() == 0:
                index = {
                    "metadata": {"total_size": sum(sum(own.values()) for _, own in told)},
                    "weight_map": {name: where for where, own in told for name in sorted(own)},
                }
                if places > 1:
                    text = json.dumps(index, indent=1)
                    (partial / "model.safetensors.index.json").write_text(text)
                if folder.exists():
                    folder.rmdir()  # empty, or it would have been refused
                partial.rename(folder)
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _taken(arguments: TrainArguments) -> Iterator[None]:
    """Raise on all ranks what the disk of one does not take."""
    with raised_on_all(), as_values(f"--export {arguments.export} cannot be written"):
        yield


def _write_beside(
    pipeline: Pipeline, arguments: TrainArguments, dtype: torch.dtype, folder: Path
) -> None:
    """Write what is no weight: configuration, tokenizer and generation config."""
    config = copy.deepcopy(pipeline.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    save_tokenizer(arguments.tokenizer, arguments.model, folder)
    if arguments.model is not None and (Path(arguments.model) / _GENERATION).is_file():
        shutil.copyfile(Path(arguments.model) / _GENERATION, folder / _GENERATION)


def _stored_dtype(pipeline: Pipeline, arguments: TrainArguments) -> torch.dtype:
    """Return ``--export-dtype``: by default the configuration's, else that of training."""
    asked = arguments.export_dtype
    own = getattr(pipeline.config, "dtype", None)
    if asked == "auto" and isinstance(own, torch.dtype):
        return own
    found: torch.dtype = getattr(torch, arguments.dtype if asked == "auto" else asked)
    return found


def _whole_tensors(pipeline: Pipeline, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return this rank's weights on the CPU; a tied weight once, on the first stage's rank."""
    owners = vocabulary_rows(pipeline.stages)
    names = dict(pipeline.stages.named_parameters())
    found = {}
    for name, parameter in names.items():
        joined = whole(parameter.detach())
        if id(parameter) in owners:
            joined = owners[id(parameter)].gather_rows(joined)
            if pipeline.spans and pipeline.groups.pipeline_rank > 0:
                continue
        if pipeline.tied is not None and name == CLASSIFIER:
            if 0 not in pipeline.indices:
                continue
            name = EMBEDDING
        found[name] = joined.to("cpu", dtype).contiguous()
    for stage in pipeline.stages:
        found |= {name: buffer.cpu() for name, buffer in stored_buffers(stage).items()}
    return stored_form(pipeline.config, found)
