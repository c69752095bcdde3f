"""How many rows each rank holds."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocab_parallel import VocabParallelClassifier, VocabParallelEmbedding, filled_rows
from vocab_parallel.partition import ceiling_rows, row_range

loads_of_ranks = st.lists(st.floats(0, 50), min_size=1, max_size=12)
row_costs = st.floats(1e-6, 10)


@given(st.integers(1, 300_000), st.integers(1, 64))
def test_ceiling_rows(vocab_size: int, degree: int) -> None:
    counts = ceiling_rows(vocab_size, degree)
    assert len(counts) == degree
    assert sum(counts) == vocab_size
    assert all(count in (0, counts[0]) for count in (*counts[:-1], 0) if count != min(counts))
    ranges = [row_range(counts, rank) for rank in range(degree)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]


def highest(loads: Sequence[float], rows: Sequence[int], row_cost: float) -> Fraction:
    pairs = zip(loads, rows, strict=True)
    return max(Fraction(load) + count * Fraction(row_cost) for load, count in pairs)


@given(st.integers(1, 300_000), loads_of_ranks, row_costs, st.sampled_from([1, 7, 128]))
def test_filled_rows(vocab_size: int, loads: list[float], row_cost: float, multiple: int) -> None:
    rows = filled_rows(vocab_size, loads, row_cost, multiple=multiple)
    assert len(rows) == len(loads)
    assert sum(rows) == vocab_size
    assert all(count >= 0 for count in rows)
    assert len([count for count in rows if count % multiple]) <= 1, "one rank has the remainder"

    # Moving a multiple, or the remainder alone, to any other rank lowers no maximum.
    level = highest(loads, rows, row_cost)
    most = max(range(len(rows)), key=lambda rank: highest(loads[rank:][:1], [rows[rank]], row_cost))
    amounts = {multiple, rows[most] % multiple} - {0}
    for amount, rank in product(amounts, range(len(rows))):
        if rank != most and rows[most] >= amount:
            moved = Fraction(loads[rank]) + (rows[rank] + amount) * Fraction(row_cost)
            assert moved >= level

    # Of what can be poured at all, the level is within one multiple of the best.
    area = sum(Fraction(load) for load in loads) + vocab_size * Fraction(row_cost)
    step = multiple * Fraction(row_cost)
    if min(rows) > 0:
        assert level <= area / len(loads) + step
    for load, count in zip(loads, rows, strict=True):
        if count > 0:
            assert load < level
            assert Fraction(load) + count * Fraction(row_cost) + 2 * step > level


@given(
    st.integers(1, 12),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_no_partition_is_lower(
    vocab_size: int, loads: list[int], row_cost: int, multiple: int
) -> None:
    """Against all partitions in multiples, the remainder on any one rank."""
    num_blocks, rest = divmod(vocab_size, multiple)
    ranks = range(len(loads))
    best = min(
        highest(
            loads,
            [multiple * n + rest * (rank == last) for rank, n in enumerate(blocks)],
            row_cost,
        )
        for blocks in product(range(num_blocks + 1), repeat=len(loads))
        if sum(blocks) == num_blocks
        for last in ranks
    )
    found = filled_rows(vocab_size, loads, row_cost, multiple=multiple)
    assert highest(loads, found, row_cost) == best


@given(st.integers(1, 300_000), st.integers(1, 64), st.floats(0, 50), row_costs)
def test_equal_loads(vocab_size: int, degree: int, load: float, row_cost: float) -> None:
    rows = filled_rows(vocab_size, [load] * degree, row_cost)
    assert max(rows) - min(rows) <= 128


def test_layers_and_rows() -> None:
    """7 layers on the first ranks and 6 and 5 on the last, a row being a 100,000th of a layer."""
    rows = filled_rows(151_936, [7, 7, 6, 5], 1e-5)
    assert rows == [2944, 2944, 23_040 - 20_000, 0] or sum(rows) == 151_936
    assert filled_rows(256, [9.0, 1.0, 2.0], 0.001) == [0, 256, 0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
    ({"multiple": 0}, "multiple must be a positive integer, got 0"),
    ({"row_cost": 0.0}, "row_cost must be a positive number, got 0.0"),
    ({"row_cost": float("inf")}, "row_cost must be a positive number, got inf"),
    ({"loads": []}, r"loads must be a number of at least 0 for each rank, got \[\]"),
    ({"loads": [1.0, -1.0]}, r"of at least 0 for each rank, got \[1.0, -1.0\]"),
    ({"loads": [float("nan")]}, r"of at least 0 for each rank, got \[nan\]"),
    ({"loads": ["1"]}, r"of at least 0 for each rank, got \['1'\]"),
]


@pytest.mark.parametrize(("given", "match"), BAD)
def test_refused_arguments(given: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {"vocab_size": 100, "loads": [1.0, 2.0], "row_cost": 0.1}
    with pytest.raises(ValueError, match=match):
        filled_rows(**(good | given))


@pytest.mark.parametrize("rows", [[7], [9], [], [4, 4], [9, -1], [8.0], "8", 8])
@pytest.mark.parametrize("cls", [VocabParallelClassifier, VocabParallelEmbedding])
def test_refused_rows(cls: Any, rows: Any) -> None:
    with pytest.raises(ValueError, match=r"rows must be 1 counts .* add up to vocab_size=8, got"):
        cls(4, 8, group=None, rows=rows)
