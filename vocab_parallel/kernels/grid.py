"""How large a launch is."""

import functools

import torch


def cdiv(length: int, size: int) -> int:
    """Return how many blocks of one size cover a length (triton's own takes microseconds)."""
    return -(-length // size)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
