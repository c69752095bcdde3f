"""A linear classifier whose rows are a DTensor over data-parallel ranks, which all need its logits.

A DTensor, because everything that meets such a weight knows one: optimizers keep its rows apart,
norms are summed over its mesh, and ``get_model_state_dict`` gives the whole.
"""

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor


class ShardedLinear(nn.Linear):
    """A linear layer [vocab_size, D] of which this rank holds the rows of ``Shard(0)``.

    A call gathers the rows, [vocab_size, D] and the bias, and gives this rank's hidden states whole
    logits; all ranks of the mesh call it, each with its own hidden states. The gradient of the rows
    is the mean over the ranks, as DDP's and FSDP2's are, by one reduce-scatter.
    """

    logits_are_linear = True  # for OutputWeight

    @classmethod
    def of(cls, linear: nn.Linear, mesh: DeviceMesh) -> Self:
        """Take rank 0's layer, sharded over a mesh of one axis; every rank of it calls.

        Rank 0 scatters its rows; the layer can be freed after.
        """
        own = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )
        for name, whole in linear.named_parameters():
            rows = distribute_tensor(whole.detach(), mesh, [Shard(0)])
            setattr(own, name, nn.Parameter(rows, requires_grad=whole.requires_grad))
        return own.train(linear.training)

    def whole(self) -> nn.Linear:
        """Return the layer with all rows; every rank of the mesh calls and gets it."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        for name, rows in self.named_parameters():
            whole = rows.detach().full_tensor()  # type: ignore[operator]
            setattr(linear, name, nn.Parameter(whole, requires_grad=rows.requires_grad))
        return linear.train(self.training)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., vocab_size)
        """Return whole logits."""
        bias = None if self.bias is None else _gathered(self.bias)
        return F.linear(hidden, _gathered(self.weight), bias)


def _gathered(rows: Tensor) -> Tensor:
    assert isinstance(rows, DTensor)
    return rows.full_tensor(grad_placements=[Partial("avg")])
