"""torchtitan's trainer with the CPU as its device, and a record of what it logs in full.

    torchrun --nproc-per-node 4 -m tests.clients.titan_on_cpu FOLDER --module llama3 ...

Nothing of torchtitan is changed but its logging, which writes FOLDER/RANK.jsonl too. torch.cpu is
given what torchtitan asks of torch.cuda.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch._utils
import torch.distributed.fsdp._fully_shard._fsdp_collectives as fsdp_collectives
import torch.distributed.tensor.experimental._context_parallel._attention as context_parallel
import torch.nn.attention.flex_attention as flex_attention


def give_the_cpu_what_cuda_has() -> None:
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    named = types.SimpleNamespace(total_memory=2**34, name="CPU")
    cpu: Any = torch.cpu
    for name, found in {
        "get_device_name": "CPU",
        "get_device_properties": named,
        "memory_stats": {},
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "mem_get_info": (2**33, 2**34),
        "memory_reserved": 0,
        "set_device": None,
        "current_device": 0,
    }.items():
        setattr(cpu, name, lambda *_, _found=found: _found)
    # Its eager form has the backward that flex attention refuses on a CPU.
    flex_attention._validate_device = lambda *_: None  # type: ignore[assignment]
    # Compiled, it would want a compiler on every machine that runs this.
    context_parallel._compiled_create_block_mask = flex_attention.create_block_mask
    # gloo has no PREMUL_SUM; FSDP2 has a switch for such backends.
    factors = fsdp_collectives._get_gradient_divide_factors
    fsdp_collectives._get_gradient_divide_factors = lambda *args: factors(*args[:-1], True)


def record_in(folder: Path) -> None:
    from torchtitan.components.metrics import MetricsProcessor

    log = MetricsProcessor.log
    file = folder / f"{os.environ['RANK']}.jsonl"

    def logged(
        self: Any, step: int, loss: float, max_loss: float, grad_norm: float, **more: Any
    ) -> None:
        with file.open("a") as opened:
            print(json.dumps([float(loss), grad_norm]), file=opened)
        log(self, step, loss, max_loss, grad_norm, **more)

    MetricsProcessor.log = logged


if __name__ == "__main__":
    give_the_cpu_what_cuda_has()
    record_in(Path(sys.argv.pop(1)))
    from torchtitan.train import main

    main()
