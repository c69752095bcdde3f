"""The loss as other trainers call one; `docs/adapters.md` shows each in its place.

Nothing of those trainers is imported: what is taken is what they hand over.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from vocab_parallel.functional import linear_cross_entropy
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.logit_settings import logit_settings, refuse_other_losses
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.heads import OutputWeight


class CausalLMLoss:
    """The loss of a Hugging Face causal language model, whose forward stays untouched.

    Runs the model without its classifier and computes the loss from its hidden states and
    ``get_output_embeddings()``, which is read at each call. A softcap and a scale of the logits
    are those of the model's configuration; `docs/causal-families.md` has the families of
    transformers, and what is refused. One process has the whole vocabulary, or the model has a
    `VocabParallelClassifier` and every rank of its group calls, with the same batch unless
    ``hidden_layout`` says otherwise. FSDP's hooks of the classifier do not run: keep it out of a
    wrapped unit.

        loss = CausalLMLoss()(model, batch)         # batch as model(**batch) takes it

    Args:
        ignore_index: labels that count for nothing.
        temperature: divides the model's logits, after its own scale.
        **options: of `linear_cross_entropy`: label_smoothing, z_loss, backward, memory_budget, ...
    """

    def __init__(self, ignore_index: int = -100, temperature: float = 1.0, **options: Any) -> None:
        self._options = {"ignore_index": ignore_index, **options}
        self._temperature = temperature

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """Return the loss that ``model(**inputs).loss`` has, without the logits.

        Args:
            model: of two modules: a body, and the ``get_output_embeddings()`` of its hidden states.
            inputs: what the model takes, ``labels`` [b, T] among them.
            num_items_in_batch: divides the sum in place of the count of valid labels, as Trainer
                gives it where gradients are accumulated.

        Raises:
            ValueError: a model without a classifier, or whose classifier has fewer rows than its
                configuration's ``vocab_size``, inputs without labels, or a model or inputs whose
                own loss is not the mean over shifted labels of one classifier's logits.
        """
        owner: Any = model
        if hasattr(owner, "get_base_model"):  # of PEFT
            owner = owner.get_base_model()
        head = owner.get_output_embeddings() if hasattr(owner, "get_output_embeddings") else None
        if head is None:
            raise ValueError(
                f"expected a causal language model with get_output_embeddings(), got "
                f"{type(model).__name__}: give the unwrapped model"
            )
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError("inputs must have labels; in a causal model's batch they are its ids")
        config: Any = getattr(owner, "config", None)
        settings = logit_settings(config)
        refuse_other_losses(config)
        weight = OutputWeight(head)
        if any(isinstance(tensor, DTensor) for tensor in weight.tensors):
            raise ValueError(
                f"the classifier of {type(owner).__name__} is a DTensor, of which each rank has a "
                f"part while the ranks have unlike tokens (FSDP's hooks do not run here): keep it "
                f"out of what is wrapped, or give CCEPipelineLoss the rows of a vocab group"
            )
        weight.check_vocab_size(owner)
        weight.warn_of_padding(owner)
        rows = weight.read()
        body = _body_of(owner, head)
        _refuse_inputs_of_the_loss(inputs)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = getattr(body(**rest), "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"expected last_hidden_state in what {type(body).__name__} returns, "
                f"got none: leave return_dict at True, in the inputs and in the configuration"
            )
        if num_items_in_batch is not None and isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(hidden.device)
        e, c = rows.operands(hidden)
        return linear_cross_entropy(
            e,
            c,
            labels.to(hidden.device),
            rows.bias,
            softcap=settings["softcap"],
            temperature=settings["temperature"] * self._temperature,
            vocab_parallel_options=rows.options,
            shift=1,
            num_valid_tokens=num_items_in_batch,
            **self._options,
        )


def _body_of(model: nn.Module, head: nn.Module) -> nn.Module:
    """Return what a model has besides its classifier.

    Raises:
        ValueError: the model is more than those two modules, or its loss is not a causal model's.
    """
    whole = getattr(model, "_orig_mod", model)  # of torch.compile
    name = type(whole).__name__
    children = dict(whole.named_children())
    if not any(child is head for child in children.values()):
        raise ValueError(
            f"expected a classifier that is a module of the model itself, got one within another "
            f"module of {name}, which may have layers of its own: give the unwrapped model, or the "
            f"classifier's own inputs to linear_cross_entropy"
        )
    others = {
        child_name: child
        for child_name, child in children.items()
        if child is not head and next(child.parameters(), None) is not None
    }
    if len(others) != 1:
        raise ValueError(
            f"expected one module besides the classifier, got {sorted(others)} in {name}, whose "
            f"order is not known: give the classifier's own inputs to linear_cross_entropy"
        )
    # transformers chooses the loss by the name of the class, or the user has set one.
    loss = getattr(whole, "loss_function", None)
    if loss is not None and getattr(loss, "__name__", "") != "ForCausalLMLoss":
        raise ValueError(
            f"expected a model with the loss of a causal one, ForCausalLMLoss, got {name} with "
            f"{loss}: give its hidden states to linear_cross_entropy"
        )
    (body,) = others.values()
    return body


def _refuse_inputs_of_the_loss(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that a model hands to its own loss, and that its base model would ignore."""
    for name, remedy in (
        ("num_items_in_batch", "pass it as CausalLMLoss's own argument"),
        ("shift_labels", "pass labels that are not shifted"),
        ("ignore_index", "pass it to CausalLMLoss()"),
        ("output_router_logits", "add the router's loss yourself"),
    ):
        value = inputs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"expected inputs of the model's body, got {name}: {remedy}")


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
        validate = None if self._validated else True
        loss = linear_cross_entropy(
            e,
            c,
            labels,
            rows.bias,
            reduction="mean" if divided else "sum",
            num_valid_tokens=global_valid_tokens,
            vocab_parallel_options=rows.options,
            hidden_layout=layout,
            **{"validate": validate, **self._options},
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

    def split(
        model: nn.Module,
        example_args: tuple[Any, ...],
        example_kwargs: dict[str, Any],
        stage_indices: list[tuple[int, ...]],
        train: bool,
        device: Any,
        rank: int | None = None,
        pp_group: ProcessGroup | None = None,
    ) -> Any:
        if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            raise ValueError(
                "the classifier is tied to the embedding of another stage: shard both ends and "
                "add up their gradients with VocabParallelEmbedding and TiedRows"
            )
        found = splitter(
            model,
            example_args,
            example_kwargs,
            stage_indices,
            train,
            device=device,
            rank=pipeline_rank,
            pp_group=pipeline_group,
        )
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
