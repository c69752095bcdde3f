"""What `python -m build` has made, installed and looked into: ``python -m tests.package FOLDER``.

FOLDER has one wheel and one sdist, of this working tree.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import vocab_parallel
from tests.ranks import ROOT

# What a user of the wheel does, whose folder comes first among those that are imported from.
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, stage_groups, vocab_parallel
for package in (stage_groups, vocab_parallel):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
hidden, rows = torch.randn(5, 8, requires_grad=True), torch.randn(13, 8)
loss = vocab_parallel.linear_cross_entropy(hidden, rows, torch.arange(5))
loss.backward()
expected = torch.nn.functional.cross_entropy(hidden @ rows.T, torch.arange(5))
assert torch.allclose(loss, expected) and hidden.grad.abs().sum() > 0
print(vocab_parallel.__version__)
"""


def check_wheel(wheel: Path) -> None:
    """See that it has the two packages, no other (launch is too general a name), and works."""
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name for name in names if name.endswith(".dist-info/METADATA")).split("/")[0]
    assert {name.split("/")[0] for name in names} == {"vocab_parallel", "stage_groups", info}
    for package in ("vocab_parallel", "stage_groups"):
        assert f"{package}/py.typed" in names
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= set(names), sorted(sources - set(names))
    described = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    assert "](docs/" not in described, "a picture that an index page cannot show"
    assert "*Picture: two columns of pipeline stages share one classifier.*" in described
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, str(wheel)]
        subprocess.run([sys.executable, *install], check=True)
        done = subprocess.run(
            [sys.executable, "-I", "-c", USE, folder], cwd=folder, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == vocab_parallel.__version__ == wheel.name.split("-")[1]


def check_sdist(sdist: Path) -> None:
    """See that it has every file of the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = set(listed.stdout.splitlines())
    assert {"Makefile", "launch/train.py", "examples/pipeline.py", "docs/api.md"} <= files
    with tarfile.open(sdist) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert files <= packed, sorted(files - packed)


def main() -> None:
    """Check both."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name} and {sdist.name} are whole")


if __name__ == "__main__":
    main()
