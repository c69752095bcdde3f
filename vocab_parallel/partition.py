"""How many rows of the vocabulary each rank of a group holds: a list of counts, by rank.

A rank's rows begin where those of the rank before it end. A count may be 0.
"""

import math
from collections.abc import Sequence
from fractions import Fraction


def ceiling_rows(vocab_size: int, degree: int) -> list[int]:
    """Return the counts of DTensor's ``Shard(0)``: ceil(vocab_size / degree) rows a rank.

    The last ranks may hold fewer rows, or none.
    """
    share = -(-vocab_size // degree)
    return [min(share, max(vocab_size - rank * share, 0)) for rank in range(degree)]


def filled_rows(
    vocab_size: int, loads: Sequence[float], row_cost: float, *, multiple: int = 128
) -> list[int]:
    """Give the rows to the ranks that have the least other work: water-filling.

    Where all stages of a pipeline carry the vocabulary, a rank with fewer layers takes more rows,
    and the slowest rank is as fast as can be:

        minimise the largest of loads[r] + counts[r] * row_cost

    exactly, over the counts that are whole multiples of ``multiple`` on all ranks but one, which
    has the vocabulary's remainder besides. A rank whose load stands above the level gets no rows;
    of ranks that are alike the first get more. Communicates nothing: equal arguments give equal
    counts, so every rank calls it with the loads of all.

    Args:
        vocab_size: rows of all ranks.
        loads: by rank, what a microbatch takes without the vocabulary, in any unit.
        row_cost: what one row takes of a microbatch, in the same unit.
        multiple: rows by which products and kernels lose nothing.

    Returns:
        The counts by rank, for ``rows=`` of `VocabParallelClassifier` and
        `VocabParallelEmbedding`.

    Raises:
        ValueError: no ranks, a size that is not positive, or a load that is negative or not finite.
    """
    for name, size in (("vocab_size", vocab_size), ("multiple", multiple)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if not _finite(row_cost) or row_cost <= 0:
        raise ValueError(f"row_cost must be a positive number, got {row_cost!r}")
    if not loads or not all(_finite(load) and load >= 0 for load in loads):
        raise ValueError(f"loads must be a number of at least 0 for each rank, got {loads!r}")
    num_blocks, rest = divmod(vocab_size, multiple)
    cost = Fraction(row_cost) * multiple  # of a block
    base = [Fraction(load) for load in loads]
    level = _water_level(base, num_blocks * cost)
    blocks = [max((level - load) // cost, 0) for load in base]

    def height(rank: int) -> Fraction:
        return base[rank] + blocks[rank] * cost

    # What is left are fewer blocks than there are ranks under water: one each, to the lowest.
    for rank in sorted(range(len(base)), key=height)[: num_blocks - sum(blocks)]:
        blocks[rank] += 1
    rows = [count * multiple for count in blocks]
    rows[min(range(len(base)), key=height)] += rest
    return rows


def checked_rows(rows: Sequence[int], vocab_size: int, degree: int) -> tuple[int, ...]:
    """Return the counts of a partition.

    Raises:
        ValueError: they do not add up to the vocabulary, or are not one a rank.
    """
    counts = tuple(rows) if isinstance(rows, Sequence) else ()
    are_counts = all(isinstance(count, int) and count >= 0 for count in counts)
    if len(counts) != degree or not are_counts or sum(counts) != vocab_size:
        raise ValueError(
            f"expected rows as counts of at least 0, one a rank of the vocab group (of degree "
            f"{degree}), that add up to vocab_size={vocab_size}, got {rows!r}: pass what "
            f"filled_rows returns, or None for the ceiling partition"
        )
    return counts


def row_range(counts: Sequence[int], rank: int) -> tuple[int, int]:
    """Return [start, stop) of a rank's rows."""
    start = sum(counts[:rank])
    return start, start + counts[rank]


def _water_level(loads: Sequence[Fraction], amount: Fraction) -> Fraction:
    """Return the level at which an amount stands over grounds of these heights."""
    ground = sorted(loads)
    level = ground[0] + amount
    for count in range(2, len(ground) + 1):
        if level <= ground[count - 1]:
            break
        level = (sum(ground[:count]) + amount) / count
    return level


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
