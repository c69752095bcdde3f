"""Which rows a rank holds."""

import pytest
import torch
import torch.nn.functional as F

from vocab_parallel import VocabParallelOptions, linear_cross_entropy
from vocab_parallel.rank_rows import RankRows


def test_alone() -> None:
    options = VocabParallelOptions.from_vocab(151_936)
    assert (options.start, options.stop, options.vocab_size) == (0, 151_936, 151_936)


def test_padding_rows() -> None:
    whole = RankRows.from_options(VocabParallelOptions(0, 10, vocab_size=7))
    assert whole.num_token_rows == 7


def test_a_padded_vocabulary() -> None:
    """Padding has no probability; without ``num_rows`` its rows would be tokens."""
    torch.manual_seed(0)
    e, c = torch.randn(5, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    targets = torch.randint(7, (5,))
    options = VocabParallelOptions.from_vocab(7, num_rows=10)
    assert (options.start, options.stop, options.vocab_size) == (0, 10, 7)
    found = linear_cross_entropy(e, c, targets, vocab_parallel_options=options)
    assert torch.allclose(found, F.cross_entropy(e @ c[:7].T, targets), rtol=1e-12)
    for sizes, match in (((7, 6), "has no place for vocab_size=7"), ((0, 6), "positive integer")):
        with pytest.raises(ValueError, match=match):
            VocabParallelOptions.from_vocab(sizes[0], num_rows=sizes[1])


def test_any_object_with_the_attributes() -> None:
    class Foreign:
        start, stop, group, reduce_e_grad = 0, 5, None, True

    assert RankRows.from_options(Foreign()).vocab_size == 5
    del Foreign.group
    with pytest.raises(ValueError, match="Foreign has no group"):
        RankRows.from_options(Foreign())
