"""All stages carry the vocabulary, on NCCL ranks that share the card."""

from tests.ranks import run_ranks
from tests.test_spanning import CASES, COLUMN_CASES, RANKS, check_all

# On a GPU a first step agrees that all is right, and the exchange runs beside the layers.
ENVIRONMENT = {"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}


def test_every_rank_carries_the_vocabulary() -> None:
    run_ranks(
        check_all, RANKS, backend="nccl", timeout=200, environment=ENVIRONMENT,
        pipeline=4, columns=1, cases=CASES,
    )  # fmt: skip


def test_columns() -> None:
    run_ranks(
        check_all, RANKS, backend="nccl", timeout=200, environment=ENVIRONMENT,
        pipeline=2, columns=2, cases=COLUMN_CASES,
    )  # fmt: skip
