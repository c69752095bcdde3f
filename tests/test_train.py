"""launch.train as torchrun starts it, on small models."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM, get_scheduler

from launch.arguments import EvaluateArguments, TrainArguments
from launch.checkpoint import complete_checkpoints
from launch.configs import config_of_sizes, load_config
from launch.model import layers_of_stage
from launch.optimizer import settled
from launch.options import parse, unreadable
from launch.planning.arguments import PlanArguments
from launch.planning.shape import ModelShape
from launch.report import plot_losses
from launch.stopping import said_of
from tests.ranks import ROOT, run_program, torchrun
from tests.small_tokenizer import CHAT, write_tokenizer

SMALL = [
    *("--hidden", "32", "--layers", "4", "--batch", "24", "--sequence", "16"),
    # Ranks wait for the one that checks alone.
    *("--steps", "6", "--timeout", "60", "--vocabulary", "151936"),
]


# The learning rate of the first step is 0: what is scored after it is what it trained on.
OPTIMIZER = [
    *("--learning-rate-schedule", "cosine", "--warmup", "2", "--betas", "0.8", "0.99"),
    *("--weight-decay", "0.1"),
]
SCORES = [
    "--no-shuffle",
    *("--text", "LICENSE", "--eval-text", "LICENSE", "--eval-batches", "1", "--eval-every", "1"),
]


def check_log(out: Path, traces: int) -> None:
    """A line a step, with the learning rates of transformers; the scores; a trace of each rank."""
    losses = json.loads((out / "run.json").read_text())["losses"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in range(1, 7) for _ in "ab"]
    lines, scored = lines[::2], lines[1::2]
    assert [line["loss"] for line in lines] == losses
    assert all(line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    # A model that knows nothing has nearly the entropy of all tokens alike, and learns.
    assert all(0 <= line["accuracy"] <= 1 and 0 < line["entropy"] < 13 for line in lines)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    schedule = get_scheduler("cosine", optimizer, 2, 6)
    for line in lines:
        assert line["learning_rate"] == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert scored[0]["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert scored[0]["eval_accuracy"] == pytest.approx(lines[0]["accuracy"], abs=1e-6)
    assert scored[-1]["eval_loss"] < scored[0]["eval_loss"]
    assert len(list((out / "written").glob("rank-*.json"))) == traces


RUNS = [
    pytest.param(1, 3, "1F1B --microbatches 1", marks=pytest.mark.slow),
    (2, 2, "InterleavedZeroBubble --microbatches 2 --accumulate 2 --clip-norm 0.5 --profile"),
    (1, 2, "1F1B --microbatches 2 --clip-norm 0.5 --data 2 --checkpoint-every 2 --checkpoint"),
    pytest.param(
        2, 1, "1F1B --microbatches 2 --data 2 --vocab-over all-stages", marks=pytest.mark.slow
    ),
    pytest.param(
        1,
        1,
        "1F1B --microbatches 2 --accumulate 2 --data 2 --shard-body --recompute all --compile yes",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        2,
        1,
        "1F1B --vocab-over all-stages --accumulate 2 --microbatches 4 --recompute all",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        2,
        1,
        "1F1B --vocab-over all-stages --microbatches 4 --recompute all --compile yes",
        marks=pytest.mark.slow,
    ),
    *(
        pytest.param(2, 1, f"{name} --microbatches 4 --accumulate 2", marks=pytest.mark.slow)
        for name in ("GPipe", "Interleaved1F1B", "LoopedBFS", "ZBVZeroBubble", "DualPipeV")
    ),
]


@pytest.mark.parametrize(("pipeline", "vocab", "schedule"), RUNS)
def test_equals_one_process(pipeline: int, vocab: int, schedule: str, tmp_path: Path) -> None:
    """Also where 151,936 rows over 3 ranks do not divide, and however the batch is cut."""
    mesh = f"--pipeline {pipeline} --vocab {vocab} --schedule {schedule}".split()
    data = 2 if "--data" in mesh else 1
    if mesh[-1] in ("--profile", "--checkpoint"):
        mesh.append(str(tmp_path / "written"))
    code, output = run_program(
        pipeline * data * vocab,
        [
            "-m",
            "launch.train",
            *SMALL,
            *mesh,
            *OPTIMIZER,
            *SCORES,
            "--check",
            "--out",
            str(tmp_path),
        ],
        timeout=150,
    )
    assert code == 0, output[-4000:]
    check_log(tmp_path, pipeline * vocab if "--profile" in mesh else 0)
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["losses"]) == 6
    if "--checkpoint" in mesh:
        for step in (4, 6):  # what is read a step late is there when a step is saved
            history = (tmp_path / "written" / f"step-{step:06d}" / "history.json").read_text()
            assert json.loads(history)["losses"] == run["losses"][:step]
    assert run["losses"][0] == pytest.approx(11.95, abs=0.3)  # ln 151936 = 11.93
    assert run["check"]["passed"]
    assert max(run["check"]["losses"]) <= 1e-5
    assert max(run["check"]["gradients"].values()) <= 1e-4
    held = [rank["rows"] for rank in run["ranks"] if rank["rows"][1] > rank["rows"][0]]
    assert len(held) == data * (pipeline * vocab if "all-stages" in schedule else vocab)
    assert sorted(held)[-1][1] == 151_936
    assert (tmp_path / "loss.png").stat().st_size > 1000


MISTAKES = [
    (
        ["--vocab", "3", "--batch", "9"],
        "--pipeline 1 x --vocab 3 is a mesh of 3 ranks, but torchrun started 2",
    ),
    pytest.param(
        ["--vocab", "2", "--batch", "5"],
        "--batch must be a multiple of vocab x microbatches",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["--bacth", "5"], "no option --bacth, did you mean --batch?", marks=pytest.mark.slow
    ),
    pytest.param(
        ["--vocab", "2", "--hidden", "32", "--export", "/proc/nowhere/model"],
        "--export /proc/nowhere cannot be written to",
        marks=pytest.mark.slow,
    ),
    # Known to the ranks of the last stage alone.
    (
        [
            "--pipeline",
            "2",
            "--microbatches",
            "2",
            "--vocab",
            "1",
            "--hidden",
            "32",
            "--impl",
            "c",
            "--text",
            "LICENSE",
            "--sequence",
            "8",
        ],
        "unknown impl 'c': known are ['auto', 'chunked', 'reference'",
    ),
    # Known when the text has been read.
    pytest.param(
        ["--vocab", "2", "--text", "LICENSE", "--sequence", "4096"],
        "fewer than one batch",
        marks=pytest.mark.slow,
    ),
]


def assert_one_sentence(code: int, output: str, words: str) -> None:
    """Check that the mistake is said once by rank 0 and once by torchrun, without a traceback."""
    assert code == 1  # torchrun's own, whatever a rank's is
    assert "exitcode  : 2 (" in output
    sentences = [line for line in output.splitlines() if words in line]
    assert len(sentences) == 2, output
    assert sentences[0].startswith("launch.train: ")
    assert sentences[1] == f"  traceback : {sentences[0]}"
    assert output.splitlines()[-2] == sentences[1], "what the user sees last"
    assert output.count("Traceback") == 1, "torchrun's own"
    assert "launch/" not in output.partition("Traceback")[2], "none of ours"
    assert len(output.splitlines()) < 55


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes(arguments: list[str], words: str, tmp_path: Path) -> None:
    mesh = ["--pipeline", "1", "--microbatches", "1", "--out", str(tmp_path / "out")]
    code, output = torchrun(2, ["-m", "launch.train", *mesh, *arguments])
    assert_one_sentence(code, output, words)
    assert not (tmp_path / "out").exists()


def unanswered(folder: Path) -> Path:
    """Write conversations in which no token counts."""
    asked = {"messages": [{"role": "user", "content": "the quick brown fox"}]}
    (folder / "chat.jsonl").write_text(f"{json.dumps(asked)}\n" * 30)
    return folder / "chat.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--text", "--eval-text"])
def test_text_in_which_no_token_counts(option: str, tmp_path: Path) -> None:
    """Conversations that nobody answers are no text to train on, nor to score."""
    write_tokenizer(tmp_path / "tokenizer", chat=CHAT)
    text = unanswered(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(100))
    arguments = ["--pipeline", "1", "--vocab", "2", "--microbatches", "1", "--hidden", "32"]
    arguments += ["--vocabulary", "300", "--batch", "2", "--sequence", "8", "--steps", "1"]
    arguments += ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    if option == "--eval-text":
        arguments += ["--text", str(tmp_path / "ids.npy"), "--eval-every", "1"]
    code, output = torchrun(2, ["-m", "launch.train", *arguments, option, str(text)])
    assert_one_sentence(code, output, f"{option} {text}: no token of what is read counts")
    assert not (tmp_path / "out").exists()


def test_no_token_counts_in_what_is_evaluated(tmp_path: Path) -> None:
    text = unanswered(tmp_path)
    write_tokenizer(tmp_path, chat=CHAT)
    config = config_of_sizes(vocabulary=300, hidden=32, layers=1, sequence=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shape = ["--batches", "1", "--batch", "2", "--sequence", "8", "--timeout", "40"]
    given = ["--model", str(tmp_path), "--text", str(text), *shape]
    code, output = run_program(1, ["-m", "launch.evaluate", *given])
    assert code == 1  # torchrun's own
    assert "exitcode  : 2 (" in output
    words = f"launch.evaluate: --text {text}: no token of what is read counts"
    assert [words in line for line in output.splitlines()].count(True) == 2, output  # and torchrun
    assert "launch/" not in output, "no traceback of ours"


@pytest.mark.parametrize("option", ["out", "export", "profile", "checkpoint"])
def test_a_file_is_no_folder(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = TrainArguments(**{option: tmp_path / "file"})
    with pytest.raises(ValueError, match=f"--{option} .*file is no folder: give another name"):
        arguments.validate_paths()


def test_a_mistake_that_one_rank_finds(tmp_path: Path) -> None:
    """The last stage's weights are missing: its rank tells the other, which says it."""
    write_tokenizer(tmp_path / "a")
    config = config_of_sizes(vocabulary=300, hidden=32, layers=2, sequence=16)
    model = AutoModelForCausalLM.from_config(config)
    weights = {name: w for name, w in model.state_dict().items() if name != "model.norm.weight"}
    save_file(weights, tmp_path / "a" / "model.safetensors")
    config.save_pretrained(tmp_path / "a")
    mesh = ["--pipeline", "2", "--vocab", "1", "--out", str(tmp_path / "out")]
    mesh += ["--text", "LICENSE", "--model", str(tmp_path / "a")]
    code, output = torchrun(2, ["-m", "launch.train", *mesh])
    assert_one_sentence(code, output, "has no weight model.norm.weight")


def python(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_without_torchrun() -> None:
    """The command lines load neither torch nor transformers, and say what starts them."""
    for program in ("train", "evaluate", "plan"):
        code = (
            "import sys, runpy\n"
            f"sys.argv = ['{program}', '--help']\n"
            "try:\n"
            f"    runpy.run_module('launch.{program}', run_name='__main__')\n"
            "except SystemExit as end:\n"
            "    assert not end.code\n"
            "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"usage: python -m launch.{program}" in done.stdout
        assert done.stdout.splitlines()[-1] == "set()"
    done = python("-m", "launch.train")
    assert done.returncode == 2
    assert done.stderr.startswith("launch.train: start this with torchrun")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", [TrainArguments, EvaluateArguments])
def test_torchrun_leaves_our_options(kind: type) -> None:
    """It takes a shortened option of its own for one, behind the program's name too."""
    for field in dataclasses.fields(kind):
        ours = ["-m", "launch.train", f"--{field.name.replace('_', '-')}", "x"]
        assert get_args_parser().parse_args(ours).training_script_args == ours[2:]


def test_layers_are_spread() -> None:
    """The last stage's classifier counts as so many layers; its cost is what is balanced."""
    for layers, vocabulary, stages, expected in (
        (4, 16, 2, [2, 2]),  # hardly a classifier
        (5, 16, 2, [3, 2]),
        (7, 16, 3, [2, 3, 2]),
        (3, 16, 3, [1, 1, 1]),
        (8, 3 * 128, 2, [5, 3]),  # as much as three layers' hidden x hidden x 13 parameters
        (4, 151_936, 2, [3, 1]),
    ):
        config = config_of_sizes(vocabulary=vocabulary, hidden=128, layers=layers, sequence=8)
        spread = [layers_of_stage(stage, stages, config) for stage in range(stages)]
        assert [layer for own in spread for layer in own] == list(range(layers))
        shape = ModelShape.of("", config.to_dict())
        head = vocabulary * 128 / shape.layer_products
        cost = [len(own) + head * (own is spread[-1]) for own in spread]
        even = [layers // stages + (i < layers % stages) for i in range(stages)]
        assert max(cost) <= max(count + head * (i == stages - 1) for i, count in enumerate(even))
        if vocabulary != 3 * 128:
            assert sorted(map(len, spread)) == sorted(expected), (layers, vocabulary)
    config = config_of_sizes(vocabulary=16, hidden=128, layers=2, sequence=8)
    with pytest.raises(ValueError, match="at least as many layers, got 2"):
        layers_of_stage(0, 3, config)


def test_misspelt_names(tmp_path: Path) -> None:
    """The nearest name is said, of options, folders and published models; none where none is."""
    options = TrainArguments
    for given, words in (
        (["--bacth", "5"], "there is no option --bacth, did you mean --batch?; --help lists all"),
        (["--no-float32-weigths"], "no option --no-float32-weigths, did you mean --no-float32-w"),
        (["--model=x", "--quux"], "there is no option --quux; --help lists all"),
        (["--eval_every", "x"], "the command line cannot be read, as said above"),
    ):
        assert words in unreadable(options, given)
    (tmp_path / "Qwen3-1.7B").mkdir()
    (tmp_path / "notes.jsonl").touch()
    for arguments, near in (
        ({"model": str(tmp_path / "qwen3-17b")}, "Qwen3-1.7B"),
        ({"text": tmp_path / "note.jsonl"}, "notes.jsonl"),
        ({"tokenizer": tmp_path / "Qwen3-1.7"}, "Qwen3-1.7B"),
        ({"model": "qwen3-8"}, None),
    ):
        meant = "qwen3-8b" if near is None else str(tmp_path / near)
        with pytest.raises(ValueError, match=rf", did you mean {re.escape(meant)}\?"):
            TrainArguments(**arguments).validate_paths()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither a folder nor a published model: known"):
        TrainArguments(model="abacus").validate_paths()


def test_options_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML as a command line would say it; what is given besides wins, what is wrong is said."""
    path = tmp_path / "run.yaml"

    def read(text: str, *given: str) -> TrainArguments:
        path.write_text(text)
        return parse(TrainArguments, "launch.train", ["--config", str(path), *given])

    text = "packed: no\nlearning_rate: 1e-4\nbetas: [0.8, 0.9]\nshard-body: True\nmodel: null\n"
    text += "text_field: --said\nfloat32_weights: false\nbatch: 16"
    assert read(text, "--batch", "32") == TrainArguments(
        packed="no", learning_rate=1e-4, betas=(0.8, 0.9), shard_body=True, batch=32,
        float32_weights=False, text_field="--said",
    )  # fmt: skip
    for wrong, words in (
        ("bacth: 5", "there is no option --bacth, did you mean --batch?; --help lists all"),
        ("batch: many", "the command line cannot be read, as said above"),
        ("resume: on", f"--config {path}: resume is true or false, got 'on'"),
        ("config: other.yaml", f"--config {path} has config, which a file cannot give"),
        ("- batch", f"--config {path} has no options: give one a line, as in batch: 64"),
        ("batch: [", f"--config {path} cannot be read: while parsing"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            read(wrong)
    with pytest.raises(ValueError, match=r"--config nowhere\.yaml cannot be read: .*No such file"):
        parse(TrainArguments, "launch.train", ["--config=nowhere.yaml"])
    assert "bacth" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [TrainArguments, EvaluateArguments, PlanArguments])
def test_help_in_groups(
    kind: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group for each base, every option in one, and lines end where no word more had room."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(kind, "launch.train", ["--help"])
    shown = capsys.readouterr().out
    names = [base.__name__.removesuffix("Arguments").lower() for base in kind.__mro__[1:-1]]
    for name in (*names, "config"):
        assert shown.count(f" {name} options ") == 1
    for field in dataclasses.fields(kind):
        assert len(re.findall(rf"^\W --{field.name.replace('_', '-')}[ ,]", shown, re.M)) == 1
    lines = [line[2:-2].rstrip() for line in shown.splitlines() if len(line) == 100]
    wrapped = 0
    for line, following in itertools.pairwise(lines):
        has_words = line.startswith(" ") or re.match(r"--.*\S  +\S", line)
        if has_words and following.startswith("  " * 4):
            wrapped += 1
            assert len(line) + 1 + len(following.split()[0]) > 96, (line, following)
    assert wrapped > 3


def test_defaults_of_a_pretrained_model() -> None:
    """Smaller rates for larger models, as the root of their sizes; what is given stays."""
    arguments = TrainArguments(steps=1000)
    found = [settled(arguments, size) for size in (10**5, 2 * 10**9, 8 * 10**9, 10**12)]
    assert [one.learning_rate for one in found] == [1e-4, 2e-5, 1e-5, 5e-6]
    assert {(one.learning_rate_schedule, one.warmup, one.clip_norm) for one in found} == {
        ("cosine", 30, 1.0)
    }
    given = {"learning_rate": 0.5, "learning_rate_schedule": "linear", "warmup": 0}
    kept = settled(TrainArguments(**given, clip_norm=math.inf), 10**9)  # type: ignore[arg-type]
    assert (kept.learning_rate, kept.warmup, kept.clip_norm) == (0.5, 0, math.inf)
    assert kept.learning_rate_schedule == "linear"
    random = settled(arguments)
    assert (random.learning_rate, random.learning_rate_schedule) == (3e-3, "constant")
    assert (random.warmup, random.clip_norm) == (0, None)
    assert settled(found[0]) == found[0]


def small_model(folder: Path) -> Path:
    """Write a folder of a small model, whose config.json is not what the options' defaults are."""
    config = config_of_sizes(vocabulary=300, hidden=32, layers=2, sequence=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_what_a_run_says(tmp_path: Path) -> None:
    """At its start, when it is resumed on another mesh, and at its end; and in run.json."""
    model, text, kept = small_model(tmp_path / "little"), tmp_path / "text.txt", tmp_path / "kept"
    text.write_text("the quick brown fox jumps over the lazy dog " * 4)
    given = ["--model", str(model), "--text", str(text), "--batch", "4", "--sequence", "8"]
    given += ["--microbatches", "2", "--eval-text", str(text), "--eval-every", "2"]
    given += ["--eval-batches", "1", "--checkpoint", str(kept), "--timeout", "40"]
    out = tmp_path / "out"
    mesh = ["--pipeline", "2", "--vocab", "1", "--steps", "4", "--out", str(out)]
    code, output = run_program(2, ["-m", "launch.train", *given, *mesh])
    assert code == 0, output
    parameters = sum(
        own.numel() for own in AutoModelForCausalLM.from_pretrained(model).parameters()
    )
    for words in (
        f"model      little, {parameters:,} parameters, float32",
        "mesh       data 1 x pipeline 2 x vocab 1 on 2 x CPU, 1F1B, vocabulary on the last stage",
        " tokens, shuffled; 128 in 4 steps, ",
        " epochs; 4 x 8 = 32 a step",
        "learning rate 0.0001, cosine, 0 steps of warm-up, weight decay 0.01, gradient norm "
        "clipped to 1; chosen by the model's size: --learning-rate, --learning-rate-schedule, "
        "--warmup, --clip-norm",
        f"folders    --out {out}, --checkpoint {kept}",
        *(f"step {step}/4: loss " for step in (1, 2, 3, 4)),
        f"checkpoint {kept / 'step-000004'}",
    ):
        assert output.count(words) == 1, (words, output)
    assert "%|" not in output, "no bar where stderr is no terminal"
    run = json.loads((out / "run.json").read_text())
    scored = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    scored = [{"step": one["step"], "loss": one["eval_loss"]} for one in scored[2::3]]
    assert run["eval_losses"] == scored
    assert [one["step"] for one in scored] == [2, 4]
    assert f"evaluation's loss {scored[-1]['loss']:.4f} after step 4" in output
    assert abs(datetime.now(UTC) - datetime.fromisoformat(run["date"])) < timedelta(minutes=10)
    assert run["versions"]["torch"] == version("torch")
    assert (run["device"], run["model"]["name"]) == ("CPU", "little")
    assert (run["model"]["hidden"], run["model"]["vocabulary"]) == (32, 300)
    assert run["model"]["parameters"] == parameters
    assert not {"hidden", "layers", "vocabulary"} & set(run["arguments"])
    assert run["arguments"]["clip_norm"] == 1.0
    read = parse(
        TrainArguments, "launch.train", ["--config", str(out / "run.json"), "--steps", "7"]
    )
    assert (read.steps, read.out, read.betas, read.warmup) == (7, out, (0.9, 0.999), 0)
    assert json.loads(json.dumps(dataclasses.asdict(read), default=str)).items() >= {
        **run["arguments"], "steps": 7,
    }.items()  # fmt: skip

    again = ["--pipeline", "1", "--vocab", "2", "--steps", "6", "--out", str(out), "--resume"]
    code, output = run_program(
        2, ["-m", "launch.train", *given, *again, "--export", str(tmp_path / "exported")]
    )
    assert code == 0, output
    saved = "goes on after step 4 of 6, which a mesh of data 1 x pipeline 2 x vocab 1 has saved"
    assert output.count(saved) == 1, output
    assert output.count(f"export {tmp_path / 'exported'}") >= 1
    run = json.loads((out / "run.json").read_text())
    assert run["eval_losses"][:2] == scored, "of the steps before too"
    assert [one["step"] for one in run["eval_losses"]] == [2, 4, 6]


def test_the_loss_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation over whole steps, under the model's name."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_losses(TrainArguments(out=tmp_path), "little", 300, [3.0, 2.0, 1.5], [(1, 4.0), (3, 2.5)])
    axes = figures[0].axes[0]
    training, evaluation = axes.lines
    assert list(training.get_ydata()) == [3.0, 2.0, 1.5]
    assert list(evaluation.get_xdata()) == [1, 3]
    assert list(evaluation.get_ydata()) == [4.0, 2.5]
    assert axes.get_title().startswith("little: ")
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_in_order(number: signal.Signals, tmp_path: Path) -> None:
    """The picture, run.json, a last checkpoint, and the command that goes on, as a last line."""
    np.save(tmp_path / "ids.npy", np.arange(4096) % 300)
    given = ["--pipeline", "2", "--vocab", "1", "--microbatches", "2", "--batch", "2"]
    given += ["--sequence", "8", "--steps", "20000", "--hidden", "32", "--vocabulary", "300"]
    given += ["--text", str(tmp_path / "ids.npy"), "--out", str(tmp_path / "out")]
    given += ["--checkpoint", str(tmp_path / "kept")]
    start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    start += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", "2", "-m", "launch.train"]
    log = tmp_path / "out" / "log.jsonl"
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen([*start, *given], cwd=ROOT, stdout=said, stderr=said)
        try:
            began = time.monotonic()
            while not log.is_file() or len(log.read_text().splitlines()) < 3:
                assert run.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() - began < 100
                time.sleep(0.2)
            run.send_signal(number)  # torchrun hands it to the ranks
            assert run.wait(50) != 0
        finally:
            run.kill()
    output = (tmp_path / "said").read_text()
    document = json.loads((tmp_path / "out" / "run.json").read_text())
    step = len(document["losses"])
    assert 3 <= step < 20000
    assert step == len(log.read_text().splitlines())
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert [path.name for path in complete_checkpoints(tmp_path / "kept")] == [f"step-{step:06d}"]
    words = f"launch.train: stopped by {number.name} after step {step} of 20000; go on with: "
    last = next(line for line in output.splitlines() if line.startswith(words))
    goes_on = shlex.split(last.removeprefix(words))
    assert goes_on == [
        "torchrun",
        "--nproc-per-node",
        "2",
        "-m",
        "launch.train",
        *given,
        "--resume",
    ]


def test_what_a_signal_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes on without checkpoints; of several machines torchrun's options are left out."""
    given = ["--steps", "9", "--checkpoint", "a folder"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    said = said_of(TrainArguments(steps=9), signal.SIGINT, 4)
    assert said.startswith("stopped by SIGINT after step 4 of 9; without --checkpoint FOLDER")
    saved = TrainArguments(steps=9, checkpoint=Path("a folder"))
    assert saved.world == 4
    said = said_of(saved, signal.SIGTERM, 4)
    command = "torchrun ... -m launch.train --steps 9 --checkpoint 'a folder' --resume"
    assert said == f"stopped by SIGTERM after step 4 of 9; go on with: {command}"
    assert said_of(dataclasses.replace(saved, resume=True), signal.SIGTERM, 4).endswith("folder'")


def test_published_models() -> None:
    """As their authors count them, from configurations alone."""
    for name, billions in (
        ("qwen3-1.7b", 1.72),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("llama-3.1-8b", 8.03),
        ("gemma-2-2b", 2.61),
    ):
        config, folder = load_config(name)
        assert folder is None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.01), name


def test_arguments() -> None:
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        TrainArguments(steps=0).validate()
    with pytest.raises(ValueError, match="--hidden must be a multiple of 32"):
        TrainArguments(hidden=33).validate()
    for options, message in (
        ({"warmup": 31}, "--warmup 31 is more than --steps 30"),
        ({"warmup": -1}, "--warmup must be at least 0, got -1"),
        ({"weight_decay": math.nan}, "--weight-decay must be at least 0, got nan"),
        ({"learning_rate": math.inf}, "--learning-rate must be finite, got inf"),
        ({"timeout": math.nan}, "--timeout must be positive seconds, at most 1e[+]09, got nan"),
        ({"pipeline": 8}, "at least as many --microbatches as --pipeline 8, got 4"),
        ({"betas": (0.9, 1.0)}, r"--betas must be in \[0, 1\), got 0.9 1.0"),
        ({"eval_every": 2}, "--eval-every N and --eval-text FILE need one another"),
        ({"eval_text": Path("LICENSE")}, "--eval-every N and --eval-text FILE need one another"),
        ({"eval_batches": 0}, "--eval-batches must be at least 1"),
        (
            {"compile": "yes", "schedule": "ZBVZeroBubble"},
            "--compile yes makes one function of a layer's backward, whose halves --schedule ZBV",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TrainArguments(**options).validate()  # type: ignore[arg-type]
