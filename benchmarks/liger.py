"""Liger's tensor-parallel loss: native kernels where they are installed, else its fallback.

Liger 0.8.5 finds its native kernels (NVSHMEM and CUTLASS, for Hopper and Blackwell) in the package
liger-cute-kernels, with apache-tvm-ffi and the NVSHMEM of the CUDA that they were built with. They
are set up once, by all ranks, for the largest of all calls, and hold memory of their own from then
on that torch's allocator does not know. On one host they want NVSHMEM_REMOTE_TRANSPORT=none.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from benchmarks.contestants import in_words
from benchmarks.ranks import Ranks


@dataclass(frozen=True)
class Liger:
    """Which of its kernels run.

    Attributes:
        kind: "native kernels" or "fallback".
        note: the bytes that the set-up took, or why there is none.
    """

    kind: str
    note: str

    @classmethod
    def set_up(cls, calls: Iterable[tuple[int, int, int]], ranks: Ranks) -> "Liger":
        """Set up the native kernels for calls of so many (tokens, hidden size, rows a rank)."""
        reason = ranks.first_reason(_why_not_native(ranks.device))
        if reason is None:
            before = torch.cuda.mem_get_info(ranks.device)[0]
            reason = ranks.first_reason(_configure(calls, ranks.device))
        if reason is not None:
            return cls("fallback", reason)
        taken = before - torch.cuda.mem_get_info(ranks.device)[0]
        return cls("native kernels", f"{taken / 2**20:,.0f} MiB a rank are taken by the set-up")

    def tear_down(self, ranks: Ranks) -> None:
        """Give back what the set-up took; before process groups go."""
        if self.kind == "native kernels":
            from liger_cute_kernels import nvshmem

            torch.cuda.synchronize(ranks.device)
            nvshmem.finalize()


def _why_not_native(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the native kernels need a GPU"
    for package in ("liger_kernel", "liger_cute_kernels", "tvm_ffi"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def _configure(calls: Iterable[tuple[int, int, int]], device: torch.device) -> str | None:
    """Call Liger's collective set-up, which cannot be enlarged later; return why it failed."""
    tokens, hidden, rows = (max(sizes) for sizes in zip(*calls, strict=True))
    try:
        from liger_kernel.ops.configure import FusedLinearCrossEntropyConfig, configure
        from liger_kernel.ops.cute.fused_linear_scaled_cross_entropy_tp import is_available

        configured = configure(
            device=device,
            flsce=FusedLinearCrossEntropyConfig(
                max_tokens=tokens, hidden_size=hidden, local_vocab_size=rows
            ),
        )
        return None if configured and is_available() else "its set-up declined this device"
    except Exception as error:
        return in_words(error)
