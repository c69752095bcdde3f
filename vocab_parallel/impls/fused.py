"""The logits' product with all that follows it in one kernel: no raw logits, unless they are kept.

What `passes.py` does to a tile between two products, done to float32 logits in registers instead:
nothing is rounded to the operands' dtype before its exponential, and nothing is moved. The kernels
are made for Hopper's loads and products; elsewhere cuBLAS and the passes do the work.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from vocab_parallel.impls import passes
from vocab_parallel.impls.base import BackwardTask, Shard
from vocab_parallel.impls.tiles import blocks
from vocab_parallel.statistics import StatisticNames

_HOPPER = 9


def works(shard: Shard) -> bool:
    """Tell whether the kernels take a shard: device, dtype, and addresses that TMA can read."""
    hidden, classifier = shard.hidden, shard.classifier
    if not passes.kernels_work(hidden) or hidden.dtype not in (torch.float16, torch.bfloat16):
        return False
    if classifier.dtype != hidden.dtype or not _device_can(hidden.device):
        return False
    from vocab_parallel.kernels.product import operands_fit

    return operands_fit(hidden, classifier)


@functools.cache
def _device_can(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return False
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def put_statistics(
    statistics: Tensor,  # (k, N); those of the tokens are written
    names: StatisticNames,
    shard: Shard,
    tokens: slice,
    kept: Tensor | None,  # (N, r); the raw logits of the first rows, written
    memory: int,
) -> None:
    """Write some tokens' statistics of all rows, within some bytes of memory."""
    from vocab_parallel.kernels.product import TOKENS
    from vocab_parallel.kernels.product_statistics import bytes_a_token, product_statistics

    most = memory // bytes_a_token(shard.classifier.shape[0], names)
    for part in _evenly(tokens, most, TOKENS):
        product_statistics(
            shard.hidden[part],
            shard.classifier,
            shard.bias,
            shard.targets[part],
            statistics[:, part],
            names,
            None if kept is None else kept[part],
            softcap=shard.softcap,
            temperature=shard.temperature,
        )


def put_gradient(
    out: Tensor,  # (n, r)
    block: Shard,
    tokens: slice,
    row_start: int,
    task: BackwardTask,
    grads: Tensor,  # (k, N), in place of the task's
) -> Tensor | None:  # (r,)
    """Write the gradient of a tile of raw logits; return its sum over tokens if a bias wants it."""
    from vocab_parallel.kernels.product_gradient import product_gradient

    return product_gradient(
        block.hidden[tokens],
        block.classifier,
        block.bias,
        block.targets[tokens],
        row_start,
        task.statistics[:, tokens],
        grads[:, tokens],
        task.names,
        out,
        softcap=block.softcap,
        temperature=block.temperature,
        sum_tokens=task.wanted.bias and block.bias is not None,
    )


def _evenly(tokens: slice, most: int, grain: int) -> list[slice]:
    """Cut tokens into as few parts as have at most so many, of about one length by the grain."""
    length = tokens.stop - tokens.start
    count = -(-length // max(most, grain))
    size = -(-length // (grain * count)) * grain
    return [
        slice(tokens.start + part.start, tokens.start + part.stop) for part in blocks(length, size)
    ]
