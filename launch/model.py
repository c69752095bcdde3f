"""A Hugging Face causal language model as pipeline stages, without a copy of its code.

A stage is the model with the other stages' layers replaced by a pass-through, so that names and
layer types keep their global indices, without an embedding off the first stage, and without a
norm and a classifier off the last. Masks and rotary positions are made by the model itself. It is
built without memory, and then filled with its own weights alone.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoModelForCausalLM, PretrainedConfig

from launch.planning.shape import ModelShape
from launch.weights import WeightSource
from vocab_parallel import VocabParallelClassifier, VocabParallelEmbedding
from vocab_parallel.modules.vocab_rows import VocabRows

EMBEDDING = "model.embed_tokens.weight"
CLASSIFIER = "lm_head.weight"
# Models that do something between embedding and layers, by model_type.
_WHOLE_ALONE = {"nanochat": "normalises its embeddings before the first layer"}


class Stage(nn.Module):
    """One stage of the pipeline; parameters have the names that they have in the whole model.

    forward: token ids [b, T] on the first stage, hidden states [b, T, D] on the others; returns
    hidden states [b, T, D]. Position ids [b, T] that begin again mark documents, which do not
    attend to one another; without them a sequence is one document.
    """

    model: Any
    lm_head: Any

    def __init__(self, model: nn.Module, lm_head: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head

    def hidden_states(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the stage's layers."""
        embedding = self.model.embed_tokens
        hidden = inputs if embedding is None else embedding(inputs)
        result: Tensor = self.model(
            inputs_embeds=hidden, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return result

    def forward(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the stage's layers, and on the last stage whatever the classifier does in it."""
        hidden = self.hidden_states(inputs, position_ids)
        return hidden if self.lm_head is None else self.lm_head(hidden)


class PassThrough(nn.Module):
    """Stands for a layer that another stage runs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states unchanged."""
        return hidden_states


def build_stage(
    config: PretrainedConfig,
    source: WeightSource,
    stage: int,
    num_stages: int,
    vocab_group: ProcessGroup | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Stage:
    """Build one stage and fill it with its weights.

    With a vocab group the last stage has this rank's rows of the classifier, and a tied model's
    first stage its rows of the embedding; without one, both are whole.

    Raises:
        ValueError: more stages than layers, a model of another build or with buffers of its own, or
            weights that do not fit.
    """
    if num_stages > 1 and config.model_type in _WHOLE_ALONE:
        raise ValueError(
            f"a {config.model_type} {_WHOLE_ALONE[config.model_type]}, which every stage would do "
            f"again: it runs on a pipeline of one stage alone"
        )
    own = layers_of_stage(stage, num_stages, config)
    with torch.device("meta"):
        # A copy, since building writes the dtype into the configuration.
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model: Any = getattr(whole, "model", None)
    if not all(hasattr(model, part) for part in ("embed_tokens", "layers", "norm", "rotary_emb")):
        raise ValueError(
            f"{type(whole).__name__} is not built of embed_tokens, layers, norm and rotary_emb, "
            f"as Qwen3, Llama and Gemma 2 are: it cannot be cut into stages"
        )
    for index in range(config.num_hidden_layers):
        if index not in own:
            model.layers[index] = PassThrough()
    is_last = stage == num_stages - 1
    head: nn.Module | None = whole.lm_head if is_last else None
    if vocab_group is not None and is_last:
        head = VocabParallelClassifier(
            config.hidden_size, config.vocab_size, group=vocab_group, device="meta", dtype=dtype
        )
    if stage != 0:
        model.embed_tokens = None
        if hasattr(model, "embedding_multiplier"):  # the first stage has multiplied already
            model.embedding_multiplier = 1.0
    elif vocab_group is not None and config.tie_word_embeddings:
        model.embed_tokens = VocabParallelEmbedding(
            config.hidden_size,
            config.vocab_size,
            group=vocab_group,
            scale=getattr(model.embed_tokens, "scalar_embed_scale", 1.0),
            device="meta",
            dtype=dtype,
        )
    if not is_last:
        model.norm = nn.Identity()
    cut = Stage(model, head)
    _fill(cut, source, config, device)
    if vocab_group is None and config.tie_word_embeddings and is_last and stage == 0:
        cut.lm_head.weight = cut.model.embed_tokens.weight
    return cut


def _fill(
    stage: Stage, source: WeightSource, config: PretrainedConfig, device: torch.device
) -> None:
    """Give every parameter memory and its weight, and every buffer its value."""
    owners = dict(stage.named_modules())
    for name, _ in stage.named_buffers():
        if not name.startswith("model.rotary_emb.") and name != "model.embed_tokens.embed_scale":
            raise ValueError(
                f"{type(stage.model).__name__} has a buffer {name}, whose values neither the "
                f"configuration nor the parameters give: a model of this family cannot be cut into "
                f"stages"
            )
    stage.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            owner = owners[name.rpartition(".")[0]]
            rows = slice(owner.start, owner.stop) if hasattr(owner, "start") else None
            stored = EMBEDDING if config.tie_word_embeddings and name == CLASSIFIER else name
            source.fill(stored, parameter, rows, owner)
    # Buffers are computed from the configuration and no part of the weights.
    stage.model.rotary_emb = type(stage.model.rotary_emb)(config=config).to(device)
    embedding = stage.model.embed_tokens
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)


def layers_of_stage(stage: int, num_stages: int, config: PretrainedConfig) -> range:
    """Return the layers of a stage, so that the slowest stage is as fast as can be.

    The last stage has the classifier besides, which costs as much as its parameters do in layers.

    Raises:
        ValueError: more stages than layers.
    """
    counts = ModelShape.of(config.model_type, config.to_dict()).layer_counts(num_stages)
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def vocabulary_rows(stages: Iterator[nn.Module] | nn.Module) -> dict[int, int]:
    """Return the size of the whole vocabulary for the id of each parameter that holds its rows."""
    modules = [stages] if isinstance(stages, nn.Module) else list(stages)
    return {
        id(parameter): module.vocab_size
        for stage in modules
        for module in stage.modules()
        if isinstance(module, VocabRows)
        for parameter in module.row_parameters()
    }
