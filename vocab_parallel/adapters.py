"""The loss as other trainers call one; `docs/adapters.md` shows each in its place.

`transformers.py` is for the models of transformers. Nothing of those trainers is imported: what is
taken is what they hand over.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel.functional import linear_cross_entropy
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.heads import OutputWeight


class HiddenStatesLoss:
    """A loss of hidden states that is told of its classifier after the model is built.

    torchtitan's contract: ``set_lm_head`` once, then ``loss(hidden, labels, global_valid_tokens)``
    with labels that are shifted already, returning (sum over valid labels / global_valid_tokens,
    metrics). The classifier may be a DTensor sharded by ``Shard(0)`` over the tensor-parallel mesh,
    whose group then is the vocab group, and hidden states a DTensor over it: replicated, or sharded
    over the sequence.

    Args:
        ignore_index: labels that count for nothing.
        **options: of `linear_cross_entropy`.
    """

    def __init__(self, ignore_index: int = -100, **options: Any) -> None:
        self._options = {"ignore_index": ignore_index, **options}
        self._weight: OutputWeight | None = None
        self._validated = False

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Take the module that owns the classifier; its weight is read at each call."""
        self._weight = OutputWeight(lm_head)

    def __call__(
        self,
        pred: Tensor,  # (b, T, D), or (b, T / V, D) of a sequence-parallel body
        labels: Tensor,  # (b, T)
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and no metrics; every rank of the vocab group calls it.

        The first call agrees over the group that the arguments are right, on any device: ranks
        with unlike tokens, over which FSDP has sharded the classifier, are no vocab group.

        Raises:
            ValueError: no classifier was given, or hidden states are sharded over their last axis.
        """
        if self._weight is None:
            raise ValueError("the loss has no classifier yet: call set_lm_head(model.lm_head)")
        layout: HiddenLayout = "replicated"
        if isinstance(pred, DTensor):
            shards = [placement for placement in pred.placements if isinstance(placement, Shard)]
            if shards and shards[0].dim not in (1, pred.dim() - 2):
                raise ValueError(
                    f"hidden states are sharded by {pred.placements}: redistribute them to "
                    f"Replicate(), or to the sequence"
                )
            layout = "sequence" if shards else "replicated"
            pred = pred.to_local()
        if isinstance(labels, DTensor):
            labels = labels.full_tensor()
        rows = self._weight.read()
        e, c = rows.operands(pred)
        divided = global_valid_tokens is not None
        loss = linear_cross_entropy(
            e,
            c,
            labels,
            rows.bias,
            reduction="mean" if divided else "sum",
            num_valid_tokens=global_valid_tokens,
            vocab_parallel_options=rows.options,
            hidden_layout=layout,
            **{"validate": None if self._validated else True, **self._options},
        )
        self._validated = True
        return loss, {}


def shard_output_embeddings(
    splitter: Callable[..., Any],
    *,
    pipeline_rank: int,
    pipeline_group: ProcessGroup,
    vocab_group: ProcessGroup,
) -> Callable[..., Any]:
    """Make a splitter of pipeline stages one of a pipeline x vocab mesh: Forgather's contract.

    A splitter takes ``(model, example_args, example_kwargs, stage_indices, train, device, rank,
    pp_group)`` and returns ``(every stage's module, this rank's modules, this rank's stages,
    anything)``. The one that is returned is called alike on every rank of the mesh. It hands the
    splitter the place of the rank in its own column, and then swaps the last stage's output
    embeddings for this rank's rows of them, on the meta device if they are there: whoever fills
    the modules with weights gives each rank its rows, [start, stop) of the
    `VocabParallelClassifier`. Communicates nothing.

        groups = build_stage_groups(pipeline, vocab)
        splitter = shard_output_embeddings(
            create_manual_causal_lm_splitter(),
            pipeline_rank=groups.pipeline_rank,
            pipeline_group=groups.pipeline_group,
            vocab_group=groups.vocab_group,
        )

    Args:
        splitter: of a column; its last module has get_output_embeddings and
            set_output_embeddings, and gives hidden states where those return them unchanged.
        pipeline_rank, pipeline_group, vocab_group: of this rank, see `StageGroups`.

    Raises:
        ValueError: when called, on every rank: the last module has no linear output embeddings,
            or their weight is tied to the input's.
    """

    place = {"rank": pipeline_rank, "pp_group": pipeline_group}

    def split(model: nn.Module, *given: Any, **named: Any) -> Any:
        if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            raise ValueError(
                "the classifier is tied to the embedding of another stage: shard both ends and "
                "add up their gradients with VocabParallelEmbedding and TiedRows"
            )
        before_rank = given[:5]  # those up to the device, as far as they have no names
        found = splitter(model, *before_rank, **{**named, **place})
        last: Any = found[0][-1]
        head = last.get_output_embeddings() if hasattr(last, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"expected a last stage with an nn.Linear as get_output_embeddings(), got "
                f"{type(head).__name__} of {type(last).__name__}"
            )
        last.set_output_embeddings(VocabParallelClassifier.from_linear(head, vocab_group))
        return found

    return split
