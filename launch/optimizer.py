"""AdamW over float32 copies of the weights, and its learning rate as a function of the step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from launch.arguments import TrainArguments
from vocab_parallel.modules.gradient_sums import local_part

WIDENED_BYTES = 2**28  # of float32 gradients that exist at a time


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW; of weights in less than float32 it trains float32 copies.

    An update of bfloat16 weights that is smaller than 1/256 of a weight is lost by rounding, which
    small learning rates make of nearly all. A copy takes it, with float32 moments, and the weight
    is the copy rounded: 16 bytes a parameter with its gradient in place of 8. Gradients are widened
    a part at a time: while the step runs, when no activations exist, it holds `WIDENED_BYTES` more,
    or the largest weight's gradient.

    Weight decay is of matrices alone, not of norms and biases.

    Args:
        parameters: what is trained.
        learning_rate, betas, weight_decay: AdamW's.
        copies: whether weights in less than float32 have copies.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        copies: bool,
    ) -> None:
        self._copies: dict[nn.Parameter, Tensor] = {}
        # By whether they decay, and their type: one fused update takes no DTensors beside others.
        kinds: dict[tuple[bool, type], list[Tensor]] = {}
        for parameter in parameters:
            if copies and parameter.dtype.itemsize < torch.float32.itemsize:
                self._copies[parameter] = parameter.detach().float()
            kind = (parameter.dim() > 1, DTensor if isinstance(parameter, DTensor) else Tensor)
            kinds.setdefault(kind, []).append(self.trained(parameter))
        groups = [
            {"params": tensors, "weight_decay": weight_decay if decays else 0.0}
            for (decays, _), tensors in kinds.items()
        ]
        super().__init__(groups, lr=learning_rate, betas=betas, fused=True)

    @classmethod
    def of(cls, arguments: TrainArguments, parameters: Iterable[nn.Parameter]) -> "AdamW":
        """Make the optimizer that the command line asks for."""
        arguments = settled(arguments)
        assert arguments.learning_rate is not None
        return cls(
            parameters,
            learning_rate=arguments.learning_rate,
            betas=arguments.betas,
            weight_decay=arguments.weight_decay,
            copies=arguments.float32_weights,
        )

    def trained(self, parameter: nn.Parameter) -> Tensor:
        """Return what has this parameter's moments: its float32 copy, or itself."""
        return self._copies.get(parameter, parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights of all gradients; does not wait for a GPU."""
        super().step(closure)  # of weights without copies: no copy has a gradient yet
        plain = [own for group in self.param_groups for own in group["params"]]
        done = [(own, own.grad) for own in plain if own.grad is not None]
        for own, _ in done:  # once is enough
            own.grad = None
        for part in self._parts():
            widened = [torch.empty_like(copy) for copy, _ in part]
            _copy_local(widened, [gradient for _, gradient in part])
            for (copy, _), gradient in zip(part, widened, strict=True):
                copy.grad = gradient
            super().step()
            for copy, _ in part:
                copy.grad = None
            del widened, gradient
        for own, gradient in done:
            own.grad = gradient
        self.round_copies()

    def _parts(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield the copies with their weights' gradients, few enough to be widened together."""
        part: list[tuple[Tensor, Tensor]] = []
        for parameter, copy in self._copies.items():
            if parameter.grad is None:
                continue
            held = sum(local_part(own).nbytes for own, _ in part)
            if part and held + local_part(copy).nbytes > WIDENED_BYTES:
                yield part
                part = []
            part.append((copy, parameter.grad))
        if part:
            yield part

    @torch.no_grad()
    def round_copies(self) -> None:
        """Give each weight the value of its copy."""
        if self._copies:
            _copy_local(list(self._copies), list(self._copies.values()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        super().zero_grad(set_to_none)
        for parameter in self._copies:
            parameter.grad = None


def _copy_local(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, or this rank's shards of them."""
    torch._foreach_copy_([local_part(own) for own in targets], [local_part(own) for own in sources])


class LearningRate:
    """The learning rate of each step: warm-up and decay as transformers' `get_scheduler` has them.

    It depends on the step alone, and a resumed run recomputes it.
    """

    def __init__(self, arguments: TrainArguments) -> None:
        arguments = settled(arguments)
        assert arguments.learning_rate is not None
        name: Any = arguments.learning_rate_schedule
        if name == "constant":
            name = "constant_with_warmup"  # of no steps too
        nothing = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        self._base = arguments.learning_rate
        schedule = get_scheduler(name, nothing, arguments.warmup, arguments.steps)
        self._factor = schedule.lr_lambdas[0]

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step; the first one is 0."""
        return self._base * float(self._factor(step))

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give the optimizer a step's learning rate, and return it."""
        rate = self(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


OF_SIZE = ("learning_rate", "learning_rate_schedule", "warmup", "clip_norm")
_RATES = (5e-6, 1e-4)
_WARM = 0.03  # of the steps


def settled(arguments: TrainArguments, pretrained: int | None = None) -> TrainArguments:
    """Return the arguments with a value for every option of the optimizer; given ones stay.

    Random weights bear a large rate; pretrained ones forget under it. Nothing here is measured:
    these are the rates at which models of such sizes are commonly trained on, 1e-5 for 8 billion
    parameters, smaller for larger ones as the root of their number.

    Args:
        arguments: of the run.
        pretrained: parameters of a model that has weights already; None for random ones.
    """
    values: dict[str, Any] = {
        "learning_rate": 3e-3,
        "learning_rate_schedule": "constant",
        "warmup": 0,
    }
    if pretrained is not None:
        low, high = _RATES
        rate = min(high, max(low, 1e-5 * math.sqrt(8e9 / pretrained)))
        values = {
            "learning_rate": float(f"{rate:.0e}"),
            "learning_rate_schedule": "cosine",
            "warmup": round(_WARM * arguments.steps),
            "clip_norm": 1.0,
        }
    missing = {name: v for name, v in values.items() if getattr(arguments, name) is None}
    return replace(arguments, **missing)
