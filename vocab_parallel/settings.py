"""What a caller of the loss may pass: every rule that one rank can check alone."""

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vocab_parallel.backends.interface import Transform
from vocab_parallel.backends.registry import option_names
from vocab_parallel.layout import HiddenLayout
from vocab_parallel.plan import BACKWARDS
from vocab_parallel.rank_rows import RankRows
from vocab_parallel.statistics import (
    LARGEST_OTHER,
    LSE,
    MEAN_LOG_PROB,
    SUM,
    TARGET,
    Columns,
    accumulation_dtype,
)

if TYPE_CHECKING:
    from vocab_parallel.arguments import Operands

# The operands' own names, and which of them have a value for each token.
NAMES = ("e", "c", "targets", "bias", "token_weight", "document_ids")
OF_TOKENS = ("targets", "token_weight", "document_ids")
MIXABLE = (torch.float16, torch.bfloat16, torch.float32)
# What other libraries call arguments of the loss.
OTHER_NAMES = {
    "input": "e here, the hidden states",
    "weight": "c here, this rank's rows of the classifier (classes have no weights, tokens have "
    "token_weight)",
    "target": "targets here",
    "linear_weight": "c here, this rank's rows of the classifier",
    "linear_bias": "bias here",
    "lin_weight": "c here, this rank's rows of the classifier, and stands after e",
    "lse_square_scale": "z_loss here",
    "filter_eps": 'an option of impl="cce" and its presets: no other drops a gradient',
}
# Options and values of earlier versions, and what to do without them.
REMOVED = {
    "overlap": "there is one collective each way, the gradient's beside the classifier's product; "
    "leave it out",
    "e_grad_reduce_dtype": "the hidden states' gradient is summed in float32 (float64 for "
    "float64), since a sum in bfloat16 has up to twice eager's error; leave it out",
    "chunk_tokens": "tiles are as large as memory_budget allows; set that, in bytes",
    "chunk_rows": "tiles are as large as memory_budget allows; set that, in bytes",
    "backward=gradients": 'use "probs", which is as fast, or "auto" with a memory_budget',
}
_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "reduction": ("mean", "sum", "none"),
    "hidden_layout": get_args(HiddenLayout),
    "backward": BACKWARDS,
    "accumulate_into": (None, "grad", "main_grad"),
}


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # of an int too, which may be beyond any float


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Tell whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_bool(value: Any) -> bool:
    """Tell whether a value is True or False, and nothing like them."""
    return isinstance(value, bool)


class Rule(NamedTuple):
    """What holds of a setting, how an error says that it must, and what to do."""

    name: str
    holds: Callable[[Any], bool]
    must: str
    hint: str = ""


_RULES = (
    Rule("ignore_index", _is_integer, "be an integer"),
    Rule("ignore_index", lambda label: -(2**63) <= label < 2**63, "fit int64"),
    Rule(
        "softcap",
        lambda cap: cap is None or is_positive(cap),
        "be a positive number, or None for no cap",
    ),
    Rule("temperature", is_positive, "be a positive number"),
    Rule("label_smoothing", lambda share: is_number(share) and 0 <= share <= 1, "lie in [0, 1]"),
    Rule("z_loss", lambda weight: is_number(weight) and weight >= 0, "be a number of at least 0"),
    Rule("hidden_grad_scale", is_number, "be a finite number"),
    Rule(
        "return_lse",
        is_bool,
        "be True or False",
        ": where the ninth argument was cut-cross-entropy's filter_eps, pass it by name",
    ),
    Rule("return_metrics", is_bool, "be True or False"),
    Rule("return_entropy", is_bool, "be True or False"),
    Rule(
        "logits_dtype",
        lambda dtype: dtype in (None, "float32"),
        'be None or "float32"',
        ": logits of float64 operands are float64 anyway",
    ),
)


def check_values(
    settings: Any, choices: Mapping[str, tuple[Any, ...]], rules: Sequence[Rule]
) -> None:
    """Raise ValueError for the first attribute that is none of its choices, or breaks a rule."""
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            gone = REMOVED.get(f"{name}={value}")
            hint = f"; {gone}" if gone else ""
            raise ValueError(f"unknown {name} {value!r}: known are {list(known)}{hint}")
    for rule in rules:
        value = getattr(settings, rule.name)
        if not rule.holds(value):
            raise ValueError(f"{rule.name} must {rule.must}, got {value!r}{rule.hint}")


@dataclass(frozen=True)
class LossSettings:
    """All that `linear_cross_entropy` and its relatives take beside tensors and rows.

    Every rank of a group passes the same: many of them decide what the ranks communicate, and the
    others what each of them returns. So all are agreed on, a new one too.

    ``shift`` is a tuple where each position makes several predictions: hidden states then have an
    axis of their own for them, the first one.
    """

    ignore_index: int = -100
    softcap: float | None = None
    reduction: str = "none"
    shift: int | tuple[int, ...] = 0
    head_weights: tuple[float, ...] | None = None
    return_heads: bool = False
    return_lse: bool = False
    return_entropy: bool = False
    return_metrics: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    hidden_layout: HiddenLayout = "replicated"
    hidden_grad_scale: float = 1.0
    logits_dtype: str | None = None
    backward: str = "auto"
    memory_budget: int | None = None
    accumulate_into: str | None = None
    num_valid_tokens: int | Tensor | None = None
    impl: str = "auto"
    impl_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Tell the loss's own options from those of its implementation."""
        names = {each.name for each in fields(cls)} - {"impl_options"}
        own = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        return cls(**own, impl_options=rest)

    @property
    def num_heads(self) -> int | None:
        """H, how many predictions a position makes, or None where there is no axis for them."""
        return len(self.shift) if isinstance(self.shift, tuple) else None

    @property
    def transform(self) -> Transform:
        """What makes logits of raw entries."""
        return Transform(self.softcap, float(self.temperature))

    @property
    def grad_columns(self) -> Columns:
        """The statistics of the logits that what has a gradient is made of."""
        columns: Columns = (LSE, TARGET)
        if self.label_smoothing:
            columns = (*columns, SUM)
        return (*columns, MEAN_LOG_PROB) if self.return_entropy else columns

    @property
    def columns(self) -> Columns:
        """Those, and after them what is only reported."""
        reported = (MEAN_LOG_PROB, LARGEST_OTHER) if self.return_metrics else ()
        return (*self.grad_columns, *(each for each in reported if each not in self.grad_columns))

    @property
    def scalar_loss(self) -> bool:
        """Whether the result that has a gradient is one number."""
        return self.reduction != "none" and not (self.return_lse or self.return_entropy)

    @property
    def separate_lse_grad(self) -> bool:
        """Whether the gradient of lse may differ from minus that of the target's logit."""
        return bool(self.return_lse or self.return_entropy or self.z_loss or self.label_smoothing)

    def check(self) -> None:
        """Raise ValueError for a value that cannot be."""
        check_values(self, _CHOICES, _RULES)
        weights = self.head_weights
        if self.num_heads == 0:
            raise ValueError("shift must name at least one prediction, such as (1, 2), got ()")
        for name in ("return_lse", "return_entropy", "return_metrics"):
            if self.num_heads is not None and getattr(self, name):
                raise ValueError(
                    f"a loss with shift={self.shift!r} has no {name}, which is of one prediction "
                    f"of each position: leave it out, or call linear_cross_entropy or "
                    f"token_logprobs for that head"
                )
        if self.return_heads and self.reduction == "none":
            raise ValueError(
                'reduction="none" returns the losses of each head by itself: leave out return_heads'
            )
        if weights is None:
            return
        if self.num_heads is None:
            raise ValueError(
                f"head_weights {weights!r} are of several predictions: give shift one number for "
                f"each, such as (1, 2), got {self.shift!r}"
            )
        if len(weights) != self.num_heads or not all(map(is_number, weights)):
            raise ValueError(
                f"head_weights must be {self.num_heads} finite numbers, one for each of shift "
                f"{self.shift}, got {weights!r}"
            )


@functools.cache
def parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names that a function takes by keyword."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(each.name for each in parameters if each.kind != each.VAR_KEYWORD)


def unknown_option(settings: LossSettings, known: Collection[str]) -> ValueError | None:
    """Say which option neither the loss nor its implementation has, and what may be meant.

    Args:
        known: what else the caller could have given.
    """
    own = option_names(settings.impl)
    unknown = sorted(settings.impl_options.keys() - own)
    if not unknown:
        return None
    name, hint = unknown[0], ""
    if name in REMOVED:
        return ValueError(f"{name} is no longer an option: {REMOVED[name]}")
    import difflib  # only who misspells waits for it

    nearest = difflib.get_close_matches(name, [*known, *own], n=1)
    if name in OTHER_NAMES:
        hint = f", which is {OTHER_NAMES[name]}"
    elif nearest:
        hint = f", did you mean {nearest[0]!r}?"
    return ValueError(
        f"unknown option {name!r}{hint}: the loss has {sorted(known)}, impl {settings.impl!r} has "
        f"{sorted(own - set(known))}"
    )


def others_names(given: Iterable[str]) -> str:
    """Return what some arguments are called here, of those that have another library's name."""
    return ", ".join(f"{name} is {OTHER_NAMES[name]}" for name in given if name in OTHER_NAMES)


def check_tensors(operands: "Operands", settings: LossSettings, degree: int) -> None:
    """Check shapes, dtypes and devices of the tensors against one another.

    Raises:
        ValueError: says what was expected, what came and what to do.
    """
    e, c, bias = operands.hidden, operands.classifier, operands.bias
    given = dict(zip(NAMES, operands.__dict__.values(), strict=True))
    several = settings.num_heads is not None
    if several and not isinstance(e, Tensor):
        raise ValueError(
            f"e must be several hidden states [..., T, D] of one shape, dtype and device, or one "
            f"tensor [H, ..., T, D] of them, got {_kinds(e)}"
        )
    for name, tensor in given.items():
        if tensor is not None or name in ("e", "c"):
            check_plain_tensor(name, tensor, e)
    if e.dim() < 2 + several or c.dim() != 2:
        axes = "H, ..., T, D" if several else "..., T, D"
        raise ValueError(
            f"expected hidden states e [{axes}] and classifier c [rows, D], got e "
            f"{list(e.shape)} and c {list(c.shape)}"
        )
    if not e.shape[-1]:
        raise ValueError(f"the hidden size must be at least 1, got e {list(e.shape)}")
    if e.shape[-1] != c.shape[1]:
        raise ValueError(
            f"the hidden size of e is {e.shape[-1]} but that of c is {c.shape[1]}: they must come "
            f"from one model"
        )
    if not {e.dtype, c.dtype} <= set(MIXABLE) and not e.dtype == c.dtype == torch.float64:
        raise ValueError(
            f"e and c must be float16, bfloat16 or float32, each as it is, or both float64, got "
            f"{e.dtype} and {c.dtype}: cast one, or call under torch.autocast"
        )
    for name in ("targets", "document_ids"):
        ids = given[name]
        if ids is not None and ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64, got {ids.dtype}"
                + (": class probabilities are not supported" if name == "targets" else "")
            )
    for name in ("bias", "token_weight"):
        value = given[name]
        if value is not None and value.is_complex():
            raise ValueError(f"{name} must be real, got {value.dtype}")
    if bias is not None and bias.shape != c.shape[:1]:
        raise ValueError(f"bias must be [{c.shape[0]}], a value a row of c, got {list(bias.shape)}")
    _check_token_shapes(e, {name: given[name] for name in OF_TOKENS}, settings, degree)


def _kinds(heads: Any) -> str:
    """Say what several hidden states are that make no tensor."""
    kinds = {
        f"{list(head.shape)} in {head.dtype} on {head.device}"
        if isinstance(head, Tensor)
        else type(head).__name__
        for head in (heads if isinstance(heads, Sequence) else [heads])
    }
    return " and ".join(sorted(kinds)) or "none"


def check_rows(c: Tensor, rows: RankRows, settings: LossSettings) -> None:
    """Check the rows of c against the options, and the options against the settings.

    Raises:
        ValueError: rows of c that are not [start, stop), or options that cannot be combined.
    """
    start, stop = rows.start, rows.stop
    if not 0 <= start <= stop:
        raise ValueError(f"expected 0 <= start <= stop, got start={start}, stop={stop}")
    if c.shape[0] != stop - start:
        raise ValueError(
            f"c has {c.shape[0]} rows but the options say [{start}, {stop}): pass this rank's "
            f"rows and their own range"
        )
    largest = rows.largest_shard
    if largest is not None and not (isinstance(largest, int) and largest >= stop - start):
        raise ValueError(
            f"largest_shard must be the rows of the rank that has the most, got {largest!r} where "
            f"this rank has {stop - start}: pass the same on all ranks"
        )
    if not rows.reduce_e_grad and settings.hidden_layout != "replicated":
        raise ValueError(
            f'reduce_e_grad=False must go with hidden_layout="replicated", got '
            f"{settings.hidden_layout!r}, which gathers the tokens of all ranks: leave it True"
        )
    if settings.label_smoothing and rows.vocab_size is None:
        raise ValueError(
            "label_smoothing needs the size of the whole vocabulary: set vocab_size in the "
            "options, as VocabParallelOptions.from_vocab does"
        )


def check_accumulation(classifier: Tensor, accumulate_into: str) -> None:
    """Check that the classifier's gradient can be accumulated as asked.

    Raises:
        ValueError: a classifier that is no plain leaf, or one without a ``main_grad`` in float32
            of its shape.
    """
    if isinstance(classifier, DTensor) or not (classifier.is_leaf and classifier.requires_grad):
        raise ValueError(
            "accumulate_into adds to an attribute of the parameter itself, but c is not a plain "
            "leaf that requires a gradient (a DTensor's local rows, a cast by autocast and a view "
            "are none): pass the parameter, or leave accumulate_into out"
        )
    if accumulate_into == "main_grad":
        found = getattr(classifier, "main_grad", None)
        dtype = accumulation_dtype(classifier.dtype)
        if found is None or found.shape != classifier.shape or found.dtype != dtype:
            come = "none" if found is None else f"{list(found.shape)} in {found.dtype}"
            raise ValueError(
                f'accumulate_into="main_grad" needs c.main_grad {list(classifier.shape)} in '
                f"float32 (float64 for float64), got {come}: make it before the first step"
            )


def check_token_divisor(
    num_valid_tokens: Any,
    e: Tensor,
    reduction: str,
    *,
    reads_values: bool,
    num_heads: int | None = None,
) -> None:
    """Raise ValueError where ``num_valid_tokens`` is no divisor for the reduction.

    Args:
        num_heads: where a tensor may hold one number for each prediction.
        reads_values: whether a tensor's value may be read, which waits for a GPU.
    """
    if num_valid_tokens is None:
        return
    if reduction != "mean":
        raise ValueError(
            f'num_valid_tokens divides reduction="mean"; with {reduction!r} leave it out'
        )
    if isinstance(num_valid_tokens, Tensor):
        fits = num_valid_tokens.numel() in (1, num_heads or 1)
        if not fits or num_valid_tokens.device != e.device:
            each = "" if num_heads is None else f", or {num_heads} (one a prediction),"
            raise ValueError(
                f"a num_valid_tokens tensor must hold one number{each} on {e.device}, got "
                f"{list(num_valid_tokens.shape)} on {num_valid_tokens.device}"
            )
        if num_valid_tokens.dtype == torch.bool or num_valid_tokens.is_complex():
            raise ValueError(
                f"num_valid_tokens must be a number of tokens, got {num_valid_tokens.dtype}"
            )
        if reads_values and not (num_valid_tokens >= 0).all():
            raise ValueError(
                f"num_valid_tokens must count tokens, at least 0, got {num_valid_tokens.tolist()!r}"
            )
    elif not _is_integer(num_valid_tokens) or num_valid_tokens < 0:
        raise ValueError(
            f"num_valid_tokens must be an int of at least 0 or a tensor, got {num_valid_tokens!r}"
        )


def check_plain_tensor(name: str, tensor: Tensor | None, e: Tensor) -> None:
    """Raise ValueError for what is no tensor, or one that the loss cannot read beside e."""
    if not isinstance(tensor, Tensor):
        several = name == "e" and isinstance(tensor, list | tuple)
        way_out = ": of several predictions give shift one number each, such as (1, 2)"
        raise ValueError(
            f"{name} must be a tensor, got {type(tensor).__name__}{way_out if several else ''}"
        )
    if isinstance(tensor, DTensor):
        raise ValueError(
            f"{name} is a DTensor: pass {name}.to_local(), or give the DTensor weight to "
            f"CCEPipelineLoss, which reads its rows off its placement"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got {tensor.layout}: pass {name}.to_dense()")
    if tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values: give it memory, to_empty(device=...) "
            f"of its module for instance, before the loss is called"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(
            f"{name} is inside of a transform of torch.func, which the loss's autograd.Functions "
            f"do not take: use torch.autograd.grad or backward()"
        )
    if tensor.device != e.device:
        raise ValueError(f"{name} is on {tensor.device} but e is on {e.device}: move one")


def _check_token_shapes(
    e: Tensor, of_tokens: Mapping[str, Tensor | None], settings: LossSettings, degree: int
) -> None:
    expected = list(e.shape[:-1])
    if settings.num_heads is not None and expected.pop(0) != settings.num_heads:
        raise ValueError(
            f"e must have one hidden state for each of shift {settings.shift}, on its first axis "
            f"where it is one tensor, got {e.shape[0]} of {list(e.shape[1:])}"
        )
    if settings.hidden_layout == "sequence":
        expected[-1] *= degree
    for name, tensor in of_tokens.items():
        if tensor is not None and list(tensor.shape) != expected:
            raise ValueError(
                f"{name} must be {expected} for e {list(e.shape)} with hidden_layout="
                f'"{settings.hidden_layout}" on {degree} ranks, got {list(tensor.shape)}'
            )
    length = expected[-1]
    for shift in settings.shift if isinstance(settings.shift, tuple) else (settings.shift,):
        if not isinstance(shift, int) or not 0 <= shift < max(length, 1):
            raise ValueError(
                f"shift must be an integer in [0, {max(length, 1)}) for sequences of {length} "
                f"tokens, got {settings.shift!r}"
            )
