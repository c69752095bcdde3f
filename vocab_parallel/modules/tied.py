"""One weight at both ends of a pipeline: the input embedding is the classifier.

Both ends hold the same rows, vocab rank by vocab rank: a `VocabParallelEmbedding` on the first
stage and a `VocabParallelClassifier` on the last. Each end's gradient is its own use's; the
weight's is the sum, which both ends compute in the same way, so that equal optimizers keep the two
bitwise equal. Where one rank runs both stages (a V-shaped schedule, or a pipeline of one rank),
they share one parameter, and autograd adds up.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vocab_parallel import collectives
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.shares_group import SharesGroup


class TiedRows(SharesGroup):
    """The two ends of a tied weight, as one rank sees them.

    Make it on every rank of the pipeline, after the stages are built and their weights loaded:
    equal rows at both ends are the caller's to provide. The modules' weights are read at each
    call, so that other parameters may take their place. A deep copy of it together with the
    modules is of the copied modules and the same group.

    Args:
        embedding, classifier: the modules that this rank runs, or None.
        group: the pipeline group of this rank's column.
        first, last: the pipeline ranks, in the group, that run the first and the last stage.

    Raises:
        ValueError: a rank at an end without its module, or both modules with unlike rows.
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
        rank = collectives.rank_in(group)
        for role, end, module in (("first", first, embedding), ("last", last, classifier)):
            if (rank == end) != (module is not None):
                raise ValueError(
                    f"pipeline rank {rank}: the {role} stage is on rank {end}, which alone has "
                    f"its end of the tied weight; got {type(module).__name__}"
                )
        self.group = group
        self._embedding, self._classifier = embedding, classifier
        self._leads = rank == first
        self._peer = last if self._leads else first
        if embedding is not None and classifier is not None:
            if embedding.weight.shape != classifier.weight.shape:
                raise ValueError(
                    f"the ends of a tied weight have the rows {list(embedding.weight.shape)} and "
                    f"{list(classifier.weight.shape)}: give both the same vocabulary"
                )
            embedding.weight = classifier.weight
        elif embedding is not None:
            embedding.become_tied_copy()  # the last stage's counts in the norm

    @property
    def parameter(self) -> nn.Parameter | None:
        """This rank's end as it is now, where the other is on another rank."""
        if self._embedding is not None and self._classifier is not None:
            return None
        end = self._embedding or self._classifier
        return None if end is None else end.weight

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the other end's gradient to this one's; both ends call it, others may.

        After the last backward of a step and before clipping. Sends and receives one gradient
        [rows, D], in its own dtype; the memory of one more exists meanwhile.

        Raises:
            ValueError: this rank has both ends, and they are no longer one parameter.
        """
        self._check_shared()
        parameter = self.parameter
        if parameter is None:
            return
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = collectives.exchange_with_peer(own, self._peer, self.group)
        # In one order on both ends: a + b and b + a are the same bits, and this needs no proof.
        first, last = (own, other) if self._leads else (other, own)
        parameter.grad = first + last

    @torch.no_grad()
    def differs(self) -> Tensor:
        """Tell, as a bool tensor, whether the two ends' rows differ in any bit; both ends call."""
        self._check_shared()
        parameter = self.parameter
        if parameter is None:
            return torch.zeros((), dtype=torch.bool)
        other = collectives.exchange_with_peer(parameter.detach(), self._peer, self.group)
        return (parameter != other).any()

    def _check_shared(self) -> None:
        embedding, classifier = self._embedding, self._classifier
        if embedding is None or classifier is None:
            return
        if embedding.weight is not classifier.weight:
            raise ValueError(
                "this rank has both ends of the tied weight, which must be one parameter, but "
                "to_empty, load_state_dict(assign=True) or an assignment has put another in the "
                "place of one: make TiedRows, and then the optimizer, after it"
            )
