"""Where a run reads: its order, its place, and the files that its tokens lie in."""

import functools
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launch import training
from launch.arguments import DataArguments, TrainArguments
from launch.command import UserError
from launch.data import load
from launch.data.batches import Batches
from launch.data.order import shuffled
from launch.data.sources import find_source, read_texts
from launch.data.store import Tokens, make_tokens
from launch.data.tokenizers import Document, FolderTokenizer, QwenTokenizer
from launch.training_pipeline import Pipeline
from tests.ranks import run_ranks
from tests.small_tokenizer import CHAT, write_tokenizer

SEQUENCE = 8


def load_ids(folder: Path, ids: np.ndarray, **given: Any) -> Batches:
    np.save(folder / "ids.npy", ids)
    arguments = DataArguments(text=folder / "ids.npy", cache=folder / "cache")
    shape = {"steps": 1, "batch": 1, "sequence": SEQUENCE, "vocabulary": 2**31} | given
    return load.load_batches(arguments, **shape)


def test_a_short_text_is_scored_once(tmp_path: Path) -> None:
    """A run reads five sequences again and again; an evaluation ends with their last batch."""
    ids = np.arange(5 * SEQUENCE)
    assert len(load_ids(tmp_path, ids, steps=8, batch=2)) == 8
    scored = load_ids(tmp_path, ids, steps=8, batch=2, once=True)
    read = torch.cat([batch.ids.flatten() for batch in scored])
    assert read.tolist() == list(range(4 * SEQUENCE))


def test_order() -> None:
    """A permutation of every count, another one for each seed and epoch, without a pattern."""
    for count in (1, 2, 3, 5, 16, 17, 1000, 65_537):
        found = shuffled(np.arange(count), count, 1, 0)
        assert sorted(found.tolist()) == list(range(count))
        parts = [shuffled(part, count, 1, 0) for part in np.array_split(np.arange(count), 3)]
        assert np.concatenate(parts).tolist() == found.tolist(), "a place at a time"
    orders = [shuffled(np.arange(1000), 1000, *of) for of in ((1, 0), (1, 1), (2, 0), (-1, 0))]
    for index, order in enumerate(orders):
        for other in (np.arange(1000), *orders[:index]):
            # Uniform: 1 in 1000 stays where it was, and neighbours are far from one another.
            assert np.sum(order == other) < 12
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.2
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.2
    many = shuffled(np.arange(1000), 10**13, 0, 0)  # of a text that no memory has
    assert len(set(many.tolist())) == 1000
    assert 4e12 < many.mean() < 6e12


def test_another_mesh_and_batch(tmp_path: Path) -> None:
    """2 columns and batches of 16, then 3 and 24: what one uninterrupted reader reads, in order."""
    sequences = 40
    ids = np.arange(sequences * SEQUENCE + 5)  # the rest fills no sequence
    given = {"steps": 6, "batch": 16, "seed": 3}
    whole = load_ids(tmp_path, ids, **given)

    def read(batches: Batches, columns: int, steps: range) -> list[list[int]]:
        parts = [batches.part(s, c, columns) for s in steps for c in range(columns)]
        return [row for part in parts for row in part.ids.tolist()]

    expected = read(whole, 1, range(6))
    first = read(whole, 2, range(3))
    resumed = replace(whole, batch=24, begins=(3, whole.read_before(3)))
    assert resumed.read_before(5) == whole.read_before(6) == 96 * SEQUENCE
    assert first + read(resumed, 3, range(3, 5)) == expected
    rows = ids[: sequences * SEQUENCE].reshape(sequences, SEQUENCE).tolist()
    for epoch in (expected[:40], expected[40:80]):
        assert sorted(epoch) == rows, "each once an epoch"
        assert epoch != rows
    assert expected[:40] != expected[40:80]
    assert set(Counter(map(tuple, expected)).values()) == {2, 3}
    assert read(replace(whole, seed=None), 1, range(2)) == rows[:32]
    assert read(replace(whole, seed=4), 1, range(2)) != expected[:32]


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while text, tokenizer and settings are the same; never half of them."""
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("the quick brown fox jumps over the lazy dog")
    made: list[Path] = []
    make = load.make_tokens

    def counted(folder: Path, documents: Any) -> Tokens:
        made.append(folder)
        return make(folder, documents)

    monkeypatch.setattr(load, "make_tokens", counted)

    def opened(**given: Any) -> Batches:
        arguments = DataArguments(text=text, cache=cache, **given)
        return load.load_batches(arguments, steps=1, batch=1, sequence=4, vocabulary=151_936)

    first = opened()
    cache.chmod(0o500)  # only looked at
    assert opened().tokens.digest == first.tokens.digest
    assert len(made) == 1
    cache.chmod(0o700)
    assert opened(packed="yes").tokens.digest != first.tokens.digest
    text.write_text("the quick brown fox jumps over the lazy cat")
    os.utime(text, (1, 1))
    assert opened().tokens.digest != first.tokens.digest
    assert len(made) == 3

    text.write_text("and another text that was never read before this")
    monkeypatch.setattr(load, "documents_of", lambda *_: iter([1 / 0]))
    with pytest.raises(ZeroDivisionError):
        opened()
    assert not list(cache.glob("*.partial")), "nothing is left of it"
    monkeypatch.undo()
    made[0].with_suffix(".partial").mkdir()  # what a killed run has left is in nobody's way
    tokens = opened().tokens
    files = {folder: folder / "tokens.arrow" for folder in cache.iterdir() if folder.is_dir()}
    for file in filter(Path.is_file, files.values()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is damaged: .*; delete it, to have it made again"):
        opened()
    del tokens
    cache = text / "below a file"
    with pytest.raises(ValueError, match=r"--cache .*below a file cannot be written to"):
        opened()


@pytest.mark.parametrize("built_in", [True, False])
def test_threads_do_not_show(
    built_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many encode, and however much each gets at a time: the same tokens and their key."""
    monkeypatch.setattr("launch.data.sources._PIECE", 200)
    write_tokenizer(tmp_path / "tokenizer", begins=True)
    (tmp_path / "a.txt").write_text(Path(__file__).read_text())
    entries = [json.dumps({"text": line}) for line in Path(__file__).read_text().splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join(entries))
    for text in (tmp_path / "a.txt", tmp_path / "a.jsonl"):
        found = set()
        for threads, characters in ((1, 1), (1, 2**23), (8, 1000), (8, 2**23)):
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", str(threads > 1).lower())
            pool = functools.partial(ThreadPoolExecutor, threads)
            monkeypatch.setattr("launch.data.tokenizers.ThreadPoolExecutor", pool)
            monkeypatch.setattr("launch.data.documents._ENCODED", characters)
            arguments = DataArguments(
                text=text,
                cache=tmp_path / f"{text.name}-{threads}-{characters}",
                tokenizer=None if built_in else tmp_path / "tokenizer",
            )
            shape: dict[str, Any] = {"steps": 1, "batch": 1, "sequence": SEQUENCE}
            tokens = load.load_batches(arguments, vocabulary=151_936, **shape).tokens
            (folder,) = arguments.cache.glob("*/tokens.arrow")
            starts = int(tokens.read(0, len(tokens))[1].sum())
            found.add((tokens.digest, len(tokens), starts, folder.parent.name))
        ((_, length, starts, _),) = found
        assert length > 3000
        assert starts > 50


def test_a_tokenizer_that_changes_makes_tokens_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name, and however it came to be another one."""
    contents = []
    for given in ({}, {"begins": True}, {"chat": CHAT}):
        write_tokenizer(tmp_path, **given)
        contents.append(FolderTokenizer(tmp_path, "").content)
        assert FolderTokenizer(tmp_path, "").content == contents[-1]
    config = tmp_path / "tokenizer_config.json"
    # Both tokens are in the vocabulary already; a template may write either.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "</s>"}))
    contents.append(FolderTokenizer(tmp_path, "").content)
    assert len(set(contents)) == 4
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1}))
    (slow / "merges.txt").write_text("#version: 0.2\n")
    for more in ({}, {"added_tokens_decoder": {"2": {"content": "zed"}}}):
        text = json.dumps({"tokenizer_class": "CTRLTokenizer", "unk_token": "<unk>"} | more)
        (slow / "tokenizer_config.json").write_text(text)
        tokenizer = FolderTokenizer(slow, "")
        assert tokenizer.encode(["a zed"]) == ([[1, 2]] if more else [[1, 0, 0, 0]])
        assert tokenizer.content not in contents
        contents.append(tokenizer.content)
    (tmp_path / "README.md").write_text("about it")
    assert FolderTokenizer(tmp_path, "").content == contents[3]
    built_in = QwenTokenizer()
    before = built_in.content
    built_in.encode(["the quick brown fox"])
    assert QwenTokenizer().content == built_in.content == before


def test_a_maker_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait as long as its file grows; with its process ends its lock."""
    folder = tmp_path / "tokens"
    lock = folder.with_suffix(".lock")
    hold = (
        "import sys, time; from pathlib import Path; from launch.disk import lock_folder; "
        "held = lock_folder(Path(sys.argv[1]), ''); print('held', flush=True); time.sleep(60)"
    )
    lock.mkdir()
    monkeypatch.setattr("launch.data.store._STILL", 0.5)
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=PIPE) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"held\n"
        words = rf"tokens.lock is in use by another run, process {maker.pid} on .*; it has written"
        try:
            with pytest.raises(ValueError, match=words):
                make_tokens(folder, [Document([1, 2, 3])])
        finally:
            maker.kill()
    tokens = make_tokens(folder, [Document([1, 2, 3])])
    assert tokens.read(0, 3)[0].tolist() == [1, 2, 3]


def test_a_long_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end where lines do, and have the ids of the whole; a wrong byte is found in any."""
    monkeypatch.setattr("launch.data.sources._PIECE", 1000)
    # No token holds the end of a line and what follows, but where the next begins with a space.
    text = "\n".join(Path(__file__).read_text().split()) + "\n"
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_texts(find_source(tmp_path / "a.txt")))
    assert len(pieces) > 5
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    encode = QwenTokenizer().encode
    (whole,) = encode([text])
    assert [token for ids in encode(pieces) for token in ids] == whole
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"word\n" * 40_000 + b"\xff")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 0xff at 200003\)"):
        list(read_texts(find_source(tmp_path / "a.txt")))


def resident() -> int:
    """Return the bytes that this process holds, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts it")
def test_memory(tmp_path: Path) -> None:
    """A text of 136 MB of tokens, read from its first to its last, holds no more than one of 1."""
    held = []
    for tokens in (2**18, 2**25):
        ids = np.arange(tokens, dtype=np.int32)
        load_ids(tmp_path, ids)  # is made
        del ids
        before = resident()
        batches = load_ids_again(tmp_path, tokens)
        steps = range(len(batches))
        peak = 0
        for step in steps:
            assert int(batches[step].ids.sum()) >= 0
            peak = max(peak, resident())
        held.append(peak - before)
    assert held[1] - held[0] < 16 * 2**20, held


def load_ids_again(folder: Path, tokens: int) -> Batches:
    arguments = DataArguments(text=folder / "ids.npy", cache=folder / "cache")
    shape = {"batch": 16, "sequence": 4096, "vocabulary": 2**31, "seed": 0}
    return load.load_batches(arguments, steps=tokens // (16 * 4096), **shape)


def check_what_one_rank_finds(arguments: TrainArguments) -> None:
    """The tokens' maker fails, or a machine has another text: every rank says it."""
    shape = {"steps": 1, "batch": 1, "sequence": SEQUENCE, "vocabulary": 320}
    found, rank = load.load_batches_on_all(arguments, **shape), dist.get_rank()

    def full(*_: Any, **__: Any) -> Batches:
        raise ValueError("the disk is full")

    def other(*_: Any, **__: Any) -> Batches:
        return replace(found, tokens=replace(found.tokens, digest=str(rank)))

    for patched, words in ((full, "the disk is full"), (other, "ids.npy is not the same on all")):
        with pytest.MonkeyPatch.context() as patch:
            if patched is other or rank == 0:
                patch.setattr(load, "load_batches", patched)
            with pytest.raises(UserError, match=words):
                load.load_batches_on_all(arguments, **shape)


def check_start(folder: str, vocab: int, batch: int, steps: int, first: int) -> None:
    """Run launch.train, and keep the ids that each column has read."""
    arguments = TrainArguments(
        pipeline=1, vocab=vocab, microbatches=8, batch=batch, sequence=SEQUENCE, steps=steps,
        vocabulary=320, hidden=32, layers=1, seed=5, text=Path(folder) / "ids.npy", timeout=25.0,
        cache=Path(folder) / "cache", out=Path(folder) / "out", resume=first > 0,
        checkpoint=Path(folder) / "kept",
    )  # fmt: skip
    read: list[list[int]] = []
    column_of = Pipeline.column_of

    def recorded(pipeline: Pipeline, batches: Batches, step: int) -> Any:
        own = column_of(pipeline, batches, step)
        read.extend(own.ids.tolist())
        return own

    cpu = torch.device("cpu")
    check_what_one_rank_finds(arguments)
    if first:
        words = rf"step-00000{first} is of a run whose batch is 16, .* is {batch}; .*--new-batch"
        with pytest.raises(UserError, match=words):
            training.run(arguments, cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "column_of", recorded)
        assert training.run(replace(arguments, new_batch=bool(first)), cpu)
    assert len(read) == (steps - first) * batch // vocab
    (Path(folder) / f"read-{vocab}-{dist.get_rank()}.json").write_text(json.dumps(read))


def test_a_run_goes_on_with_another_mesh_and_batch(tmp_path: Path) -> None:
    """Real ranks, V = 2 and then V = 3: the sequences of an uninterrupted run, each once."""
    ids = np.arange(320)
    whole = load_ids(tmp_path, ids, steps=6, batch=16, seed=5)
    for vocab, batch, steps, first in ((2, 16, 3, 0), (3, 24, 5, 3)):
        run_ranks(
            check_start, vocab, folder=str(tmp_path), vocab=vocab, batch=batch, steps=steps,
            first=first,
        )  # fmt: skip
    files = sorted(tmp_path.glob("read-*.json"))
    assert len(files) == 5
    found = Counter(tuple(row) for file in files for row in json.loads(file.read_text()))
    assert found == Counter(tuple(row) for one in whole for row in one.ids.tolist())
    assert set(found.values()) == {2, 3}  # 96 sequences of 40
    saved = json.loads((tmp_path / "kept" / "step-000005" / "run.json").read_text())
    assert (saved["tokens_read"], saved["batch"]) == (96 * SEQUENCE, 24)
