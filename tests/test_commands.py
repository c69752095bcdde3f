"""Every command that a page shows is run as it is printed, or read by what it starts."""

import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
from torch.distributed.run import get_args_parser

from launch.arguments import EvaluateArguments, TrainArguments
from launch.options import parse
from launch.planning.arguments import PlanArguments
from tests.ranks import ROOT, run_program

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {
    "launch.train": TrainArguments, "launch.evaluate": EvaluateArguments,
    "launch.plan": PlanArguments,
}  # fmt: skip
# Run as printed, one page's after the other: the tests below.
RUN = ("tutorial.md", "python -m launch.plan")
# Neither started by torchrun nor of this repository: what cannot run here, and why.
STRANGERS = {
    "make demo": "makes a virtual environment; test_train.py runs the same with other sizes",
    "make test": "is what runs this",
    "git worktree add ../older cb0ae2e": "changes the repository",
    "hf download Qwen/Qwen3-1.7B --local-dir Qwen3-1.7B": "needs a network",
    "python -m torchtitan.train ... --override.imports "
    "vocab_parallel.torchtitan.cut_cross_entropy": "has a configuration of torchtitan's; "
    "test_torchtitan.py applies the override",
}
# Read to the last option, and not run: the model, the data or the GPUs are not here.
LARGE = r"qwen3-\d|Qwen3-1\.7B|-m benchmarks\.|--nproc-per-node [68]|--model trained"


def commands(page: Path) -> Iterator[str]:
    """Yield each command of a page's blocks in one line, variables of the block written out."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words)


def inline_commands(page: Path) -> Iterator[str]:
    """Yield what a sentence tells to type, but for what it leaves to the reader."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for command in re.findall(r"`((?:python -m|torchrun) (?:launch|benchmarks)[^`]*)`", text):
        if "..." not in command:
            yield " ".join(command.split())


SHOWN = [(page.name, command) for page in PAGES for command in commands(page)]


def started(command: str) -> tuple[int, list[str]]:
    """Return how many ranks a command starts, and of what: "-m", a module and its options."""
    words = shlex.split(command)
    if words[0] == "python":
        return 1, words[1:]
    assert words[0] == "torchrun"
    found = get_args_parser().parse_args(words[1:])
    module = ["-m"] if found.module else []
    ranks = int(found.nnodes.split(":")[-1]) * int(found.nproc_per_node)
    return ranks, [*module, found.training_script, *found.training_script_args]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_is_read(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, and by the program's own parser and checks of what is told it."""
    if command in STRANGERS:
        return
    if installed := re.fullmatch(r"pip install -e (?:\.|'\.\[(\w+)\]')", command):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert installed[1] is None or installed[1] in extras["optional-dependencies"]
        return
    ranks, (flag, module, *given) = started(command)
    assert flag == "-m"
    assert page in RUN or command.startswith(RUN) or re.search(LARGE, command), "nobody runs it"
    if module not in KINDS:
        tyro.cli(importlib.import_module(module).Arguments, args=given)
        return
    if "--config" in given:  # of the command before
        before = next(one for name, one in reversed(SHOWN[: SHOWN.index((page, command))])
                      if name == page and "launch.train" in one)  # fmt: skip
        options = parse(TrainArguments, module, started(before)[1][2:])
        written = tmp_path / given[given.index("--config") + 1]
        written.parent.mkdir(parents=True)
        written.write_text(json.dumps({"arguments": vars(options)}, default=str))
        monkeypatch.chdir(tmp_path)
    arguments = parse(KINDS[module], module, given)
    if not isinstance(arguments, PlanArguments):
        arguments.validate()
        arguments.validate_ranks(ranks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_is_read(page: Path) -> None:
    """Of a placeholder, a capital letter alone, any number will do."""
    for command in inline_commands(page):
        _, (_, module, *given) = started(command)
        given = [re.sub(r"^[A-Z]$", "1", word) for word in given]
        if module in KINDS:
            if given != ["--help"]:
                parse(KINDS[module], module, given)
        else:
            tyro.cli(importlib.import_module(module).Arguments, args=given)


def test_every_stranger_is_shown() -> None:
    assert set(STRANGERS) <= {command for _, command in SHOWN}


def test_the_tutorial(tmp_path: Path) -> None:
    """A stranger's first ten minutes: each block as it is printed, in an empty folder."""
    page = ROOT / "docs" / "tutorial.md"
    snippet = tmp_path / "snippet.py"
    [block] = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    snippet.write_text(block)
    said = [run_program(1, [str(snippet)], folder=tmp_path)[1]]
    for command in commands(page):
        if command.startswith("torchrun"):
            ranks, program = started(command)
            code, output = run_program(ranks, program, folder=tmp_path, timeout=90)
            assert code == 0, f"{command}:\n{output[-6000:]}"
            said.append(output)
    snippet_says, one, two, pipeline, resumed, evaluated = said
    assert re.search(r"loss \d\.\d{4}", snippet_says)
    losses = [re.findall(r"step \d/4: loss (\S+),", output) for output in (one, two, pipeline)]
    assert len(losses[0]) == 4
    for found in losses[1:]:
        assert [float(loss) for loss in found] == pytest.approx(
            [float(loss) for loss in losses[0]], abs=2e-4
        )
    assert "[75,968, 151,936)" in two
    assert "goes on after step 4 of 6" in resumed
    assert (tmp_path / "runs" / "model" / "config.json").is_file()
    perplexity = json.loads(evaluated.splitlines()[-1])["perplexity"]
    assert 1 < perplexity < 151_936


@pytest.mark.parametrize(
    "command", [one for _, one in SHOWN if one.startswith(RUN[1]) and "mine.json" not in one]
)
def test_plans(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    _, (_, module, *given) = started(command)
    monkeypatch.setattr(sys, "argv", [module, *given])
    monkeypatch.delitem(sys.modules, "launch.plan", raising=False)
    runpy.run_module(module, run_name="__main__")
    assert " -m launch.train --model " in capsys.readouterr().out.splitlines()[-1]
    if "--plot" in given:
        assert (tmp_path / given[given.index("--plot") + 1]).stat().st_size > 1000
