"""Published models' configurations: data alone, so that a planner need not load transformers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.planning.nearest import nearest, nearest_path

_QWEN_3: Mapping[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
_LLAMA_3_1: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
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
}
# Published configurations, by the names that ``--model`` takes.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "qwen3-1.7b": {
        **_QWEN_3,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN_3,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        **_QWEN_3,
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        **_LLAMA_3_1,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA_3_1,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
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


def find_model(model: str) -> Path | Mapping[str, Any]:
    """Return what ``--model`` names: a path that exists, or else a published configuration.

    What is on the disk wins: who has a folder Qwen3-1.7B means its weights.

    Raises:
        ValueError: it is neither.
    """
    path = Path(model)
    if path.exists():
        return path
    if model.lower() in PUBLISHED:
        return PUBLISHED[model.lower()]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        name = path.name
        raise ValueError(
            f"--model {model} is no folder here, and nothing is downloaded: get it with `hf "
            f"download {model} --local-dir {name}`, then give --model {name}"
        )
    near = nearest_path(path) or nearest(model, PUBLISHED)
    raise ValueError(
        f"--model {model} is neither a folder nor a published model"
        f"{'' if near is None else f', did you mean {near}?'}: known are {sorted(PUBLISHED)}"
    )
