"""What makes the steps of two starts the steps of one run."""

import hashlib
from typing import Any

from transformers import PretrainedConfig

from launch.arguments import TrainArguments
from launch.data.batches import Batches

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
_OF_ARGUMENTS = ("batch", "sequence", "seed")


def run_identity(config: PretrainedConfig, arguments: TrainArguments) -> dict[str, Any]:
    """Return what must be equal for one start to go on where another has ended."""
    of_model = {name: getattr(config, name, None) for name in _OF_MODEL}
    return of_model | {name: getattr(arguments, name) for name in _OF_ARGUMENTS}


class StepsDigest:
    """A checksum of what the steps of a run have read, brought up to date a step at a time.

    Text, tokenizer, packing and masks are all in it; what later steps will read is not, so that a
    run may go on for more steps, or with more text behind what it has read.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._hash = hashlib.sha256()
        self._steps = 0

    def until(self, steps: int) -> str:
        """Return the checksum of so many steps, no fewer than at the call before."""
        assert steps >= self._steps
        for step in range(self._steps, steps):
            batch = self._batches[step]
            self._hash.update(batch.ids.numpy().tobytes())
            self._hash.update(batch.labels.numpy().tobytes())
            if batch.position_ids is not None:
                self._hash.update(batch.position_ids.numpy().tobytes())
        self._steps = steps
        return self._hash.hexdigest()
