"""What the loss communicates: which calls, how many bytes, in forward and in backward."""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import VocabParallelOptions, linear_cross_entropy

DEGREE, TOKENS, HIDDEN, VOCABULARY = 2, 12, 8, 23


def check_calls() -> None:
    options = VocabParallelOptions.from_vocab(VOCABULARY)
    rows = options.stop - options.start
    whole = DEGREE * TOKENS
    gathered_labels = ("all_gather", 4 * TOKENS)
    gathered_hidden = ("all_gather", 2 * TOKENS * HIDDEN)
    for layout, dtype, extra, forward, backward in (
        ("replicated", torch.float32, {}, [("all_gather", 2 * 4 * TOKENS)],
         [("all_reduce", 4 * TOKENS * HIDDEN)]),
        ("replicated", torch.bfloat16, {"label_smoothing": 0.1}, [("all_gather", 3 * 4 * TOKENS)],
         [("reduce_scatter", 4 * TOKENS * HIDDEN),
          ("all_gather", 2 * TOKENS * HIDDEN // DEGREE)]),
        ("sharded", torch.bfloat16, {},
         [gathered_labels, gathered_hidden, ("all_gather", 2 * 4 * whole)],
         [("reduce_scatter", 4 * whole * HIDDEN)]),
        ("sharded", torch.bfloat16, {"reduction": "none"},
         [gathered_labels, gathered_hidden, ("all_gather", 2 * 4 * whole)],
         [("all_gather", 4 * TOKENS), ("reduce_scatter", 4 * whole * HIDDEN)]),
        ("sequence", torch.bfloat16, {},
         [gathered_hidden, ("all_gather", 2 * 4 * whole)],
         [("reduce_scatter", 4 * whole * HIDDEN)]),
    ):  # fmt: skip
        e = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
        c = torch.randn(rows, HIDDEN, dtype=dtype, requires_grad=True)
        length = whole if layout == "sequence" else TOKENS
        targets = torch.randint(VOCABULARY, (length,))
        with CollectiveRecorder() as recorded:
            loss = linear_cross_entropy(
                e, c, targets, vocab_parallel_options=options, hidden_layout=layout,
                validate=False, **extra,
            )  # fmt: skip
        assert [(call.name, call.size) for call in recorded.calls] == forward, (layout, extra)
        with CollectiveRecorder() as recorded:
            loss.sum().backward()
        assert [(call.name, call.size) for call in recorded.calls] == backward, (layout, extra)

        with CollectiveRecorder() as recorded:  # a hidden state that needs no gradient
            loss = linear_cross_entropy(
                e.detach(), c, targets, vocab_parallel_options=options, hidden_layout=layout,
                validate=False,
            )  # fmt: skip
            loss.backward()
        assert not {"all_reduce", "reduce_scatter"} & {call.name for call in recorded.calls}

    with CollectiveRecorder() as recorded:  # validation is one exchange of 8 integers
        linear_cross_entropy(
            torch.randn(4, 2), torch.randn(rows, 2), torch.zeros(4, dtype=torch.long),
            vocab_parallel_options=options, validate=True,
        )  # fmt: skip
    assert [(call.name, call.size) for call in recorded.calls] == [
        ("all_gather", 8 * 8),
        ("all_gather", 2 * 4 * 4),
    ]


def test_calls_and_bytes() -> None:
    run_ranks(check_calls, DEGREE)


def check_partial_gradient() -> None:
    """reduce_e_grad=False leaves each rank its own part; the parts add up."""
    torch.manual_seed(0)
    whole = torch.randn(VOCABULARY, HIDDEN)
    hidden = torch.randn(TOKENS, HIDDEN)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    found = []
    for reduce_e_grad in (True, False):
        options = VocabParallelOptions.from_vocab(VOCABULARY, reduce_e_grad=reduce_e_grad)
        e = hidden.clone().requires_grad_()
        c = whole[options.start : options.stop]
        linear_cross_entropy(e, c, targets, vocab_parallel_options=options).backward()
        found.append(e.grad)
    dist.all_reduce(found[1])
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="reduce_e_grad=False"):
        linear_cross_entropy(
            hidden, c, targets, vocab_parallel_options=options, hidden_layout="sharded"
        )


def test_partial_gradient() -> None:
    run_ranks(check_partial_gradient, DEGREE)
