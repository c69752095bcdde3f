"""The kernels of the installed cut-cross-entropy, whichever version that is.

What a version can do is found from the parameters of its functions, never from its number:

    release on the registry (25.1.1)    hidden states and classifier in half precision alone
    repository (25.6 and later)         also a bias, a gradient of lse, float32 accumulation, and a
                                        backward that skips the product nobody wants

Its functions are looked up at each call, and imported then: an implementation that does not need
them loads neither them nor triton.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends.torch import put_product

OLDEST_CAPABILITY = (8, 0)  # Ampere
WHOLE_BLOCKS = 256  # rows; every block size of every version's kernels divides it


@dataclass(frozen=True)
class Features:
    """What the installed kernels can do, beside the release of the registry."""

    bias: bool
    lse_grad: bool
    fp32_accumulation: bool
    skips_hidden_grad: bool


@dataclass(frozen=True)
class BackwardRequest:
    """The arguments of one backward, for any version.

    Attributes:
        hidden: [N, D], contiguous.
        classifier: [R, D].
        bias: [R] or None; None where the version has none.
        lse: [N] float32, of the whole vocabulary.
        targets: [N] int64, rows of this shard or -1.
        nll_grad: [N] float32; multiplies softmax - [is target].
        lse_grad: [N] float32 or None; multiplies softmax. None where the version has none.
        softcap: or None.
        filter_eps: blocks of the gradient below it are skipped; None skips nothing.
        filter_hidden, filter_classifier: whether that gradient may be filtered.
        fp32_hidden, fp32_classifier: whether that gradient is accumulated in float32.
        vocab_order: [R] int32, rows in the order of their mean logit, or None.
        hidden_dtype: of the returned gradient of the hidden states.
        wants: (hidden, classifier, bias).
    """

    hidden: Tensor
    classifier: Tensor
    bias: Tensor | None
    lse: Tensor
    targets: Tensor
    nll_grad: Tensor
    lse_grad: Tensor | None
    softcap: float | None
    filter_eps: float | None
    filter_hidden: bool
    filter_classifier: bool
    fp32_hidden: bool
    fp32_classifier: bool
    vocab_order: Tensor | None
    hidden_dtype: torch.dtype
    wants: tuple[bool, bool, bool]


def why_unavailable() -> str | None:
    """Return why the kernels cannot run on this machine, or None where they can."""
    if sys.platform == "darwin":
        return "cut-cross-entropy's kernels need Linux or Windows: macOS has no triton"
    for package in ("triton", "cut_cross_entropy"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {package.replace('_', '-')}"
    if interprets():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, in float16)"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return f"the GPU is older than Ampere: {torch.cuda.get_device_name()}"
    return None


def interprets() -> bool:
    """Whether Triton's interpreter runs kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def features() -> Features:
    """Find what the installed kernels can do; imports them."""
    backward = inspect.signature(_attribute("cce_backward", "cce_backward_kernel")).parameters
    forward = inspect.signature(_attribute("cce_lse_forward", "cce_lse_forward_kernel")).parameters
    return Features(
        bias="bias" in backward and "bias" in forward,
        lse_grad="dlse" in backward,
        fp32_accumulation="accum_e_fp32" in backward and "accum_c_fp32" in backward,
        skips_hidden_grad="e_info" in backward,
    )


@functools.cache
def installed_presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the presets that the installed version lists, with their settings; {} if none."""
    if importlib.util.find_spec("cut_cross_entropy.cce_utils") is None:
        return {}
    presets = _attribute("cce_utils", "CCEPresets")
    default = {
        "filter_eps": "auto",
        "accum_e_fp32": False,
        "accum_c_fp32": False,
        "filter_e_grad": True,
        "filter_c_grad": True,
    }
    return {name: dict(presets.build_for_impl(name, default)) for name in sorted(presets.names)}


def shard_lse(
    hidden: Tensor,  # (N, D)
    classifier: Tensor,  # (R, D)
    bias: Tensor | None,
    softcap: float | None,
    with_mean_logits: bool,
) -> tuple[Tensor, Tensor | None]:  # (N,) float32, (R,) float32
    """Return each token's logsumexp over the shard and, where asked, each row's mean logit.

    The kernel masks the columns beyond the last row before it applies a softcap, which brings
    them back as -softcap. So with a softcap it gets whole blocks alone, and the rows that remain,
    fewer than `WHOLE_BLOCKS`, are computed here.
    """
    num_rows = classifier.shape[0]
    head = num_rows if softcap is None else num_rows - num_rows % WHOLE_BLOCKS
    parts: list[tuple[Tensor, Tensor | None]] = []
    if head:
        kernel = _attribute("cce_lse_forward", "cce_lse_forward_kernel")
        extra = {} if bias is None else {"bias": bias[:head]}
        found = kernel(
            hidden,
            classifier[:head],
            softcap=softcap,
            return_logit_avg=with_mean_logits,
            **extra,
        )
        parts.append(found if with_mean_logits else (found, None))
    if head < num_rows:
        assert softcap is not None
        logits = _few_logits(hidden, classifier[head:], bias if bias is None else bias[head:])
        logits = logits.div_(softcap).tanh_().mul_(softcap)
        parts.append((torch.logsumexp(logits, 1), logits.mean(0) if with_mean_logits else None))
    lse = parts[0][0] if len(parts) == 1 else torch.logaddexp(parts[0][0], parts[1][0])
    means = [mean for _, mean in parts if mean is not None]
    return lse, torch.cat(means) if means else None


def _few_logits(hidden: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden.new_empty((hidden.shape[0], rows.shape[0]), dtype=torch.float32)
    if not hidden.is_cuda:  # a CPU has no product into a wider dtype
        hidden, rows = hidden.to(logits.dtype), rows.to(logits.dtype)
    put_product(logits, hidden, rows.T, add=False)
    return logits if bias is None else logits.add_(bias)


def chosen_dot(hidden: Tensor, classifier: Tensor, rows: Tensor) -> Tensor:  # (N,) float32
    """Return the product of each hidden state with one row of the classifier.

    Bias and softcap are left to the caller: some versions add the bias once for every block of
    the hidden size.
    """
    kernel = _attribute("indexed_dot", "indexed_neg_dot_forward_kernel")
    return kernel(hidden, classifier, rows, out_dtype=torch.float32).neg_()


def backward(request: BackwardRequest) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernel; return the gradients of hidden states, classifier and bias."""
    kernel = _attribute("cce_backward", "cce_backward_kernel")
    shared: dict[str, Any] = {
        "do": request.nll_grad,
        "e": request.hidden,
        "lse": request.lse,
        "valids": None,
        "softcap": request.softcap,
        "filter_eps": request.filter_eps,
        "targets": request.targets,
        "vocab_ordering": request.vocab_order,
    }
    if not features().skips_hidden_grad:
        classifier = request.classifier.detach().requires_grad_(request.wants[1])
        hidden_grad, classifier_grad = kernel(c=classifier, **shared)
        return hidden_grad if request.wants[0] else None, classifier_grad, None
    info = _attribute("utils", "TensorInfo")
    bias = request.bias
    return kernel(
        **shared,
        dlse=request.lse_grad,
        # Its gradient comes back in the dtype named here: float32 as it was accumulated, so that
        # the sum over the group needs no copy.
        e_info=info(request.hidden_dtype, request.wants[0]),
        c=request.classifier,
        c_info=info(request.classifier.dtype, request.wants[1]),
        bias=bias,
        bias_info=None if bias is None else info(bias.dtype, request.wants[2]),
        accum_e_fp32=request.fp32_hidden,
        accum_c_fp32=request.fp32_classifier,
        filter_e_grad=request.filter_hidden,
        filter_c_grad=request.filter_classifier,
    )


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"cut_cross_entropy.{module}"), name)
