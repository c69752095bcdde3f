"""The ranks of a run, started by torchrun: what they agree on between measurements.

A contestant's collectives go over the default group, NCCL's on GPUs. What the ranks tell each
other goes over a gloo group beside it, so that it is in step also where a contestant is not.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from benchmarks.contestants import Contestant, in_words
from launch.timing import busy_work


@dataclass(frozen=True)
class Ranks:
    """All ranks of the run; every method is called by each of them.

    Attributes:
        device: this rank's.
        messages: the gloo group.
        timeout: seconds that a collective waits for a rank.
    """

    device: torch.device
    messages: ProcessGroup
    timeout: float

    @classmethod
    def start(cls, timeout: float) -> Self:
        """Make the groups: one rank a GPU, or gloo on a machine without.

        Raises:
            ValueError: more ranks than GPUs.
        """
        device = torch.device("cpu")
        if torch.cuda.is_available():
            local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= count:
                raise ValueError(
                    f"expected one rank a GPU, got {os.environ['LOCAL_WORLD_SIZE']} ranks and "
                    f"{count} GPUs: start torchrun with --nproc-per-node {count}"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if on_gpu else None,
        )
        return cls.over_default_group(device, timeout)

    @classmethod
    def over_default_group(cls, device: torch.device, timeout: float) -> Self:
        # A message waits for a rank that waits in a contestant's collective until that gives up.
        patience = timedelta(seconds=2 * timeout)
        return cls(device, dist.new_group(backend="gloo", timeout=patience), timeout)

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0

    def tell(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def first_reason(self, reason: str | None) -> str | None:
        """Return why some rank cannot, or None where all can."""
        reasons = {rank: one for rank, one in enumerate(self.tell(reason)) if one is not None}
        if len(reasons) == dist.get_world_size():
            return reasons[0]
        return next((f"rank {rank}: {one}" for rank, one in reasons.items()), None)

    def barrier(self) -> None:
        """Let no rank begin before all are here: queued on a GPU's stream, waited for on a CPU."""
        if self.device.type == "cuda":
            dist.all_reduce(torch.zeros(1, device=self.device))
        else:
            dist.barrier()

    def busy_then_together(self) -> Callable[[], None]:
        """Return what is queued before each timed call: work that keeps a GPU busy, a barrier."""
        busy = busy_work(self.device)

        def ahead() -> None:
            busy()
            self.barrier()

        return ahead

    def slowest(self, times: Mapping[str, list[float]]) -> dict[str, list[float]]:
        """Return each call's time on the rank that took longest, round by round."""
        every = self.tell(times)
        return {
            name: [max(found) for found in zip(*(one[name] for one in every), strict=True)]
            for name in times
        }

    def enter(self, name: str, make: Callable[[], Contestant]) -> tuple[Contestant | None, str]:
        """Make a contestant and call it once: on all ranks or on none.

        Returns:
            The contestant and "", or None and why it is left out: some rank could not make it
            (it is not installed, or not for these operands), or all ranks raised alike in the call.

        Raises:
            RuntimeError: on all ranks, where the call raised on some of them alone: collectives
                are out of step then, and nothing can be measured any more.
        """
        contestant, reason = _attempt(make)
        reason = self.first_reason(reason)
        if reason is not None:
            return None, reason
        assert contestant is not None
        began = time.monotonic()
        result, reason = _attempt(contestant)
        in_time = time.monotonic() - began < self.timeout
        del result
        reasons = self.tell(reason if in_time or reason is None else f"gave up: {reason}")
        kinds = {None if one is None else one.partition(":")[0] for one in reasons}
        if kinds == {None}:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return contestant, ""
        if len(kinds) > 1 or "gave up" in kinds:
            raised = {rank: one for rank, one in enumerate(reasons) if one is not None}
            raise RuntimeError(
                f"{name} raised on some ranks alone or unlike on each, and the others cannot go "
                f"on without them: {raised}"
            )
        self.barrier()  # what all refused has left the group as it was, or this raises
        return None, reasons[0]

    def end(self) -> None:
        """Leave together; nothing may hold a group any more."""
        dist.barrier(group=self.messages)
        dist.destroy_process_group()


def _attempt(what: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return what(), None
    except Exception as error:
        return None, in_words(error)
