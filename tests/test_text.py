"""What a run reads: tokenizers, text and data sets, token ids, and the labels of conversations."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from launch.arguments import DataArguments, EvaluateArguments, TrainArguments
from launch.configs import known_positions, load_config, say_beyond_positions
from launch.data.batches import IGNORED, Batches
from launch.data.load import load_batches
from launch.data.tokenizers import Document, QwenTokenizer, save_tokenizer
from launch.planning.shape import ModelShape
from launch.weights import RandomWeights, say_random
from tests.batches import batches_of_documents
from tests.small_tokenizer import BEGIN, CHAT, END, UNMARKED_CHAT, WORDS, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


KEPT: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tokens in a folder of the test's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setitem(KEPT, "cache", folder)
    return folder


def ids_of(batches: Batches) -> list[int]:
    return [token for one in batches for token in one.ids.flatten().tolist()]


def write_config(folder: Path, family: str, **given: Any) -> Path:
    AutoConfig.for_model(family, **SIZES | given).save_pretrained(folder)
    return folder


def load(text: Path, model: Path | None, **given: Any) -> Batches:
    """Load one batch of 2 x 8 ids of a vocabulary of 300, or as it is said."""
    shape = {"steps": 1, "batch": 2, "sequence": 8, "vocabulary": 300}
    shape |= {name: given.pop(name) for name in list(given) if name in shape}
    arguments = DataArguments(text=text, **KEPT, **given)
    return load_batches(arguments, **shape, model=None if model is None else str(model))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    (tmp_path / "plain.txt").write_text(WORDS * 4)
    return tmp_path / "plain.txt"


@pytest.mark.parametrize(
    ("family", "begins"), [("llama", True), ("gemma2", True), ("qwen3", False)]
)
def test_a_folders_own_tokenizer(family: str, begins: bool, plain: Path, tmp_path: Path) -> None:
    folder = write_config(tmp_path / family, family)
    with pytest.raises(ValueError, match=rf"{family} has no tokenizer: give --tokenizer FOLDER"):
        load(plain, folder)  # Qwen's and Gemma's classes would make an empty one
    write_tokenizer(folder, begins=begins)
    expected = AutoTokenizer.from_pretrained(folder)(plain.read_text()).input_ids[:16]
    assert (expected[0] == BEGIN) == begins
    found = load(plain, folder)
    assert found[0].ids.flatten().tolist() == expected
    assert found[0].for_stages() == {}
    assert expected != QwenTokenizer().encode([plain.read_text()])[0][:16]

    other = tmp_path / "other"
    write_tokenizer(other, begins=not begins)
    assert load(plain, folder, tokenizer=other)[0].ids.tolist() != found[0].ids.tolist()
    with pytest.raises(ValueError, match="has the id") as raised:
        load(plain, folder, vocabulary=100)
    assert f"the tokenizer of {folder} has the id 2" in str(raised.value)
    assert f"the vocabulary of --model {folder} is 100" in str(raised.value)
    assert "--vocabulary" not in str(raised.value)


def test_the_built_in_tokenizer(plain: Path, tmp_path: Path) -> None:
    """Qwen's ids for a Qwen; for another published model none; exported, it says the same."""
    ids = load(plain, None, vocabulary=151_936)[0].ids
    assert ids.flatten().tolist() == QwenTokenizer().encode([plain.read_text()])[0][:16]
    with pytest.raises(
        ValueError, match=r"the built-in Qwen tokenizer has the id .* --vocabulary is"
    ):
        load(plain, None, vocabulary=10)
    for_qwen = load_batches(
        DataArguments(text=plain, **KEPT), steps=1, batch=2, sequence=8, vocabulary=151_936,
        model="qwen3-8b",
    )  # fmt: skip
    assert torch.equal(for_qwen[0].ids, ids)
    with pytest.raises(ValueError, match=r"llama-3.1-8b brings no tokenizer"):
        load(plain, Path("llama-3.1-8b"), vocabulary=128_256)
    save_tokenizer(None, None, tmp_path / "exported")
    again = AutoTokenizer.from_pretrained(tmp_path / "exported")
    for text in (
        WORDS,
        Path(__file__).read_text(),
        "Å ångström ①  naïve 日本語 e\u0301 <|endoftext|> 12345\r\n\r\n  x",
    ):
        assert [again(text).input_ids] == QwenTokenizer().encode([text])
    assert again.eos_token_id == QwenTokenizer().end


def test_no_code_of_a_folder_runs(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    write_tokenizer(folder)
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Mine: ...\n")
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(ValueError, match=r"the tokenizer of .*custom cannot be read"):
        load(plain, None, tokenizer=folder)
    assert not ran.exists()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="give --tokenizer a folder that has one"):
        load(plain, None, tokenizer=folder)


def test_a_folder_wins_over_a_published_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, folder = load_config("Qwen3-1.7B")
    assert (config.hidden_size, folder) == (2048, None)
    assert ModelShape.load("Qwen3-1.7B").hidden == 2048
    say_random("Qwen3-1.7B", RandomWeights(0, 0.02))
    assert "RANDOM WEIGHTS: there is no folder Qwen3-1.7B here" in capsys.readouterr().err
    say_random(None, RandomWeights(0, 0.02))  # a model of sizes has no trained weights
    assert capsys.readouterr().err == ""

    write_config(tmp_path / "Qwen3-1.7B", "qwen3")
    config, folder = load_config("Qwen3-1.7B")
    assert (config.hidden_size, folder) == (32, Path("Qwen3-1.7B"))
    assert ModelShape.load("Qwen3-1.7B").hidden == 32
    for read in (load_config, ModelShape.load):
        with pytest.raises(ValueError, match=r"hf download Qwen/Qwen3-8B --local-dir Qwen3-8B`"):
            read("Qwen/Qwen3-8B")
        (tmp_path / "qwen3-8b").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"--model qwen3-8b has no config.json"):
            read("qwen3-8b")


TEXTS = [f"the lazy dog {'jumps ' * (number % 3)}{number}" for number in range(8)]


def test_plain_text(tmp_path: Path) -> None:
    """One stream of files in order, repeated where it is short; packed, a file is a document."""
    (tmp_path / "b.txt").write_text("one two three four five six seven eight nine ten")
    (tmp_path / "a.txt").write_text("alpha beta gamma")
    given: dict[str, Any] = {"vocabulary": 151_936, "batch": 1, "sequence": 3}
    folder = load(tmp_path, None, **given | {"steps": 3, "sequence": 4})
    assert (len(folder), folder[0].ids.shape) == (3, (1, 4))
    alone = load(tmp_path / "a.txt", None, **given)
    assert ids_of(folder)[:3] == ids_of(alone)
    assert torch.equal(folder[0].labels, folder[0].ids)
    assert folder[0].for_stages() == {}
    repeated = load(tmp_path / "a.txt", None, **given | {"steps": 2})
    assert repeated[0].ids.tolist() == repeated[1].ids.tolist()
    packed = load(tmp_path, None, **given | {"sequence": 8}, packed="yes")
    end = QwenTokenizer().end
    assert packed[0].ids[0, 3] == end
    assert packed[0].labels[0, 4] == IGNORED
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than one batch of 1 x 99 = 99"):
        load(tmp_path, None, **given | {"sequence": 99})


def test_data_sets_are_read_alike(tmp_path: Path) -> None:
    """Lines, an array, compressed, parquet, saved, and a folder of splits: the same batches."""
    import datasets

    datasets.disable_progress_bars()
    write_tokenizer(tmp_path / "tokenizer")
    entries = [{"text": text, "other": "x"} for text in [None, "", *TEXTS]]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    made = datasets.Dataset.from_list(entries)
    folder = tmp_path / "published"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# A data set")
    (folder / ".gitattributes").write_text("x")
    datasets.Dataset.from_list([{"text": "held out"}] * 20).to_parquet(
        folder / "data/test-0.parquet"
    )
    made.to_parquet(folder / "data" / "train-0.parquet")
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=made, test=made.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))

    encode = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    documents = [[*encode(text).input_ids, END] for text in TEXTS]
    expected = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    given: dict[str, Any] = {"tokenizer": tmp_path / "tokenizer", "steps": 2, "sequence": 20}
    for name in ("a.jsonl", "a.json", "a.json.gz", "a.parquet", "saved", "splits", "published"):
        found = load(tmp_path / name, None, **given)
        assert ids_of(found) == expected[:80], name
        begun = [p == 0 for one in found for p in one.for_stages()["position_ids"].flatten()]
        assert np.flatnonzero(begun).tolist() == sorted(
            {*(s for s in starts.tolist() if s < 80), 0, 20, 40, 60}
        ), name
    stream = load(tmp_path / "a.jsonl", None, **given, packed="no")
    assert stream[0].for_stages() == {}
    assert ids_of(stream) == expected[:80]
    other = load(tmp_path / "a.jsonl", None, **given | {"sequence": 4}, text_field="other")
    assert other[0].ids[0].tolist() == [*encode("x").input_ids, END] * 2


def test_refused_sources(plain: Path, tmp_path: Path) -> None:
    def refused(match: str, text: Path, **given: Any) -> None:
        write_tokenizer(tmp_path / "tokenizer")
        with pytest.raises(ValueError, match=match):
            load(text, None, tokenizer=tmp_path / "tokenizer", **given)

    def written(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    refused(r"nowhere does not exist: --text takes UTF-8 text, \.jsonl", tmp_path / "nowhere")
    refused(r"photo\.txt is not UTF-8 text \(byte 0xff at 0\)", written("photo.txt", b"\xff\xd8"))
    refused(r"zero\.txt is binary, not text", written("zero.txt", b"a\0b"))
    refused(r"a\.gz is not UTF-8 text", written("a.gz", gzip.compress(b"text")))
    (tmp_path / "empty").mkdir()
    refused("is a folder without files", tmp_path / "empty")
    written("mixed/a.jsonl", '{"text": "a"}')
    written("mixed/b.txt", "b")
    refused(r"has a data set's a\.jsonl and other files, such as b\.txt", tmp_path / "mixed")
    refused(r"a\.jsonl cannot be read", written("a.jsonl", "this is no JSON\n"))
    refused(r"a\.parquet cannot be read", written("a.parquet", b"PAR1 and no more"))
    refused("the text has 0 tokens", written("none.jsonl", ""))
    refused(
        r"entry 0 of --text .*columns are \['body'\], without 'text': .* --text-field",
        written("b.jsonl", '{"body": "b"}\n'),
    )
    refused(
        "entry 1 of .*: its 'text' is neither a text nor a list of messages .* but '3'",
        written("c.jsonl", '{"text": "a"}\n{"text": 3}\n'),
    )
    refused("its 'text' is neither", written("d.jsonl", '{"text": [{"from": "me", "value": "a"}]}'))
    written("dict/dataset_dict.json", "{}")
    (tmp_path / "dict" / "test").mkdir()
    refused(r"has the splits \['test'\] and no train", tmp_path / "dict")
    with pytest.raises(ValueError, match=r"--tokenizer .*nowhere is no folder here"):
        DataArguments(tokenizer=tmp_path / "nowhere").validate_paths()


def test_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    ids = np.arange(100, dtype=np.uint16)
    for given in (ids, ids.reshape(5, 20).astype(np.int64)):
        np.save(path, given)
        found = load(path, None, steps=3, sequence=20)
        assert found[0].ids.dtype == torch.int64
        assert ids_of(found) == [*range(100), *range(20)]  # each row once, and again from the first
        assert found[0].for_stages() == {}
    for wrong, match in (
        (ids, r"ids\.npy has the id 99, but --vocabulary is 50"),
        (-ids.astype(np.int32), "has the id -"),
        (ids.astype(np.float32), r"expected integers \[tokens\] or \[sequences, T\], got float32"),
        (ids.reshape(5, 5, 4), r"got uint16 \[5, 5, 4\]"),
        (ids.reshape(10, 10), "its rows have 10 ids, but --sequence is 20: give --sequence 10"),
        (ids[:30], "30 tokens, fewer than one batch"),
        (np.array([{}]), "Python objects"),
    ):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=match):
            load(path, None, steps=3, sequence=20, vocabulary=50)
    with path.open("wb") as opened:
        np.savez(opened, ids=ids)
    with pytest.raises(ValueError, match=r"ids\.npy: expected one array .* archive of arrays"):
        load(path, None)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"--text .*ids\.npy"):
        load(path, None)
    np.save(path, ids)
    with pytest.raises(ValueError, match="ids without documents"):
        load(path, None, packed="yes")


CHATS = [
    [{"role": "user", "content": "what does it say?"}, {"role": "assistant", "content": "nothing"}],
    [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps", "thinking": "over"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "it says nothing"},
    ],
]


def test_conversations(tmp_path: Path) -> None:
    """The assistant's tokens, each with its </s>, are what is predicted, and nothing else."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS * 3))
    write_tokenizer(tmp_path / "marked", chat=CHAT)
    encode = AutoTokenizer.from_pretrained(tmp_path / "marked")
    expected: list[int] = []
    for chat in CHATS:
        for message in chat:
            ids = encode(message["content"]).input_ids
            expected += [*ids, END] if message["role"] == "assistant" else []
    marked = load(path, None, tokenizer=tmp_path / "marked", batch=1, sequence=48)
    labels = marked[0].labels.flatten()
    assert labels[labels != IGNORED].tolist()[: len(expected)] == expected
    every = load(path, None, tokenizer=tmp_path / "marked", batch=1, sequence=48, chat_labels="all")
    assert torch.equal(every[0].ids, marked[0].ids)
    starts = every[0].for_stages()["position_ids"] == 0
    assert torch.equal(every[0].labels == IGNORED, starts)
    column = tmp_path / "column.jsonl"
    column.write_text(path.read_text().replace('"messages"', '"talk"'))
    again = load(
        column, None, tokenizer=tmp_path / "marked", batch=1, sequence=48, text_field="talk"
    )
    assert torch.equal(again[0].labels, marked[0].labels)

    write_tokenizer(tmp_path / "unmarked", chat=UNMARKED_CHAT)
    with pytest.raises(ValueError, match=r"does not mark .* \{% generation %\}.*--chat-labels all"):
        load(path, None, tokenizer=tmp_path / "unmarked")
    load(path, None, tokenizer=tmp_path / "unmarked", chat_labels="all")
    write_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match=r"entry 0 of .*has no chat template"):
        load(path, None, tokenizer=tmp_path / "none")
    with pytest.raises(ValueError, match="the built-in Qwen tokenizer has no chat template"):
        load(path, None, vocabulary=151_936)
    write_tokenizer(tmp_path / "strict", chat="{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match=r"the chat template of .* says: no such role"):
        load(path, None, tokenizer=tmp_path / "strict", chat_labels="all")


def test_text_that_teaches_nothing(tmp_path: Path) -> None:
    """Where no token counts for the loss there is nothing to train on, or to score."""
    path = tmp_path / "chat.jsonl"
    asked = [{"role": "user", "content": "the quick brown fox"}]
    path.write_text(f"{json.dumps({'messages': asked})}\n" * 30)
    write_tokenizer(tmp_path / "marked", chat=CHAT)
    with pytest.raises(ValueError, match=r"--text .*chat\.jsonl: no token .* counts for the loss"):
        load(path, None, tokenizer=tmp_path / "marked")
    every = load(path, None, tokenizer=tmp_path / "marked", chat_labels="all")
    assert every.counts_any
    answered = [*asked, {"role": "assistant", "content": "jumps"}]
    path.write_text("".join(f"{json.dumps({'messages': one})}\n" for one in (answered, asked)))
    some = load(path, None, tokenizer=tmp_path / "marked", batch=1, sequence=16)
    assert int((some[0].labels[:, 1:] != IGNORED).sum()) > 0
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(100))
    assert load(ids, None).counts_any


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        (None, 64),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 128),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
            128,
        ),
    ],
)
def test_positions_that_a_model_knows(
    rope: dict[str, Any] | None, known: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond them a warning, which counts positions in documents, not in packed sequences."""
    given = {} if rope is None else {"rope_parameters": rope}
    config = AutoConfig.for_model("qwen3", **SIZES, max_position_embeddings=64, **given)
    assert known_positions(config) == known
    say_beyond_positions(config, known)
    assert capsys.readouterr().err == ""
    say_beyond_positions(config, known + 1)
    said = capsys.readouterr().err
    assert f"of {known + 1} tokens" in said
    assert f"the model knows {known} positions" in said
    documents = [Document([1] * length) for length in (3, 6, 1)]
    for packed, sequence, longest in ((False, 10, 10), (True, 10, 6), (True, 5, 5)):
        given = {"steps": 1, "batch": 1, "sequence": sequence, "packed": packed}
        assert batches_of_documents(documents, **given).longest == longest


def test_evaluate_takes_the_same_options() -> None:
    shared = {"text", "text_field", "tokenizer", "packed", "chat_labels", "cache"}
    for arguments in (TrainArguments(), EvaluateArguments("folder")):
        assert shared <= vars(arguments).keys()
