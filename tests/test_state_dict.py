"""torch's ordinary recipes of checkpoints, with rows of the vocabulary on several ranks."""

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

from stage_groups import build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    TiedRows,
    VocabParallelClassifier,
    VocabParallelEmbedding,
    linear_cross_entropy,
)

HIDDEN, VOCABULARY, FEW = 3, 11, 5  # rows of 2, 3 and 4 ranks: 6 + 5; 2 + 2 + 1; 2 + 2 + 1 + 0
RATE = 0.1
UNEVEN = {2: (8, 3), 3: (0, 7, 4)}
FULL = StateDictOptions(full_state_dict=True)
ON_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class Whole(nn.Module):
    """What one process has; `Sharded` has the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head: nn.Module = nn.Linear(HIDDEN, VOCABULARY)
        self.few: nn.Module = nn.Linear(HIDDEN, FEW, bias=False)
        self.double()


class Sharded(nn.Module):
    def __init__(self, group: ProcessGroup, rows: tuple[int, ...] | None = None) -> None:
        super().__init__()
        given: Any = {"group": group, "dtype": torch.float64}
        self.embed = VocabParallelEmbedding(HIDDEN, VOCABULARY, rows=rows, **given)
        self.body = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.head = VocabParallelClassifier(HIDDEN, VOCABULARY, rows=rows, bias=True, **given)
        self.few = VocabParallelClassifier(HIDDEN, FEW, **given)


def own(module: nn.Module, name: str, whole: Tensor) -> Tensor:
    """Return what a rank has of a tensor of the whole model."""
    owner: Any = module.get_submodule(name.partition(".")[0])
    return whole[owner.start : owner.stop] if hasattr(owner, "start") else whole


def assert_has(module: nn.Module, whole: nn.Module) -> None:
    expected = dict(whole.named_parameters())
    for name, parameter in module.named_parameters():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert relative_error(found.detach(), own(module, name, expected[name])) < 1e-14, name


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=RATE)


def take_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, gradients: dict[str, Tensor]
) -> None:
    for name, parameter in module.named_parameters():
        parameter.grad = own(module, name, gradients[name]).clone()
    optimizer.step()
    optimizer.zero_grad()


class Reference:
    """A whole model that has trained some steps, and its next step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Whole()
        self.first = copy.deepcopy(self.model)
        self.gradients = [
            {name: torch.randn_like(p) for name, p in self.model.named_parameters()}
            for _ in range(3)
        ]
        self.optimizer = optimizer_of(self.model)
        for gradients in self.gradients[:2]:
            take_step(self.model, self.optimizer, gradients)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        self.saved = copy.deepcopy({"model": model, "optimizer": optimizer})
        self.now = copy.deepcopy(self.model)
        take_step(self.model, self.optimizer, self.gradients[2])

    def trained(
        self, group: ProcessGroup, rows: tuple[int, ...] | None = None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return the same on a group's ranks, from the whole model's first weights."""
        module = Sharded(group, rows)
        optimizer = optimizer_of(module)
        module.load_state_dict(self.first.state_dict())
        for gradients in self.gradients[:2]:
            take_step(module, optimizer, gradients)
        assert_has(module, self.now)
        return module, optimizer

    def goes_on(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Assert that a resumed run's next step is the one of a run that never ended."""
        assert_has(module, self.now)
        take_step(module, optimizer, self.gradients[2])
        assert_has(module, self.model)


def load_there(
    reference: Reference,
    folder: Path,
    group: ProcessGroup,
    rows: tuple[int, ...] | None = None,
    process_group: ProcessGroup | None = None,
) -> None:
    module = Sharded(group, rows)
    optimizer = optimizer_of(module)
    model, of_optimizer = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder, process_group=process_group or group)
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    reference.goes_on(module, optimizer)


def load_on_meta(
    reference: Reference, folder: Path, group: ProcessGroup, rows: tuple[int, ...] | None
) -> None:
    """Give a module memory by a load alone."""
    with torch.device("meta"):
        module = Sharded(group, rows)
    state = get_model_state_dict(module)
    with warnings.catch_warnings(action="ignore"):  # torch's own, of its own function
        dcp.load({"model": state}, checkpoint_id=folder, process_group=group)
    module.load_state_dict(state, assign=True)
    assert_has(module, reference.now)


def save_there(
    reference: Reference,
    folder: Path,
    group: ProcessGroup,
    rows: tuple[int, ...] | None = None,
    process_group: ProcessGroup | None = None,
) -> None:
    """Save in the background, while training goes on."""
    module, optimizer = reference.trained(group, rows)
    model, of_optimizer = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": of_optimizer}
    saving = dcp.async_save(state, checkpoint_id=folder, process_group=process_group or group)
    reference.goes_on(module, optimizer)
    saving.result()


def assert_equal(found: Any, expected: Any) -> None:
    """Compare state dicts of whole tensors."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, Tensor):
        assert type(found) is Tensor
        assert relative_error(found, expected) < 1e-14
    else:
        assert found == expected


def check_other_ranks(reference: Reference, folder: Path, groups: dict[int, Any]) -> None:
    """What was saved on some ranks loads on others, in any partition, and into a whole model."""
    rank = dist.get_rank()
    saves: dict[str, tuple[int, tuple[int, ...] | None]] = {
        "2": (2, None),
        "3": (3, None),
        "uneven": (2, UNEVEN[2]),
    }
    for name, (degree, rows) in saves.items():
        if rank < degree:
            save_there(reference, folder / name, groups[degree], rows)
        dist.barrier()
        for other in (1, 2, 3):
            if rank < other:
                load_there(reference, folder / name, groups[other])
                if other in UNEVEN:
                    load_there(reference, folder / name, groups[other], UNEVEN[other])
                    load_on_meta(reference, folder / name, groups[other], None)
                    load_on_meta(reference, folder / name, groups[other], UNEVEN[other])
        if rank == 0:
            state = copy.deepcopy(reference.first.state_dict())
            dcp.load({"model": state}, checkpoint_id=folder / name, process_group=groups[1])
            assert_equal(state, reference.saved["model"])


def check_tied(folder: Path, groups: dict[int, Any]) -> None:
    """Ends of a tied weight on two stages, and both of them on one rank."""
    mesh = build_stage_groups(2, 2, device_type="cpu")
    torch.manual_seed(2)
    whole = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    given: Any = {"group": mesh.vocab_group, "dtype": torch.float64}
    stage = nn.Module()
    embedding = VocabParallelEmbedding(HIDDEN, VOCABULARY, **given)
    classifier = VocabParallelClassifier(HIDDEN, VOCABULARY, **given)
    if mesh.pipeline_rank == 0:
        stage.embed = embedding
    else:
        stage.head = classifier
    for end in stage.children():
        end.load_state_dict({"weight": whole})
    tied = TiedRows(
        getattr(stage, "embed", None),
        getattr(stage, "head", None),
        mesh.pipeline_group,
        first=0,
        last=1,
    )
    assert not tied.differs()
    full = get_model_state_dict(stage, options=FULL)
    assert list(full) == (["embed.weight"] if mesh.pipeline_rank == 0 else ["head.weight"])
    assert torch.equal(next(iter(full.values())), whole)
    dcp.save(get_model_state_dict(stage), checkpoint_id=folder)
    for degree in (2, 3):
        if dist.get_rank() >= degree:
            continue
        group = groups[degree]
        model = nn.Module()
        model.embed = VocabParallelEmbedding(HIDDEN, VOCABULARY, **{**given, "group": group})
        model.head = VocabParallelClassifier(HIDDEN, VOCABULARY, **{**given, "group": group})
        model.head.weight = model.embed.weight
        optimizer = optimizer_of(model)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_model_state_dict(model, state)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.gather_rows(model.head.weight), whole)
        of_optimizer = get_optimizer_state_dict(model, optimizer, options=FULL)
        assert of_optimizer["state"]["embed.weight"]["exp_avg"].shape == whole.shape
    dist.barrier()


def check_replicas(reference: Reference, folder: Path, vocab_group: ProcessGroup) -> None:
    """Two copies of the data axis save and load the same rows."""
    world = dist.group.WORLD
    save_there(reference, folder, vocab_group, process_group=world)
    load_there(reference, folder, vocab_group, process_group=world)
    assert world is not None
    load_there(reference, folder, world)


def check_full(reference: Reference, folder: Path) -> None:
    """State dicts of all rows, on every rank or the first alone, and loads of them."""
    world = dist.group.WORLD
    assert world is not None
    module, optimizer = reference.trained(world)
    model, of_optimizer = get_state_dict(module, optimizer, options=FULL)
    assert_equal(model, reference.saved["model"])
    assert_equal(of_optimizer, reference.saved["optimizer"])
    Whole().load_state_dict(model)
    model, of_optimizer = get_state_dict(module, optimizer, options=ON_FIRST)
    if dist.get_rank() == 0:
        assert_equal(model, reference.saved["model"])
        torch.save({"model": model, "optimizer": of_optimizer}, folder / "full.pt")
    else:
        assert model == of_optimizer == {}
    dist.barrier()
    for options in (FULL, FROM_FIRST):
        for rows in (None, (0, 6, 1, 4)):
            module = Sharded(world, rows)
            optimizer = optimizer_of(module)
            reads = options is FULL or dist.get_rank() == 0
            saved = torch.load(folder / "full.pt") if reads else {"model": {}, "optimizer": {}}
            set_model_state_dict(module, saved["model"], options=options)
            set_optimizer_state_dict(module, optimizer, saved["optimizer"], options=options)
            reference.goes_on(module, optimizer)
    # Without torch's functions, and on the meta device.
    saved = torch.load(folder / "full.pt")
    for assign in (False, True):
        with torch.device("meta" if assign else "cpu"):
            module = Sharded(world)
        module.load_state_dict(saved["model"], assign=assign)
        assert_has(module, reference.now)
        for parameter in module.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes or not assign
    with torch.device("meta"):
        module = Sharded(world)
    with warnings.catch_warnings(action="ignore"):  # torch's own, of its own function
        set_model_state_dict(module, saved["model"], options=FULL)
    assert_has(module, reference.now)


def check_own_files(reference: Reference, folder: Path, group: ProcessGroup) -> None:
    """A rank's own file loads; another rank's is refused on every rank."""
    rank, degree = dist.get_rank(), dist.get_world_size(group)
    is_refused = partial(pytest.raises, ValueError, match=r"needs rows .* but was given rows")
    module, optimizer = reference.trained(group)
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / f"{rank}.pt")
    dist.barrier(group)
    mine = torch.load(folder / f"{rank}.pt")
    foreign = torch.load(folder / f"{(rank + 1) % degree}.pt")
    other = Sharded(group)
    resumed = optimizer_of(other)
    with is_refused():
        other.load_state_dict(foreign["model"])
    other.load_state_dict(mine["model"])
    resumed.load_state_dict(foreign["optimizer"])  # not seen yet: the next step refuses it
    with is_refused():
        take_step(other, resumed, reference.gradients[2])
    resumed = optimizer_of(other)
    resumed.load_state_dict(mine["optimizer"])
    best = copy.deepcopy(other.state_dict())
    reference.goes_on(other, resumed)
    with is_refused():
        resumed.load_state_dict(foreign["optimizer"])
    other.load_state_dict(best)
    resumed.load_state_dict(torch.load(folder / f"{rank}.pt")["optimizer"])
    reference.goes_on(other, resumed)
    # Rows of a partition that no DTensor has know whose they are, too.
    uneven = Sharded(group, UNEVEN[degree])
    uneven.load_state_dict(copy.deepcopy(uneven.state_dict()))
    told: list[Any] = [None] * degree
    dist.all_gather_object(told, uneven.state_dict(), group=group)
    with is_refused():
        uneven.load_state_dict(told[(rank + 1) % degree])
    for options in (None, FULL):
        with pytest.raises(ValueError, match=r"torch\.save would keep rows .* for the whole"):
            torch.save(get_model_state_dict(uneven, options=options), folder / f"{rank}.pt")


def check_older(reference: Reference, group: ProcessGroup) -> None:
    """State dicts from before rows were named: plain tensors of a rank's rows."""
    module, optimizer = reference.trained(group)
    plain = {name: parameter.detach() for name, parameter in module.named_parameters()}
    other = Sharded(group)
    resumed = optimizer_of(other)
    other.load_state_dict(plain)
    state = optimizer.state_dict()
    state["state"] = dict(enumerate(optimizer.state.values()))
    resumed.load_state_dict(copy.deepcopy(state))
    reference.goes_on(other, resumed)
    for wrong in (torch.zeros(4, HIDDEN), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"or all of them, but .* another number of ranks"):
            other.head.load_state_dict({**other.head.state_dict(), "weight": wrong})


def check_what_is_refused(group: ProcessGroup) -> None:
    """What no state dict can say raises on every rank."""
    module = Sharded(group, UNEVEN[2])
    full = get_model_state_dict(module, options=FULL)
    with pytest.raises(RuntimeError, match=r"for torch\.distributed\.checkpoint alone"):
        Whole().load_state_dict(full)
    optimizer = torch.optim.Adafactor(module.parameters())
    with pytest.raises(ValueError, match=r"optimizer keeps a (row|col)_var .* which rows"):
        get_optimizer_state_dict(module, optimizer)
    assert module.head.state_dict(keep_vars=True)["weight"] is module.head.weight
    # What a parametrization makes rows of are rows too.
    normed = parametrizations.weight_norm(Sharded(group).head)
    full = get_model_state_dict(normed, options=FULL)
    assert full["parametrizations.weight.original0"].shape == (VOCABULARY, 1)
    expected = copy.deepcopy(normed)
    for parameter in normed.parameters():
        nn.init.zeros_(parameter)
    normed.load_state_dict(full)
    assert torch.equal(normed.weight, expected.weight)


def check_compiled_step(reference: Reference, group: ProcessGroup) -> None:
    """An optimizer whose step is compiled is seen too."""
    module = Sharded(group)
    optimizer = optimizer_of(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.compile(optimizer.step, backend="eager")()
    moments = optimizer.state_dict()["state"]
    names = [name for name, _ in module.named_parameters()]
    assert isinstance(moments[names.index("head.weight")]["exp_avg"], DTensor)


def check_fsdp_body(reference: Reference, folder: Path, vocab_group: ProcessGroup) -> None:
    """Rows beside a body that FSDP2 has sharded, over a data axis or over the vocab group."""
    world = dist.group.WORLD
    groups = build_stage_groups(1, 2, data=2, device_type="cpu")

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = Sharded(groups.vocab_group)
        module.load_state_dict(reference.first.state_dict())
        fully_shard(module.body, mesh=groups.mesh["data"])
        return module, torch.optim.AdamW(module.parameters(), lr=RATE, foreach=False)

    module, optimizer = build()
    get_optimizer_state_dict(module, optimizer)  # a step without gradients: moments of zero
    model, of_optimizer = get_state_dict(module, optimizer, options=FULL)
    assert_equal(model, reference.first.state_dict())
    assert of_optimizer["state"]["head.weight"]["exp_avg"].shape == (VOCABULARY, HIDDEN)
    model, of_optimizer = get_state_dict(module, optimizer)
    state = {"model": model, "optimizer": of_optimizer}
    dcp.save(state, checkpoint_id=folder, process_group=world)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    dcp.load(state, checkpoint_id=folder, process_group=world)
    set_model_state_dict(module, model)
    assert_has(module, reference.first)
    # FSDP2 around everything: rows are cut once more, and a checkpoint knows where.
    module = fully_shard(Sharded(groups.vocab_group), mesh=groups.mesh["data"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE)
    model, of_optimizer = get_state_dict(module, optimizer)
    dcp.load({"model": model}, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=model, optim_state_dict=of_optimizer)
    assert_has(module, reference.first)
    dcp.save({"model": model, "optimizer": of_optimizer}, checkpoint_id=folder / "cut")
    module.head.load_state_dict(reference.now.head.state_dict())
    whole = reference.now.head.weight.detach()
    cut = copy.deepcopy(module.head.weight).full_tensor()  # over the data axis alone
    assert torch.equal(cut, own(module, "head", whole))
    state = reference.first.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder / "cut")
    assert_equal(state, reference.first.state_dict())


def check_gradients_beside_fsdp(reference: Reference) -> None:
    """FSDP2 takes the mean over the vocab group where the loss has the sum: V undoes it."""
    world = dist.group.WORLD
    assert world is not None
    degree, rank = dist.get_world_size(), dist.get_rank()
    whole = copy.deepcopy(reference.first)
    torch.manual_seed(1)  # some ranks have drawn more than others
    hidden = torch.randn(degree, 5, HIDDEN, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (degree, 5))
    linear_cross_entropy(whole.body(hidden), whole.head.weight, targets, whole.head.bias).backward()
    module = Sharded(world)
    module.load_state_dict(reference.first.state_dict())
    fully_shard(module.body, mesh=build_stage_groups(1, degree, device_type="cpu").mesh["vocab"])
    linear_cross_entropy(
        module.body(hidden[rank]),
        module.head.weight,
        targets[rank],
        module.head.bias,
        vocab_parallel_options=module.head.options,
        hidden_layout="sharded",
        hidden_grad_scale=degree,
    ).backward()
    for name, parameter in whole.named_parameters():
        found = module.get_parameter(name).grad
        if parameter.grad is None:
            continue
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert relative_error(found, own(module, name, parameter.grad)) < 1e-12, name


def check_recipes(folder: str) -> None:
    reference = Reference()
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)}
    pairs = dist.new_subgroups(2)[0]
    check_other_ranks(reference, Path(folder), groups)
    check_replicas(reference, Path(folder) / "replicas", pairs)
    check_full(reference, Path(folder))
    check_tied(Path(folder) / "tied", groups)
    if dist.get_rank() < 2:
        check_own_files(reference, Path(folder), groups[2])
        check_older(reference, groups[2])
        check_what_is_refused(groups[2])
        check_compiled_step(reference, groups[2])
    dist.barrier()
    check_fsdp_body(reference, Path(folder) / "fsdp", pairs)
    check_gradients_beside_fsdp(reference)


def test_recipes(tmp_path: Path) -> None:
    run_ranks(check_recipes, 4, folder=str(tmp_path))
