"""The hardware file of the device at hand: products, copies, a layer, the loss and the links."""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from launch.planning.hardware import Hardware
from launch.planning.layers import DecoderLayers
from launch.planning.loss_time import loss_seconds
from launch.planning.published import PUBLISHED
from launch.planning.shape import ModelShape
from launch.timing import busy_work, time_of
from vocab_parallel import linear_cross_entropy, plan_backward


@dataclass(frozen=True)
class _Sizes:
    """What is run; a CPU's are small, since its rates do not depend on them as much."""

    tokens: int
    hidden: int
    rows: int
    copied: int  # bytes
    layer: Mapping[str, Any]  # a configuration
    rounds: int


_GPU = _Sizes(8192, 4096, 37_984, 2**31, PUBLISHED["qwen3-8b"], 10)
_CPU = _Sizes(
    512,
    256,
    4096,
    2**26,
    {
        **PUBLISHED["qwen3-8b"],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    3,
)


def calibrate(device: torch.device) -> Hardware:
    """Measure a device, and the links between the ranks of the default group if there is one.

    Every rank of the group must call; each measures its own device, one after the other where
    several ranks share it is up to the caller. Products are bfloat16 on a GPU and float32 on a
    CPU. Takes some seconds.
    """
    sizes = _GPU if device.type == "cuda" else _CPU
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    today = f"measured {date.today().isoformat()}, launch.plan --calibrate"
    with tqdm(total=5, desc="calibrating", disable=_rank() != 0) as progress:
        product = _product_flops(sizes, dtype, device)
        progress.update()
        copied = _copy_bytes(sizes, device)
        progress.update()
        layer = _layer_flops(sizes, dtype, device)
        progress.update()
        link, link_source = _link_bytes(sizes, device, today)
        progress.update()
        found = Hardware(
            name=_name(device),
            memory=float(_memory(device)),
            product_flops=product,
            layer_flops=layer,
            copy_bytes=copied,
            link_bytes=link,
            loss_overhead={"recompute": 1.0, "probs": 1.0},
            sources={
                "memory": "read from the device",
                "product_flops": today,
                "layer_flops": f"{today}, torch's own attention, eager",
                "copy_bytes": today,
                "link_bytes": link_source,
                "loss_overhead": today,
            },
        )
        for way in found.loss_overhead:
            found.loss_overhead[way] = _loss_overhead(way, sizes, dtype, device, found)
        progress.update()
    return found


def _product_flops(sizes: _Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """Time the loss's three products, as everything else that is scaled by their rate."""
    e = torch.randn(sizes.tokens, sizes.hidden, device=device).to(dtype)
    c = torch.randn(sizes.rows, sizes.hidden, device=device).to(dtype)
    logits = e @ c.T
    e_grad, c_grad = torch.empty_like(e), torch.empty_like(c)

    def products() -> None:
        torch.mm(e, c.T, out=logits)
        torch.mm(logits, c, out=e_grad)
        torch.mm(logits.T, e, out=c_grad)

    return 6.0 * e.numel() * sizes.rows / _seconds(products, sizes, device)


def _copy_bytes(sizes: _Sizes, device: torch.device) -> float:
    source = torch.ones(sizes.copied // 4, device=device)
    into = torch.empty_like(source)
    return 2.0 * sizes.copied / _seconds(lambda: into.copy_(source), sizes, device)


def _layer_flops(sizes: _Sizes, dtype: torch.dtype, device: torch.device) -> float:
    """Time forward and backward of two decoder layers, as transformers computes them."""
    count, sequence = 2, min(4096, sizes.tokens)
    layers = DecoderLayers(sizes.layer, count, sequence, dtype, device)

    def step() -> None:
        out = layers()
        out.backward(out.detach())

    flops = 3.0 * count * ModelShape.of("", sizes.layer).layer_flops(sequence, sequence)
    return flops / _seconds(step, sizes, device)


def _loss_overhead(
    way: str, sizes: _Sizes, dtype: torch.dtype, device: torch.device, hardware: Hardware
) -> float:
    e = torch.randn(sizes.tokens, sizes.hidden, device=device).to(dtype).requires_grad_()
    c = torch.randn(sizes.rows, sizes.hidden, device=device) / sizes.hidden**0.5
    rows = c.to(dtype).requires_grad_()
    targets = torch.randint(sizes.rows, (sizes.tokens,), device=device)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, rows, targets, impl="chunked", backward=way)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, (e, rows))

    backward_plan = plan_backward(
        sizes.tokens, sizes.rows, sizes.hidden, dtype, backward=way, device_type=device.type
    )
    expected = loss_seconds(
        backward_plan, sizes.tokens, sizes.rows, sizes.hidden, dtype.itemsize, hardware
    )
    return _seconds(step, sizes, device) / expected


def _link_bytes(sizes: _Sizes, device: torch.device, today: str) -> tuple[float, str]:
    """Time an all-gather of the default group; NVLink's data sheet where one rank is alone."""
    degree = dist.get_world_size() if dist.is_initialized() else 1
    if degree == 1:
        return 450e9, "data sheet of NVLink in one direction: one rank has no link to measure"
    own = torch.ones(sizes.tokens * sizes.hidden, device=device)
    gathered = torch.empty(degree * own.numel(), device=device)
    seconds = _seconds(lambda: dist.all_gather_into_tensor(gathered, own), sizes, device)
    moved = (degree - 1) * own.numel() * own.itemsize
    return moved / seconds, f"{today}, all-gather of {degree} ranks"


def _seconds(call: Callable[[], object], sizes: _Sizes, device: torch.device) -> float:
    """Return the median seconds of a call, which waits behind products as it does in training."""
    busy = busy_work(device)
    milliseconds = [time_of(call, device, busy) for _ in range(3 + sizes.rounds)][3:]
    return statistics.median(milliseconds) / 1e3


def _name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one rank's threads"
    )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
