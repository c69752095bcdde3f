"""Where a stage's weights come from: a seed, or a Hugging Face folder read slice by slice."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from launch.command import say
from launch.conversion import Conversion

_INDEX = "model.safetensors.index.json"
_BLOCK = 4096  # rows of a vocabulary that one seed draws


class WeightSource(Protocol):
    """Attributes: bytes_read, from files, so far."""

    bytes_read: int

    def fill(self, name: str, into: Tensor, rows: slice | None, module: nn.Module) -> None:
        """Write a weight, or some rows of it, into a tensor.

        Args:
            name: in the whole model.
            into: [...], or [stop - start, ...] of its rows.
            rows: of the whole weight; None for all.
            module: which owns it; a random weight is drawn as its kind wants it.
        """
        ...


class RandomWeights:
    """Weights that depend on their names and a seed alone, not on who draws them.

    Every rank draws what it holds: replicas are equal, and the rows of a vocabulary are the same
    however they are cut.
    """

    def __init__(self, seed: int, deviation: float) -> None:
        self.bytes_read = 0
        self._seed, self._deviation = seed, deviation

    def fill(self, name: str, into: Tensor, rows: slice | None, module: nn.Module) -> None:
        """See `WeightSource.fill`.

        Raises:
            ValueError: a buffer, which is no weight to be drawn, but for a bias.
        """
        if name.endswith("bias"):
            into.zero_()
        elif name.rpartition(".")[2] in dict(module.named_buffers(recurse=False)):
            raise ValueError(
                f"the model has a buffer {name}, whose values are in a folder of trained weights "
                f"alone: give such a folder"
            )
        elif "norm" in type(module).__name__.lower():
            # Gemma's norm multiplies by 1 + weight
            into.fill_(0.0 if "gemma" in type(module).__name__.lower() else 1.0)
        elif rows is None and into.dim() < 2:
            into.normal_(0.0, self._deviation, generator=self._generator(name, 0, into))
        else:
            start = 0 if rows is None else rows.start
            stop = start + into.shape[0]
            for block in range(start // _BLOCK, -(-stop // _BLOCK)):
                first = block * _BLOCK
                drawn = torch.empty(_BLOCK, *into.shape[1:], device=into.device)
                drawn.normal_(0.0, self._deviation, generator=self._generator(name, block, into))
                low, high = max(first, start), min(first + _BLOCK, stop)
                into[low - start : high - start] = drawn[low - first : high - first]

    def _generator(self, name: str, block: int, like: Tensor) -> torch.Generator:
        text = f"{self._seed} {name} {block}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator(like.device).manual_seed(seed)


def say_random(model: str | None, source: WeightSource) -> None:
    """Say that a published model's name has brought no weights; one rank calls it."""
    if model is not None and isinstance(source, RandomWeights):
        say(
            f"RANDOM WEIGHTS: there is no folder {model} here, and the name {model} stands for a "
            f"configuration alone; for trained weights give --model FOLDER"
        )


class FolderWeights:
    """The safetensors of a Hugging Face folder, one file or several with an index.

    Reads what is asked for and nothing else: ``bytes_read`` counts it. A weight that the files have
    under another name or in parts, as most folders have experts, is made as transformers makes it.

    It is not torch's HuggingFaceStorageReader, which reads every safetensors file of a folder and
    no index: where two have one weight, as ``model.safetensors`` beside ``model.fp16.safetensors``,
    it takes either without a word. And it opens all files again for each call.

    Args:
        folder: of the model.
        config: of the model.

    Raises:
        ValueError: no safetensors in the folder, or an index that names files which are not there.
    """

    def __init__(self, folder: Path, config: PretrainedConfig) -> None:
        self.bytes_read = 0
        self._files = _files_of_weights(folder)
        self._folder, self._config = folder, config

    def fill(self, name: str, into: Tensor, rows: slice | None, module: Any) -> None:
        """See `WeightSource.fill`.

        Raises:
            ValueError: the files do not have it, or in another shape.
        """
        plain = self._plain_name(name)
        if plain is not None:
            found, shape = self._read(plain, rows)
        else:
            made = self._conversion.convert(name, lambda part: self._read(part)[0])
            found, shape = made if rows is None else made[rows], list(made.shape)
        wanted = list(into.shape) if rows is None else [module.vocab_size, *into.shape[1:]]
        if shape != wanted:
            raise ValueError(
                f"{self._folder}: {name} is {shape}, but the model wants {wanted}: its config.json "
                f"is of another model"
            )
        into.copy_(found)

    @cached_property
    def _conversion(self) -> Conversion:
        return Conversion(self._config, self._files)

    def _plain_name(self, name: str) -> str | None:
        """Return a weight's name in the files; None where it is made of several or of others.

        Raises:
            ValueError: the files do not have it in any form.
        """
        if name in self._files:
            return name
        stored = self._conversion.stored.get(name)
        if stored is None:
            raise ValueError(
                f"{self._folder} has no weight {name}: its config.json and its safetensors are "
                f"not of one model"
            )
        return stored.names[0] if stored.rule is None else None

    def _read(self, name: str, rows: slice | None = None) -> tuple[Tensor, list[int]]:
        """Return a stored weight, or those of the rows that it has; and its whole shape."""
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                stored = opened.get_slice(name)
                found = opened.get_tensor(name) if rows is None else stored[rows]
                shape = list(stored.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        self.bytes_read += found.nbytes
        return found, shape


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """Return the file of each weight, having opened each file once.

    Raises:
        ValueError: an index that is none, a file that is not there or cannot be read, or that has
            not the weights that the index says.
    """
    index, single = folder / _INDEX, folder / "model.safetensors"
    if not index.is_file():
        return dict.fromkeys(_names_in(single), single)
    files = _read_index(index)
    held = {(name, file) for file in sorted(set(files.values())) for name in _names_in(file)}
    missing = sorted(files.items() - held)
    if missing:
        name, file = missing[0]
        raise ValueError(f"{index} says that {file} has {name}, but it has not")
    return files


def _read_index(index: Path) -> dict[str, Path]:
    """Return the file of each weight that an index names.

    Raises:
        ValueError: it is not JSON, has no map of weights to files, or names a file outside of the
            folder. The folder's own files may be links to elsewhere, as a hub's cache makes them.
    """
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read: {error}") from error
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(
            f'{index} has no "weight_map" from weights to files: copy the folder again'
        )
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} says that {name} is in {file!r}, which is no file beside it")
    return {name: index.parent / file for name, file in names.items()}


def _names_in(file: Path) -> set[str]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a folder with safetensors weights")
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}; copy it again") from error
