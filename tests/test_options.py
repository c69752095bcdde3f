"""Which rows a rank holds."""

import pytest

from vocab_parallel import VocabParallelOptions
from vocab_parallel.sharded.rows import RankRows


def test_alone() -> None:
    options = VocabParallelOptions.from_vocab(151_936)
    assert (options.start, options.stop, options.vocab_size) == (0, 151_936, 151_936)


def test_padding_rows() -> None:
    whole = RankRows.from_options(VocabParallelOptions(0, 10, vocab_size=7))
    assert whole.num_token_rows == 7


def test_any_object_with_the_attributes() -> None:
    class Foreign:
        start, stop, group, reduce_e_grad = 0, 5, None, True

    assert RankRows.from_options(Foreign()).vocab_size == 5
    del Foreign.group
    with pytest.raises(ValueError, match="Foreign has no group"):
        RankRows.from_options(Foreign())
