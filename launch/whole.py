"""A whole Hugging Face causal language model without memory: its parts, their names and shapes."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


def model_without_memory(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Build the model on the meta device, whose ``model`` has all of `PARTS`.

    Parameters and buffers that the family keeps in float32 are so in every dtype.

    Raises:
        ValueError: a model of other parts, or values that no model can be built of.
    """
    try:
        with torch.device("meta"):
            # A copy, since building writes the dtype into the configuration.
            whole = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except Exception as error:  # transformers raises what its classes make of the values
        words = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"no {config.model_type} can be built of its configuration: {type(error).__name__}: "
            f"{words}; look for a value in config.json that is not right"
        ) from error
    inner = getattr(whole, "model", None)
    if not all(hasattr(inner, part) for part in PARTS):
        raise ValueError(_of_other_parts(whole))
    kept = getattr(whole, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*whole.named_parameters(), *whole.named_buffers()):
        if any(f".{one}." in f".{name}." for one in kept):
            tensor.data = tensor.data.float()
    return whole


def _of_other_parts(whole: nn.Module) -> str:
    """Say which parts a model has in place of those that a stage is cut from."""
    base = getattr(whole, "base_model", whole)
    prefix = next((f"{name}." for name, module in whole.named_children() if module is base), "")
    own = ", ".join(f"{prefix}{name}" for name, _ in base.named_children())
    return (
        f"{type(whole).__name__} cannot be cut into stages: a stage is cut from "
        f"{', '.join(f'model.{part}' for part in PARTS)}, as Qwen3, Llama, Gemma 2 and Mixtral "
        f"are built, and this model is built of {own}"
    )
