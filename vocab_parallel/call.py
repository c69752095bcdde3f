"""One call of the loss or of a relative: arguments in, checked and agreed on, statistics out."""

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from vocab_parallel import arguments
from vocab_parallel.agreement import Claim, agree
from vocab_parallel.arguments import LossSettings
from vocab_parallel.function import VocabStatistics
from vocab_parallel.fused_function import LossOfTokens, VocabLoss
from vocab_parallel.impls import Choice, Demand, LocalImpl, create_impl
from vocab_parallel.layout import TokenLayout, mark_labels
from vocab_parallel.problem import LossProblem
from vocab_parallel.shard import VocabShard
from vocab_parallel.weight_grad import WeightGrad, weight_grad_of


@dataclass(frozen=True)
class Operands:
    """The tensors of a call; autocast has been applied to the first two.

    Attributes:
        hidden: [..., T, D].
        classifier: [rows, D].
        targets: [..., T], or None where a call has none.
        bias: [rows] or None.
        token_weight: [..., T] or None.
    """

    hidden: Tensor
    classifier: Tensor
    targets: Tensor | None
    bias: Tensor | None = None
    token_weight: Tensor | None = None

    @classmethod
    def of(
        cls,
        e: Tensor,
        c: Tensor,
        targets: Tensor | None,
        bias: Tensor | None = None,
        token_weight: Tensor | None = None,
    ) -> "Operands":
        """Cast hidden states and classifier as autocast casts the operands of a linear layer."""
        tensors = isinstance(e, Tensor) and isinstance(c, Tensor)
        if tensors and not e.is_meta and torch.is_autocast_enabled(e.device.type):
            dtype = torch.get_autocast_dtype(e.device.type)
            e, c = (t if t.dtype == torch.float64 else t.to(dtype) for t in (e, c))
        return cls(e, c, targets, bias, token_weight)


@dataclass(frozen=True)
class Call:
    """A call whose arguments are known to be right."""

    operands: Operands
    problem: LossProblem

    def labels(self) -> Tensor:
        """Return the labels [N] in the loss's order; gathers those of a "sharded" layout."""
        operands, settings = self.operands, self.problem.settings
        assert operands.targets is not None
        labels = mark_labels(
            operands.targets,
            settings.ignore_index,
            self.problem.shard.vocab_size,
            settings.shift,
        )
        return self.problem.layout.arrange(labels)

    def statistics(self, labels: Tensor) -> Tensor:
        """Return the statistics [k, N] of the whole vocabulary.

        All ranks of the group must call it; see `collectives` for what it communicates.
        """
        return cast(Tensor, VocabStatistics.apply(*self._inputs(labels), self.problem))

    def scalar_loss(self, labels: Tensor, loss_of: LossOfTokens) -> Tensor:
        """Return the loss of all tokens, its gradients computed already; as `statistics`."""
        return cast(Tensor, VocabLoss.apply(*self._inputs(labels), self.problem, loss_of))

    def _inputs(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        operands = self.operands
        return (
            operands.hidden.reshape(-1, operands.hidden.shape[-1]),
            operands.classifier,
            operands.bias,
            self.problem.shard.local_targets(labels),
        )

    def own(self, per_token: Tensor) -> Tensor:
        """Return this rank's part of a result [N]; see `TokenLayout.own`."""
        shape = self.operands.hidden.shape[:-1]
        return self.problem.layout.own(per_token, shape, self.problem.settings.shift)


def prepare(
    operands: Operands,
    settings: LossSettings,
    options: Any,
    *,
    validate: bool | None,
    needs_targets: bool = True,
) -> Call:
    """Check the arguments, agree on them over the group where asked, and return the call.

    Raises:
        ValueError: bad input; on every rank of the group where ``validate`` holds, or where it is
            None and the tensors are on the CPU.
    """
    hidden, classifier = operands.hidden, operands.classifier
    if options is None:
        has_rows = isinstance(classifier, Tensor) and classifier.dim() > 0
        shard = VocabShard.whole(classifier.shape[0] if has_rows else 0)
    else:
        shard = VocabShard.from_options(options)
    local_impl: LocalImpl | None = None
    demand: Demand | None = None
    weight_grad: WeightGrad | None = None
    chosen: Choice | None = None
    problem: ValueError | None = None
    on_gpu = isinstance(hidden, Tensor) and hidden.is_cuda
    reads_values = bool(validate or not on_gpu)
    try:
        settings.check()
        if needs_targets and operands.targets is None:
            raise ValueError("targets must be a tensor of class ids, got None")
        local_impl = create_impl(
            settings.impl, settings.memory_budget, settings.impl_options
        )
        arguments.check_tensors(
            hidden,
            classifier,
            operands.targets,
            operands.bias,
            operands.token_weight,
            settings,
            shard.degree,
        )
        arguments.check_token_divisor(
            settings.num_valid_tokens, hidden, settings.reduction, reads_values=reads_values
        )
        arguments.check_shard(classifier, shard, settings)
        weight_grad = weight_grad_of(classifier, settings.accumulate_into)
        demand = _demand(settings, operands, shard, accumulates=weight_grad is not None)
        local_impl.check(demand)
        chosen = local_impl.way(demand)
    except ValueError as error:
        problem = error
    if validate or shard.degree == 1 or (validate is None and not on_gpu):
        checks_targets = problem is None and reads_values
        agree(
            problem,
            _claim(shard, operands.targets if checks_targets else None, settings),
            _agreed(settings, operands, shard) if problem is None and shard.degree > 1 else {},
            shard.group,
            shard.degree,
        )
    elif problem is not None:
        raise problem
    assert local_impl is not None
    assert demand is not None
    layout = TokenLayout(settings.hidden_layout, shard.group, shard.rank, shard.degree)
    assert chosen is not None
    return Call(
        operands,
        LossProblem(
            settings,
            shard,
            layout,
            local_impl,
            demand,
            chosen,
            weight_grad,
            torch.is_grad_enabled(),
        ),
    )


def _demand(
    settings: LossSettings, operands: Operands, shard: VocabShard, *, accumulates: bool
) -> Demand:
    copies = 1 if settings.hidden_layout == "replicated" else shard.degree
    even_rows = None
    if shard.degree == 1:
        even_rows = shard.num_token_rows
    elif shard.vocab_size is not None:
        even_rows = -(-shard.vocab_size // shard.degree)
    return Demand(
        dtype=operands.hidden.dtype,
        device_type=operands.hidden.device.type,
        bias=operands.bias is not None,
        softcap=settings.softcap is not None,
        temperature=settings.temperature != 1.0,
        names=settings.statistics,
        separate_lse_grad=settings.separate_lse_grad,
        tokens=copies * operands.hidden.shape[:-1].numel(),
        hidden_size=operands.hidden.shape[-1],
        rows=shard.num_token_rows,
        even_rows=even_rows,
        degree=shard.degree,
        backward=settings.backward,
        scalar_loss=settings.scalar_loss,
        accumulates=accumulates,
    )


def _claim(shard: VocabShard, targets: Tensor | None, settings: LossSettings) -> Claim:
    lowest, highest, digest = 0, -1, 0
    if targets is not None:
        lowest, highest = arguments.target_range(targets, settings.ignore_index)
        if settings.hidden_layout != "sharded" and shard.degree > 1:
            digest = arguments.target_digest(targets)
    vocab_size = -1 if shard.vocab_size is None else shard.vocab_size
    return Claim(shard.start, shard.stop, vocab_size, lowest, highest, digest)


def _agreed(settings: LossSettings, operands: Operands, shard: VocabShard) -> dict[str, Any]:
    """Name what must be equal over the group, for the ranks to communicate and return alike.

    That is everything but what is known to be a rank's own, so that nothing is forgotten: its
    rows, and of its tensors the values.
    """
    hidden = operands.hidden
    tensors = [(each.name, getattr(operands, each.name)) for each in fields(operands)]
    recorded = torch.is_grad_enabled()
    return {
        **settings.agreed(),
        "reduce_e_grad": shard.reduce_e_grad,
        "tokens of e": hidden.shape[:-1].numel(),
        "hidden size": hidden.shape[-1],
        "dtype of e": hidden.dtype,
        "e requires grad": hidden.requires_grad and recorded,
        # Per-token gradients are gathered in backward, where there is one.
        "a gradient is required": recorded
        and any(tensor is not None and tensor.requires_grad for _, tensor in tensors),
        **{f"{name} given": tensor is not None for name, tensor in tensors},
    }
