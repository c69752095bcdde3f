"""A stage's body, sharded over the data axis by torch's FSDP2.

Each of the N ranks of the data group holds 1/N of every parameter, cut in dimension 0, with its
gradient and optimizer state. The whole weights and gradients exist while a schedule's step runs, as
torch's schedules have it: weights are gathered once for all its microbatches (with one stage a
rank, once for all of --accumulate), and gradients reduced once a step of the optimizer. So a
schedule may split the backward, too: nothing is gathered or dropped between its halves.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from launch.arguments import TrainArguments
from launch.model import PassThrough, Stage, vocabulary_rows
from vocab_parallel.split_backward import loses_nodes


class StageOfShards(PipelineStage):
    """A pipeline stage whose body is sharded over the data axis.

    Attributes:
        reduces: whether this schedule step ends in the sum of the gradients over the data axis. One
            that does not leaves them whole, for the next one to add to.
    """

    reduces = True

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Sum the gradients over the data axis, and keep this rank's shards of them.

        A parameter that no token of this copy has reached takes part as zeros.
        """
        if not self.reduces:
            return
        for parameter in self.submod.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        super().perform_reduce_grad(grad_scale_factor)


def refuse_to_shard(arguments: TrainArguments) -> None:
    """Refuse --shard-body where this torch would lose FSDP2's part of the graph.

    Raises:
        ValueError: a schedule that splits the backward, under a torch before 2.13.
    """
    if arguments.shard_body and arguments.splits_backward and loses_nodes():
        raise ValueError(
            f"--shard-body under --schedule {arguments.schedule}, which splits the backward, needs "
            f"torch 2.13 or newer, and this is {torch.__version__}: use 1F1B, Interleaved1F1B, "
            f"GPipe or LoopedBFS, or leave it out"
        )


def shard_body(stage: Stage, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard a stage's layers, plain embedding and norms over a mesh of one axis, in place.

    All ranks of the mesh call it, with equal weights; each keeps its part of them. Left whole are
    rows of the vocabulary, which the vocab group has cut, and parameters of another dtype, as some
    families keep a few in float32: `replicated_parameters`, whose gradients are the caller's to
    sum. From here on the stage runs by its ``forward`` alone.
    """
    layers = [layer for layer in stage.model.layers if not isinstance(layer, PassThrough)]
    rows = vocabulary_rows(stage)
    left_out = {
        parameter
        for parameter in stage.parameters()
        if id(parameter) in rows or parameter.dtype != dtype
    }
    parts: list[nn.Module] = [*layers, stage]
    embedding = stage.model.embed_tokens
    if embedding is not None and embedding.weight not in left_out:
        parts.insert(0, embedding)
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=False, ignored_params=left_out)
    for part in _sharded(stage):
        # Shares of one mean add up. Nothing but a plain sum is in every backend.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def reshard_body(stages: nn.Module) -> None:
    """Drop the whole weights that a forward without a backward has left."""
    for part in _sharded(stages):
        part.reshard()


def replicated_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that every rank of the data axis has in full."""
    return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor's whole, and any other as it is; all ranks of its mesh call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def named_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient on the CPU, by the parameter's name.

    Sharded ones are gathered: all ranks of their mesh call.
    """
    return {
        name: whole(parameter.grad.detach()).to("cpu", copy=True)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
