"""Apple's cut cross-entropy: its own Triton kernels do the local work.

Source: arXiv 2411.09009. The logits live in registers alone. Accumulation is under locks, so the
gradients' last bits change from run to run, and a filter drops blocks of the gradient that are
below ``filter_eps``: with the default of eps(dtype) / 32 that is most of the gradient of a model
that has not begun to train. ``cce_exact`` filters nothing.

No token is skipped for being ignored, which would need the GPU's answer before each launch; its
gradients are zero instead.
"""

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends import cce_kernels
from vocab_parallel.backends.interface import Gradients, Shard, Upstream, Wanted
from vocab_parallel.backends.reference import RecomputeOnly
from vocab_parallel.backends.torch import owned_targets, well_scaled
from vocab_parallel.plan import BackwardPlan
from vocab_parallel.statistics import names_of

# These work the same with every version. The other presets are the installed version's.
OWN_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cce": {"filter_eps": "auto"},
    "cce_exact": {"filter_eps": None, "accum_e_fp32": True, "accum_c_fp32": True},
    "cce_kahan": {"filter_eps": "auto", "accum_e_fp32": True, "accum_c_fp32": True},
}
# Names that newer versions list, so that an older one can say what is missing.
NEWER_PRESETS = (
    "cce_kahan_full",
    "cce_kahan_full_c",
    "cce_kahan_full_c_full_e",
    "cce_kahan_full_e",
)


@dataclass(frozen=True)
class CutCrossEntropyBackend(RecomputeOnly):
    """One preset of cut-cross-entropy.

    Attributes:
        name: the preset's.
        filter_eps: a block whose every |softmax - [is target]| is below it gets no gradient;
            "auto" is eps(dtype) / 32, None filters nothing.
        accum_e_fp32, accum_c_fp32: accumulate that gradient in float32, where the installed
            kernels can.
        filter_e_grad, filter_c_grad: whether that gradient may be filtered.
    """

    name: str = "cce"
    filter_eps: float | str | None = "auto"
    accum_e_fp32: bool = False
    accum_c_fp32: bool = False
    filter_e_grad: bool = True
    filter_c_grad: bool = True

    def __post_init__(self) -> None:
        eps = self.filter_eps
        if not (eps is None or eps == "auto" or (isinstance(eps, float) and eps >= 0.0)):
            raise ValueError(
                f'filter_eps must be "auto", None or a float of at least 0, got {eps!r}'
            )

    def plan(self, shard: Shard, *, tokens: int, backward: str, **_: Any) -> BackwardPlan:
        """See `Backend.plan`; refuses what neither the installed kernels nor this file can do."""
        reason = self._why_not(shard, tokens)
        if reason is not None:
            raise ValueError(f'impl "{self.name}" {reason}; or use impl="chunked"')
        return super().plan(shard, tokens=tokens, backward=backward)

    def _why_not(self, shard: Shard, tokens: int) -> str | None:
        device_type, dtype = shard.hidden.device.type, shard.hidden.dtype
        is_newer = cce_kernels.is_newer()
        newer = "install cut-cross-entropy 25.6 or later"
        interprets = cce_kernels.interprets()
        if device_type != "cuda" and not interprets:
            return f"needs tensors on a CUDA device, got {device_type}: move them"
        if interprets and dtype != torch.float16:
            return f"under Triton's interpreter is right in float16 alone, got {dtype}: cast"
        if shard.mixed:
            other = shard.classifier.dtype
            return f"multiplies operands of one dtype, got e in {dtype} and c in {other}: cast one"
        if dtype == torch.float64:
            return "works in float16, bfloat16 and float32, got float64: cast"
        if dtype == torch.float32 and not is_newer:
            return f"of the installed version needs float16 or bfloat16: {newer}"
        if shard.bias is not None and not is_newer:
            return f"of the installed version has no bias: {newer}"
        names = names_of(shard.columns)
        elements = max(tokens, shard.classifier.shape[0]) * shard.hidden.shape[1]
        if elements >= 2**31 and not is_newer:
            return f"of the installed version counts elements in 32 bits: {newer}"
        for refused, what in (
            (shard.transform.temperature != 1.0, "temperature"),
            ("sum" in names, "label_smoothing"),
            (shard.logits_dtype != shard.product_dtype, "logits_dtype"),
            ("largest_other" in names, "metrics"),
            ("mean_log_prob" in names, "entropy"),
        ):
            if refused:
                return f"has no {what}: leave it out"
        return None

    def statistics(self, shard: Shard, plan: BackwardPlan) -> tuple[Tensor, Tensor | None]:
        """See `Backend.statistics`; keeps the rows' mean logits [R], or None."""
        hidden = shard.hidden.contiguous()
        cap = shard.transform.softcap
        filters = self.filter_eps is not None and shard.needs_grad
        lse, mean_logits = cce_kernels.shard_lse(hidden, shard.classifier, shard.bias, cap, filters)
        owned, rows = owned_targets(shard.targets, shard.classifier.shape[0])
        target = cce_kernels.chosen_dot(hidden, shard.classifier, rows)
        if shard.bias is not None:
            target += shard.bias[rows]
        if cap is not None:
            target = cap * torch.tanh(target / cap)
        return torch.stack([lse, target.masked_fill_(~owned, 0.0)]), mean_logits

    def gradients(self, shard: Shard, plan: BackwardPlan, upstream: Upstream) -> Gradients:
        """See `Backend.gradients`.

        The kernel's gradient is nll_grad (p - [is target]) + lse_grad p, so that
        nll_grad = -d.target and lse_grad = d.lse + d.target.
        """
        newer = cce_kernels.is_newer()
        statistics, mean_logits = upstream.statistics, upstream.kept
        grads, scale = well_scaled(upstream.grads, shard.hidden.dtype, peak=1.0)
        lse_grad, target_grad = grads[0], grads[1]
        separate = lse_grad + target_grad if shard.separate_lse_grad else None
        owned, rows = owned_targets(shard.targets, shard.classifier.shape[0])
        arguments = {
            # Without a gradient of lse of its own, the older kernel takes p's factor for both.
            "do": (-target_grad if newer else lse_grad).contiguous(),
            "e": shard.hidden.contiguous(),
            "lse": statistics[0].contiguous(),
            "valids": None,
            "softcap": shard.transform.softcap,
            "filter_eps": self._filter_eps(shard.hidden.dtype),
            "targets": torch.where(owned, rows, -1),
            "vocab_ordering": None
            if mean_logits is None
            else torch.argsort(mean_logits).to(torch.int32),
        }
        if newer:
            found = self._newer_gradients(shard, upstream.wanted, arguments, separate)
        else:
            found = _older_gradients(shard, upstream.wanted, arguments)
            if separate is not None:
                _add_at_targets(found, shard, statistics[1], separate)
        if scale is not None:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(scale)
        return found._replace(classifier=upstream.classifier_grad.placed(found.classifier))

    def _newer_gradients(
        self, shard: Shard, wanted: Wanted, arguments: dict[str, Any], lse_grad: Tensor | None
    ) -> Gradients:
        info = cce_kernels.attribute("utils", "TensorInfo")
        # A sum over the group in float32 follows: let the kernel write float32.
        fp32_hidden = self.accum_e_fp32 or shard.sum_dtype == torch.float32
        hidden_dtype = torch.float32 if fp32_hidden else shard.hidden.dtype
        filters, bias = self.filter_eps is not None, shard.bias
        kernel = cce_kernels.attribute("cce_backward", "cce_backward_kernel")
        found = kernel(
            **arguments,
            dlse=lse_grad,
            e_info=info(hidden_dtype, wanted.hidden),
            c=shard.classifier,
            c_info=info(shard.classifier.dtype, wanted.classifier),
            bias=bias,
            bias_info=None if bias is None else info(bias.dtype, wanted.bias),
            accum_e_fp32=fp32_hidden,
            accum_c_fp32=self.accum_c_fp32,
            filter_e_grad=self.filter_e_grad and filters,
            filter_c_grad=self.filter_c_grad and filters,
        )
        return Gradients(*found)

    def _filter_eps(self, dtype: torch.dtype) -> float | None:
        if self.filter_eps == "auto":
            return torch.finfo(dtype).eps / 32
        assert not isinstance(self.filter_eps, str)
        return self.filter_eps


def _older_gradients(shard: Shard, wanted: Wanted, arguments: dict[str, Any]) -> Gradients:
    kernel = cce_kernels.attribute("cce_backward", "cce_backward_kernel")
    classifier = shard.classifier.detach().requires_grad_(wanted.classifier)
    hidden_grad, classifier_grad = kernel(c=classifier, **arguments)
    return Gradients(hidden_grad if wanted.hidden else None, classifier_grad, None)


def _add_at_targets(found: Gradients, shard: Shard, target: Tensor, factor: Tensor) -> None:
    """Add factor [is target] to the logits' gradient: one row of the classifier for each token."""
    owned, rows = owned_targets(shard.targets, shard.classifier.shape[0])
    factor = factor.masked_fill(~owned, 0.0)
    cap = shard.transform.softcap
    if cap is not None:
        factor = factor * (1.0 - (target / cap).square())
    factor = factor.unsqueeze(1)
    if found.hidden is not None:
        found.hidden.add_((factor * shard.classifier[rows]).to(found.hidden.dtype))
    if found.classifier is not None:
        values = (factor * shard.hidden).to(found.classifier.dtype)
        found.classifier.index_add_(0, rows, values)


def preset(name: str) -> Mapping[str, Any] | None:
    """Return a preset's settings: our own, else as the installed version lists it, else None."""
    return OWN_PRESETS.get(name) or installed_presets().get(name)


@functools.cache
def installed_presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the presets that the installed version lists, with their settings; {} if none."""
    if importlib.util.find_spec("cut_cross_entropy.cce_utils") is None:
        return {}
    presets = cce_kernels.attribute("cce_utils", "CCEPresets")
    default = {
        each.name: each.default for each in fields(CutCrossEntropyBackend) if each.name != "name"
    }
    return {name: dict(presets.build_for_impl(name, default)) for name in sorted(presets.names)}
