"""Where a stage's weights come from: a seed, or a Hugging Face folder read slice by slice."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

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
        print(
            f"RANDOM WEIGHTS: there is no folder {model} here, and the name {model} stands for a "
            f"configuration alone; for trained weights give --model FOLDER",
            file=sys.stderr,
            flush=True,
        )


class FolderWeights:
    """The safetensors of a Hugging Face folder, one file or several with an index.

    Reads what is asked for and nothing else: ``bytes_read`` counts it. A weight that the files have
    under another name or in parts, as most folders have experts, is made as transformers makes it.

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

    def fill(self, name: str, into: Tensor, rows: slice | None, module: nn.Module) -> None:
        """See `WeightSource.fill`."""
        plain = self._plain_name(name)
        if plain is None:
            made = self._conversion.convert(name, self._read)
            _refuse_other_shape(self._folder, name, list(made.shape), list(into.shape), rows)
            into.copy_(made if rows is None else made[rows])
            return
        with self._opened(plain) as opened:
            stored = opened.get_slice(plain)
            shape = list(stored.get_shape())
            _refuse_other_shape(self._files[plain], name, shape, list(into.shape), rows)
            found: Tensor = opened.get_tensor(plain) if rows is None else stored[rows]
        self.bytes_read += found.nbytes
        into.copy_(found)

    def stored_rows(self, name: str) -> int:
        """Return how many rows a weight has in the files.

        Raises:
            ValueError: the files have no such weight, or have it in parts.
        """
        plain = self._plain_name(name)
        if plain is None:
            raise ValueError(f"{self._folder} has {name} in parts, which is not known here")
        with self._opened(plain) as opened:
            shape = opened.get_slice(plain).get_shape()
        return int(shape[0]) if shape else 0

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
        stored = self._conversion.stored(name)
        if stored is None:
            raise ValueError(
                f"{self._folder} has no weight {name}: its config.json and its safetensors are "
                f"not of one model"
            )
        return stored.names[0] if stored.rule is None else None

    def _read(self, name: str) -> Tensor:
        """Return a stored weight."""
        with self._opened(name) as opened:
            found: Tensor = opened.get_tensor(name)
        self.bytes_read += found.nbytes
        return found

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """Open the file of a stored weight."""
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _refuse_other_shape(
    origin: Path, name: str, shape: list[int], wanted: list[int], rows: slice | None
) -> None:
    """Raise ValueError where a weight is not what the model wants, or lacks the rows."""
    fits = shape == wanted
    if rows is not None:
        fits = shape[1:] == wanted[1:] and rows.stop <= shape[0]
    if not fits:
        raise ValueError(
            f"{origin}: {name} is {shape}, but the model wants "
            f"{wanted if rows is None else f'rows [{rows.start}, {rows.stop})'}"
            f" of {wanted[1:]}: its config.json is of another model"
        )


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """Return the file of each weight, having opened each file once.

    Raises:
        ValueError: an index that is none, a file that is not there or cannot be read, or that has
            not the weights that the index says.
    """
    index = folder / _INDEX
    if index.is_file():
        files = _read_index(index)
    else:
        return dict.fromkeys(_names_in(folder / "model.safetensors"), folder / "model.safetensors")
    for file in sorted(set(files.values())):
        named = {name for name, where in files.items() if where == file}
        missing = sorted(named - _names_in(file))
        if missing:
            raise ValueError(f"{index} says that {file} has {missing[0]}, but it has not")
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
