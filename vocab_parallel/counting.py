"""How many tokens a whole step learns from."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vocab_parallel import collectives


def count_valid_tokens(
    labels: Tensor | Iterable[Tensor],  # (..., T), each
    groups: Iterable[ProcessGroup | None] = (),
    shift: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    """Count the valid labels of a step over its microbatches and over groups of ranks.

    Divide by it with ``num_valid_tokens``, and the loss and its gradients do not depend on how
    the batch was cut into microbatches or spread over ranks:

        count = count_valid_tokens(labels, [groups.data_group], shift=1)

    In the "sharded" layout the ranks of the vocab group have other labels too: name its group as
    well. Waits for nothing: the count stays on the device. Communicates one int64 a group.

    Args:
        labels: this rank's labels of the step, whole or as microbatches.
        groups: sum over the ranks of each of these, which must all call; None is skipped.
        shift: as the loss has it; the first ``shift`` labels of a sequence count for nothing.
        ignore_index: labels that count for nothing.

    Returns:
        An int64 tensor without dimensions, on the labels' device, equal on all ranks of the groups.

    Raises:
        ValueError: no labels, or a negative shift.
    """
    parts = [labels] if isinstance(labels, Tensor) else list(labels)
    if not parts:
        raise ValueError("count_valid_tokens needs at least one tensor of labels, got none")
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an integer of at least 0, got {shift!r}")
    count = torch.stack([(part[..., shift:] != ignore_index).sum() for part in parts]).sum()
    for group in groups:
        if group is not None:
            count = collectives.sum_over_group(count, group, dist.get_world_size(group))
    return count
