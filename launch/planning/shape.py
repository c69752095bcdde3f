"""A model as the planner sees it: sizes, parameters, activations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launch.planning.balance import layer_counts
from launch.planning.published import find_model

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense causal language model; `qk_norm` is a norm of queries and keys."""

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    qk_norm: bool

    @classmethod
    def load(cls, model: str) -> Self:
        """Read a config.json, a folder with one, or else a published name.

        Raises:
            ValueError: none of these, or a config without what is needed.
        """
        found = find_model(model)
        if not isinstance(found, Path):
            return cls.of(model.lower(), found)
        path = found / "config.json" if found.is_dir() else found
        if not path.is_file():
            raise ValueError(f"--model {model} has no config.json: give a folder with one")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.of(path.parent.name or str(path), raw)

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any]) -> Self:
        """Read a configuration's values.

        Raises:
            ValueError: one that is needed is missing.
        """
        missing = [key for key in _NEEDED if not isinstance(raw.get(key), int)]
        if missing:
            raise ValueError(f"the config of {name} has no {missing}: give a causal LM's")
        heads = raw["num_attention_heads"]
        return cls(
            name=name,
            vocabulary=raw["vocab_size"],
            hidden=raw["hidden_size"],
            intermediate=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_size=raw.get("head_dim") or raw["hidden_size"] // heads,
            tied=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=raw.get("model_type") == "qwen3",
        )

    def layer_counts(self, num_stages: int) -> list[int]:
        """Spread the layers over stages; the classifier costs what its parameters do in layers.

        In the gathering layouts a rank's rows meet the tokens of all columns: whole, however cut.

        Raises:
            ValueError: more stages than layers.
        """
        classifier = self.vocabulary_parameters / self.layer_products
        return layer_counts(self.layers, num_stages, classifier)

    @property
    def layer_products(self) -> int:
        """Parameters of one layer's matrix products."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms included."""
        norms = 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0)
        return self.layer_products + norms

    @property
    def vocabulary_parameters(self) -> int:
        """Parameters of the embedding, and of the classifier."""
        return self.vocabulary * self.hidden

    def activation_bytes(self, itemsize: int) -> int:
        """Bytes that one layer keeps of one token for its backward, as transformers computes it.

        Norms keep their input in float32 and its normalised values; products their input; attention
        queries, keys, values and output; the gated product its three factors and itself.
        """
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        normed = 2 * self.hidden + (queries + keys if self.qk_norm else 0)
        norms = normed * (4 + itemsize)
        inputs = 2 * self.hidden * itemsize
        attention = (2 * queries + 2 * queries) * itemsize  # keys and values are repeated
        return norms + inputs + attention + 4 * self.intermediate * itemsize

    def layer_flops(self, tokens: int, sequence: int) -> float:
        """Flops of one layer's forward over some tokens, causal attention at half."""
        attention = 2.0 * tokens * sequence * self.heads * self.head_size
        return 2.0 * tokens * self.layer_products + attention
