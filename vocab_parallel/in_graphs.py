"""What a call is in a graph of torch.compile: one operator, or a break of the graph.

Imported when a graph is being compiled, and never before: it loads torch's compiler.

The operator ``vocab_parallel::loss`` runs the function as it is, with an autograd graph of its own,
and ``vocab_parallel::loss_backward`` goes back through that: what an eager call does, to the bit.
All that is no tensor is a text, a constant of the outer graph, which says everything by itself: it
holds in any process, whatever cache a graph comes from.

Between the two the call's graph is kept by a `_Ticket`, which lives as long as the memory of a
tensor of one number. The outer graph saves that tensor for its backward, and frees it as it frees
an activation, so that a loss whose backward never runs leaves nothing behind. What the call saves
of the caller's tensors is taken from the arguments of backward: a compiler may have written over an
activation, and have computed it again.
"""

import ast
import itertools
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._library.effects import EffectType
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from vocab_parallel.arguments import Operands
from vocab_parallel.functional import linear_cross_entropy, token_logprobs
from vocab_parallel.metrics import LossMetrics
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.settings import NAMES
from vocab_parallel.statistics import accumulation_dtype

P = ParamSpec("P")
R = TypeVar("R")

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (linear_cross_entropy, token_logprobs)
}
_POSITIONAL = {
    name: [one.name for one in signature(each).parameters.values() if one.kind < one.KEYWORD_ONLY]
    for name, each in _FUNCTIONS.items()
}
_ROWS = ("start", "stop", "reduce_e_grad", "vocab_size", "largest_shard")


# --- while a graph is traced ---


def run(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of the library: as an operator where tensors and a text can say the call.

    Else the graph breaks, and the function runs as it does without a graph.
    """
    names = _POSITIONAL.get(function.__name__)
    if names is not None and len(args) <= len(names) and not _is_transformed():
        placed = dict(zip(names, args, strict=False))
        given = dict(placed, **kwargs)
        if len(given) == len(placed) + len(kwargs) and _can_be_said(given):
            return cast(R, _in_graph(function.__name__, given))
    return outside(function, *args, **kwargs)


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    """Tell whether a transform of torch.func is traced: the function refuses it, as in eager."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _outside(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


outside = torch.compiler.disable(_outside)


def _can_be_said(given: Mapping[str, Any]) -> bool:
    """Tell whether tensors and values are plain; ``accumulate_into`` writes to the parameter."""
    rest = {name: value for name, value in given.items() if name not in NAMES}
    options = rest.pop("vocab_parallel_options", None)
    if options is not None:
        if not all(hasattr(options, name) for name in ("group", *_ROWS[:3])):
            return False
        if options.group is not None and not isinstance(options.group, ProcessGroup):
            return False
        rest.update(_rows(options))
    if type(rest.get("num_valid_tokens")) is Tensor:
        del rest["num_valid_tokens"]
    tensors = [given.get(name) for name in NAMES]
    return (
        rest.get("accumulate_into") is None
        and all(tensor is not None for tensor in tensors[:3])
        and all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(value is None or type(value) in (bool, int, float, str) for value in rest.values())
        and all(abs(float(value)) < math.inf for value in rest.values() if type(value) is float)
    )


def _rows(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name, None) for name in _ROWS}


def _in_graph(name: str, given: dict[str, Any]) -> Any:
    """Call the operator, and return what the function of that name does."""
    tensors = Operands.of(*[given.pop(each, None) for each in NAMES])
    e, c, bias = tensors.hidden, tensors.classifier, tensors.bias
    options, divisor = given.pop("vocab_parallel_options", None), given.get("num_valid_tokens")
    if type(divisor) in (int, Tensor):  # another number at each step is no other graph
        del given["num_valid_tokens"]
    else:
        divisor = None
    counted = isinstance(divisor, Tensor)
    if options is not None:
        group = None if options.group is None else options.group.group_name
        given.update(_rows(options), group=group)
    found = torch.ops.vocab_parallel.loss.default(
        e,
        c,
        tensors.targets,
        bias,
        [tensors.token_weight, tensors.document_ids, divisor if counted else None],
        None if counted else divisor,
        [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (e, c, bias)],
        _said({"function": name, **given}),
    )
    results = list(found[:-1])
    if given.get("return_metrics"):
        results[-3:] = [LossMetrics(*[each.detach() for each in results[-3:]])]
    return tuple(results) if len(results) > 1 else results[0]


def _said(values: Mapping[str, Any]) -> str:
    """Return the text of a dictionary of plain values, by what a tracer knows."""
    text = ""
    for name, value in values.items():
        # A number may be a symbol, which this makes a constant of.
        known = type(value)(value) if type(value) in (int, float) else value
        text += f"{name!r}: {known!r}, "
    return "{" + text + "}"


# --- the operators ---


class _Ticket(array):
    """A call that waits for its backward, and the memory of the tensor of its number.

    Attributes:
        leaves: hidden states, classifier and bias, where the call's own graph begins.
        outputs: where it ends.
        lent: those three tensors while backward runs.
    """

    leaves: Sequence[Tensor | None]
    outputs: Sequence[Tensor]
    lent: list[Tensor | None]


_waiting: "WeakValueDictionary[int, _Ticket]" = WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op(
    "vocab_parallel::loss",
    mutates_args=(),
    schema="(Tensor e, Tensor c, Tensor targets, Tensor? bias, Tensor?[] others, SymInt? divisor,"
    " bool[] wanted, str text) -> Tensor[]",
)
def _loss(
    e: Any, c: Any, targets: Any, bias: Any, others: Any, divisor: Any, wanted: Any, text: str
) -> list[Tensor]:
    """Return the tensors of a call's results, and last the number of its ticket, int64 [1].

    Raises:
        ValueError: a CUDA graph is being captured, whose replays would draw no ticket.
    """
    if e.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "the loss within a compiled graph cannot be captured into a CUDA graph: compile it "
            'without mode="reduce-overhead", or capture the loss outside of what is compiled'
        )
    given = dict(_understood(text))
    function = _FUNCTIONS[given.pop("function")]
    if "group" in given:
        rows = {name: given.pop(name) for name in ("group", *_ROWS)}
        if rows["group"] is not None:
            rows["group"] = _resolve_process_group(rows["group"])
        given["vocab_parallel_options"] = VocabParallelOptions(**rows)
    names = (*NAMES[4:], "num_valid_tokens", "num_valid_tokens")
    beside = zip(names, (*others, divisor), strict=True)
    given |= {name: value for name, value in beside if value is not None}
    ticket = _Ticket("q", [next(_numbers)])
    ticket.leaves = [
        None if tensor is None else tensor.detach().requires_grad_(needed)
        for tensor, needed in zip((e, c, bias), wanted, strict=True)
    ]
    ticket.lent = []
    # Autocast has been applied in the outer graph.
    with _recording(any(wanted)), _lending(ticket), torch.autocast(e.device.type, enabled=False):
        e, c, bias = ticket.leaves
        results = function(e, c, targets, bias, **given)
    flat: list[Tensor] = []
    for result in results if isinstance(results, tuple) else (results,):
        flat += result if isinstance(result, tuple) else (result,)
    ticket.outputs = flat
    _waiting[ticket[0]] = ticket
    number = torch.frombuffer(ticket, dtype=torch.int64)
    return [*(result.detach().contiguous() for result in flat), number]


@torch.library.custom_op(
    "vocab_parallel::loss_backward",
    mutates_args=(),
    schema="(Tensor ticket, Tensor?[] grads, Tensor?[] leaves, bool[] wanted) -> Tensor[]",
)
def _loss_backward(ticket: Any, grads: Any, leaves: Any, wanted: Any) -> list[Tensor]:
    """Return the wanted gradients of hidden states, classifier and bias."""
    call = _waiting.get(int(ticket))
    if call is None:
        raise RuntimeError(
            "what the loss's forward kept is gone: hooks on saved tensors, such as save_on_cpu, "
            "copied the int64 tensor of one number that it belongs to; let them leave that as it is"
        )
    pairs = [
        (output, grad)
        for output, grad in zip(call.outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    outputs, received = zip(*pairs, strict=True)
    sought = [cast(Tensor, leaf) for leaf, want in zip(call.leaves, wanted, strict=True) if want]
    call.lent[:] = leaves
    try:
        with _recording(False):
            found = torch.autograd.grad(outputs, sought, received, retain_graph=True)
    finally:
        call.lent.clear()
    return [grad.contiguous() for grad in found]


# What a call was given beside tensors, of what `_said` wrote.
_understood = lru_cache(maxsize=256)(ast.literal_eval)


@contextmanager
def _recording(grad: bool) -> Iterator[None]:
    """Let autograd work within an operator, where torch has switched it off."""
    include, keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    with (
        include(keys.AutogradFunctionality, False),
        include(keys.ADInplaceOrView, False),
        torch.set_grad_enabled(grad),
    ):
        yield


def _lending(ticket: _Ticket) -> saved_tensors_hooks:
    """Let what is saved of a ticket's leaves be read from what it is lent in backward."""
    leaves, lent = ticket.leaves, ticket.lent  # not the ticket: its graph would keep itself alive

    def pack(tensor: Tensor) -> Any:
        for place, leaf in enumerate(leaves):
            if leaf is not None and 0 < leaf.numel() == tensor.numel():
                view = leaf.detach().reshape(tensor.shape)
                if (view.data_ptr(), view.stride()) == (tensor.data_ptr(), tensor.stride()):
                    return place, tensor.shape
        return tensor.detach()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        place, shape = packed
        return cast(Tensor, lent[place]).reshape(shape)

    return saved_tensors_hooks(pack, unpack)


# --- what torch's compiler knows of them ---


@_loss.register_fake
def _(e: Tensor, c: Tensor, *rest: Any) -> list[Tensor]:
    """Return tensors like the results; what is wrong with a call is said where it runs."""
    given = _understood(rest[-1])
    dtype = accumulation_dtype(torch.promote_types(e.dtype, c.dtype))
    each = list(e.shape[:-1])
    shift = given.get("shift", 0)
    if each and shift and given.get("hidden_layout") != "sequence" and isinstance(shift, int):
        each[-1] = max(each[-1] - shift, 0)
    logprobs = given["function"] == "token_logprobs"
    whole = not logprobs and given.get("reduction", "mean") != "none"
    shapes = [() if whole else each]
    if given.get("return_lse") or given.get("return_entropy"):
        shapes.append(each)
    results = [e.new_empty(shape, dtype=dtype) for shape in shapes]
    if given.get("return_metrics"):
        kinds = (dtype, dtype, torch.int64)
        results += [e.new_empty((), dtype=kind) for kind in kinds]
    return [*results, torch.empty(1, dtype=torch.int64, device="cpu")]


@_loss_backward.register_fake
def _(ticket: Any, grads: Any, leaves: Any, wanted: Any) -> list[Tensor]:
    return [leaf.new_empty(leaf.shape) for leaf, want in zip(leaves, wanted, strict=True) if want]


def _save(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    e, c, _, bias, others, *_ = inputs
    # torch asks for a list of gradients where it was given a list of tensors alone.
    some_missing = any(each is None for each in others)
    ctx.of_others = None if some_missing else [None] * len(others)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], e, c, bias)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    ticket, *leaves = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    found: list[Any] = [None] * len(ctx.needs_input_grad)
    if any(wanted) and any(grad is not None for grad in grads[:-1]):
        made = iter(torch.ops.vocab_parallel.loss_backward(ticket, grads[:-1], leaves, wanted))
        for place, want in zip((0, 1, 3), wanted, strict=True):
            found[place] = next(made) if want else None
    found[4] = ctx.of_others
    return tuple(found)


_loss.register_autograd(_backward, setup_context=_save)
# Ranks meet inside of them: none is left out, and they stay in the order of the program.
for _operator in (_loss, _loss_backward):
    _operator.register_effect(EffectType.ORDERED)
