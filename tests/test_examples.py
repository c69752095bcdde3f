"""The documentation cannot rot: examples run, and pages name what is there.

The first line of an example is the command that runs it, on real ranks.
"""

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import stage_groups
import vocab_parallel
from tests.ranks import ROOT, run_program
from vocab_parallel import adapters, no_loss

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    assert "assert" in text, "an example can fail"
    name = f"examples/{path.name}"
    command = re.match(rf"# torchrun --nproc-per-node (\d) {name}\n", text)
    assert command is not None, "the first line says how to run it"
    code, output = run_program(int(command[1]), [name])
    assert code == 0, output[-6000:]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def lines_of(text: str) -> str:
    """Return the lines without their indentation, each ended."""
    return "".join(line.strip() + "\n" for line in text.strip().splitlines())


def test_snippets_are_parts_of_examples() -> None:
    blocks = python_blocks(README)
    assert blocks
    for block in blocks:
        assert any(
            f"\n{lines_of(block)}" in f"\n{lines_of(path.read_text())}" for path in EXAMPLES
        ), block


def test_snippets_are_complete() -> None:
    """Every name that a snippet uses is one that it has made, imported, or that Python has."""
    for block in python_blocks(README):
        nodes = list(ast.walk(ast.parse(textwrap.dedent(block))))
        made = set(dir(builtins))
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.arg):
                made.add(node.arg)
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert used <= made, used - made


def test_snippets_run_and_print(tmp_path: Path) -> None:
    """Copied as they are: the first in one process, the second as its example is."""
    first, second = python_blocks(README)
    program = tmp_path / "snippet.py"
    for ranks, block in ((1, first), (4, second)):
        program.write_text(block)
        code, output = run_program(ranks, [str(program)])
        assert code == 0, output[-6000:]
        assert re.search(r"loss \d\.\d+", output), output[-6000:]


def test_readme_is_short() -> None:
    assert len(README.split()) <= 700
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    numbers = re.findall(r"\d[\d,.]*", prose)
    assert len(numbers) <= 30, numbers


def paths_named(page: Path) -> Iterator[str]:
    """Yield what a page links to, and each path in backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\(([^)#:]+)\)", text)
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w.*/-]+(\.(py|md|sbatch|json|yml|png|svg)|/)", quoted) and (
            "/" in quoted or quoted.endswith((".py", ".md"))
        ):
            yield quoted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    for path in paths_named(page):
        found = [*ROOT.glob(path.rstrip("/")), *page.parent.glob(path.removeprefix("../"))]
        assert found or (page.parent / path).exists(), f"{page.name} names {path}"


def public_names() -> Iterator[str]:
    for module in (vocab_parallel, stage_groups):
        yield from (f"{module.__name__}.{name}" for name in module.__all__)
    for name, value in vars(adapters).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == adapters.__name__:
            yield f"{adapters.__name__}.{name}"


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(public_names())


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE)
    pages = [page.name for page in (ROOT / "docs").glob("*.md")]
    assert sorted(listed) == sorted([*pages, "index.md"])  # the README, by docs/hooks.py


def test_no_loss_is_never_called() -> None:
    with pytest.raises(ValueError, match="only the last stage computes the loss"):
        no_loss(torch.zeros(1), torch.zeros(1))
