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
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts) - {0, counts[0]}) <= 1, "one rank alone has a part of a share"
    ranges = [row_range(counts, rank) for rank in range(degree)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]


def heights(loads: Sequence[float], rows: Sequence[int], row_cost: float) -> list[Fraction]:
    pairs = zip(loads, rows, strict=True)
    return [Fraction(load) + count * Fraction(row_cost) for load, count in pairs]


@given(st.integers(1, 300_000), loads_of_ranks, row_costs, st.sampled_from([1, 7, 128]))
def test_filled_rows(vocab_size: int, loads: list[float], row_cost: float, multiple: int) -> None:
    rows = filled_rows(vocab_size, loads, row_cost, multiple=multiple)
    assert len(rows) == len(loads)
    assert sum(rows) == vocab_size
    assert all(count >= 0 for count in rows)
    assert len([count for count in rows if count % multiple]) <= 1, "one rank has the remainder"
    found = heights(loads, rows, row_cost)
    level = max(height for height, count in zip(found, rows, strict=True) if count > 0)
    for load, height, count in zip(loads, found, rows, strict=True):
        assert height + multiple * Fraction(row_cost) >= level, "this rank had room for more"
        assert load < level or count == 0, "this rank stands above the level"


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
    every = [
        [multiple * count + rest * (rank == owner) for rank, count in enumerate(blocks)]
        for blocks in product(range(num_blocks + 1), repeat=len(loads))
        if sum(blocks) == num_blocks
        for owner in range(len(loads))
    ]
    found = filled_rows(vocab_size, loads, row_cost, multiple=multiple)
    assert found in every
    best = min(max(heights(loads, rows, row_cost)) for rows in every)
    assert max(heights(loads, found, row_cost)) == best


@given(st.integers(1, 300_000), st.integers(1, 64), st.floats(0, 50), row_costs)
def test_equal_loads(vocab_size: int, degree: int, load: float, row_cost: float) -> None:
    rows = filled_rows(vocab_size, [load] * degree, row_cost)
    assert max(rows) - min(rows) <= 128


def test_layers_and_rows() -> None:
    """A row is 1e-5 layers, so that Qwen3's 151,936 are 1.5: they go where layers are fewer."""
    assert filled_rows(151_936, [7, 7, 7, 7], 1e-5) == [38_016, 38_016, 38_016, 37_888]
    assert filled_rows(151_936, [7, 7, 6, 5], 1e-5) == [0, 0, 25_984, 125_952]
    assert filled_rows(151_936, [7, 7, 7, 5], 1e-5) == [0, 0, 0, 151_936]


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
    with pytest.raises(ValueError, match=r"degree 1.*add up to vocab_size=8, got"):
        cls(4, 8, group=None, rows=rows)
