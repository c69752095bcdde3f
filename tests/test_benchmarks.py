"""The benchmarks that start ranks, or that others' decisions hang on, on small shapes."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vocab_parallel
from benchmarks import contestants, host
from benchmarks.contestants import Gradients
from benchmarks.exact import exact_gradients, relative_errors
from benchmarks.older import older_library
from benchmarks.ranks import Ranks
from benchmarks.several_gpus import FLOOR_OF, LAYOUTS, WAYS
from benchmarks.several_gpus_table import between_markers, markdown
from tests.ranks import ROOT, run_program, run_ranks
from vocab_parallel import VocabParallelOptions

CPU = torch.device("cpu")
OURS = [f"ours, {way}" for way in WAYS]
NOT_INSTALLED = ("liger, tensor-parallel, fallback", "fla, process group")
EVEN, UNEVEN = "48x16x600", "48x16x601"


def test_several_gpus(tmp_path: Path) -> None:
    """One start, on two ranks; what it printed last is what it wrote."""
    command = ["-m", "benchmarks.several_gpus", "--shapes", EVEN, UNEVEN, "--rounds", "2"]
    against = ["--against", str(ROOT)]  # the same code, as if it were older
    code, output = run_program(2, [*command, *against, "--out", str(tmp_path)])
    assert code == 0, output[-6000:]
    last = next(line for line in reversed(output.splitlines()) if line.startswith("{"))
    document = json.loads(last)
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()) == document
    assert written.with_suffix(".png").stat().st_size > 0
    assert document["ranks"] == 2
    even, uneven = (document["shapes"][shape] for shape in (EVEN, UNEVEN))
    for found in (even, uneven):
        assert_every_way_in_every_layout(found)
        for name in NOT_INSTALLED:
            assert "No module named" in found["missing"][f"{name} [replicated]"]
        assert not found["rows"].keys() & found["missing"].keys()
    for layout in ("replicated", "sequence"):  # torch's is there, and wants equal shards
        name = f"torch, loss_parallel [{layout}]"
        assert name in even["rows"]
        assert "2 ranks do not divide 601 rows" in uneven["missing"][name]
    assert_tables_of_the_page(document)


def assert_every_way_in_every_layout(found: dict[str, Any]) -> None:
    rows = found["rows"]
    assert [name for name in rows if name.startswith("ours")] == [
        f"{name} [{layout}]" for layout in LAYOUTS for name in OURS
    ]
    older = [name.replace("ours", "older") for name in rows if name.startswith("ours")]
    assert [name for name in rows if name.startswith("older")] == older
    for row in rows.values():
        floor = found["floors"][FLOOR_OF[row["layout"]]]
        assert row["over_floor"] == row["milliseconds"] / found["floors"]["products"]
        assert row["over_floor_with_collectives"] == row["milliseconds"] / floor
        gradients = row["peak"] - row["held"]  # float32, D = 16, at least 300 rows
        assert gradients >= 4 * 16 * (300 + (48 if row["layout"] == "replicated" else 24))
        assert row["same_in_two_calls"]
        assert row["same_on_all_ranks"] is (True if row["layout"] == "replicated" else None)
        assert len(row["errors"]) == 4
        for kind, error in row["errors"].items():
            assert 0 < error < (1e-6 if "random" in kind else 1e-3), (row, kind)


def assert_tables_of_the_page(document: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    once = between_markers(page, markdown(document))
    assert once == between_markers(once, markdown(document))
    for layout in LAYOUTS:
        assert f"\n| {layout} | 48 x 16 x 600 | 48 x 16 x 601 |" in once
    with pytest.raises(ValueError, match="expected a page with the lines"):
        between_markers("", "")


def check_what_ranks_agree_on() -> None:
    """What fails on every rank is left out; what fails on one rank alone ends the run."""
    patience = 3
    ranks = Ranks.over_default_group(CPU, patience)
    group = dist.new_group(timeout=timedelta(seconds=patience))
    rank = dist.get_rank()

    def reduce() -> Gradients:
        reduced = torch.ones(1)
        dist.all_reduce(reduced, group=group)
        return reduced, reduced

    def unsupported() -> Gradients:
        raise NotImplementedError("no such shape")

    def missing_on_one() -> Any:
        if rank == 1:
            raise ImportError("not installed")
        return reduce

    def raises_on_one() -> Gradients:
        if rank == 1:
            raise RuntimeError("a fault of one rank")
        return reduce()

    assert ranks.enter("a", lambda: reduce) == (reduce, "")
    assert ranks.enter("b", missing_on_one) == (None, "rank 1: ImportError: not installed")
    assert ranks.enter("c", lambda: unsupported) == (None, "NotImplementedError: no such shape")
    assert ranks.enter("a", lambda: reduce) == (reduce, "")
    assert ranks.slowest({"a": [1.0 + rank, 2.0 - rank]}) == {"a": [2.0, 2.0]}
    with pytest.raises(RuntimeError, match=r"d raised on some ranks alone.*a fault of one rank"):
        ranks.enter("d", lambda: raises_on_one)


def check_exact_gradients(tokens: int, hidden: int, vocabulary: int) -> None:
    """Over a group they are what autograd finds of the whole classifier in float64."""
    options = VocabParallelOptions.from_vocab(vocabulary, dist.group.WORLD)
    drawn = contestants.draw_over_group(tokens, hidden, options, torch.float32, CPU)
    for case in (drawn, contestants.confident(drawn)):
        shards = [None] * dist.get_world_size()
        dist.all_gather_object(shards, case.rows.detach())
        rows = torch.cat(shards).double().requires_grad_()  # type: ignore[arg-type]
        e = case.hidden.detach().double().requires_grad_()
        loss = F.cross_entropy(F.linear(e, rows), case.targets)
        hidden_grad, rows_grad = torch.autograd.grad(loss, (e, rows))
        own = slice(options.start, options.stop)
        found = exact_gradients(case)
        errors = relative_errors(found, (hidden_grad, rows_grad[own]), case)
        assert max(errors.values()) < 1e-10, errors  # autograd cancels 1 - p
        half = case.laid_out("sharded")
        off = found[0][half.own_tokens] * 1.5, found[1]
        assert relative_errors(off, found, half) == pytest.approx({"dE": 0.5, "dC": 0.0})
    assert float(loss.detach()) < 0.1  # confident


def check_parts() -> None:
    check_exact_gradients(tokens=10, hidden=64, vocabulary=33)
    check_what_ranks_agree_on()


def test_parts_of_several_gpus() -> None:
    run_ranks(check_parts, 2)


def test_host_times(capsys: pytest.CaptureFixture[str]) -> None:
    operands = contestants.draw(32, 8, 40, torch.float32, CPU)
    forwards = host.contestants(operands, ROOT)
    losses = [float(forward().detach()) for forward in forwards.values()]
    assert losses == pytest.approx([losses[-1]] * len(losses), rel=1e-5)
    found = host.measure(forwards, operands, microbatches=3, loops=2)
    assert found.keys() == forwards.keys()
    assert all(one.forward_microseconds > 0 < one.backward_microseconds for one in found.values())
    assert all(one.microbatch_milliseconds > 0 for one in found.values())
    host.print_profiles("ours", forwards["ours, auto"], operands, calls=2)
    printed = capsys.readouterr().out
    assert printed.count("Ordered by: internal time") == 2
    assert "run_backward" in printed
    with pytest.raises(ValueError, match="expected names of"):
        host.chosen(forwards, ("nobody",))


def test_an_older_library_beside_todays() -> None:
    """It is another copy of the code, and what it times is the same loss."""
    older = older_library(ROOT)
    assert older.__name__ != vocab_parallel.__name__
    assert older.linear_cross_entropy is not vocab_parallel.linear_cross_entropy
    operands = contestants.draw(16, 8, 40, torch.float64, torch.device("cpu"))
    for case in (operands, *contestants.other_targets(operands).values()):
        assert 0 <= int(case.targets.min()) <= int(case.targets.max()) < 40
        for options in ({"backward": "probs"}, {}):
            pair = zip(
                contestants.ours(case, loss=older.linear_cross_entropy, **options)(),
                contestants.ours(case, **options)(),
                strict=True,
            )
            assert all(torch.equal(*both) for both in pair)
    with pytest.raises(ValueError, match="expected a checkout with the package"):
        older_library(ROOT / "docs")
