"""A source's documents as token ids."""

from collections.abc import Iterator, Mapping
from typing import Any

from launch.arguments import DataArguments
from launch.data.sources import Source, read_entries, read_texts
from launch.data.tokenizers import Document, TextTokenizer


def documents_of(
    source: Source, arguments: DataArguments, tokenizer: TextTokenizer
) -> Iterator[Document]:
    """Encode a source, as far as it is asked for; what has no tokens is left out.

    An entry's text ends with the tokenizer's end of a text, where it has one; a conversation as its
    template ends it; plain text, of which a file is a part, only where it is packed.

    Raises:
        ValueError: what cannot be read, an entry without text, or a conversation that the
            tokenizer has no template for.
    """
    if source.kind == "text":
        for text in read_texts(source):
            if text:
                ids = tokenizer.encode(text)
                yield _ended(ids, tokenizer) if arguments.packed == "yes" else Document(ids)
        return
    for number, entry in enumerate(read_entries(source)):
        try:
            document = _encode_entry(entry, arguments, tokenizer)
        except ValueError as error:
            raise ValueError(f"entry {number} of {source.name}: {error}") from error
        if document is not None:
            yield document


def _encode_entry(
    entry: Mapping[str, Any], arguments: DataArguments, tokenizer: TextTokenizer
) -> Document | None:
    field = arguments.text_field
    if field == "text" and entry.get(field) is None and entry.get("messages") is not None:
        field = "messages"
    if field not in entry:
        raise ValueError(
            f"its columns are {sorted(entry)}, without {field!r}: name the text's column with "
            f"--text-field"
        )
    found = entry[field]
    if found is None or found in ("", []):
        return None
    if isinstance(found, str):
        return _ended(tokenizer.encode(found), tokenizer)
    if isinstance(found, list) and all(_is_message(one) for one in found):
        # Where messages differ in what they have, a column gives all of them all of it.
        messages = [{k: v for k, v in one.items() if v is not None} for one in found]
        tools = entry.get("tools") or None
        return tokenizer.encode_chat(messages, tools, arguments.chat_labels == "assistant")
    raise ValueError(
        f"its {field!r} is neither a text nor a list of messages with role and content, but "
        f"{str(found)[:60]!r}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def _ended(ids: list[int], tokenizer: TextTokenizer) -> Document:
    if tokenizer.end is not None and (not ids or ids[-1] != tokenizer.end):
        ids = [*ids, tokenizer.end]
    return Document(ids)
