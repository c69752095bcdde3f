"""Which part of its GPUs' products a run makes use of: model-FLOPs utilisation.

Counted is what the model's mathematics needs, three times its forward, and not what recomputing
adds (arXiv 2204.02311, appendix B). The peak is the data sheet's of dense bfloat16 products.
"""

import torch
from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.planning.shape import ModelShape

# Dense bfloat16 FLOP/s of data sheets, by what torch calls the device; the first that is in it.
_PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return a device's dense bfloat16 FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)


def step_flops(arguments: TrainArguments, config: PretrainedConfig) -> float | None:
    """Return the FLOPs of one step over all ranks; None where layers have experts.

    Of a token, its 2 a parameter of the products and classifier, and causal attention at half.
    """
    raw = config.to_dict()
    if any("expert" in name and value for name, value in raw.items()):
        return None
    shape = ModelShape.of(config.model_type, raw)
    tokens = arguments.batch * arguments.sequence
    layers = shape.layers * shape.layer_flops(tokens, arguments.sequence)
    return 3.0 * (layers + 2.0 * tokens * shape.vocabulary_parameters)


def utilisation(
    flops: float | None, seconds: float, ranks: int, peak: float | None
) -> float | None:
    """Return the part of all ranks' peak that so many FLOPs in so many seconds are."""
    if flops is None or peak is None:
        return None
    return flops / (seconds * ranks * peak)
