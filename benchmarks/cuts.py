"""How V ranks of the last stage can share its work, each cut with a loss."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import contestants
from benchmarks.contestants import Contestant, Operands


@dataclass(frozen=True)
class Cut:
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
    make: Callable[[Operands], Contestant]


def cuts_of(vocab: int, peers: bool) -> dict[str, Cut]:
    """Return every contestant on V ranks a stage."""
    cuts = {
        "(a) ours, whole": Cut(1, 1, 1, False, contestants.ours),
        "(a) eager": Cut(1, 1, 1, False, lambda p: contestants.materialised(p, False)),
        "(a) torch.compile": Cut(1, 1, 1, False, lambda p: contestants.materialised(p, True)),
    }
    if peers:
        for name in contestants.PEERS_OF_ONE_GPU:
            cuts[f"(a) {name}"] = Cut(
                1, 1, 1, False, lambda p, name=name: contestants.peer(p, name)
            )
    cuts["(b) loss-parallel logits"] = Cut(vocab, 1, vocab, True, contestants.loss_parallel_logits)
    cuts["(c) ours, sharded"] = Cut(vocab, vocab, 1, False, contestants.ours)
    cuts["(d) ours, replicated"] = Cut(vocab, 1, 1, True, contestants.ours)
    return cuts
