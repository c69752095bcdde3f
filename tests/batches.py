"""Batches of documents, or of ids, by way of the files that a run reads."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from launch.data.batches import Batches
from launch.data.store import Tokens, make_tokens
from launch.data.tokenizers import Document


def tokens_of(documents: Iterable[Document]) -> Tokens:
    """Keep documents as a run does; the files are gone from their folder when it returns."""
    with tempfile.TemporaryDirectory() as folder:
        return make_tokens(Path(folder) / "tokens", documents)


def batches_of_documents(
    documents: Iterable[Document], *, steps: int, batch: int, sequence: int, packed: bool
) -> Batches:
    return Batches(tokens_of(documents), steps, batch, sequence, packed)


def batches_of_ids(ids: Tensor) -> Batches:
    """Return the batches that ids [steps, batch, T] are."""
    return Batches(tokens_of([Document(ids.flatten().tolist())]), *ids.shape)
