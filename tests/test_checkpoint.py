"""A Hugging Face folder in, training on a mesh, checkpoints over meshes, and a folder out."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from launch.arguments import EvaluateArguments, TrainArguments
from launch.checkpoint import complete_checkpoints
from launch.configs import config_of_sizes
from launch.evaluation import evaluate
from launch.model import build_stage
from launch.training_pipeline import model_of
from launch.weights import FolderWeights
from tests.ranks import run_program, run_ranks, torchrun
from tests.small_tokenizer import END, WORDS, write_tokenizer
from vocab_parallel import VocabParallelClassifier

VOCABULARY, HIDDEN, LAYERS = 151_936, 32, 4
SIZES = [
    *("--batch", "24", "--sequence", "16", "--timeout", "40"),
    *("--hidden", "32", "--layers", "4"),
]
FOLDER_SIZES = [*SIZES[:-4], "--text", "LICENSE"]


def write_model(folder: Path, tied: bool, shards: str = "5GB") -> Path:
    """Let transformers write a tiny Qwen3 and a small tokenizer."""
    torch.manual_seed(int(tied))
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shards)
    write_tokenizer(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def train(ranks: tuple[int, int], out: Path, *arguments: str) -> dict[str, Any]:
    mesh = ["--pipeline", str(ranks[0]), "--vocab", str(ranks[1]), "--out", str(out)]
    mesh += ["--microbatches", str(max(2, ranks[0]))]
    code, output = run_program(
        ranks[0] * ranks[1], ["-m", "launch.train", *mesh, *arguments], timeout=150
    )
    assert code == 0, output[-4000:]
    run: dict[str, Any] = json.loads((out / "run.json").read_text())
    return run


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_in_and_out(tied: bool, tmp_path: Path) -> None:
    """Bitwise where nothing is computed, and each rank reads its own alone."""
    source = write_model(tmp_path / "a", tied, shards="5MB")
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(source)
    assert (source / "model.safetensors.index.json").exists()
    run = train(
        (2, 2), tmp_path / "run", *FOLDER_SIZES, "--model", str(source), "--learning-rate", "0",
        "--steps", "2", "--export", str(tmp_path / "b"),
    )  # fmt: skip
    before, after = weights_of(source), weights_of(tmp_path / "b")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    ids = torch.tensor([[3, 150_000, 17]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(ids).logits
        assert torch.equal(again(ids).logits, expected)
    assert again.dtype == torch.bfloat16, "config.json says what is stored"
    assert again.generation_config.temperature == 0.3
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "b")]
    assert tokenizers[0](WORDS).input_ids == tokenizers[1](WORDS).input_ids

    total = sum(tensor.nbytes for tensor in before.values())
    rows = VOCABULARY * HIDDEN * 2
    layers = total - rows * (1 if tied else 2)
    read = [rank["bytes_read"] for rank in run["ranks"]]
    # Stages of 3 and 1 layers; ends of the vocabulary, of which a tied or a last one is halved.
    first = rows // 2 if tied else rows
    assert sum(read) == 2 * (layers + first + rows // 2)
    assert max(read[2:]) < rows // 2 + layers


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_tied_equals_one_process(schedule: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "a", tied=True)
    run = train(
        (2, 2), tmp_path / "run", *FOLDER_SIZES, "--model", str(source), "--steps", "5",
        "--schedule", schedule, "--check", "--clip-norm", "1.0",
    )  # fmt: skip
    assert run["check"]["passed"]
    assert "model.embed_tokens.weight" in run["check"]["gradients"]


MESHES = [
    ((2, 2), (1, 3)),
    pytest.param((1, 3), (1, 4), marks=pytest.mark.slow),
    pytest.param((1, 4), (2, 1), marks=pytest.mark.slow),
    pytest.param((2, 1), (4, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("first", "second"), MESHES)
def test_resume_on_another_mesh(
    first: tuple[int, int], second: tuple[int, int], tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoints")
    whole = train(
        first, tmp_path / "whole", *SIZES, "--steps", "4", "--checkpoint", folder,
        "--checkpoint-every", "2",
    )  # fmt: skip
    assert sorted(os.listdir(folder)) == ["lock", "step-000002", "step-000004"]
    (Path(folder) / "step-000004").rename(Path(folder) / "step-000004.bak")  # a user's own copy
    (Path(folder) / "step-notes").write_text("the loss looked odd here")
    # What a kill left of an older one, which the next save finds.
    shutil.copytree(Path(folder) / "step-000002", Path(folder) / "step-000001.partial")
    (Path(folder) / "step-000000.partial").mkdir()  # the rest of one that was dropped
    rest = train(
        second, tmp_path / "rest", *SIZES, "--steps", "4", "--checkpoint", folder, "--resume",
        "--export", str(tmp_path / "trained"),
    )  # fmt: skip
    assert rest["first_step"] == 2
    assert rest["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert rest["losses"][:2] == whole["losses"][:2]
    there = ["lock", "step-000002", "step-000004", "step-000004.bak", "step-notes"]
    assert sorted(os.listdir(folder)) == there

    # No step is left: what is saved is exported, as it is, in the dtype asked for.
    code, output = torchrun(
        1,
        [
            "-m", "launch.train", *SIZES, "--pipeline", "1", "--vocab", "1", "--steps", "3",
            "--checkpoint", folder, "--resume", "--export", str(tmp_path / "saved"),
            "--export-dtype", "bfloat16", "--out", str(tmp_path / "rest"),
        ],
    )  # fmt: skip
    assert code == 0, output[-4000:]
    assert "no step was left of --steps 3: exported " in output
    assert json.loads((tmp_path / "rest" / "run.json").read_text()) == rest, "left alone"
    trained, saved = weights_of(tmp_path / "trained"), weights_of(tmp_path / "saved")
    assert trained.keys() == saved.keys()
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(saved[name], tensor.bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    assert sorted(os.listdir(folder)) == there, "nothing was saved again"


def test_what_is_a_checkpoint(tmp_path: Path) -> None:
    """A user's own copies and notes, and what a killed save left, are none."""
    for name in ("step-000003.bak", "step-000003.partial", "step-3", "step-000002"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000004").write_text("no folder")
    assert complete_checkpoints(tmp_path) == []
    (tmp_path / "step-000002" / "run.json").write_text("{}")
    assert complete_checkpoints(tmp_path) == [tmp_path / "step-000002"]


REFUSED = [
    (["--steps", "5", "--hidden", "64"], "its hidden_size is 32, but this one's is 64"),
    (["--steps", "2"], "has done all of --steps 2"),
    (["--steps", "5", "--sequence", "8"], "sequence is 16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_resume_of_another_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    train((1, 1), tmp_path / "out", *SIZES, "--steps", "2", "--checkpoint", folder)
    seen = sorted(Path(folder).rglob("*"))
    mesh = ["--pipeline", "1", "--vocab", "1", "--microbatches", "2"]
    mesh += ["--out", str(tmp_path / "bad")]
    again = [*mesh, *SIZES, "--checkpoint", folder, "--resume", *arguments]
    code, output = torchrun(1, ["-m", "launch.train", *again])
    assert code == 1
    assert message in output
    assert sorted(Path(folder).rglob("*")) == seen, "nothing on disk changed"


def test_bad_folders(tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            model_of(TrainArguments(model=str(folder)))

    refused(tmp_path / "nowhere", "neither a folder nor a published model: known are")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")

    source = write_model(tmp_path / "a", tied=False)
    config = json.loads((source / "config.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": None}))
    refused(copy, "has no vocab_size")
    # A vocabulary of other rows, whole and as the rows of one rank.
    for name, module in (
        ("model.embed_tokens.weight", torch.nn.Embedding(1000, 32)),
        ("lm_head.weight", VocabParallelClassifier(32, 1000, group=None)),
    ):
        rows = slice(module.start, module.stop) if hasattr(module, "start") else None
        weights = FolderWeights(source, Qwen3Config.from_pretrained(source))
        with pytest.raises(ValueError, match=rf"{name} is \[151936, 32\], .* wants \[1000, 32\]"):
            weights.fill(name, torch.empty(1000, 32), rows, module)

    shutil.copytree(source, tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(tmp_path / "short", "cannot be read")
    file.unlink()
    refused(tmp_path / "short", "does not exist")

    weights = FolderWeights(source, Qwen3Config.from_pretrained(source))
    with pytest.raises(ValueError, match=r"has no weight model\.layers\.9"):
        weights.fill("model.layers.9", torch.empty(1), None, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"config\.json is of another model"), torch.no_grad():
        weights.fill("model.norm.weight", torch.empty(7), None, torch.nn.Identity())


def test_hostile_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a folder says, its code is not run, nobody is asked, and no other file is read."""

    def nobody_asked(_: str = "") -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", nobody_asked)
    folder = tmp_path / "a"
    config = config_of_sizes(vocabulary=300, hidden=32, layers=1, sequence=16)
    model = AutoModelForCausalLM.from_config(config)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    names = list(model.state_dict())
    own = json.loads(config.to_json_string()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(own))
    assert model_of(TrainArguments(model=str(folder)))[0].model_type == "qwen3"

    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nclass Config: pass\nclass Model: pass\n"
    )
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}

    bad_rope = {"rope_scaling": {"rope_type": "linear", "factor": "x"}, "rope_parameters": None}

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            model_of(TrainArguments(model=str(folder)))

    for text, match in (
        (json.dumps(own | code | {"model_type": "evil"}), "config.json cannot be read"),
        (json.dumps(own | {"attn_implementation": "evil/kernel"}), "asks for code from elsewhere"),
        (json.dumps(own | {"x": {"_attn_implementation": "evil/a:b"}}), "code from elsewhere"),
        (json.dumps(own | {"hidden_act": 3, "layer_types": 5}), "config.json cannot be read"),
        (json.dumps(own | {"hidden_size": -1}), "has hidden_size = -1: it must be at least 1"),
        (json.dumps(own | {"hidden_size": 0}), "has hidden_size = 0: it must be at least 1"),
        (json.dumps(own | {"hidden_act": "nope"}), "no qwen3 can be built .*KeyError: 'nope'"),
        (json.dumps(own | bad_rope), "no qwen3 can be built .*: TypeError: .*'str'"),
        (json.dumps(own | {"head_dim": -4}), "no qwen3 can be built .* negative dimension"),
        ("[1]", "is no configuration"),
        ("[" * 10**5, "is not JSON"),
    ):
        (folder / "config.json").write_text(text)
        refused(match)
    # A model that transformers has is transformers' own, whatever else the folder offers.
    (folder / "config.json").write_text(json.dumps(own | code))
    found, source = model_of(TrainArguments(model=str(folder)))
    cpu = torch.device("cpu")
    build_stage(found, source, 0, 1, None, device=cpu, dtype=torch.float32)
    assert not marker.exists()

    index = folder / "model.safetensors.index.json"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    whole = dict.fromkeys(names, "model.safetensors")
    for document, match in (
        ({"weight_map": whole | {names[0]: "../outside.safetensors"}}, "no file beside it"),
        ({"weight_map": whole | {names[0]: str(outside)}}, "no file beside it"),
        ({"weight_map": whole | {names[0]: ["model.safetensors"]}}, "no file beside it"),
        ({"weight_map": whole | {names[0]: ".."}}, "does not exist"),
        ({"weight_map": whole | {names[0]: ""}}, "no file beside it|does not exist"),
        ({"weight_map": whole | {"more": "model.safetensors"}}, "has more, but it has not"),
        ({"weight_map": list(whole)}, 'no "weight_map"'),
        ({"metadata": {}}, 'no "weight_map"'),
        (list(whole), 'no "weight_map"'),
    ):
        index.write_text(json.dumps(document))
        refused(f"index.json.*({match})|({match})")
    for text in ("{", "[" * 10**5, "\0"):
        index.write_text(text)
        refused("index.json cannot be read")
    index.write_text(json.dumps({"weight_map": whole}))
    os.rename(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")  # as a hub's cache has them
    model_of(TrainArguments(model=str(folder)))


@pytest.mark.slow
def test_more_stages_than_layers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "a", tied=True)
    arguments = ["--model", str(source), "--pipeline", "2", "--vocab", "1", *FOLDER_SIZES]
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (source / "config.json").write_text(json.dumps(config))
    code, output = torchrun(
        2, ["-m", "launch.train", *arguments, "--out", str(tmp_path / "out")], timeout=60
    )
    assert code == 1
    assert "2 stages need at least as many layers, got 1" in output
    assert not (tmp_path / "out").exists()


def check_evaluate(meshes: list[list[Any]], expected: list[float], **given: Any) -> None:
    """Every rank has the same scores, whatever the mesh."""
    for pipeline, vocab, vocab_over in meshes:
        arguments = EvaluateArguments(
            **{**given, "text": Path(given["text"])},
            pipeline=pipeline, vocab=vocab, vocab_over=vocab_over,
        )  # fmt: skip
        arguments.validate_ranks(dist.get_world_size())
        found = evaluate(arguments, torch.device("cpu"))
        assert [found.perplexity, found.accuracy, float(found.count)] == pytest.approx(
            expected, rel=1e-4
        ), (pipeline, vocab, vocab_over)


def test_evaluate(tmp_path: Path) -> None:
    """Perplexity and accuracy of packed documents: those of each one's logits alone."""
    source = write_model(tmp_path / "a", tied=True)
    texts = ["the quick brown fox jumps over the lazy dog " * (1 + n % 3) for n in range(16)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    encode = AutoTokenizer.from_pretrained(source)
    stream = [(n, t) for n, one in enumerate(texts) for t in [*encode(one).input_ids, END]]
    rows = [stream[start : start + 24] for start in range(0, 2 * 4 * 24, 24)]
    pieces = [
        torch.tensor([[token for _, token in piece]])
        for row in rows
        for _, piece in itertools.groupby(row, key=lambda pair: pair[0])
    ]
    assert len(pieces) > 8
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = torch.cat([model(piece).logits[0, :-1] for piece in pieces])
    wanted = torch.cat([piece[0, 1:] for piece in pieces])
    nll = torch.nn.functional.cross_entropy(logits, wanted)
    accuracy = (logits.argmax(-1) == wanted).float().mean()
    expected = [float(nll.exp()), float(accuracy), wanted.numel()]
    given = {"model": str(source), "text": str(text), "batches": 2, "batch": 4, "sequence": 24}
    last, everywhere = "last-stage", "all-stages"
    for ranks, meshes in (
        (2, [(1, None, last), (2, 1, last), (2, None, everywhere)]),
        (4, [(2, 2, last), (2, 2, everywhere)]),
    ):
        run_ranks(check_evaluate, ranks, meshes=meshes, expected=expected, timeout=60, **given)
    arguments = EvaluateArguments("folder", pipeline=2, batch=3)
    for ranks, words in (
        (3, "--pipeline 2 does not divide the 3 ranks"),
        (4, "--batch must be a multiple of 2 columns, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            arguments.validate_ranks(ranks)
    with pytest.raises(ValueError, match="a mesh of 2 ranks, but torchrun started 4"):
        replace(arguments, vocab=1).validate_ranks(4)
