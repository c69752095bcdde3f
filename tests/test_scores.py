"""Perplexity and accuracy without the logits, against the logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.ranks import run_ranks
from vocab_parallel import VocabParallelOptions, score_tokens


def check_scores(degree: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 6, generator=generator)
    hidden = torch.randn(degree, 2, 6, 6, generator=generator)
    targets = torch.randint(23, (degree, 2, 6), generator=generator)
    best = (hidden @ rows.T).argmax(-1)
    targets[:, 0, ::2] = best[:, 0, ::2]  # some are right
    targets[:, 1, 2] = -100
    options = VocabParallelOptions.from_vocab(23)
    own = rows[options.start : options.stop]
    rank = dist.get_rank()
    for layout, shift in (
        ("replicated", 0), ("replicated", 1), ("sharded", 1), ("sequence", 0), ("sequence", 2)
    ):  # fmt: skip
        mine = rank if layout == "sharded" else 0
        e, labels = hidden[mine], targets[mine]
        if layout == "sequence":
            e = e.chunk(degree, 1)[rank]
        if layout == "sequence" and e.shape[1] * degree != 6:
            continue
        found = score_tokens(
            e, own, labels, shift=shift, hidden_layout=layout, vocab_parallel_options=options
        )
        wanted = F.pad(labels[:, shift:], (0, shift), value=-100)
        if layout == "sequence":
            wanted = wanted.chunk(degree, 1)[rank]
        logits = e @ rows.T
        valid = wanted != -100
        nll = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        assert float(found.nll) == pytest.approx(float(nll), rel=1e-5)
        assert float(found.correct) == int(((logits.argmax(-1) == wanted) & valid).sum())
        assert float(found.count) == int(valid.sum())
        both = found + found
        assert both.accuracy == pytest.approx(found.accuracy)
        assert both.perplexity == pytest.approx(
            float((nll / valid.sum().clamp(min=1)).exp()), rel=1e-5
        )
    nothing = score_tokens(
        hidden[0], own, torch.full_like(targets[0], -100), vocab_parallel_options=options
    )
    assert (nothing.accuracy, nothing.perplexity) == (0.0, 1.0)


@pytest.mark.parametrize("degree", [1, 3])
def test_scores(degree: int) -> None:
    run_ranks(check_scores, degree, degree=degree)
