"""Other libraries' functions by name, computed by ours, for their own test files.

`test_peers.py` copies those files and lets each begin with ``peers.replace(...)``. What has no
counterpart here skips the test that asks for it, and says why.
"""

import importlib
from typing import Any

import pytest
from torch import Tensor

from vocab_parallel import linear_cross_entropy


def cut_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    impl: Any = None,
    shift: Any = 0,
    **options: Any,
) -> Any:
    """Apple's function; whatever its ``impl`` is, ours."""
    return linear_cross_entropy(e, c, targets, bias, shift=int(shift), **options)


class LigerFunction:
    """Liger's autograd function, which its functional form and its module call alike."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: Any = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> tuple[Any, Any, Any, Any]:
        for asked, reason in (
            (ce_weight is not None, "ce_weight: a weight for each class"),
            (use_token_scaling, "use_token_scaling: a loss times its own detached probability"),
            (return_predicted_tokens, "return_predicted_tokens: predictions are another function"),
        ):
            if asked:
                pytest.skip(reason)
        loss, lse, metrics = linear_cross_entropy(
            hidden,
            weight,
            target,
            bias,
            ignore_index,
            softcap,
            reduction,
            return_lse=True,
            return_metrics=True,
            z_loss=lse_square_scale,
            label_smoothing=label_smoothing,
        )
        z_loss = lse_square_scale * lse.detach().square()
        if reduction != "none":
            z_loss = z_loss.sum() / ((target != ignore_index).sum() if reduction == "mean" else 1)
        dtype = hidden.dtype  # Liger's losses have it
        return (
            loss.to(dtype),
            z_loss.to(dtype) if return_z_loss else None,
            metrics.accuracy if return_token_accuracy else None,
            None,
        )


def replace(library: str) -> None:
    """Put ours where a test file of that library imports its function from."""
    for path in {
        "cut_cross_entropy": ["cut_cross_entropy"],
        "liger_kernel": [
            "liger_kernel.ops",
            "liger_kernel.transformers.functional",
            "liger_kernel.transformers.fused_linear_cross_entropy",
        ],
    }[library]:
        module: Any = importlib.import_module(path)
        if library == "cut_cross_entropy":
            module.linear_cross_entropy = cut_cross_entropy
        else:
            module.LigerFusedLinearCrossEntropyFunction = LigerFunction


def torch_sample_problem(sample: Any) -> str | None:
    """Say why a sample of torch's own for F.linear_cross_entropy is nothing for ours, or None."""
    weight, target = sample.args
    for has, reason in (
        (target.is_floating_point(), "probabilities as targets"),
        (sample.kwargs.get("weight") is not None, "a weight for each class"),
        (weight.dim() > 2, "several predictions of a token by one weight"),
    ):
        if has:
            return reason
    return None


def torch_sample_loss(
    sample: Any, inputs: tuple[Tensor, Tensor], bias: Tensor | None = None
) -> Any:
    """Compute a sample of torch's own by ours; torch takes a token without an axis too."""
    (hidden, weight), target = inputs, sample.args[1]
    ignored = sample.kwargs.get("ignore_index")
    loss: Any = linear_cross_entropy(
        hidden.view(-1, hidden.shape[-1]),
        weight,
        target.view(-1),
        bias,
        -100 if ignored is None else ignored,
        reduction=sample.kwargs.get("reduction", "mean"),
    )
    return loss.view(target.shape) if loss.dim() else loss


def is_nan_mean_of_nothing(sample: Any) -> bool:
    """Tell whether a mean is over no valid token: NaN in torch, 0 here."""
    ignored = sample.kwargs.get("ignore_index", -100)
    of_nothing = bool((sample.args[1] == (-100 if ignored is None else ignored)).all())
    return of_nothing and sample.kwargs.get("reduction", "mean") == "mean"


def leaves_of(*tensors: Tensor | None) -> list[Tensor]:
    """Return fresh leaves of the tensors that are there."""
    return [each.detach().clone().requires_grad_() for each in tensors if isinstance(each, Tensor)]
