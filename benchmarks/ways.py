"""The ways in which V ranks of the last stage can share its work, each with a loss."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import contestants
from benchmarks.contestants import Contestant, Problem


@dataclass(frozen=True)
class Way:
    """How the vocabulary's work is cut.

    Attributes:
        shards: into how many parts the classifier's rows are cut.
        columns: whose tokens one loss covers.
        degree: of tensor parallelism of the layers.
        same: whether all V ranks of a stage work on the same sequences.
        make: the loss.
    """

    shards: int
    columns: int
    degree: int
    same: bool
    make: Callable[[Problem], Contestant]


def ways_of(vocab: int, peers: bool) -> dict[str, Way]:
    """Return every contestant on V ranks a stage."""
    ways = {
        "(a) ours, whole": Way(1, 1, 1, False, contestants.ours),
        "(a) eager": Way(1, 1, 1, False, lambda p: contestants.materialised(p, False)),
        "(a) torch.compile": Way(1, 1, 1, False, lambda p: contestants.materialised(p, True)),
    }
    if peers:
        for name in contestants.PEERS_OF_ONE_GPU:
            ways[f"(a) {name}"] = Way(
                1, 1, 1, False, lambda p, name=name: contestants.peer(p, name)
            )
    ways["(b) loss-parallel logits"] = Way(vocab, 1, vocab, True, contestants.loss_parallel_logits)
    ways["(c) ours, sharded"] = Way(vocab, vocab, 1, False, contestants.ours)
    ways["(d) ours, replicated"] = Way(vocab, 1, 1, True, contestants.ours)
    return ways
