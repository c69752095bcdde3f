"""The hardware file of the device at hand: products, copies, a layer, the loss and the links."""

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
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

_LAYERS = 4  # that are measured: what stands around them is little beside them


@dataclass(frozen=True)
class _Bench:
    """What is run on a device; a CPU's sizes are small, its rates do not depend on them as much."""

    device: torch.device
    dtype: torch.dtype
    tokens: int
    hidden: int
    rows: int
    copied: int  # bytes
    layer: Mapping[str, Any]  # a configuration
    rounds: int

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the median seconds of a call, which waits behind products as in training."""
        busy = busy_work(self.device)
        milliseconds = [time_of(call, self.device, busy) for _ in range(3 + self.rounds)][3:]
        return statistics.median(milliseconds) / 1e3

    def random(self, *shape: int) -> Tensor:
        """Return random numbers on the device."""
        return torch.randn(shape, device=self.device).to(self.dtype)


_SMALL = {
    **PUBLISHED["qwen3-8b"],
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def calibrate(device: torch.device) -> Hardware:
    """Measure a device, and the links between the ranks of the default group if there is one.

    Every rank of the group must call; each measures its own device, one after the other where
    several ranks share it is up to the caller. Products are bfloat16 on a GPU and float32 on a
    CPU. Takes some seconds.
    """
    bench = _Bench(device, torch.float32, 512, 256, 4096, 2**26, _SMALL, 3)
    name = "CPU, one rank's threads"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        layer = PUBLISHED["qwen3-8b"]
        bench = _Bench(device, torch.bfloat16, 8192, 4096, 37_984, 2**31, layer, 10)
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.get_device_properties(device).total_memory
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    today = f"measured {date.today().isoformat()}, launch.plan --calibrate"
    measured = {
        "product_flops": _product_flops,
        "layer_flops": _layer_flops,
        "copy_bytes": _copy_bytes,
        "link_bytes": _link_bytes,
    }
    if device.type == "cuda" and find_spec("triton"):  # else launch.train does not compile
        measured |= {"compiled_speed": _compiled_speed, "compiled_kept": _compiled_kept}
    sources = dict.fromkeys((*measured, "loss_overhead"), today)
    sources["memory"] = "read from the device"
    sources["layer_flops"] += ", torch's own attention, eager"
    sources["link_bytes"] += f", all-gather of {ranks} ranks"
    if ranks == 1:
        sources["link_bytes"] = (
            "data sheet of NVLink in one direction: one rank has no link to measure"
        )
    found = Hardware(
        name=name,
        memory=float(memory),
        loss_overhead={"recompute": 1.0, "probs": 1.0},
        sources=sources,
        **{
            rate: measure(bench)
            for rate, measure in tqdm(measured.items(), "calibrating", disable=rank != 0)
        },
    )
    for way in found.loss_overhead:
        found.loss_overhead[way] = _loss_overhead(way, bench, found)
    return found


def _product_flops(bench: _Bench) -> float:
    """Time the loss's three products, as everything else that is scaled by their rate."""
    e, c = bench.random(bench.tokens, bench.hidden), bench.random(bench.rows, bench.hidden)
    logits = e @ c.T
    e_grad, c_grad = torch.empty_like(e), torch.empty_like(c)

    def products() -> None:
        torch.mm(e, c.T, out=logits)
        torch.mm(logits, c, out=e_grad)
        torch.mm(logits.T, e, out=c_grad)

    return 6.0 * e.numel() * bench.rows / bench.seconds(products)


def _copy_bytes(bench: _Bench) -> float:
    source = torch.ones(bench.copied // 4, device=bench.device)
    into = torch.empty_like(source)
    return 2.0 * bench.copied / bench.seconds(lambda: into.copy_(source))


def _layer_flops(bench: _Bench) -> float:
    layers = _layers(bench, compiled=False)
    sequence = layers.inputs.shape[1]
    flops = 3.0 * _LAYERS * ModelShape.of("", bench.layer).layer_flops(sequence, sequence)
    return flops / _seconds_of(layers, bench)


def _compiled_speed(bench: _Bench) -> float:
    eager, compiled = (_seconds_of(_layers(bench, one), bench) for one in (False, True))
    return eager / compiled


def _compiled_kept(bench: _Bench) -> float:
    eager, compiled = (_kept_by(_layers(bench, one), bench) for one in (False, True))
    return compiled / eager


def _layers(bench: _Bench, compiled: bool) -> DecoderLayers:
    """Return decoder layers as transformers computes them, each compiled by itself if asked."""
    sequence = min(4096, bench.tokens)
    layers = DecoderLayers(bench.layer, _LAYERS, sequence, bench.dtype, bench.device)
    if compiled:
        model: Any = layers.model
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    return layers


def _seconds_of(layers: DecoderLayers, bench: _Bench) -> float:
    """Time forward and backward."""

    def step() -> None:
        out = layers()
        out.backward(out.detach())

    return bench.seconds(step)


def _kept_by(layers: DecoderLayers, bench: _Bench) -> int:
    """Return the bytes that wait between forward and backward."""
    layers().sum().backward()  # compiles, and makes what stays
    before = torch.cuda.memory_allocated(bench.device)
    out = layers()
    return torch.cuda.memory_allocated(bench.device) - before - out.nbytes


def _loss_overhead(way: str, bench: _Bench, hardware: Hardware) -> float:
    shape = bench.tokens, bench.rows, bench.hidden
    e = bench.random(bench.tokens, bench.hidden).requires_grad_()
    c = (bench.random(bench.rows, bench.hidden) / bench.hidden**0.5).requires_grad_()
    targets = torch.randint(bench.rows, (bench.tokens,), device=bench.device)

    def step() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(e, c, targets, impl="chunked", backward=way)
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, (e, c))

    backward_plan = plan_backward(*shape, bench.dtype, backward=way, device_type=bench.device.type)
    return bench.seconds(step) / loss_seconds(backward_plan, *shape, bench.dtype.itemsize, hardware)


def _link_bytes(bench: _Bench) -> float:
    """Time an all-gather of the default group; NVLink's data sheet where one rank is alone."""
    degree = dist.get_world_size() if dist.is_initialized() else 1
    if degree == 1:
        return 450e9
    own = torch.ones(bench.tokens * bench.hidden, device=bench.device)
    gathered = torch.empty(degree * own.numel(), device=bench.device)
    seconds = bench.seconds(lambda: dist.all_gather_into_tensor(gathered, own))
    return (degree - 1) * own.numel() * own.itemsize / seconds
