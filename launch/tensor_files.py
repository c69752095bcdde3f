"""Where a checkpoint's tensors lie in its files, as JSON, for torch.distributed.checkpoint.

torch keeps this in ``.metadata``, a pickle, which whoever wrote it can let execute anything on
being read. Here it is tensors.json, of names and numbers alone; ``.metadata`` is written besides,
for torch's own tools, and never read. The tensors themselves torch reads by
``torch.load(weights_only=True)``, and there is nothing but tensors.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from launch.checksums import checksum, write_synced

TENSORS = "tensors.json"
_TORCHS_OWN = ".metadata"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class CheckedWriter(FileSystemWriter):
    """Writes a folder's tensors and tensors.json, and knows the checksums of what it has written.

    Attributes:
        folder: that it writes.
        sums: of this rank's files, by name; complete when the save is. They are taken where the
            files are written, in the background.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.sums: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors.

        Raises:
            OSError: the disk does not take them. Of a full one torch says that a place in its file
                is unexpected, beside what the system says.
        """
        try:
            future = super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise
        files = {result.storage_data.relative_path for result in future.value()}
        self.sums = {file: checksum(self.folder / file) for file in sorted(files)}
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write where everything lies; one rank calls it."""
        super().finish(metadata, results)
        # torch 2.11 notes the places in a copy of the metadata.
        places = {one.index: one.storage_data for of_rank in results for one in of_rank}
        text = json.dumps(_as_json(metadata, places))
        self.sums[_TORCHS_OWN] = checksum(self.folder / _TORCHS_OWN)
        self.sums[TENSORS] = write_synced(self.folder / TENSORS, text)


class CheckedReader(FileSystemReader):
    """Reads a folder's tensors by tensors.json.

    Args:
        folder: a checkpoint, whose checksums have been compared.
        files: those that may be read, by their names in it.

    Raises:
        ValueError: tensors.json is not of this format, or names another file.
    """

    def __init__(self, folder: Path, files: Collection[str]) -> None:
        super().__init__(folder)
        if TENSORS not in files:
            raise ValueError(f"{folder} has no {TENSORS}, or no checksum of it")
        try:
            document = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
            self._metadata = _from_json(document, files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / TENSORS} cannot be read: {error!r}") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what tensors.json says."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def _as_json(metadata: Metadata, places: Mapping[MetadataIndex, Any]) -> dict[str, Any]:
    """Return {name: {dtype, size, parts}}, a part being [offsets, sizes, file, byte, bytes]."""
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # nothing else is saved
        parts = []
        for chunk in tensor.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            where = [place.relative_path, place.offset, place.length]
            parts.append([list(chunk.offsets), list(chunk.sizes), *where])
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(tensor.size), "parts": parts}
    return tensors


def _from_json(document: Any, files: Collection[str]) -> Metadata:
    """Read what `_as_json` made.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is something else; or a tensor's parts
            are not the whole of it.
    """
    tensors: dict[str, Any] = {}
    places = {}
    for name, tensor in document.items():
        size = _sizes(tensor["size"])
        chunks = []
        for offsets, sizes, file, byte, length in tensor["parts"]:
            if file not in files:
                raise ValueError(f"{name} is said to be in {file!r}, of which there is no checksum")
            chunk = ChunkStorageMetadata(_sizes(offsets), _sizes(sizes))
            chunks.append(chunk)
            places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(file, *_sizes([byte, length]))
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
            raise ValueError(f"the parts of {name} are not the whole of it")
        properties = TensorProperties(dtype=_DTYPES[tensor["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, size, chunks)
    return Metadata(tensors, storage_data=places)


def _sizes(values: Any) -> torch.Size:
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{values!r} are not sizes")
    return torch.Size(values)
