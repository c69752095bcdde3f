"""All stages carry the vocabulary, on NCCL ranks that share the card."""

from tests.ranks import run_ranks
from tests.test_spanning import RANKS, check_all


def test_every_rank_carries_the_vocabulary() -> None:
    run_ranks(check_all, RANKS, backend="nccl", timeout=200)
