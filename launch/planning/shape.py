"""A model as the planner sees it: sizes, parameters, activations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from launch.planning.balance import layer_counts
from launch.planning.counted import count_layer, model_of
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
    """Sizes of a causal language model.

    Attributes:
        intermediate: of the gated product; with experts, of all that one token passes.
        qk_norm: whether queries and keys have a norm.
        norms: of the hidden size, in a layer.
        layer_parameters: of each layer, every expert's and the norms' too.
        layer_products: parameters of the matrix products that one token passes in a layer; the mean
            where layers differ.
        norm_parameters: of the last norm.
    """

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    qk_norm: bool
    norms: int
    layer_parameters: tuple[int, ...]
    layer_products: float
    norm_parameters: int

    @classmethod
    def load(cls, model: str) -> Self:
        """Read a config.json or a folder with one, as training does, or else a published name.

        Raises:
            ValueError: none of these, a model that cannot be counted, or no transformers to count
                a config.json's with.
        """
        found = find_model(model)
        if not isinstance(found, Path):
            return cls.of(model.lower(), found)
        if found.is_file() and found.name != "config.json":
            raise ValueError(f"--model {model} is no config.json: give one, or a folder with one")
        folder = found.parent if found.is_file() else found
        try:
            from launch.configs import load_config  # with transformers, which a name does not need
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--model {model} has a configuration whose parameters transformers counts, and it "
                f"is not installed ({error}): install it, or give a published name"
            ) from error
        return cls.of_config(folder.resolve().name, load_config(str(folder))[0])

    @classmethod
    def of_config(cls, name: str, config: Any) -> Self:
        """Count transformers' own model of a configuration, which is built without memory.

        Raises:
            ValueError: one that cannot be built or counted.
        """
        model: Any = model_of(name, config)
        try:
            heads = getattr(config, "num_attention_heads", None)
            kv_heads = getattr(config, "num_key_value_heads", None)
            head_size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        except Exception as error:  # transformers' own, where these are of each layer
            raise ValueError(f"{name} cannot be planned: {error}") from error
        if not isinstance(heads, int):
            raise ValueError(f"{name} cannot be planned: it has no num_attention_heads")
        parameters = {key: parameter.shape for key, parameter in model.named_parameters()}
        vocabulary, hidden = model.model.embed_tokens.weight.shape
        if parameters.get("lm_head.weight", (vocabulary, hidden)) != (vocabulary, hidden):
            raise ValueError(
                f"{name} cannot be planned: its embedding and classifier differ in shape"
            )
        layers = [count_layer(name, layer, config) for layer in model.model.layers]
        others = sum(layer.others for layer in layers) / len(layers)
        return cls(
            name=name,
            vocabulary=vocabulary,
            hidden=hidden,
            intermediate=round(others / (3 * hidden)),
            heads=heads,
            kv_heads=kv_heads or heads,
            head_size=head_size or hidden // heads,
            tied="lm_head.weight" not in parameters,
            qk_norm=any(".q_norm." in key for key in parameters),
            norms=max(layer.norms for layer in layers),
            layer_parameters=tuple(layer.parameters for layer in layers),
            layer_products=others + sum(layer.attention for layer in layers) / len(layers),
            norm_parameters=sum(
                shape.numel() for key, shape in parameters.items() if key.startswith("model.norm.")
            ),
        )

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any]) -> Self:
        """Read the values of a dense Llama, Qwen3 or Gemma 2, of which nothing is left out.

        Raises:
            ValueError: one that is needed is missing.
        """
        missing = [key for key in _NEEDED if not isinstance(raw.get(key), int)]
        if missing:
            raise ValueError(f"the config of {name} has no {missing}: give a causal LM's")
        hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        head_size = raw.get("head_dim") or hidden // heads
        qk_norm = raw.get("model_type") == "qwen3"
        norms = 4 if raw.get("model_type") == "gemma2" else 2
        products = 2 * hidden * head_size * (heads + kv_heads)
        products += 3 * hidden * raw["intermediate_size"]
        parameters = products + norms * hidden + (2 * head_size if qk_norm else 0)
        return cls(
            name=name,
            vocabulary=raw["vocab_size"],
            hidden=hidden,
            intermediate=raw["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            tied=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=qk_norm,
            norms=norms,
            layer_parameters=(parameters,) * raw["num_hidden_layers"],
            layer_products=products,
            norm_parameters=hidden,
        )

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.layer_parameters)

    def layer_counts(self, num_stages: int) -> list[int]:
        """Spread the layers over stages; the classifier costs what its parameters do in layers.

        In the gathering layouts a rank's rows meet the tokens of all columns: whole, however cut.

        Raises:
            ValueError: more stages than layers.
        """
        classifier = self.vocabulary_parameters / self.layer_products
        return layer_counts(self.layers, num_stages, classifier)

    @property
    def vocabulary_parameters(self) -> int:
        """Parameters of the embedding, and of the classifier."""
        return self.vocabulary * self.hidden

    def activation_bytes(self, itemsize: int, group: int = 1) -> int:
        """Bytes that one layer keeps of one token for its backward, as transformers computes it.

        Of a group of tensor-parallel ranks, sequence-parallel too, each keeps its part of all but
        the inputs of products, which it has gathered.

        Norms keep their input in float32 and its normalised values; products their input; attention
        queries, keys, values and output; the gated product its three factors and itself.
        """
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        normed = self.norms * self.hidden + (queries + keys if self.qk_norm else 0)
        norms = normed * (4 + itemsize)
        inputs = 2 * self.hidden * itemsize
        attention = (2 * queries + 2 * queries) * itemsize  # keys and values are repeated
        return (norms + attention + 4 * self.intermediate * itemsize) // group + inputs

    def step_flops(self, tokens: int, sequence: int) -> float:
        """Flops of a step that the model's mathematics needs: three times its forward."""
        classifier = 2.0 * tokens * self.vocabulary_parameters
        return 3.0 * (self.layers * self.layer_flops(tokens, sequence) + classifier)

    def layer_flops(self, tokens: int, sequence: int) -> float:
        """Flops of one layer's forward over some tokens, causal attention at half."""
        attention = 2.0 * tokens * sequence * self.heads * self.head_size
        return 2.0 * tokens * self.layer_products + attention
