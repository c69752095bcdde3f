"""Communication in pieces, behind the products: calls, bytes, and the same bits in either order."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.recording import CollectiveRecorder
from vocab_parallel import VocabParallelOptions, linear_cross_entropy
from vocab_parallel.sharded import exchange

BACKWARDS = ("recompute", "probs", "gradients")


def check_overlap() -> None:
    """Pieces communicate as many bytes as the whole, and give the same bits."""
    tokens, hidden, vocabulary = 12, 8, 23
    options = VocabParallelOptions.from_vocab(vocabulary)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(vocabulary, hidden, generator=generator)
    given = torch.randn(tokens, hidden, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    found: dict[Any, tuple[Tensor, ...]] = {}
    for fewest in (2048, 3):
        exchange._FEWEST_TOKENS = fewest
        for backward in BACKWARDS:
            for overlap in (True, False, "auto"):
                e = given.clone().requires_grad_()
                c = whole[options.start : options.stop].clone().requires_grad_()
                with CollectiveRecorder() as before:
                    loss = linear_cross_entropy(
                        e, c, targets, vocab_parallel_options=options, backward=backward,
                        overlap=overlap, validate=False, chunk_tokens=tokens,
                    )  # fmt: skip
                with CollectiveRecorder() as after:
                    loss.backward()
                calls = [(call.name, call.size) for call in before.calls + after.calls]
                cut = (
                    fewest == 3 and overlap is True and backward != "gradients"
                )  # which has chunks
                count = {"all_gather": 2 if cut else 1, "all_reduce": 4 if cut else 1}
                for name, size in (
                    ("all_gather", 2 * 4 * tokens),
                    ("all_reduce", 4 * tokens * hidden),
                ):
                    sizes = [size for called, size in calls if called == name]
                    assert (len(sizes), sum(sizes)) == (count[name], size), (calls, backward)
                assert len(after.calls) == (0 if backward == "gradients" else count["all_reduce"])
                found[fewest, backward, overlap] = (loss.detach(), e.grad, c.grad)
    for key, result in found.items():
        other = found[key[0], key[1], False]
        assert all(torch.equal(a, b) for a, b in zip(result, other, strict=True)), key
        first = found[2048, "recompute", True]
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(result, first, strict=True)), key
    dist.barrier()


def check_scattered_pieces() -> None:
    """Each rank's tokens are summed there as they are complete: the bytes of a reduce-scatter."""
    tokens, hidden, vocabulary = 6, 8, 23
    options = VocabParallelOptions.from_vocab(vocabulary)
    rank, degree = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    given, targets = torch.randn(tokens, hidden), torch.randint(vocabulary, (tokens,))
    torch.manual_seed(10)
    whole = torch.randn(vocabulary, hidden)
    found: dict[Any, tuple[Tensor, ...]] = {}
    calls_of: dict[Any, dict[str, int]] = {}
    # 4 tokens a chunk end within a rank's own.
    for fewest, backward, chunk, calls in (
        (2048, "recompute", None, {"reduce_scatter": 1}),
        (3, "recompute", None, {"reduce": degree}),
        (3, "probs", None, {"reduce": degree}),
        (3, "gradients", 18, {"reduce_scatter": 1}),
        (3, "gradients", 4, {"reduce": 6}),
        (2048, "gradients", 4, {"reduce_scatter": 1}),
    ):
        exchange._FEWEST_TOKENS = fewest
        for overlap in (True, False, "auto"):
            e = given.clone().requires_grad_()
            c = whole[options.start : options.stop].clone().requires_grad_()
            with CollectiveRecorder() as recorded:
                loss = linear_cross_entropy(
                    e, c, targets, vocab_parallel_options=options, hidden_layout="sharded",
                    backward=backward, overlap=overlap, validate=False, chunk_tokens=chunk,
                )  # fmt: skip
                loss.backward()
            sums = [call for call in recorded.calls if call.name.startswith("reduce")]
            expected = calls
            if backward != "gradients" and overlap is not True:  # which has chunks of its own
                expected = {"reduce_scatter": 1}
            assert {name: len(sums) for name in {call.name for call in sums}} == expected, backward
            assert sum(call.size for call in sums) == 4 * degree * tokens * hidden
            result = (loss.detach(), e.grad, c.grad)
            found[fewest, backward, chunk, overlap] = result
            calls_of[fewest, backward, chunk, overlap] = expected
    first = found[2048, "recompute", None, False]
    for key, result in found.items():
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(result, first, strict=True)), key
        if key[3] is True and calls_of[key] != calls_of[*key[:3], False]:
            continue  # a reduction of each rank's tokens may add in another order
        other = found[*key[:3], False]
        assert all(torch.equal(a, b) for a, b in zip(result, other, strict=True)), key
    dist.barrier()


def test_overlap() -> None:
    run_ranks(check_overlap, 2)


def test_scattered_pieces() -> None:
    run_ranks(check_scattered_pieces, 3)
