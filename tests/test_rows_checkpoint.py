"""Checkpoints of rows: saved on any partition of the vocabulary, loaded on any other."""

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import (
    BlockingAsyncStager,
    DefaultStager,
    StagingOptions,
)
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.distributed.device_mesh import DeviceMesh

from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import VocabParallelClassifier, rows_as_dtensor, rows_for_checkpoint

HIDDEN, VOCABULARY = 3, 16
RATE = 0.1


@dataclass(frozen=True)
class Place:
    """Where a run goes on: its rows by rank, how they are told, and how many ranks hold each."""

    rows: tuple[int, ...] | None = None
    degree: int = 0
    form: str = "rows"  # or "dtensor", "whole"
    replicas: int = 1
    in_background: bool = False


# Each loads what the one before it has saved.
PLACES = [
    Place((5, 0, 11)),
    Place(degree=2),
    Place(degree=1),
    Place((0, 13, 0, 3), in_background=True),
    Place((16, 0), replicas=2),
    Place(degree=2, form="dtensor"),
    Place((5, 0, 11), in_background=True),
    Place(degree=1, form="whole"),
    Place((1, 2, 0, 13)),
    Place(degree=3, form="dtensor"),
    Place((0, 16)),
]


def check_places(folder: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)  # ranks that sit out a place draw alike
    whole = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.float64)
    single = torch.optim.AdamW(whole.parameters(), lr=RATE)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)}
    pairs = dist.new_subgroups(2)[0]
    before: Path | None = None
    for step, place in enumerate(PLACES):
        degree = place.degree or len(place.rows or ())
        ranks = degree * place.replicas
        gradients = [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            for parameter in whole.parameters()
        ]
        saved = Path(folder) / str(step)
        if dist.get_rank() < ranks:
            group = pairs if place.replicas > 1 else groups.get(degree)
            carry_on(place, group, groups.get(ranks), whole, single, gradients, before, saved)
        for parameter, gradient in zip(whole.parameters(), gradients, strict=True):
            parameter.grad = gradient
        single.step()
        before = saved
        dist.barrier()
    check_a_gap(Path(folder) / "gap", groups[2])


def carry_on(
    place: Place,
    vocab_group: ProcessGroup | None,
    group: ProcessGroup | None,
    whole: nn.Linear,
    single: torch.optim.Optimizer,
    gradients: list[Tensor],
    before: Path | None,
    saved: Path,
) -> None:
    """Load, compare with the whole of one process, train a step and save."""
    head = VocabParallelClassifier(
        HIDDEN, VOCABULARY, group=vocab_group, rows=place.rows, bias=True, dtype=torch.float64
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE)
    own = slice(head.start, head.stop)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    state = state_of(place, head, optimizer)
    if before is None:
        head.load_state_dict({k: tensor[own] for k, tensor in whole.state_dict().items()})
        for moments in optimizer.state.values():
            moments["step"].zero_()
    else:
        dcp.load(state, checkpoint_id=before, process_group=group)
        for found, expected in zip(head.parameters(), whole.parameters(), strict=True):
            assert relative_error(found.detach(), expected.detach()[own]) < 1e-14, place
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                ours, theirs = optimizer.state[found][moment], single.state[expected][moment]
                theirs = theirs[own] if theirs.dim() else theirs
                assert relative_error(ours, theirs) < 1e-14, (place, moment)
    for parameter, gradient in zip(head.parameters(), gradients, strict=True):
        parameter.grad = gradient[own].clone()
    optimizer.step()
    if not place.in_background:
        dcp.save(state, checkpoint_id=saved, process_group=group)
        return
    future = dcp.async_save(state, checkpoint_id=saved, process_group=group)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()  # training goes on
    future.result()


def state_of(
    place: Place, head: VocabParallelClassifier, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Name what a run has by what it is of the whole."""
    tell = partial(rows_for_checkpoint, start=head.start, vocab_size=VOCABULARY)
    if place.form == "dtensor":
        assert head.group is not None
        mesh = DeviceMesh.from_group(head.group, "cpu")
        tell = partial(rows_as_dtensor, vocab_size=VOCABULARY, mesh=mesh)
        with pytest.raises(ValueError, match="one that is a DTensor"):
            rows_for_checkpoint(tell(head.weight), head.start, VOCABULARY)
    elif place.form == "whole":
        tell = Tensor.detach
    state = {}
    for name, parameter in head.named_parameters():
        state[name] = tell(parameter)
        for role, moment in optimizer.state[parameter].items():
            state[f"{role}.{name}"] = tell(moment) if moment.dim() else moment
    return state


def check_a_gap(folder: Path, group: ProcessGroup) -> None:
    """A row that nobody has is missed before anything is written, on every rank."""
    rank = dist.get_rank()
    if rank < 2:
        rows = rows_for_checkpoint(torch.zeros(7 + rank, 2), 8 * rank, 16)
        with pytest.raises(CheckpointException, match="Failed to validate global plan"):
            dcp.save({"rows": rows}, checkpoint_id=folder, process_group=group)
    dist.barrier()


def test_any_partition_to_any_other(tmp_path: Path) -> None:
    run_ranks(check_places, 4, folder=str(tmp_path))


def test_what_it_is_good_for() -> None:
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    told = rows_for_checkpoint(rows, 4, 16)
    assert told.shape == (16, 2)
    assert "rows [4, 7) of [16, 2]" in repr(told)
    for compute in (lambda: told + 1.0, lambda: told.sum(), lambda: torch.cat([told, told])):
        with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint alone: compute"):
            compute()


def test_copies() -> None:
    """Whatever stages a save in the background has the rows as they were, and where they lie."""
    rows = torch.arange(6.0).view(3, 2)
    told = {"rows": rows_for_checkpoint(rows, 4, 16)}
    options = StagingOptions(*[False] * 4)  # as async_save has them
    copies = [
        stage(told)["rows"]
        for stage in (
            DefaultStager(options).stage,
            BlockingAsyncStager().stage,
            copy.deepcopy,
            lambda state: pickle.loads(pickle.dumps(state)),
        )
    ]
    before = rows.clone()
    rows.zero_()
    for copied in copies:
        (item,) = copied.__create_write_items__("rows", copied)
        assert (item.tensor_data.size, item.index.offset) == ((16, 2), (4, 0))
        assert torch.equal(find_tensor_shard(copied, item.index), before)


def test_refused_rows() -> None:
    rows = torch.zeros(3, 2)
    for wrong, start, match in (
        (rows, -1, "from start=-1 on of a vocabulary of 16"),
        (rows, 14, r"from start=14 on of a vocabulary of 16, got \[3, 2\]"),
        (torch.tensor(1.0), 0, r"got \[\]: pass the start"),
        (rows.to("meta"), 0, "on the meta device"),
    ):
        with pytest.raises(ValueError, match=match):
            rows_for_checkpoint(wrong, start, 16)
