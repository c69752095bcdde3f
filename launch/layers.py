"""How decoder layers run: compiled, and computed once more in backward.

Each layer's forward is compiled by itself. Layers of one kind share one graph, whose parameters are
inputs, so that compiling takes the time of one layer; and checkpointing stays outside of the graph.
"""

import importlib.util
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launch.arguments import TrainArguments
from launch.data.batches import Batch
from launch.model import PassThrough


def compiles(arguments: TrainArguments, device: torch.device) -> bool:
    """Tell whether layers are compiled; by default where that is on a GPU and can be.

    Raises:
        ValueError: --compile yes on a GPU without triton.
    """
    lacks_triton = device.type == "cuda" and importlib.util.find_spec("triton") is None
    if arguments.compile == "yes" and lacks_triton:
        raise ValueError("--compile yes needs the package triton on a GPU: install it, or say no")
    if arguments.compile != "auto":
        return arguments.compile == "yes"
    return device.type == "cuda" and not lacks_triton and not arguments.splits_backward


def prepare_layers(model: Any, *, compiled: bool, recomputed: bool) -> None:
    """Compile a model's layers, and let them keep their input alone for backward."""
    for layer in model.layers:
        if isinstance(layer, PassThrough):
            continue
        if compiled:
            # Every microbatch has one shape: a second one, as a trial's, is a graph of its own.
            layer.forward = torch.compile(layer.forward, dynamic=False)
        if recomputed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def warm_up(stages: Iterable[nn.Module], microbatch: Batch) -> None:
    """Run forward and backward once on a microbatch of zeros.

    Communicates nothing but a sharded body's weights and gradients. Every rank compiles then at the
    same time. In the first step each would wait for the ones before it, and might give up.
    """
    for stage in stages:
        inner: Any = stage
        like = next(inner.model.parameters())
        hidden = torch.zeros(
            (*microbatch.ids.shape, inner.model.config.hidden_size),
            dtype=like.dtype,
            device=like.device,
            requires_grad=True,
        )
        positions = microbatch.position_ids
        positions = None if positions is None else positions.to(like.device)
        inner(hidden, positions).sum().backward()
        inner.zero_grad()
