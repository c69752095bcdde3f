"""Whatever replaces or copies the parameters of a rank's rows, they stay known as rows."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrizations, parametrize

from stage_groups import StageGroups, build_stage_groups
from tests.oracle import relative_error
from tests.ranks import run_ranks
from vocab_parallel import (
    CCEPipelineLoss,
    VocabParallelClassifier,
    VocabParallelEmbedding,
    VocabParallelOptions,
    clip_grad_norm_,
)
from vocab_parallel.modules.vocab_rows import holds_vocab_rows

HIDDEN, VOCABULARY = 6, 11
ROWS = (8, 3)  # of the two vocab ranks


class Head(VocabParallelClassifier):
    """Rows, and beside them a factor that is the same on every rank."""

    def __init__(self, group: Any, **options: Any) -> None:
        super().__init__(HIDDEN, VOCABULARY, group=group, rows=ROWS, bias=True, **options)
        self.factor = nn.Parameter(torch.zeros(2, HIDDEN))


class Stage(nn.Module):
    def __init__(self, group: Any, **options: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.embed = VocabParallelEmbedding(HIDDEN, VOCABULARY, group=group, rows=ROWS, **options)
        self.head = Head(group, **options)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.layer(self.embed(ids))
        return hidden @ self.head.weight.sum(0) + self.head.bias.sum()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def reloaded(stage: nn.Module, **options: Any) -> nn.Module:
    state = {name: tensor.detach().clone() for name, tensor in stage.state_dict().items()}
    stage.load_state_dict(state, **options)
    return stage


def with_flag(setter: str, change: Callable[[nn.Module], nn.Module], stage: nn.Module) -> nn.Module:
    """Change a stage while one of torch's rules of conversion is another."""
    rule = getattr(torch.__future__, setter)
    rule(True)
    try:
        return change(stage)
    finally:
        rule(False)


def assigned(stage: Stage) -> nn.Module:
    stage.head.weight = nn.Parameter(stage.head.weight.detach().clone())
    stage.embed.register_parameter("weight", nn.Parameter(stage.embed.weight.detach().clone()))
    return stage


def tied(stage: Stage) -> nn.Module:
    stage.embed.weight = nn.Parameter(stage.head.weight.detach().clone())
    stage.head.weight = stage.embed.weight
    return stage


def parametrized(stage: Stage, then: Callable[[nn.Module], nn.Module]) -> nn.Module:
    parametrize.register_parametrization(stage.head, "weight", Doubled())
    return then(stage)


def normed(stage: Stage) -> nn.Module:
    parametrizations.weight_norm(stage.head)
    return stage


def sharded(stage: nn.Module, groups: StageGroups) -> nn.Module:
    return fully_shard(stage, mesh=groups.mesh["data"])


def run_once(stage: nn.Module) -> nn.Module:
    """Let FSDP2 put whole parameters in the place of its shards, and its shards back."""
    stage(torch.arange(4)).sum().backward()
    return stage


def replaced(groups: StageGroups) -> dict[str, Callable[[], nn.Module]]:
    """Return stages whose parameters are not those of their construction, by what was done."""
    group = groups.vocab_group
    swap, overwrite = (f"set_{rule}_module_params_on_conversion" for rule in ("swap", "overwrite"))
    return {
        "nothing": lambda: Stage(group),
        "to_empty": lambda: Stage(group, device="meta").to_empty(device="cpu"),
        "load, assigned": lambda: reloaded(Stage(group), assign=True),
        "load, swapped": lambda: with_flag(swap, reloaded, Stage(group)),
        "double, swapped": lambda: with_flag(swap, nn.Module.double, Stage(group)),
        "double, new": lambda: with_flag(overwrite, nn.Module.double, Stage(group)),
        "assignment": lambda: assigned(Stage(group)),
        "tied here": lambda: tied(Stage(group)),
        "deep copy": lambda: copy.deepcopy(Stage(group)),
        "parametrized": lambda: parametrized(Stage(group), copy.deepcopy),
        "parametrized, load": lambda: parametrized(
            Stage(group), lambda stage: reloaded(stage, assign=True)
        ),
        "parametrized, to_empty": lambda: parametrized(
            Stage(group, device="meta"), lambda stage: stage.to_empty(device="cpu")
        ),
        "fully_shard": lambda: run_once(sharded(Stage(group), groups)),
        "fully_shard, to_empty": lambda: reloaded(
            sharded(Stage(group, device="meta"), groups).to_empty(device="cpu")
        ),
        "fully_shard, load": lambda: run_once(reloaded(sharded(Stage(group), groups), assign=True)),
    }


def give_gradients(stage: nn.Module, groups: StageGroups, seed: int) -> Tensor:
    """Give each parameter its part of a gradient of the whole model; return their norm."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(())
    for name, parameter in stage.named_parameters():
        has_rows = name.startswith(("head.", "embed.")) and name != "head.factor"
        shape = (VOCABULARY, *parameter.shape[1:]) if has_rows else parameter.shape
        whole = torch.randn(shape, generator=generator)
        squares += whole.square().sum()
        own = whole[stage.head.start : stage.head.stop] if has_rows else whole
        own = own.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            own = distribute_tensor(own, parameter.device_mesh, parameter.placements)
        parameter.grad = own.clone()
    return squares.sqrt()


def check_norms() -> None:
    groups = build_stage_groups(1, 2, data=2, device_type="cpu")
    for seed, (what, make) in enumerate(replaced(groups).items()):
        stage = make()
        for parameters in (list(stage.parameters()), stage):
            expected = give_gradients(stage, groups, seed)
            norm = clip_grad_norm_(parameters, 1e9, groups)
            assert relative_error(norm, expected) < 1e-6, (what, type(parameters))
    # A parametrization that makes the rows of several parameters is known by its module.
    stage = normed(Stage(groups.vocab_group))
    expected = give_gradients(stage, groups, 0)
    assert relative_error(clip_grad_norm_(stage, 1e9, groups), expected) < 1e-6
    check_flat_parameters(groups)


def check_flat_parameters(groups: StageGroups) -> None:
    """FSDP1's flat parameter on one rank is refused on every rank."""
    body = nn.Linear(3, 3)
    for use_orig_params in (False, True):
        stage: nn.Module = Stage(groups.vocab_group)
        if groups.vocab_rank == 1:
            stage = FullyShardedDataParallel(
                stage,
                process_group=groups.data_group,
                use_orig_params=use_orig_params,
                device_id=torch.device("cpu"),
            )
        for parameters in (stage, stage.parameters(), [*body.parameters(), *stage.parameters()]):
            with pytest.raises(ValueError, match=r"part of FSDP1's flat parameter.*fully_shard"):
                clip_grad_norm_(parameters, 1.0, groups)


def test_norms() -> None:
    run_ranks(check_norms, 4)


class Everything(nn.Module):
    """A stage that also holds what else has a group."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.head = VocabParallelClassifier(HIDDEN, VOCABULARY, group=group, rows=ROWS, bias=True)
        self.options = VocabParallelOptions.from_vocab(VOCABULARY, group)
        self.loss = CCEPipelineLoss(self.head)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(hidden), labels)


def check_copies() -> None:
    group = dist.new_group([0, 1])
    hidden, labels = torch.randn(4, HIDDEN), torch.randint(VOCABULARY, (4,))
    for tensor in (hidden, labels):
        dist.broadcast(tensor, 0)
    stage = Everything(group)
    expected = stage(hidden, labels)
    copied = copy.deepcopy(stage)
    assert torch.equal(copied(hidden, labels), expected)
    assert copied.head.group is copied.options.group is group
    assert copied.head.row_counts == ROWS
    assert copied.head.options.largest_shard == 8
    assert copied.options == copy.copy(stage.options) == stage.options
    assert holds_vocab_rows(copied.head.weight)
    assert copy.copy(stage.head).weight is stage.head.weight
    average = torch.optim.swa_utils.AveragedModel(stage)
    assert torch.equal(average.module(hidden, labels), expected)
    with torch.no_grad():
        average.module.head.weight.add_(1.0)
        average.module.head.bias.zero_()
    assert torch.equal(stage(hidden, labels), expected), "a deep copy has its own rows"
    assert not torch.equal(average.module(hidden, labels), expected), "and its loss reads them"

    for held in (stage, stage.head, stage.options, stage.loss):
        with pytest.raises(ValueError, match="process group, which cannot be pickled: save"):
            pickle.dumps(held)
    default = Everything(None)
    for rebuilt in (pickle.loads(pickle.dumps(default)), copy.deepcopy(default)):
        assert torch.equal(rebuilt(hidden, labels), default(hidden, labels))
        assert holds_vocab_rows(rebuilt.head.bias)
        assert rebuilt.options == default.options


def test_copies() -> None:
    run_ranks(check_copies, 2)
