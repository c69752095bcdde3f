"""What holds for every call of a shape: checked and planned once, and found again by a key.

A training step calls the loss with the shapes, dtypes and options of the step before. All that
follows from these alone, and from nobody else, is made at the first such call: that they are
right, which implementation works, its plan, and which statistics it makes. Nothing of a microbatch
is held, no parameter and no process group. What ranks tell one another (`agreement.py`) is told at
every call, found or made: ranks would differ in what they wait for.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vocab_parallel.local import tile_ops
from vocab_parallel.local.backward_plan import BackwardPlan
from vocab_parallel.local.interface import LocalImpl, Shard
from vocab_parallel.local.registry import create_impl
from vocab_parallel.local.statistics import accumulation_dtype
from vocab_parallel.sharded import settings as rules
from vocab_parallel.sharded.operands import Operands
from vocab_parallel.sharded.rows import RankRows
from vocab_parallel.sharded.settings import LossSettings

_PLAIN = (Tensor, nn.Parameter)
_MOST = 256
_bound: dict[Hashable, "Bound"] = {}


class Bound(NamedTuple):
    """What is known of a shape.

    Attributes:
        shard: of the local work, with neither tokens nor rows: its tensors hold nothing.
        impl: who does that work, and
        plan: how its backward finds the logits.
    """

    shard: Shard
    impl: LocalImpl
    plan: BackwardPlan


def bound_of(operands: Operands, settings: LossSettings, rows: RankRows) -> Bound:
    """Return what holds for the call's shape.

    Raises:
        ValueError: bad input.
    """
    key = _key(operands, settings, rows)
    found = None if key is None else _bound.get(key)
    if found is None:
        found = _bind(operands, settings, rows)
        if key is not None:
            if len(_bound) >= _MOST:
                _bound.clear()
            _bound[key] = found
    return found


def forget() -> None:
    """Forget all shapes, for whoever changes what plans are made of."""
    _bound.clear()


def _key(operands: Operands, settings: LossSettings, rows: RankRows) -> Hashable | None:
    """Return what tells shapes apart, or None for a call that is checked anew each time."""
    kinds: list[Hashable] = []
    for tensor in operands.tensors:
        if tensor is None:
            kinds.append(None)
            continue
        if type(tensor) not in _PLAIN or tensor.is_meta:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return None
        # Hopper's kernels read what TMA can: `tile_ops.choose`.
        lies = (tensor.stride(), tensor.data_ptr() % 16) if tensor.is_cuda else None
        kinds.append((tensor.shape, tensor.dtype, tensor.device, lies))
    of_rows = (
        rows.start, rows.stop, rows.vocab_size, rows.reduce_e_grad, rows.largest_shard,
        rows.group.degree,
    )  # fmt: skip
    key = (tuple(kinds), settings.key, of_rows, tile_ops.choose)
    try:
        hash(key)
    except TypeError:  # an option that cannot be, as the checks will say
        return None
    return key


def _bind(operands: Operands, settings: LossSettings, rows: RankRows) -> Bound:
    """Check what one rank alone can check, and choose who does the work."""
    settings.check()
    impl = create_impl(settings.impl, settings.memory_budget, settings.impl_options)
    rules.check_tensors(operands, settings, rows.group.degree)
    rules.check_rows(operands.classifier, rows, settings)
    shard = _shard(operands, settings, rows)
    degree = rows.group.degree
    copies = 1 if settings.hidden_layout == "replicated" else degree
    plan = impl.plan(
        shard,
        tokens=copies * operands.hidden.shape[:-1].numel(),
        most_rows=rows.most_rows,
        degree=degree,
        backward=settings.backward,
        has_main_grad=settings.accumulate_into == "main_grad",
    )
    return Bound(shard, impl, plan)


def _shard(operands: Operands, settings: LossSettings, rows: RankRows) -> Shard:
    """Describe this rank's rows for the local work; no tensor of the call's is held."""
    hidden, classifier, bias = operands.flat_hidden, operands.classifier, operands.bias
    none = hidden.new_empty((0, hidden.shape[1]))
    product_dtype = torch.promote_types(hidden.dtype, classifier.dtype)
    sums = rows.sums_hidden_grad(settings.hidden_layout)
    return Shard(
        hidden=none,
        classifier=_of_shape(classifier, rows.num_token_rows),
        bias=None if bias is None else _of_shape(bias, rows.num_token_rows),
        targets=none[:, 0],
        transform=settings.transform,
        names=settings.statistics,
        grad_names=settings.grad_statistics,
        separate_lse_grad=settings.separate_lse_grad,
        logits_dtype=accumulation_dtype(product_dtype) if settings.logits_dtype else product_dtype,
        sum_dtype=accumulation_dtype(hidden.dtype) if sums else hidden.dtype,
        needs_grad=False,
        ops=tile_ops.choose(hidden, classifier),
    )


def _of_shape(parameter: Tensor, num_rows: int) -> Tensor:
    """Return a tensor of a parameter's shape and dtype, with so many rows and no memory."""
    return parameter.detach().new_empty(()).expand(num_rows, *parameter.shape[1:])
