"""A classifier, and an embedding tied to it, whose rows are a DTensor over data-parallel ranks.

A DTensor, because what meets such a weight knows one: optimizers keep its rows apart, norms are
summed over its mesh, and ``get_model_state_dict`` gives the whole. A call of either module gathers
the rows, and the gradient of the rows is the mean over the ranks, as DDP's and FSDP2's are, by one
reduce-scatter; all ranks of the mesh call it, each with its own tokens.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor


class _ShardedRows(nn.Module):
    """Parameters that are DTensors; a load from whole tensors takes this rank's rows of them."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, rows in self.named_parameters(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and not isinstance(given, DTensor):
                state_dict[prefix + name] = own_rows(given, cast(DTensor, rows))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ShardedLinear(_ShardedRows, nn.Linear):
    """A linear layer [vocab_size, D] of which this rank holds the rows of ``Shard(0)``."""

    logits_are_linear = True  # for OutputWeight

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., vocab_size)
        """Return whole logits."""
        bias = None if self.bias is None else _gathered(self.bias)
        return F.linear(hidden, _gathered(self.weight), bias)


class ShardedEmbedding(_ShardedRows, nn.Embedding):
    """An embedding [vocab_size, D] of which this rank holds the rows of ``Shard(0)``."""

    def forward(self, ids: Tensor) -> Tensor:  # (...) -> (..., D)
        """Return the rows of ids."""
        return F.embedding(ids, _gathered(self.weight), self.padding_idx)


_SHARDED: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {nn.Linear: ShardedLinear, nn.Embedding: ShardedEmbedding}
)
_WHOLE = MappingProxyType({sharded: whole for whole, sharded in _SHARDED.items()})


def can_be_sharded(module: nn.Module) -> bool:
    """Tell whether `shard_rows` takes a module: a plain nn.Linear or nn.Embedding."""
    plain = all(type(own) is nn.Parameter for own in module.parameters())
    options = (getattr(module, name, None) for name in ("max_norm", "sparse", "scale_grad_by_freq"))
    return type(module) in _SHARDED and plain and not any(options)


def shard_rows(modules: list[nn.Module], mesh: DeviceMesh) -> None:
    """Leave each rank its rows of modules, which keep what they share; every rank calls.

    Rank 0's rows are scattered. The modules become `ShardedLinear` and `ShardedEmbedding`.

    Args:
        modules: those that `can_be_sharded`.
        mesh: of one axis.
    """
    _change(modules, _SHARDED, lambda whole: distribute_tensor(whole, mesh, [Shard(0)]))


def make_whole(modules: list[nn.Module]) -> None:
    """Undo `shard_rows`: every rank calls and gets all rows."""
    _change(modules, _WHOLE, lambda rows: cast(DTensor, rows).full_tensor())


def is_sharded(module: nn.Module) -> bool:
    """Tell whether `shard_rows` made a module what it is."""
    return isinstance(module, _ShardedRows)


def own_rows(whole: Tensor, like: DTensor) -> DTensor:
    """Take of a whole tensor, equal on every rank, what this rank has of another; no exchange."""
    own = whole.detach().to(like.device)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)


def _change(
    modules: list[nn.Module],
    classes: Mapping[type[nn.Module], type[nn.Module]],
    function: Callable[[Tensor], Tensor],
) -> None:
    """Give modules other classes, and function(parameter) for every parameter, shared as before."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, old in list(module.named_parameters(recurse=False)):
            if old not in replaced:
                replaced[old] = nn.Parameter(function(old.detach()), old.requires_grad)
            setattr(module, name, replaced[old])
        module.__class__ = classes[type(module)]


def _gathered(rows: Tensor) -> Tensor:
    return cast(DTensor, rows).full_tensor(grad_placements=[Partial("avg")])
