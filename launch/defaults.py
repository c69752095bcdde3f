"""What trains a model whose optimizer no option describes.

Random weights bear a large rate; pretrained ones forget under it. Nothing here is measured: these
are the rates at which models of such sizes are commonly trained on, 1e-5 for 8 billion parameters,
smaller for larger ones as the root of their number.
"""

import math
from dataclasses import replace
from typing import Any

from launch.arguments import TrainArguments

OF_SIZE = ("learning_rate", "learning_rate_schedule", "warmup", "clip_norm")
_RANDOM: dict[str, Any] = {
    "learning_rate": 3e-3,
    "learning_rate_schedule": "constant",
    "warmup": 0,
}
_RATES = (5e-6, 1e-4)
_WARM = 0.03  # of the steps


def settled(arguments: TrainArguments, pretrained: int | None = None) -> TrainArguments:
    """Return the arguments with a value for every option of the optimizer; given ones stay.

    Args:
        arguments: of the run.
        pretrained: parameters of a model that has weights already; None for random ones.
    """
    values = _RANDOM if pretrained is None else _of_size(pretrained, arguments.steps)
    missing = {name: v for name, v in values.items() if getattr(arguments, name) is None}
    return replace(arguments, **missing) if missing else arguments


def _of_size(parameters: int, steps: int) -> dict[str, Any]:
    low, high = _RATES
    rate = min(high, max(low, 1e-5 * math.sqrt(8e9 / parameters)))
    return {
        "learning_rate": float(f"{rate:.0e}"),
        "learning_rate_schedule": "cosine",
        "warmup": round(_WARM * steps),
        "clip_norm": 1.0,
    }
