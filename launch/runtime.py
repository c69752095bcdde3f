"""Start and end of a rank's process."""

import gc
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record as _record
from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

from launch.command import UserError, partial_name


@contextmanager
def process_group(timeout: float) -> Iterator[torch.device]:
    """Join the ranks that torchrun started, and leave them in order; yields this rank's device.

    A reference to a group that outlives the interpreter's shutdown may abort it: whatever holds
    one is collected, and the ranks meet, before the groups are destroyed; after a `UserError` too,
    which every rank raises. Any other error may be this rank's alone. It leaves the groups as they
    are, since NCCL destroys them on all ranks together: this rank would wait for others that wait
    for it, where torchrun ends them as soon as it is gone.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # Several communicators' kernels are enqueued in one order on all ranks, and run in it.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            # Ranks that share a card, to try things out: NCCL takes those with different host
            # ids for ranks of different machines.
            os.environ.setdefault("NCCL_HOSTID", f"rank{os.environ['RANK']}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    mistake = None
    try:
        yield device
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # whose variables hold groups
        mistake = error
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    if mistake is not None:
        raise mistake


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this rank has held: on the device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


F = TypeVar("F", bound=Callable[..., object])


class LastWords(ErrorHandler):
    """torch's own, whose file is there when it is whole.

    torchrun ends, without its restarts, where it finds the file of a rank that was killed while it
    wrote.
    """

    def record_exception(self, e: BaseException) -> None:
        """Write an error to the file that torchrun reads, if there is one."""
        super().record_exception(e)
        path = super()._get_error_file_path()
        if path is not None:
            partial_name(path).rename(path)

    def _get_error_file_path(self) -> str | None:
        path = super()._get_error_file_path()
        return None if path is None else str(partial_name(path))


def record(function: F) -> F:
    """Decorate what a rank runs, in the place of torch's decorator of that name."""
    decorated: F = _record(function, error_handler=LastWords())  # type: ignore[assignment]
    return decorated
