"""Whatever ``--text`` names, as the batches of a run."""

import hashlib
import json
import os
import sys
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from launch.arguments import DataArguments
from launch.command import raised_on_all
from launch.data.batches import Batches
from launch.data.documents import documents_of, read_ids, validate_ids
from launch.data.sources import Source, find_source
from launch.data.store import Tokens, make_tokens, open_tokens
from launch.data.tokenizers import TextTokenizer, load_tokenizer
from stage_groups import build_host_group

_FORMAT = 2  # of a folder of tokens: another number makes them anew
_MAKING = timedelta(days=2)  # that ranks wait for the one that makes tokens


def load_batches_on_all(arguments: DataArguments, **given: Any) -> Batches:
    """Call `load_batches` on all ranks, the tokens made by one rank of those that share a disk.

    All ranks call it. They wait for the one that makes the tokens as long as it takes.

    Raises:
        UserError: as `load_batches`, or ranks of two machines found two texts.
    """
    group, batches = _waiting_group(), None
    for turn in (dist.get_rank() == 0, os.environ.get("LOCAL_RANK", "0") == "0", True):
        with raised_on_all(group):
            if turn and batches is None:
                batches = load_batches(arguments, **given)
    assert batches is not None
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, batches.tokens.digest, group=group)
    with raised_on_all():
        if len(set(digests)) > 1:
            raise ValueError(
                f"{given.get('option', '--text')} {arguments.text} is not the same on all "
                f"machines: copy it, and the tokenizer, from one to the others"
            )
    return batches


@cache
def _waiting_group() -> ProcessGroup:
    """Create the group in which ranks wait for tokens, once: every text is waited for in it."""
    return build_host_group(_MAKING)


def load_batches(
    arguments: DataArguments,
    *,
    steps: int,
    batch: int,
    sequence: int,
    vocabulary: int,
    model: str | None = None,
    option: str = "--text",
    seed: int | None = None,
    once: bool = False,
) -> Batches:
    """Open a text's tokens in ``--cache``, which are made where they are not there.

    Args:
        arguments: what to read, and with which tokenizer.
        steps, batch, sequence: the shape of the result.
        vocabulary: every id must be below it.
        model: a folder, whose tokenizer is used, a published name, or None.
        option: of the command line, by which messages name the text.
        seed: of the order of the sequences; None is the text's.
        once: whether no sequence is read again: fewer steps, where the text ends before.

    Raises:
        ValueError: what cannot be read, no tokenizer, fewer tokens than one batch, or an id that
            the vocabulary does not have, or nothing that counts for the loss.
    """
    source = find_source(arguments.text, option)
    packed = arguments.packed == "yes" or (arguments.packed == "auto" and source.kind == "entries")
    tokenizer = None
    if source.kind != "ids":
        tokenizer = load_tokenizer(arguments.tokenizer, model)
    elif arguments.packed == "yes":
        raise ValueError(f"{source.name} has ids without documents: leave --packed out")
    else:
        validate_ids(source, sequence)
    tokens = _find_or_make(source, arguments, tokenizer)
    if len(tokens) < batch * sequence:
        raise ValueError(
            f"the text has {len(tokens)} tokens, fewer than one batch of {batch} x {sequence} = "
            f"{batch * sequence}: give more text, or a smaller --batch or --sequence"
        )
    if tokens.low < 0 or tokens.high >= vocabulary:
        by = source.name if tokenizer is None else tokenizer.name
        of = "--vocabulary" if model is None else f"the vocabulary of --model {model}"
        found = tokens.low if tokens.low < 0 else tokens.high
        raise ValueError(
            f"{by} has the id {found}, but {of} is {vocabulary}: give a text or a "
            f"tokenizer that is made for it"
        )
    if once:
        steps = min(steps, len(tokens) // sequence // batch)
    batches = Batches(tokens, steps, batch, sequence, packed, seed)
    if not batches.counts_any:
        raise ValueError(
            f"{source.name}: no token of what is read counts for the loss, {len(tokens)} tokens: "
            f"give text with more than one token a document, conversations that an assistant "
            f"answers within --sequence, or --chat-labels all"
        )
    return batches


def _find_or_make(
    source: Source, arguments: DataArguments, tokenizer: TextTokenizer | None
) -> Tokens:
    folder = arguments.cache / _key(source, arguments, tokenizer)
    tokens = open_tokens(folder)
    if tokens is not None:
        return tokens
    print(f"{source.name}: its tokens are made once, in {folder}", file=sys.stderr, flush=True)
    if tokenizer is None:
        return make_tokens(folder, read_ids(source))
    return make_tokens(folder, documents_of(source, arguments, tokenizer))


def _key(source: Source, arguments: DataArguments, tokenizer: TextTokenizer | None) -> str:
    """Return a name for all that a text's tokens hang on; its files are not read."""
    files = [
        one
        for file in source.files
        for one in (sorted(file.rglob("*")) if source.saved else [file])
    ]
    states = [(str(file.resolve()), file.stat()) for file in files]
    key: dict[str, Any] = {
        "format": _FORMAT,
        "files": [(name, state.st_size, state.st_mtime_ns) for name, state in states],
    }
    if tokenizer is not None:
        key["tokenizer"] = tokenizer.content
        key |= {name: getattr(arguments, name) for name in ("packed", "text_field", "chat_labels")}
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
