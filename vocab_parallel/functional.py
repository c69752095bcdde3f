"""Linear cross-entropy over a vocabulary whose rows are spread over a group of ranks.

With z = softcap(e c^T + bias) / temperature, never held as a whole, each rank computes a few
statistics of every token over its own rows, one all-gather joins them, and what remains is
arithmetic on [N] tensors, which autograd differentiates:

    nll   = (1 - s) (lse - target) + s (lse - sum / vocabulary)      s = label_smoothing
    loss  = reduce(token_weight (nll + z_loss lse^2))

Source: cut cross-entropy, arXiv 2411.09009, section 4; vocabulary parallelism as in
arXiv 1909.08053, section 3.
"""

from typing import Any, Literal, overload

from torch import Tensor

from vocab_parallel.arguments import Call, Operands, prepare
from vocab_parallel.engine import scalar_loss, vocab_statistics
from vocab_parallel.entry import entry
from vocab_parallel.layout import IGNORED, HiddenLayout, count_valid
from vocab_parallel.metrics import LossMetrics, loss_metrics
from vocab_parallel.settings import LossSettings, parameters_of
from vocab_parallel.statistics import Statistics
from vocab_parallel.token_loss import Divisor, TokenLoss


# For type checkers: the return type depends on two flags. The rest is below.
@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[True],
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor, LossMetrics]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, LossMetrics]: ...


@overload
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_cross_entropy(
    e: Tensor, c: Tensor, targets: Tensor, *positional: Any, **options: Any
) -> Tensor: ...


@entry
def linear_cross_entropy(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T) global ids
    bias: Tensor | None = None,  # (stop - start,)
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int = 0,
    return_lse: bool = False,
    *,
    return_metrics: bool = False,
    vocab_parallel_options: Any = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    document_ids: Tensor | None = None,
    num_valid_tokens: int | Tensor | None = None,
    hidden_layout: HiddenLayout = "replicated",
    hidden_grad_scale: float = 1.0,
    logits_dtype: Literal["float32"] | None = None,
    impl: str = "auto",
    backward: str = "auto",
    memory_budget: int | None = None,
    validate: bool | None = None,
    accumulate_into: str | None = None,
    **impl_options: Any,
) -> Tensor | tuple[Tensor | LossMetrics, ...]:
    """Cross-entropy of ``softcap(e c^T + bias) / temperature`` without the logits.

    Every rank of the vocab group calls it, with its own rows of the classifier, and every rank
    returns the same loss; ``c.grad`` and ``bias.grad`` are those of its own rows. It communicates
    2 float32 for each token in forward (3 with label smoothing, and 2 more with metrics), once, and
    the gradient of the hidden states in backward, once; `collectives.py` lists every call and its
    bytes.

    Args:
        e: hidden states [..., T, D], float16, bfloat16, float32 or float64.
        c: this rank's classifier rows [stop - start, D], in e's dtype or in another: float16,
            bfloat16 and float32 go with one another. Operands of two dtypes are multiplied in
            float32, a tile of each widened at a time, and each gets its gradient in its own dtype.
        targets: int32 or int64 ids of the whole vocabulary, [..., T]; the same on every rank but in
            the "sharded" layout.
        bias: [stop - start], or None.
        ignore_index: a target that counts for nothing.
        softcap: s in s tanh(x / s), or None.
        reduction: "mean" over the valid tokens of the whole group (0 where there are none),
            "sum", or "none" for [..., T - shift] values of this rank's own tokens.
        shift: position t predicts ``targets[..., t + shift]``; in [0, max(T, 1)).
        return_lse: return (loss, lse); lse [..., T - shift] is differentiable, and 0 where the
            token is ignored.
        return_metrics: also return `LossMetrics`, the last of the tuple: accuracy and mean entropy
            of the group's valid tokens, from the same pass and without waiting for a device.
        vocab_parallel_options: which rows these are, `VocabParallelOptions` or any object with
            its attributes. None: one rank that holds the whole vocabulary.
        label_smoothing: as in F.cross_entropy, over the true vocabulary.
        z_loss: weight of lse^2, added to each token's loss.
        temperature: divides the logits, after the softcap.
        token_weight: [..., T], aligned with targets; multiplies each token's loss, and counts for
            nothing where the target is ignored. It gets no gradient.
        document_ids: [..., T] integers, aligned with targets; a document is a run of equal ones.
            Position t then predicts ``targets[..., t + shift]`` only where both are of one
            document; else its target counts as ignored. Other marks do not say where documents
            begin: a target that is ignored may as well be a prompt within one.
        num_valid_tokens: divides "mean" in place of the count of valid tokens, so that a batch
            may be cut into microbatches at will; an int or a one-element tensor, at least 0 and
            the same on every rank. A negative tensor that nobody checked makes the loss NaN.
        hidden_layout: what the vocab axis does for the hidden states:
            "replicated"  every rank has the same e and targets;
            "sharded"     each rank has its own sequences, equally many;
            "sequence"    e is this rank's [..., T / V, D] of sequences whose targets are whole.
            In the last two, e is gathered and its gradient comes back by reduce-scatter; the
            exact gradient of a replicated body parameter is then the sum over the vocab axis.
        hidden_grad_scale: multiplies e's gradient, never c's: V for wrappers that average.
        logits_dtype: "float32" rounds no logit of float16 or bfloat16 operands to their dtype
            before its exponential, in forward or backward; None may, on a GPU that is no Hopper or
            where backward reads logits that were kept. Products stay in the operands' dtype.
            docs/precision.md has the errors, and which ``backward`` it allows.
        impl: "auto", or a name of `available_impls`.
        backward: where backward finds the logits; with impl="chunked" all three:
            "recompute"  computes them again: least memory, 8 N D R flops instead of 6;
            "probs"      keeps them, [N, rows] in e's dtype;
            "auto"       takes the fastest that fits; `plan_backward` tells which, and its bytes.
        memory_budget: bytes that the loss may hold beside its inputs, its two gradients and
            float32 sums of their size; None means 64 MiB. Give it N x rows x itemsize for speed.
            Losses that wait for their backward share it: one is assumed, unless
            ``microbatches_in_flight`` or `validate_pipeline_loss` tells of more.
        validate: agree over the group that all arguments are right before the work, in one small
            exchange that waits for the result. None: yes for CPU tensors, no for GPU tensors,
            where it would cost a synchronisation; then an error on one rank is local.
        accumulate_into: "grad" or "main_grad" adds c's gradient to that attribute of the
            parameter c, in backward, by the product that computes it: c gets no gradient from
            autograd, none of its hooks run, and no [rows, D] tensor is made. ``main_grad`` must be
            there, in float32; where ``grad`` is None, autograd makes it as usual.
        **impl_options: options of the implementation itself; `ChunkedImpl` has its own.

    Returns:
        The loss in float32 (float64 for float64 inputs), a scalar or [..., T - shift]; with
        return_lse or return_metrics a tuple, (loss, lse, metrics) with both. In the "sequence"
        layout per-token results are this rank's [..., T / V], 0 where the shift leaves no target.
        Per-token gradients of the gathering layouts are gathered in backward: all ranks must use
        them or none.

    It has a first derivative alone: gradients that were taken with ``create_graph=True`` refuse to
    be differentiated, and transforms of torch.func are refused.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds.
    """
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=int(shift) if isinstance(shift, bool) else shift,
        return_lse=return_lse,
        return_metrics=return_metrics,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
        hidden_layout=hidden_layout,
        hidden_grad_scale=hidden_grad_scale,
        logits_dtype=logits_dtype,
        backward=backward,
        memory_budget=memory_budget,
        accumulate_into=accumulate_into,
        num_valid_tokens=num_valid_tokens,
        impl=impl,
        impl_options=impl_options,
    )
    operands = Operands.of(e, c, targets, bias, token_weight, document_ids)
    known = parameters_of(linear_cross_entropy)
    call = prepare(operands, settings, vocab_parallel_options, validate=validate, known=known)
    labels = call.labels()
    losses = token_losses(call, labels)
    loss, values = reduced_loss(call, labels, losses)
    if not (return_lse or return_metrics):
        return loss
    results: tuple[Tensor | LossMetrics, ...] = (loss,)
    if return_lse:
        results += (call.own(values[0].masked_fill(labels == IGNORED, 0.0)),)
    if return_metrics:
        results += (loss_metrics(Statistics(values, call.bound.shard.columns), labels),)
    return results


@overload
def token_logprobs(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    return_entropy: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    e: Tensor, c: Tensor, targets: Tensor, *positional: Any, **options: Any
) -> Tensor: ...


@entry
def token_logprobs(
    e: Tensor,  # (..., T, D)
    c: Tensor,  # (stop - start, D)
    targets: Tensor,  # (..., T) global ids
    bias: Tensor | None = None,  # (stop - start,)
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int = 0,
    *,
    return_entropy: bool = False,
    document_ids: Tensor | None = None,
    vocab_parallel_options: Any = None,
    temperature: float = 1.0,
    hidden_layout: HiddenLayout = "replicated",
    hidden_grad_scale: float = 1.0,
    logits_dtype: Literal["float32"] | None = None,
    impl: str = "auto",
    backward: str = "auto",
    memory_budget: int | None = None,
    validate: bool | None = None,
    **impl_options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target and, where asked, the entropy of its position.

    Both are differentiable with any gradient, in e, c and bias, and need one backward pass over
    the logits together. Every rank of the vocab group calls it; it communicates 2 float32 for each
    token in forward, 3 with the entropy, and the gradient of the hidden states in backward. In
    the gathering layouts results are this rank's own tokens, and their gradients are gathered in
    backward: all ranks must use them or none.

    Args:
        return_entropy: also return -sum p log p, in nats, of each position.
        Everything else is as in `linear_cross_entropy`.

    Returns:
        log-probabilities [..., T - shift] in float32 (float64 for float64 inputs), 0 where the
        target is ignored; with return_entropy (log-probabilities, entropies), both so.

    Raises:
        ValueError: bad input, as `linear_cross_entropy`; an entropy from an implementation that
            has none.
    """
    settings = LossSettings(
        ignore_index=ignore_index,
        softcap=softcap,
        shift=int(shift) if isinstance(shift, bool) else shift,
        return_entropy=return_entropy,
        temperature=temperature,
        hidden_layout=hidden_layout,
        hidden_grad_scale=hidden_grad_scale,
        logits_dtype=logits_dtype,
        backward=backward,
        memory_budget=memory_budget,
        impl=impl,
        impl_options=impl_options,
    )
    operands = Operands.of(e, c, targets, bias, document_ids=document_ids)
    known = parameters_of(token_logprobs)
    call = prepare(operands, settings, vocab_parallel_options, validate=validate, known=known)
    labels = call.labels()
    losses, values = reduced_loss(call, labels, token_losses(call, labels))
    if not return_entropy:
        return 0.0 - losses  # no -0.0
    expected = Statistics(values, call.bound.shard.columns)["mean_log_prob"]
    return 0.0 - losses, call.own((-expected).masked_fill(labels == IGNORED, 0.0))


def reduced_loss(call: Call, labels: Tensor, losses: TokenLoss) -> tuple[Tensor, Tensor]:
    """Return the loss as the call reduces it, and the statistics [k, N] that it is made of.

    Where the loss alone has a gradient, the statistics have none.
    """
    if call.bound.scalar_loss:
        return scalar_loss(call, labels, losses)
    values = vocab_statistics(call, labels)
    if call.settings.reduction == "none":
        return call.own(losses(values)), values
    return losses.total(values), values


def token_losses(call: Call, labels: Tensor, weight: Tensor | None = None) -> TokenLoss:
    """Return what makes the loss of each of the call's tokens of its statistics.

    Args:
        call: of `linear_cross_entropy`.
        labels: [N], as `Call.labels` returns them.
        weight: [N], by which the divisor has been applied; None: the call's own, and its divisor.
    """
    return TokenLoss(
        labels,
        call.token_weight() if weight is None else weight,
        call.settings.label_smoothing,
        call.rows.vocab_size or 0,
        call.settings.z_loss,
        _divisor(call, labels) if weight is None else None,
        call.bound.kernels,
    )


def _divisor(call: Call, labels: Tensor) -> Divisor:
    """Return what the sum of the tokens' losses is divided by."""
    if call.settings.reduction != "mean":
        return None
    given = call.settings.num_valid_tokens
    if given is None:
        return "counted" if call.bound.kernels else count_valid(labels)
    if not isinstance(given, Tensor):
        return given
    return given.detach().reshape(()).clone()  # backward reads it too: its owner may write to it
