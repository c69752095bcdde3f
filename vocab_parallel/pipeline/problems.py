"""What is wrong with a stage or with a loss under a schedule: checks of one rank alone."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

DIVIDED_TWICE = (
    "num_valid_tokens divides by the tokens of the whole step, but the schedule was built with "
    "scale_grads=True and divides by the number of microbatches again: build it with "
    "scale_grads=False"
)
_WRAPPERS = {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel"}


def check_stages(stages: Sequence[Any], scale_grads: bool, unwrapped: str | None) -> None:
    """Raise ValueError where something is wrong with the stages of this rank.

    Args:
        stages: this rank's pipeline stages.
        scale_grads: of the schedule.
        unwrapped: why no stage, nor a part of it, may be wrapped for data parallelism, and what to
            do; None where it may.
    """
    modules = [stage.submod for stage in stages]
    owners = Counter(id(own) for module in modules for own in set(module.parameters()))
    if scale_grads and any(count > 1 for count in owners.values()):
        raise ValueError(
            "a parameter is shared by two stages of one rank, and scale_grads=True divides its "
            "gradient once for each: build the schedule with scale_grads=False"
        )
    kinds = {type(inner) for module in modules for inner in module.modules()}
    wrappers = {cls.__name__ for kind in kinds for cls in kind.__mro__} & _WRAPPERS
    if wrappers and unwrapped is not None:
        raise ValueError(f"{min(wrappers)} {unwrapped}")


def check_loss(loss: Any, scale_grads: bool, splits: bool) -> None:
    """Raise ValueError where something is wrong with the loss of the last stage.

    Args:
        loss: what the schedule was given.
        scale_grads: of the schedule.
        splits: whether it runs autograd's backward of the loss in two halves.
    """
    if hasattr(loss, "_torchdynamo_orig_callable") or hasattr(loss, "_orig_mod"):
        raise ValueError(
            "a compiled loss fails under a schedule that splits the backward, and hides what the "
            "schedule asks of a loss: pass the CCEPipelineLoss itself"
        )
    if getattr(loss, "accumulate_into", None) is not None and (splits or scale_grads):
        raise ValueError(
            "accumulate_into adds to the classifier's gradient by itself, which a schedule that "
            "splits the backward would miss and scale_grads=True would divide wrongly: leave it "
            "out, or use 1F1B, Interleaved1F1B, GPipe or LoopedBFS with scale_grads=False and the "
            "loss's num_valid_tokens"
        )
    if getattr(loss, "reduction", None) == "sum" and scale_grads:
        raise ValueError(
            'reduction="sum" is not a mean over microbatches, but scale_grads=True divides by '
            "their number: build the schedule with scale_grads=False"
        )
    if getattr(loss, "num_valid_tokens", None) is not None and scale_grads:
        raise ValueError(DIVIDED_TWICE)
