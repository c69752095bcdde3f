"""The loss as a pipeline schedule calls it, and the check that the two fit together."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from vocab_parallel.arguments import LAYOUTS
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.loss import linear_cross_entropy
from vocab_parallel.options import VocabParallelOptions, ceiling_rows

_NOT_OPTIONS = ("e", "c", "targets", "bias", "return_lse", "num_valid_tokens", "validate")


class CCEPipelineLoss:
    """``loss_fn`` of a pipeline schedule: the linear cross-entropy of the last stage's output.

    Every rank of the last stage's vocab group calls it, once for each microbatch. It only reads
    the classifier's weight, at each call, and must not own it: the weight is a parameter of the
    last stage's module, or training goes wrong (`validate_pipeline_loss` says how).

        loss = CCEPipelineLoss(last_stage_module.classifier, hidden_layout="sharded")
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss)
        validate_pipeline_loss(schedule, loss)
        schedule.step(target=labels, losses=losses, return_outputs=False)

    Args:
        output_weight: the classifier [rows, D]: the module that owns it (`VocabParallelClassifier`,
            nn.Linear), a Parameter, or a DTensor sharded over its rows.
        output_bias: its bias; None takes the module's own, if it has one.
        impl: "auto", or a name of `available_impls`.
        vocab_parallel_options: which rows these are. None: the module's ``.options``, or the
            DTensor's placement; a plain tensor is the whole vocabulary.
        ignore_index, softcap, shift, reduction, hidden_layout, **loss_options: as in
            `linear_cross_entropy`; ``shift`` is 1 by default, since a schedule's labels are
            usually its inputs.

    Raises:
        ValueError: an unknown option, a reduction that gives no scalar, or an ``output_weight``
            from which no rows can be read.
    """

    def __init__(
        self,
        output_weight: nn.Module | Tensor,
        output_bias: Tensor | None = None,
        impl: str = "auto",
        *,
        vocab_parallel_options: Any = None,
        ignore_index: int = -100,
        softcap: float | None = None,
        shift: int = 1,
        reduction: str = "mean",
        hidden_layout: HiddenLayout = "replicated",
        **loss_options: Any,
    ) -> None:
        if not isinstance(output_weight, Tensor) and not isinstance(
            getattr(output_weight, "weight", None), Tensor
        ):
            raise ValueError(
                f"output_weight must be a tensor or a module with a weight, got "
                f"{type(output_weight).__name__}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(
                f'a schedule needs a scalar loss: reduction must be "mean" or "sum", got '
                f"{reduction!r}"
            )
        if hidden_layout not in LAYOUTS:
            raise ValueError(f"unknown hidden_layout {hidden_layout!r}: known are {list(LAYOUTS)}")
        for name in loss_options.keys() & set(_NOT_OPTIONS):
            raise ValueError(f"{name} is not an option of a pipeline loss")
        self.output_weight = output_weight
        self.output_bias = output_bias
        self.vocab_parallel_options = vocab_parallel_options
        self._options: dict[str, Any] = {
            "impl": impl,
            "ignore_index": ignore_index,
            "softcap": softcap,
            "shift": shift,
            "reduction": reduction,
            "hidden_layout": hidden_layout,
            **loss_options,
        }
        self._validated = False

    def __call__(
        self,
        hidden_states: Tensor,  # (..., T, D), or (..., T / V, D) in the "sequence" layout
        labels: Tensor,  # (..., T)
        *,
        num_valid_tokens: int | Tensor | None = None,
    ) -> Tensor:
        """Return the scalar loss of one microbatch, equal on every rank of the vocab group.

        The first call agrees over the group that the arguments are right, on any device; the
        later ones as `linear_cross_entropy` does by default. A schedule may call it on
        uninitialised hidden states to infer shapes: nothing is kept of a call.
        """
        weight, bias, options = self._read()
        validate = None if self._validated else True
        loss = linear_cross_entropy(
            hidden_states,
            weight,
            labels,
            bias,
            vocab_parallel_options=options,
            num_valid_tokens=num_valid_tokens,
            validate=validate,
            **self._options,
        )
        self._validated = True
        assert isinstance(loss, Tensor)
        return loss

    @property
    def parameters(self) -> list[Tensor]:
        """The weight and the bias that the loss reads now."""
        owner = self.output_weight
        weight = owner if isinstance(owner, Tensor) else owner.weight
        bias = self.output_bias
        if bias is None and not isinstance(owner, Tensor):
            bias = getattr(owner, "bias", None)
        return [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]

    def _read(self) -> tuple[Tensor, Tensor | None, Any]:
        weight, *rest = self.parameters
        bias = rest[0] if rest else None
        options = self.vocab_parallel_options
        if options is None:
            options = getattr(self.output_weight, "options", None)
        if options is None and isinstance(weight, DTensor):
            options = _options_of_dtensor(weight)
        return _local(weight), None if bias is None else _local(bias), options


def validate_pipeline_loss(schedule: Any, loss: CCEPipelineLoss) -> None:
    """Refuse a schedule and a loss that would train wrongly together.

    Call it on every rank after building the schedule; ranks without the last stage have nothing
    to check. Communicates nothing.

    Raises:
        ValueError: on the ranks of the last stage, where the classifier's weight is not a
            parameter of the last stage's module. A weight that only the loss owns is trained
            wrongly and silently: its gradient is M times too large with ``scale_grads=True`` (M
            microbatches; the schedule divides only its modules' gradients), missing under
            InterleavedZeroBubble and ZBVZeroBubble, and partial under DualPipeV.
    """
    # Imported here, since it takes a second that the loss alone should not cost.
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    if isinstance(schedule, PipelineScheduleSingle):
        stages = [schedule._stage]
    elif isinstance(schedule, PipelineScheduleMulti):
        stages = list(schedule._stages)
    else:
        raise ValueError(
            f"schedule must be a schedule of torch.distributed.pipelining, got "
            f"{type(schedule).__name__}"
        )
    if not any(stage.is_last for stage in stages):
        return
    if not isinstance(loss, CCEPipelineLoss):
        raise ValueError(f"loss must be a CCEPipelineLoss, got {type(loss).__name__}")
    last = next(stage for stage in stages if stage.is_last)
    owned = {id(parameter) for parameter in last.submod.parameters()}
    for tensor in loss.parameters:
        if id(tensor) not in owned:
            raise ValueError(
                f"the classifier's tensor {list(tensor.shape)} that the loss reads is not a "
                f"parameter of the last stage's module: the schedule would not scale its "
                f"gradient (M times too large with scale_grads=True) and zero-bubble schedules "
                f"would not compute it; register the classifier in the last stage's module, e.g. "
                f"as a VocabParallelClassifier, and give the loss that module"
            )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _options_of_dtensor(weight: DTensor) -> VocabParallelOptions:
    """Read the rows of a DTensor [vocab, D] off its placement."""
    axes = [
        axis
        for axis, placement in enumerate(weight.placements)
        if not isinstance(placement, Replicate)
    ]
    rest = [weight.placements[axis] for axis in axes]
    if len(axes) > 1 or (rest and rest[0] != Shard(0)):
        raise ValueError(
            f"a DTensor classifier must be sharded by Shard(0) over one mesh axis, got "
            f"{weight.placements}: redistribute it, or pass vocab_parallel_options"
        )
    if not axes:
        raise ValueError(
            "a DTensor classifier that is replicated has no shard of rows: pass "
            "weight.to_local() of a plain module, or shard it by Shard(0)"
        )
    mesh = weight.device_mesh
    start, stop = ceiling_rows(weight.shape[0], mesh.get_local_rank(axes[0]), mesh.size(axes[0]))
    return VocabParallelOptions(start, stop, mesh.get_group(axes[0]), vocab_size=weight.shape[0])
