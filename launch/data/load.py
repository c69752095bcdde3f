"""Whatever ``--text`` names, as the batches of a run."""

import numpy as np

from launch.arguments import DataArguments
from launch.data.batches import Batches, batches_of_documents, batches_of_ids
from launch.data.documents import documents_of
from launch.data.sources import Source, find_source
from launch.data.tokenizers import load_tokenizer


def load_batches(
    arguments: DataArguments,
    *,
    steps: int,
    batch: int,
    sequence: int,
    vocabulary: int,
    model: str | None = None,
    option: str = "--text",
) -> Batches:
    """Read text or token ids, no more than is needed; what is too short for all steps is repeated.

    Args:
        arguments: what to read, and with which tokenizer.
        steps, batch, sequence: the shape of the result.
        vocabulary: every id must be below it.
        model: a folder, whose tokenizer is used, a published name, or None.
        option: of the command line, by which messages name the text.

    Raises:
        ValueError: what cannot be read, no tokenizer, fewer tokens than one batch, or an id that
            the vocabulary does not have, or nothing that counts for the loss.
    """
    source = find_source(arguments.text, option)
    shape = {"steps": steps, "batch": batch, "sequence": sequence}
    if source.kind == "ids":
        batches, by = _read_ids(source, arguments, shape), source.name
    else:
        tokenizer = load_tokenizer(arguments.tokenizer, model)
        packed = arguments.packed == "yes" or (
            arguments.packed == "auto" and source.kind == "entries"
        )
        documents = documents_of(source, arguments, tokenizer)
        batches, by = batches_of_documents(documents, **shape, packed=packed), tokenizer.name
    _check_range(batches, by, vocabulary, model)
    if not batches.counts_any:
        raise ValueError(
            f"{source.name}: no token of what is read counts for the loss, {batches.ids.numel()} "
            f"tokens: give text with more than one token a document, conversations that an "
            f"assistant answers within --sequence, or --chat-labels all"
        )
    return batches


def _check_range(batches: Batches, by: str, vocabulary: int, model: str | None) -> None:
    low, high = int(batches.ids.min()), int(batches.ids.max())
    if low < 0 or high >= vocabulary:
        has = f"{by} has the id {low if low < 0 else high}"
        if model is None:
            raise ValueError(f"{has}, but --vocabulary is {vocabulary}")
        raise ValueError(
            f"{has}, but the vocabulary of --model {model} is {vocabulary}: they are not made for "
            f"one another"
        )


def _read_ids(source: Source, arguments: DataArguments, shape: dict[str, int]) -> Batches:
    if arguments.packed == "yes":
        raise ValueError(f"{source.name} has ids without documents: leave --packed out")
    try:
        ids = np.load(source.files[0], mmap_mode="r", allow_pickle=False)
        if not isinstance(ids, np.ndarray):
            raise ValueError("expected one array (.npy), got an archive of arrays (.npz)")
        return batches_of_ids(ids, **shape)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{source.name}: {error}") from error
