"""Apple's cut cross-entropy: its own Triton kernels do the local work.

Source: arXiv 2411.09009. The logits live in registers alone. Accumulation is under locks, so the
gradients' last bits change from run to run, and a filter drops blocks of the gradient that are
below ``filter_eps``: with the default of eps(dtype) / 32 that is most of the gradient of a model
that has not begun to train. ``cce_exact`` filters nothing.

No token is skipped for being ignored, which would need the GPU's answer before each launch; its
gradients are zero instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vocab_parallel.backends import cce_kernels
from vocab_parallel.backends.interface import Gradients, Shard, Upstream
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
        can = cce_kernels.features()
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
        if dtype == torch.float32 and not can.fp32_accumulation:
            return f"of the installed version needs float16 or bfloat16: {newer}"
        if shard.bias is not None and not can.bias:
            return f"of the installed version has no bias: {newer}"
        names = names_of(shard.columns)
        elements = max(tokens, shard.classifier.shape[0]) * shard.hidden.shape[1]
        if elements >= 2**31 and not can.fp32_accumulation:
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
        can = cce_kernels.features()
        statistics, mean_logits = upstream.statistics, upstream.kept
        grads, scale = well_scaled(upstream.grads, shard.hidden.dtype, peak=1.0)
        lse_grad, target_grad = grads[0], grads[1]
        separate = lse_grad + target_grad if shard.separate_lse_grad else None
        # A sum over the group in float32 follows: let the kernel write float32.
        fp32_hidden = can.fp32_accumulation and (
            self.accum_e_fp32 or shard.sum_dtype == torch.float32
        )
        filter_eps = self._filter_eps(shard.hidden.dtype)
        hidden = shard.hidden.contiguous()
        owned, rows = owned_targets(shard.targets, shard.classifier.shape[0])
        request = cce_kernels.BackwardRequest(
            hidden=hidden,
            classifier=shard.classifier,
            bias=shard.bias,
            lse=statistics[0].contiguous(),
            targets=torch.where(owned, rows, -1),
            # Without a gradient of lse of its own, the older kernel takes p's factor for both.
            nll_grad=(-target_grad if can.lse_grad else lse_grad).contiguous(),
            lse_grad=separate if can.lse_grad else None,
            softcap=shard.transform.softcap,
            filter_eps=filter_eps,
            filter_hidden=self.filter_e_grad and filter_eps is not None,
            filter_classifier=self.filter_c_grad and filter_eps is not None,
            fp32_hidden=fp32_hidden,
            fp32_classifier=can.fp32_accumulation and self.accum_c_fp32,
            vocab_order=None if mean_logits is None else torch.argsort(mean_logits).to(torch.int32),
            hidden_dtype=torch.float32 if fp32_hidden else shard.hidden.dtype,
            wants=upstream.wanted,
        )
        found = Gradients(*cce_kernels.backward(request))
        if separate is not None and not can.lse_grad:
            _add_at_targets(found, shard, statistics[1], separate)
        if scale is not None:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(scale)
        return found._replace(classifier=upstream.classifier_grad.placed(found.classifier))

    def _filter_eps(self, dtype: torch.dtype) -> float | None:
        if self.filter_eps == "auto":
            return torch.finfo(dtype).eps / 32
        assert not isinstance(self.filter_eps, str)
        return self.filter_eps


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
    return OWN_PRESETS.get(name) or cce_kernels.installed_presets().get(name)
