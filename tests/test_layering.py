"""The rules of the layout: what each folder may import and call."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT

SOURCES = sorted(
    path
    for folder in ("stage_groups", "vocab_parallel", "launch", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
SHIPPED = [path for path in SOURCES if path.parts[len(ROOT.parts)] not in ("benchmarks", "tests")]
GROUP_MAKERS = {"new_group", "new_subgroups", "init_device_mesh", "DeviceMesh", "split_group"}
COLLECTIVES = {
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_object",
    "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "broadcast", "barrier",
    "reduce", "gather_object", "scatter", "all_to_all", "all_to_all_single", "send", "recv",
    "isend", "irecv", "broadcast_object_list",
}  # fmt: skip


def within(folder: str) -> list[Path]:
    return [path for path in SOURCES if path.is_relative_to(ROOT / folder)]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (module, whether at the top level) for every import of a file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", id(node) in top


def imported_names(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield what `imports` does, and every name that is taken from a module: it may be one."""
    yield from imports(path)
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                # tensor.scatter(...) and the like are no collectives
                owner = ast.unparse(function.value)
                if owner in ("dist", "torch.distributed"):
                    yield function.attr
            elif isinstance(function, ast.Name):
                yield function.id


def offenders(paths: list[Path], wrong: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in calls(path)
        if name in wrong
    ]


def test_groups_are_created_in_one_place() -> None:
    elsewhere = [path for path in SHIPPED if not path.is_relative_to(ROOT / "stage_groups")]
    assert offenders(elsewhere, GROUP_MAKERS) == []
    assert offenders(within("stage_groups"), GROUP_MAKERS) != []


def test_collectives_are_called_in_one_place() -> None:
    home = ROOT / "vocab_parallel" / "collectives.py"
    assert offenders([path for path in within("vocab_parallel") if path != home], COLLECTIVES) == []
    assert offenders([home], COLLECTIVES) != []


def imported(paths: list[Path], prefix: str) -> list[tuple[Path, bool]]:
    return [
        (path.relative_to(ROOT), top)
        for path in paths
        for module, top in imported_names(path)
        if module == prefix or module.startswith(prefix + ".")
    ]


KERNELS, BACKENDS = ("vocab_parallel", "kernels"), ("vocab_parallel", "backends")


def test_triton_is_lazy() -> None:
    for package in ("triton", "cut_cross_entropy"):
        for path, top in imported(SHIPPED, package):
            assert path.parts[:2] in (KERNELS, BACKENDS), path
            assert not top or path.parts[1] == "kernels", path
    loaded_by_name = ("triton.py", "hopper.py")
    for path, top in imported(within("vocab_parallel"), "vocab_parallel.kernels"):
        assert not top or path.parts[1] == "kernels" or path.name in loaded_by_name, path
    for backend in loaded_by_name:
        name = f"vocab_parallel.backends.{backend.removesuffix('.py')}"
        importers = {path.name for path, _ in imported(within("vocab_parallel"), name)}
        assert importers <= set(loaded_by_name), importers


def test_local_work_knows_no_group() -> None:
    for folder in ("vocab_parallel/backends", "vocab_parallel/kernels"):
        assert imported(within(folder), "torch.distributed") == []


def test_pipelining_is_imported_where_schedules_are() -> None:
    for path, _ in imported(SHIPPED, "torch.distributed.pipelining"):
        assert path.parts[:2] == ("vocab_parallel", "pipeline") or path.parts[0] == "launch", path


# What each room may not import: data flows from kernels and rows towards the schedule.
LATER = {
    "kernels": ("backends", "arguments", "engine", "modules", "pipeline", "functional"),
    "backends": ("arguments", "engine", "collectives", "modules", "pipeline", "functional"),
    "distillation": ("modules", "pipeline", "evaluation", "adapters"),
    "modules": ("pipeline", "functional", "evaluation", "adapters"),
    "pipeline": ("adapters",),
}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("vocab_parallel", ("launch", "benchmarks", "tests")),
        ("stage_groups", ("vocab_parallel", "launch", "benchmarks", "tests")),
        ("launch", ("benchmarks", "tests")),
        ("benchmarks", ("tests",)),
        *(
            (f"vocab_parallel/{room}", tuple(f"vocab_parallel.{other}" for other in later))
            for room, later in LATER.items()
        ),
    ],
)
def test_data_flows_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    for prefix in forbidden:
        assert imported(within(folder), prefix) == []


def test_planning_knows_nothing_of_the_trainer() -> None:
    """The planner imports itself, the timing that benchmarks share, and of the loss public names.

    And the order of a step over all stages, which is pure Python: it plans what will run. A
    config.json is read as training reads it.
    """
    strangers = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in within("launch/planning")
        for module, _ in imports(path)
        if module.partition(".")[0] in ("launch", "vocab_parallel", "stage_groups")
        and not module.startswith("launch.planning.")
        and module
        not in (
            "launch.configs",
            "launch.timing",
            "vocab_parallel",
            "vocab_parallel.pipeline.spanning",
            "vocab_parallel.pipeline.spanning.order",
        )
    ]
    assert strangers == []
    assert imported(within("launch/planning"), "launch.planning") != []
    assert imported([ROOT / "launch" / "timing.py"], "launch") == []


def test_the_top_level_stays() -> None:
    """Whoever looks for a place for a line has six folders of code to choose from, and docs."""
    found = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    code = {"vocab_parallel", "stage_groups", "launch", "benchmarks", "tests", "examples"}
    assert found == code | {"docs"}  # a hook of the site's


def test_no_module_level_state() -> None:
    """A module's own names are constants, types and functions: nothing that a call changes."""
    for path in within("vocab_parallel") + within("stage_groups"):
        tree = ast.parse(path.read_text())
        globals_written = [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
        assert globals_written == [], path


def closure(module: str) -> set[Path]:
    """Every file of the package that a module's imports lead to, lazy ones too."""
    found: set[Path] = set()
    seen: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in seen or not path.exists():
            continue
        seen.add(path)
        tree = ast.parse(path.read_text())
        if len(tree.body) > 1:  # more than a docstring
            found.add(path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vocab_parallel"
            ):
                waiting.append(node.module)
                waiting += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_the_loss_reads_few_files() -> None:
    """A reader of the loss can hold it: what it imports, and the backend that works on a CPU.

    Those of GPUs and Apple's kernels are loaded by name when a call chooses them.
    """
    files = closure("vocab_parallel.functional") | closure("vocab_parallel.backends.torch")
    assert len(files) <= 19, sorted(str(path.relative_to(ROOT)) for path in files)


def test_importing_the_loss_is_light() -> None:
    """Neither kernels nor schedules are loaded until they are used."""
    code = (
        "import sys, vocab_parallel, stage_groups;"
        "heavy = {'triton', 'cut_cross_entropy', 'transformers', 'torch.distributed.pipelining'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    bare = "import sys, torch, torch.distributed.tensor; print(*sys.modules)"
    before = subprocess.run(
        [sys.executable, "-c", bare], capture_output=True, text=True, check=True
    )
    if "triton" in before.stdout.split():
        pytest.skip("torch itself imports triton here")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_planner_is_light() -> None:
    """The models, pictures, schedules and kernels are loaded where they are used."""
    code = (
        "import importlib, pkgutil, sys, launch.planning as planning\n"
        "for module in pkgutil.walk_packages(planning.__path__, 'launch.planning.'):\n"
        "    importlib.import_module(module.name)\n"
        "heavy = {'transformers', 'matplotlib', 'torch.distributed.pipelining',"
        " 'vocab_parallel.kernels', 'cut_cross_entropy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
