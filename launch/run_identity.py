"""What makes the steps of two starts the steps of one run."""

from typing import Any

from transformers import PretrainedConfig

from launch.arguments import TrainArguments

_OF_MODEL = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
_OF_ARGUMENTS = ("sequence", "seed")


def run_identity(config: PretrainedConfig, arguments: TrainArguments) -> dict[str, Any]:
    """Return what must be equal for one start to go on where another has ended."""
    of_model = {name: getattr(config, name, None) for name in _OF_MODEL}
    return of_model | {name: getattr(arguments, name) for name in _OF_ARGUMENTS}
