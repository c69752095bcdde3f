"""Which model: a published configuration, a Hugging Face folder, or sizes from the command line."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from launch.command import say
from launch.planning.published import find_model

HEAD_SIZE = 32  # of a model given by sizes


def config_of_sizes(
    *, vocabulary: int, hidden: int, layers: int, sequence: int
) -> PretrainedConfig:
    """Return a small Qwen3's configuration."""
    heads = hidden // HEAD_SIZE
    return AutoConfig.for_model(
        "qwen3",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max(2048, sequence),
        tie_word_embeddings=False,
        use_cache=False,
    )


def load_config(model: str) -> tuple[PretrainedConfig, Path | None]:
    """Return the configuration of ``--model``, and the folder of its weights if it has some.

    Raises:
        ValueError: neither a folder with a config.json that can be read and has a vocabulary, nor
            a published name.
    """
    found = find_model(model)
    if not isinstance(found, Path):
        return AutoConfig.for_model(**found), None
    folder, path = found, found / "config.json"
    if not path.is_file():
        raise ValueError(f"--model {model} has no config.json: give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no configuration, but {str(raw)[:60]!r}")
    _refuse_foreign_code(raw, path)
    if raw.get("quantization_config"):
        raise ValueError(
            f"{path} says that the weights are quantised (quantization_config), and quantised "
            f"weights do not train: give a folder with the model in bfloat16 or float32"
        )
    model_type = str(raw.get("model_type"))
    names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        given = [raw.get(one) for one in (name, names.get(name))]
        value = next((one for one in given if isinstance(one, int)), None)
        if value is None:
            raise ValueError(f"{path} has no {name}: give a causal language model's config.json")
        if value < 1:
            raise ValueError(f"{path} has {name} = {value}: it must be at least 1")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what its classes make of the values
        words = " ".join(str(error).split())  # the cause may stand on a second line
        raise ValueError(f"{path} cannot be read: {words}") from error
    return config, folder


def known_positions(config: PretrainedConfig) -> int | None:
    """Return up to how many positions a model knows, or None where its configuration is silent.

    What rotary positions are scaled by counts.
    """
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = [  # families with several types of layers have one such part for each
        part["factor"] * (part.get("original_max_position_embeddings") or known)
        for part in (rope, *(each for each in rope.values() if isinstance(each, dict)))
        if isinstance(part.get("factor"), int | float)
    ]
    return int(max(known, *scaled)) if scaled else known


def say_beyond_positions(config: PretrainedConfig, longest: int) -> None:
    """Warn where sequences are longer than what a model knows; one rank calls it."""
    known = known_positions(config)
    if known is not None and longest > known:
        say(
            f"UNKNOWN POSITIONS: documents of {longest} tokens, but by its configuration "
            f"(max_position_embeddings) the model knows {known} positions; give --sequence "
            f"{known}, or raise the number in config.json where it is to learn more"
        )


def _refuse_foreign_code(raw: dict[str, Any], path: Path) -> None:
    """Refuse what transformers would fetch code for, however deep in the configuration.

    Raises:
        ValueError: an implementation that names a repository of kernels on the hub.
    """
    for name, value in raw.items():
        if isinstance(value, dict):
            _refuse_foreign_code(value, path)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(
                f"{path} asks for code from elsewhere, {name} = {value!r}, which is never run: "
                f"take the line out"
            )


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
