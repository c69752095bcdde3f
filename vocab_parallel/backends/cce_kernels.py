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
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends.torch import put_product

OLDEST_CAPABILITY = (8, 0)  # Ampere
WHOLE_BLOCKS = 256  # rows; every block size of every version's kernels divides it


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
def is_newer() -> bool:
    """Find whether the installed kernels can do what the repository's can; imports them."""
    backward = inspect.signature(attribute("cce_backward", "cce_backward_kernel")).parameters
    return {"bias", "dlse", "accum_e_fp32", "accum_c_fp32", "e_info"} <= backward.keys()


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
        kernel = attribute("cce_lse_forward", "cce_lse_forward_kernel")
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
    kernel = attribute("indexed_dot", "indexed_neg_dot_forward_kernel")
    return kernel(hidden, classifier, rows, out_dtype=torch.float32).neg_()


def attribute(module: str, name: str) -> Any:
    """Return a function or class of the installed package."""
    return getattr(importlib.import_module(f"cut_cross_entropy.{module}"), name)
