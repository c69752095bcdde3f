"""What a model has of each layer, counted in transformers' own model on the meta device.

transformers is loaded here alone, and for a configuration alone: published names are data.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PARTS = ("model.embed_tokens.weight", "model.norm.", "model.layers.", "lm_head.weight")


@dataclass(frozen=True)
class LayerCount:
    """What one layer has.

    Attributes:
        parameters: all of them, every expert's too.
        attention, others: parameters of the matrix products that one token passes, in attention and
            beside it; of the experts those of its top-k.
        norms: how many norms of the hidden size.
    """

    parameters: int
    attention: float
    others: float
    norms: int


def model_of(name: str, config: Any) -> nn.Module:
    """Build a configuration's model on the meta device.

    Args:
        name: what errors call it.
        config: of transformers.

    Raises:
        ValueError: no causal language model, or one with parameters outside of an embedding,
            layers, a last norm and a classifier without a bias, of which a plan knows nothing.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # A copy, since building writes the dtype into the configuration.
            whole: nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=False
            )
    except Exception as error:  # transformers raises what its classes make of the values
        words = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} cannot be built: {words}") from error
    strange = [each for each, _ in whole.named_parameters() if not each.startswith(_PARTS)]
    embedding = getattr(getattr(whole, "model", None), "embed_tokens", None)
    if strange or embedding is None:
        raise ValueError(
            f"{type(whole).__name__} of {name} cannot be planned: beside model.embed_tokens, "
            f"model.layers, model.norm and lm_head.weight it has {strange[:4]}"
        )
    return whole


def count_layer(name: str, layer: nn.Module, config: Any) -> LayerCount:
    """Count one layer.

    Raises:
        ValueError: it has experts, and its configuration does not say how many a token passes.
    """
    attention, others, norms = 0.0, 0.0, 0
    for key, parameter in layer.named_parameters():
        if parameter.dim() < 2 or key.endswith("bias"):
            norms += "norm" in key and parameter.shape == (config.hidden_size,)
            continue
        passed = parameter.numel() * _part_passed(name, layer, key, config)
        if "attn" in key or "attention" in key:
            attention += passed
        else:
            others += passed
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    return LayerCount(parameters, attention, others, norms)


def _part_passed(name: str, layer: nn.Module, key: str, config: Any) -> float:
    """Return the part of a parameter that one token passes: below 1 for stacked or listed experts.

    Raises:
        ValueError: how many experts a token passes is not said.
    """
    before, experts, _ = key.partition(".experts.")
    if not experts:
        return 1.0
    each_token = getattr(config, "num_experts_per_tok", None)
    if not isinstance(each_token, int):
        raise ValueError(
            f"{name} cannot be planned: it has experts, and its configuration has no "
            f"num_experts_per_tok"
        )
    module = layer.get_submodule(f"{before}.experts")
    stacked = layer.get_parameter(key).shape
    number = len(module) if isinstance(module, nn.ModuleList) else stacked[0]
    return min(1.0, each_token / number)
