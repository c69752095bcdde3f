"""Which part of its GPUs' products a run makes use of: model-FLOPs utilisation.

Counted is what the model's mathematics needs, three times its forward, and not what recomputing
adds (arXiv 2204.02311, appendix B). The peak is the data sheet's of dense bfloat16 products.
"""

import torch
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.planning.hardware import peak_of
from launch.planning.shape import ModelShape


def peak_flops(device: torch.device) -> float | None:
    """Return a device's dense bfloat16 FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def step_flops(arguments: TrainArguments, config: PretrainedConfig) -> float | None:
    """Return the FLOPs of one step over all ranks; None where layers have experts.

    Of a token, its 2 a parameter of the products and classifier, and causal attention at half.
    """
    raw = config.to_dict()
    if any("expert" in name and value for name, value in raw.items()):
        return None
    shape = ModelShape.of(config.model_type, raw)
    return shape.step_flops(arguments.batch * arguments.sequence, arguments.sequence)


def utilisation(
    flops: float | None, seconds: float, ranks: int, peak: float | None
) -> float | None:
    """Return the part of all ranks' peak that so many FLOPs in so many seconds are."""
    if flops is None or peak is None:
        return None
    return flops / (seconds * ranks * peak)
