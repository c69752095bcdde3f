"""One weight at both ends of a pipeline: the input embedding is the classifier.

Both ends hold the same rows, vocab rank by vocab rank: a `VocabParallelEmbedding` on the first
stage and a `VocabParallelClassifier` on the last. Each end's gradient is its own use's; the
weight's is the sum, which both ends compute in the same way, so that equal optimizers keep the two
bitwise equal. Where one rank runs both stages (a V-shaped schedule, or a pipeline of one rank),
they share one parameter, and autograd adds up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vocab_parallel.collectives import VocabGroup, exchange_with_peer
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.vocab_rows import VocabRows
from vocab_parallel.options import SharesGroup


class TiedRows(SharesGroup):
    """The two ends of a tied weight, as one rank sees them.

    Make it on every rank of the pipeline, after the stages are built and their weights loaded:
    equal values of the rows at both ends are the caller's to provide. The ranks exchange a few
    words, to know that the rows are the same. The modules' weights are read at each call, so that
    other parameters may take their place. A deep copy of it together with the modules is of the
    copied modules and the same group.

    Args:
        embedding, classifier: the modules that this rank runs, or None.
        group: the pipeline group of this rank's column.
        first, last: the pipeline ranks, in the group, that run the first and the last stage.

    Raises:
        ValueError: on every rank of the pipeline, where an end is without its module, or the two
            have unlike rows.
    """

    def __init__(
        self,
        embedding: VocabParallelEmbedding | None,
        classifier: VocabParallelClassifier | None,
        group: ProcessGroup,
        *,
        first: int,
        last: int,
    ) -> None:
        pipeline = VocabGroup.of(group)
        _check_ends(pipeline, [("first", first, embedding), ("last", last, classifier)])
        self.group = group
        self._embedding, self._classifier = embedding, classifier
        self._leads = pipeline.rank == first
        self._peer = last if self._leads else first
        if embedding is not None and classifier is not None:
            embedding.weight = classifier.weight
        elif embedding is not None:
            embedding.become_tied_copy()  # the last stage's counts in the norm

    @property
    def parameter(self) -> nn.Parameter | None:
        """This rank's end as it is now, where the other is on another rank.

        Raises:
            ValueError: this rank has both ends, and they are no longer one parameter.
        """
        embedding, classifier = self._embedding, self._classifier
        if embedding is None or classifier is None:
            end = embedding or classifier
            return None if end is None else end.weight
        if embedding.weight is not classifier.weight:
            raise ValueError(
                "this rank has both ends of the tied weight, which must be one parameter, but "
                "to_empty, load_state_dict(assign=True) or an assignment has put another in the "
                "place of one: make TiedRows, and then the optimizer, after it"
            )
        return None

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the other end's gradient to this one's; both ends call it, others may.

        After the last backward of a step and before clipping. Sends and receives one gradient
        [rows, D], in its own dtype; the memory of one more exists meanwhile.

        Raises:
            ValueError: this rank has both ends, and they are no longer one parameter.
        """
        parameter = self.parameter
        if parameter is None:
            return
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = exchange_with_peer(own, self._peer, self.group)
        # In one order on both ends: a + b and b + a are the same bits, and this needs no proof.
        first, last = (own, other) if self._leads else (other, own)
        parameter.grad = first + last

    @torch.no_grad()
    def differs(self) -> Tensor:
        """Tell, as a bool tensor, whether the two ends' rows differ in any bit; both ends call."""
        parameter = self.parameter
        if parameter is None:
            return torch.zeros((), dtype=torch.bool)
        other = exchange_with_peer(parameter.detach(), self._peer, self.group)
        return (parameter != other).any()


def _check_ends(pipeline: VocabGroup, ends: list[tuple[str, int, VocabRows | None]]) -> None:
    """Raise ValueError on every rank of the pipeline, or on none; see `TiedRows`.

    Args:
        pipeline: the ranks, which all call.
        ends: "first" and "last", the pipeline rank of that stage, and this rank's module of it.
    """
    own = [None if module is None else _rows_in_words(module) for _, _, module in ends]
    told, problems = pipeline.exchange_objects(own), []
    for (role, end, _), rows in zip(ends, zip(*told, strict=True), strict=True):
        holders = [rank for rank, each in enumerate(rows) if each is not None]
        if holders != [end]:
            problems.append(
                f"the {role} stage is on pipeline rank {end}, which alone has its end of the tied "
                f"weight: got one from the ranks {holders}"
            )
    different = sorted({each for rows in told for each in rows if each is not None})
    if len(different) > 1:
        problems.append(
            f"the ends of a tied weight have the rows {' and '.join(different)}: give both the "
            f"same vocabulary and the same counts of rows"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _rows_in_words(module: Any) -> str:
    if not isinstance(module, VocabRows):
        return f"of a {type(module).__name__}, which is no module of this library's rows"
    return f"[{module.start}, {module.stop}) of [{module.vocab_size}, {module.hidden_size}]"
