"""Write a trained model as a Hugging Face folder, one file for each pipeline rank."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from launch.conversion import stored_form
from launch.model import CLASSIFIER, EMBEDDING, stored_buffers, vocabulary_rows
from launch.training_pipeline import Pipeline


def export_model(pipeline: Pipeline, folder: Path, write_tokenizer: Callable[[Path], None]) -> None:
    """Write a folder that transformers opens: config.json, safetensors and the tokenizer.

    All ranks call it. The rows of a vocabulary are gathered over its group, one weight at a time;
    the first vocab rank of each pipeline rank writes what that one holds. Weights are stored in
    the dtype that the model's configuration names, else in the one that they were trained in. The
    folder appears when it is whole.
    """
    groups = pipeline.groups
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    tensors = _whole_tensors(pipeline)
    single = groups.pipeline_degree == 1
    file = (
        "model.safetensors"
        if single
        else f"model-{groups.pipeline_rank + 1:05d}-of-{groups.pipeline_degree:05d}.safetensors"
    )
    sizes = {}
    if groups.column_rank == 0 and groups.data_rank == 0:
        save_file(tensors, partial / file, metadata={"format": "pt"})
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    told: list[tuple[str, dict[str, int]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(told, (file, sizes))
    if dist.get_rank() == 0:
        pipeline.config.save_pretrained(partial)
        write_tokenizer(partial)
        if not single:
            index = {
                "metadata": {"total_size": sum(sum(own.values()) for _, own in told)},
                "weight_map": {name: where for where, own in told for name in sorted(own)},
            }
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        if folder.exists():
            folder.rmdir()  # empty, or it would have been refused
        partial.rename(folder)
    dist.barrier()


def _whole_tensors(pipeline: Pipeline) -> dict[str, Tensor]:
    """Return this rank's weights on the CPU; a tied weight once, on the first stage's rank."""
    owners = vocabulary_rows(pipeline.stages)
    stored = getattr(pipeline.config, "dtype", None)
    names = dict(pipeline.stages.named_parameters())
    found = {}
    for name, parameter in names.items():
        whole = parameter.detach()
        if id(parameter) in owners:
            whole = owners[id(parameter)].gather_rows(whole)
            if pipeline.spans and pipeline.groups.pipeline_rank > 0:
                continue
        if pipeline.tied is not None and name == CLASSIFIER:
            if 0 not in pipeline.indices:
                continue
            name = EMBEDDING
        dtype = stored if isinstance(stored, torch.dtype) else whole.dtype
        found[name] = whole.to("cpu", dtype).contiguous()
    for stage in pipeline.stages:
        found |= {name: buffer.cpu() for name, buffer in stored_buffers(stage).items()}
    return stored_form(pipeline.config, found)
