"""Where a pipeline loss finds the classifier: read at each call, never kept."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel.options import VocabParallelOptions, ceiling_rows


@dataclass(frozen=True)
class OutputWeight:
    """A classifier that somebody else owns.

    Attributes:
        owner: the module that owns it, a Parameter, or a DTensor sharded over its rows.
        bias: its bias; None takes the module's own, if it has one.
        options: which rows these are; None takes the module's ``.options``, or the DTensor's
            placement; a plain tensor is the whole vocabulary.
    """

    owner: nn.Module | Tensor
    bias: Tensor | None
    options: Any

    def __post_init__(self) -> None:
        if not isinstance(self.owner, Tensor) and not isinstance(
            getattr(self.owner, "weight", None), Tensor
        ):
            raise ValueError(
                f"output_weight must be a tensor or a module with a weight, got "
                f"{type(self.owner).__name__}"
            )

    @property
    def tensors(self) -> list[Tensor]:
        """The weight and, if there is one, the bias, as they are now."""
        owner = self.owner
        weight = owner if isinstance(owner, Tensor) else owner.weight
        bias = self.bias
        if bias is None and not isinstance(owner, Tensor):
            bias = getattr(owner, "bias", None)
        return [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]

    def read(self) -> tuple[Tensor, Tensor | None, Any]:
        """Return this rank's rows, their bias, and their options.

        Raises:
            ValueError: a DTensor that is not sharded over its rows alone.
        """
        weight, *rest = self.tensors
        options = self.options
        if options is None:
            options = getattr(self.owner, "options", None)
        if options is None and isinstance(weight, DTensor):
            options = _options_of_dtensor(weight)
        return _local(weight), _local(rest[0]) if rest else None, options


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _options_of_dtensor(weight: DTensor) -> VocabParallelOptions:
    """Read the rows of a DTensor [vocab, D] off its placement."""
    axes = [
        axis
        for axis, placement in enumerate(weight.placements)
        if not isinstance(placement, Replicate)
    ]
    rest = [weight.placements[axis] for axis in axes]
    if len(axes) > 1 or (rest and rest[0] != Shard(0)):
        raise ValueError(
            f"a DTensor classifier must be sharded by Shard(0) over one mesh axis, got "
            f"{weight.placements}: redistribute it, or pass vocab_parallel_options"
        )
    if not axes:
        raise ValueError(
            "a DTensor classifier that is replicated has no shard of rows: pass "
            "weight.to_local() of a plain module, or shard it by Shard(0)"
        )
    mesh = weight.device_mesh
    start, stop = ceiling_rows(weight.shape[0], mesh.get_local_rank(axes[0]), mesh.size(axes[0]))
    return VocabParallelOptions(start, stop, mesh.get_group(axes[0]), vocab_size=weight.shape[0])
