"""How many layers each stage gets, and how many rows: the slowest is as fast as can be."""

import heapq
from collections.abc import Sequence


def layer_counts(num_layers: int, num_stages: int, classifier: float) -> list[int]:
    """Spread the layers; the last stage has the classifier besides.

    Args:
        num_layers, num_stages: of the whole pipeline.
        classifier: what the classifier costs on a rank, in layers.

    Raises:
        ValueError: more stages than layers.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"{num_stages} stages need at least as many layers, got {num_layers}: use fewer "
            f"stages (--pipeline) or more --layers"
        )
    if num_stages == 1:
        return [num_layers]
    before = num_stages - 1

    def slowest(last: int) -> tuple[float, int]:
        return max(-(-(num_layers - last) // before), last + classifier), -last

    last = min(range(1, num_layers - before + 1), key=slowest)
    share, remainder = divmod(num_layers - last, before)
    return [share + (stage < remainder) for stage in range(before)] + [last]


def filled_rows(
    vocab_size: int, loads: Sequence[float], row_cost: float, *, multiple: int = 128
) -> list[int]:
    """Give the rows to the ranks that have the least other work: water-filling.

    Args:
        vocab_size: rows of all ranks.
        loads: by rank, what a microbatch takes without the vocabulary, in any unit.
        row_cost: what one row takes of a microbatch, in the same unit.
        multiple: all counts but one are multiples of it.

    Returns:
        The counts by rank.
    """
    counts = [0] * len(loads)
    heights = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heights)
    for start in range(0, vocab_size, multiple):
        height, rank = heights[0]
        size = min(multiple, vocab_size - start)
        counts[rank] += size
        heapq.heapreplace(heights, (height + size * row_cost, rank))
    return counts
