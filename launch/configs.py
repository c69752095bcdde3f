"""Which model: a published configuration, a Hugging Face folder, or sizes from the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

# Published configurations, by the names that ``--model`` takes.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "tie_word_embeddings": True,
    },
}
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
        ValueError: neither a published name nor a folder with a config.json that can be read and
            has a vocabulary.
    """
    published = PUBLISHED.get(model.lower())
    if published is not None:
        return AutoConfig.for_model(**published), None
    folder = Path(model)
    path = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(
            f"--model {model} is neither a folder nor a published model: known are "
            f"{sorted(PUBLISHED)}"
        )
    if not path.is_file():
        raise ValueError(f"--model {model} has no config.json: give a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not isinstance(raw.get(name), int):
            raise ValueError(f"{path} has no {name}: give a causal language model's config.json")
    return AutoConfig.from_pretrained(folder), folder
