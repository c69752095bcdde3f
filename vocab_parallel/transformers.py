"""A causal model of transformers whose own forward has the fused loss: one call, in place.

For a call with labels the model finds a stand-in in its classifier's place, which returns
`DeferredLogits`. All else of the call is the model's own code: what stands around it (hooks, PEFT,
DDP, FSDP2, accelerate, Trainer) runs as ever, and no family's loss, shift or scale is written down
here. Nothing of transformers is imported.

With a mesh the classifier's rows are spread over data-parallel ranks. What each rank returns stays
its own loss, and gradients stay means over the ranks, of the body's by DDP or FSDP2 and of the rows
by the loss: so a trainer's own factors mean what they meant.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vocab_parallel.collectives import VocabGroup
from vocab_parallel.deferred_logits import DeferredLogits, Recipe
from vocab_parallel.functional import linear_cross_entropy
from vocab_parallel.modules.heads import OutputWeight, Rows
from vocab_parallel.modules.sharded_linear import (
    ShardedLinear,
    can_be_sharded,
    is_sharded,
    make_whole,
    shard_rows,
)

_CHANGED = "_vocab_parallel_forward"  # the attribute of a changed model
# What the model's forward says of its loss, or what its loss does not return.
_OF_THE_MODEL = frozenset(
    {
        *("softcap", "temperature", "shift", "reduction", "ignore_index", "num_valid_tokens"),
        *("bias", "vocab_parallel_options", "token_weight", "document_ids", "return_lse"),
        *("return_metrics", "hidden_layout", "hidden_grad_scale"),
    }
)


def use_vocab_parallel_loss(
    model: nn.Module, *, mesh: DeviceMesh | None = None, **options: Any
) -> None:
    """Let ``model(**batch).loss`` be computed without the logits, in training and evaluation.

    The model is changed in place, and `remove_vocab_parallel_loss` undoes it. With labels, its own
    forward and its own loss run as they are, with `linear_cross_entropy` where they take the
    cross-entropy: shift, num_items_in_batch, scale and softcap are the model's. Without labels
    nothing is changed. Call it before or after PEFT, DDP, FSDP2 or accelerate wrap the model, and
    on a changed model to give other options. A deep copy and a pickle of the model are changed too.

    The classifier is the whole vocabulary, or a `VocabParallelClassifier` or a DTensor sharded by
    ``Shard(0)`` whose group has the same batch on every rank; then every rank of it calls.

    Outputs have no ``logits`` where gradients are taken. Under ``torch.no_grad`` they are computed
    when they are first read.

        use_vocab_parallel_loss(model)
        Trainer(model, ...).train()

    With a mesh each data-parallel rank holds its rows of the classifier, and only their optimizer's
    state: every rank calls this, before DDP or ``fully_shard`` wraps the model and before there is
    an optimizer, and then always calls the model when the others do, with sequences of its own. Its
    loss is that of its own tokens, and its rows' gradient is the mean over the ranks, as DDP's and
    FSDP2's are. A call gathers the tokens' hidden states, in place of the rows and their gradient;
    without labels, for logits and for an embedding that is tied, it gathers the rows. DDP leaves
    the rows alone; FSDP2 wants ``ignored_params={*model.lm_head.parameters()}``.
    `remove_vocab_parallel_loss` makes the classifier whole on every rank, and the functions of
    torch.distributed.checkpoint.state_dict give it whole from the sharded model.

    Args:
        model: of transformers, with get_output_embeddings(), or what wraps it.
        mesh: one axis over all ranks that DDP or FSDP2 takes gradients' means over.
        **options: of `linear_cross_entropy`: backward, impl, memory_budget, label_smoothing,
            z_loss, logits_dtype, validate, ... ``label_smoothing`` has the effect of Trainer's
            label_smoothing_factor, with which Trainer sends no labels and computes logits.

    Raises:
        ValueError: a model without a classifier, a classifier whose logits may be more than its
            weight's, or an option that the model itself sets; with a mesh, one that is not of all
            ranks, a classifier that is no plain nn.Linear, or a changed model.
            When called: a model whose loss is not the cross-entropy of its classifier's scaled
            logits.
    """
    wrong = sorted(_OF_THE_MODEL.intersection(options))
    if wrong:
        raise ValueError(
            f"expected options of linear_cross_entropy that the model's own loss leaves open, got "
            f"{', '.join(wrong)}: what the model says of its loss stays; call linear_cross_entropy "
            f"itself for another loss"
        )
    owner = _owner_of(model)
    head = owner.get_output_embeddings()
    weight = OutputWeight(head)  # refuses what is no linear classifier
    changed = vars(owner).get(_CHANGED)
    if changed is None:
        _check_vocab_size(owner, weight)
    if mesh is not None:
        _check_sharding(model, owner, head, mesh)
        shard_rows(_sharing(owner, head), mesh)
        _tell_ddp(owner, head)
    if changed is None:
        changed = _Forward(owner, owner.forward)
        setattr(owner, _CHANGED, changed)
        owner.forward = changed
    changed.options = options


def remove_vocab_parallel_loss(model: nn.Module) -> None:
    """Undo `use_vocab_parallel_loss`; a model that is not changed stays as it is.

    A classifier that was sharded over a mesh is whole again, as another parameter: every rank
    calls, and sends its rows to the others.

    Raises:
        ValueError: not a model of transformers with a classifier.
    """
    owner = _owner_of(model)
    changed = vars(owner).pop(_CHANGED, None)
    if changed is None:
        return
    sharded = [module for module in owner.modules() if is_sharded(module)]
    if sharded:
        make_whole(sharded)
        del owner._ddp_params_and_buffers_to_ignore
    changed.options = None  # whoever has wrapped it since calls through
    if vars(owner).get("forward") is changed:
        del owner.forward
        if owner.forward != changed.inner:  # it was patched before
            owner.forward = changed.inner


def _check_vocab_size(owner: nn.Module, weight: OutputWeight) -> None:
    """Refuse fewer rows than the configuration says, and warn of more."""
    tensors = weight.tensors
    if any(own.is_meta for own in tensors):
        return  # it may be resized before it has values
    weight.check_vocab_size(owner)
    if not any(isinstance(own, DTensor) for own in tensors):
        weight.warn_of_padding(owner)


def _owner_of(model: nn.Module) -> Any:
    """Return the model of transformers in what wraps it: torch.compile, DDP, PEFT."""
    owner: Any = model
    while not hasattr(owner, "get_output_embeddings"):
        inner = getattr(owner, "_orig_mod", getattr(owner, "module", None))
        if not isinstance(inner, nn.Module):
            break
        owner = inner
    owner = getattr(owner, "_orig_mod", owner)
    if hasattr(owner, "get_base_model"):
        owner = owner.get_base_model()
    if not hasattr(owner, "get_output_embeddings") or owner.get_output_embeddings() is None:
        raise ValueError(
            f"expected a causal language model with get_output_embeddings(), got "
            f"{type(owner).__name__}: give linear_cross_entropy the hidden states and the weight "
            f"of its classifier"
        )
    return owner


def _check_sharding(model: nn.Module, owner: Any, head: Any, mesh: DeviceMesh) -> None:
    """Raise ValueError where the rows of a classifier cannot be spread over a mesh."""
    others = [module for module in _sharing(owner, head) if not can_be_sharded(module)]
    if mesh.ndim != 1 or mesh.size() != dist.get_world_size():
        problem = f"a mesh of one axis over all {dist.get_world_size()} ranks, got {mesh}"
    elif isinstance(model, DistributedDataParallel):
        problem = "a model before DDP wraps it, got DDP's: DDP sums whole gradients"
    elif _CHANGED in vars(owner):
        problem = "a model that is not changed yet: call remove_vocab_parallel_loss(model) first"
    elif others:
        problem = (
            f"a plain nn.Linear as the classifier, and a plain nn.Embedding where one is tied to "
            f"it, got {type(others[0]).__name__} with {type(others[0].weight).__name__}: call "
            f"before FSDP2 wraps the model, and leave both out of PEFT"
        )
    else:
        return
    raise ValueError(f"expected, to spread the classifier's rows over a mesh, {problem}")


def _sharing(owner: nn.Module, head: Any) -> list[Any]:
    """Return the classifier and the modules that its weight is tied to."""
    tied = [module for module in owner.modules() if getattr(module, "weight", None) is head.weight]
    return [head, *(module for module in tied if module is not head)]


def _tell_ddp(owner: Any, head: nn.Module) -> None:
    """Name the sharded rows to DDP, by what they are called in PEFT's wrappers too."""
    rows = set(head.parameters())
    every = owner.named_parameters(remove_duplicate=False)
    names = [name for name, own in every if own in rows]
    owner._ddp_params_and_buffers_to_ignore = [
        prefix + name for prefix in ("", "base_model.", "base_model.model.") for name in names
    ]


class _Forward:
    """A model's forward that takes the place of ``model.forward``.

    An object rather than a function, so that copies and pickles of the model have one of their own.

    Args:
        owner: the model.
        inner: its forward before.
    """

    def __init__(self, owner: Any, inner: Callable[..., Any]) -> None:
        self.owner, self.inner = owner, inner
        self.options: dict[str, Any] | None = {}
        self.agreed = False  # whether the vocab group has agreed once on its arguments
        # For whoever asks which inputs a model takes. No __wrapped__, which accelerate follows.
        self.__signature__ = inspect.signature(inner)

    @torch.compiler.disable(recursive=False)  # the model's own frames are compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.owner:  # accelerate's unwrap_model() binds it to the model
            args = args[1:]
        labels = kwargs.get("labels")
        if labels is None and args:
            labels = self.__signature__.bind_partial(*args, **kwargs).arguments.get("labels")
        if labels is None or self.options is None:
            return self.inner(*args, **kwargs)
        head = self.owner.get_output_embeddings()
        stand_in = _StandIn(head, partial(self.loss, head))
        with _in_place_of(head, stand_in, self.owner):
            output = self.inner(*args, **kwargs)
        stand_in.done = True
        if not stand_in.called:
            raise ValueError(
                f"expected a model that calls its classifier, {type(head).__name__}, for logits, "
                f"got {type(self.owner).__name__}, which did not: leave it as it is, or give its "
                f"hidden states to linear_cross_entropy"
            )
        return _with_logits_on_request(output)

    def loss(self, head: nn.Module, hidden: Tensor, targets: Tensor, **given: Any) -> Tensor:
        """Return the loss that `Recipe` asks for."""
        loss = partial(self._loss, targets=targets, given=given)
        # Its weight is whole within its own call alone.
        return _within(head, hidden, loss) if isinstance(head, FSDPModule) else loss(head, hidden)

    def _loss(self, head: nn.Module, hidden: Tensor, targets: Tensor, given: Any) -> Tensor:
        sharded = any(map(is_sharded, head.modules()))
        if sharded and not isinstance(head, ShardedLinear):
            raise ValueError(
                f"expected the classifier whose rows were spread over a mesh, got it within "
                f"{type(head).__name__}: leave it out of PEFT's target_modules and modules_to_save"
            )
        options = {**(self.options or {}), **given}
        rows = OutputWeight(head).read()
        if rows.options is not None and not self.agreed:
            # Ranks with unlike tokens, over which FSDP has sharded the classifier, are no group.
            options.setdefault("validate", True)
            self.agreed = True
        if sharded:
            return _loss_of_own_tokens(rows, hidden, targets, **options)
        e, c = rows.operands(hidden)
        return linear_cross_entropy(
            e, c, targets, rows.bias, vocab_parallel_options=rows.options, **options
        )


def _loss_of_own_tokens(
    rows: Rows,
    hidden: Tensor,  # (..., D)
    targets: Tensor,  # (...)
    *,
    reduction: str,
    ignore_index: int,
    **options: Any,
) -> Tensor:
    """Return this rank's loss over rows that data-parallel ranks share; all of them call.

    The ranks may have unlike numbers of tokens, which they tell each other first. The host waits
    for that, and for the GPU before it where the group cannot communicate from the CPU.
    """
    group = VocabGroup.of(rows.options.group)
    flat, labels = hidden.flatten(0, -2), targets.flatten()
    missing = int(group.exchange_integers([labels.shape[0]]).max()) - labels.shape[0]
    losses = linear_cross_entropy(
        F.pad(flat, (0, 0, 0, missing)),
        rows.weight,
        F.pad(labels, (0, missing), value=ignore_index),
        rows.bias,
        reduction="none",
        ignore_index=ignore_index,
        vocab_parallel_options=rows.options,
        hidden_layout="sharded",
        hidden_grad_scale=float(group.degree),
        **options,
    )[: labels.shape[0]]
    # The rows' gradient is a sum over the ranks: its mean, with the hidden states' as it was.
    losses = losses.detach() + (losses - losses.detach()) / group.degree
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


@contextmanager
def _in_place_of(head: nn.Module, stand_in: nn.Module, owner: nn.Module) -> Iterator[None]:
    """Put a stand-in wherever a model has its classifier."""
    places = [
        (parent, name)
        for parent in owner.modules()
        for name, child in parent._modules.items()
        if child is head
    ]
    for parent, name in places:
        parent._modules[name] = stand_in
    try:
        yield
    finally:
        for parent, name in places:
            parent._modules[name] = head


class _StandIn(nn.Module):
    """What a model finds in place of its classifier while it has labels."""

    def __init__(self, head: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.head, self.loss, self.called, self.done = head, loss, False, False

    @property
    def weight(self) -> Any:
        """The classifier's, for models that cast their hidden states to its dtype."""
        return self.head.weight

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> DeferredLogits:
        """Return the logits of hidden states [..., D] as something that is not computed."""
        self.called = True
        tensors = OutputWeight(self.head).tensors  # refuses hooks, which might change logits
        options = getattr(self.head, "options", None)
        rows = tensors[0].shape[0] if options is None else options.vocab_size
        kind = hidden.device.type
        casts = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if casts else hidden.dtype
        differentiable = torch.is_grad_enabled()

        def compute(hidden: Tensor) -> Tensor:  # wherever they are read, as they would be here
            with (
                torch.set_grad_enabled(differentiable and torch.is_grad_enabled()),
                torch.autocast(kind, dtype, enabled=casts),
            ):
                return self.head(hidden)

        return DeferredLogits(
            Recipe(hidden, compute, rows, self.loss, dtype, may_compute=lambda: self.done)
        )


def _within(
    module: nn.Module, hidden: Tensor, function: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Return function(module, hidden), computed within the module's own call and its hooks."""

    def forward(hidden: Tensor) -> Tensor:
        del module.forward
        return function(module, hidden)

    module.forward = forward
    try:
        return module(hidden)
    finally:
        vars(module).pop("forward", None)


def _with_logits_on_request(output: Any) -> Any:
    """Return a model's output without logits where gradients are taken, else computed if read.

    DDP copies the tensors of an output in training, which would compute them each time.
    """

    def on_request(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        return None if torch.is_grad_enabled() else value

    if isinstance(output, tuple):
        return tuple(on_request(value) for value in output)
    return type(output)(**{name: on_request(value) for name, value in output.items()})
