"""What is wrong with a stage or with a loss under a schedule, as words."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

DIVIDED_TWICE = (
    "num_valid_tokens divides by the tokens of the whole step, but the schedule was built with "
    "scale_grads=True and divides by the number of microbatches again: build it with "
    "scale_grads=False"
)


def problem_of_stages(stages: Sequence[Any], scale_grads: bool, splits: bool) -> str | None:
    """Say what is wrong with the stages of this rank, or None.

    Args:
        stages: this rank's pipeline stages.
        scale_grads: of the schedule.
        splits: whether the schedule runs a backward in two halves.
    """
    owners = Counter(
        id(parameter) for stage in stages for parameter in set(stage.submod.parameters())
    )
    if scale_grads and any(count > 1 for count in owners.values()):
        return (
            "a parameter is shared by two stages of one rank, and scale_grads=True divides its "
            "gradient once for each: build the schedule with scale_grads=False"
        )
    if splits:
        for stage in stages:
            wrapper = data_parallel_wrapper(stage.submod)
            if wrapper is not None:
                return (
                    f"{wrapper} does not work under a schedule that splits the backward: use "
                    f"1F1B, Interleaved1F1B, GPipe or LoopedBFS, or reduce the gradients over the "
                    f"data group after the step"
                )
    return None


def problem_of_loss(loss: Any, scale_grads: bool, splits: bool) -> str | None:
    """Say what is wrong with the loss of the last stage, or None."""
    if hasattr(loss, "_torchdynamo_orig_callable") or hasattr(loss, "_orig_mod"):
        if splits:
            return (
                "a compiled loss fails under a schedule that splits the backward, which runs it "
                "twice: pass the CCEPipelineLoss itself"
            )
        return "pass the CCEPipelineLoss itself, not what torch.compile made of it"
    if splits and getattr(loss, "accumulate_into", None) is not None:
        return (
            "accumulate_into gives autograd no gradient of the classifier, which a schedule that "
            "splits the backward asks for by name: leave it out, or use 1F1B, Interleaved1F1B, "
            "GPipe or LoopedBFS"
        )
    if getattr(loss, "accumulate_into", None) is not None and scale_grads:
        return (
            "accumulate_into adds each microbatch's gradient to what is there, and scale_grads="
            "True divides only .grad, or that of earlier steps again: build the schedule with "
            "scale_grads=False and set the loss's num_valid_tokens"
        )
    if getattr(loss, "reduction", None) == "sum" and scale_grads:
        return (
            'reduction="sum" is not a mean over microbatches, but scale_grads=True divides by '
            "their number: build the schedule with scale_grads=False"
        )
    if getattr(loss, "num_valid_tokens", None) is not None and scale_grads:
        return DIVIDED_TWICE
    return None


def data_parallel_wrapper(module: nn.Module) -> str | None:
    """Return the name of what wraps a stage, or a part of it, for data parallelism; or None."""
    for inner in module.modules():
        for cls in type(inner).__mro__:
            if cls.__name__ == "DistributedDataParallel":
                return "DistributedDataParallel"
            if cls.__name__ in ("FSDPModule", "FullyShardedDataParallel"):
                return "FSDP"
    return None
