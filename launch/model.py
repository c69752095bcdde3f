"""A Hugging Face causal language model as pipeline stages, without a copy of its code.

A stage is the model with the other stages' layers replaced by a pass-through, so that names and
layer types keep their global indices, without an embedding off the first stage, and without a
norm and a classifier off the last. Masks and rotary positions are made by the model itself. It is
built without memory, and then filled with its own weights alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig

from launch.attention import document_mask, leave_out_masks
from launch.configs import model_without_memory
from launch.planning.balance import layer_counts
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

    forward: token ids [b, T] on the first stage, or their embeddings [b, T, D] where all stages
    hold rows of them; hidden states [b, T, D] on the others; returns hidden states [b, T, D].
    Position ids [b, T] that begin again mark documents, which do not attend to one another; without
    them a sequence is one document.
    """

    model: Any
    lm_head: Any

    def __init__(self, model: nn.Module, lm_head: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.makes_masks = leave_out_masks(model)

    def hidden_states(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the stage's layers."""
        embedding = self.model.embed_tokens
        given = embedding is None or inputs.is_floating_point()
        # Contiguous, so that what a schedule infers shapes with has the layout of what it runs:
        # compiled layers have a graph for each.
        hidden = inputs.contiguous() if given else embedding(inputs)
        mask = None
        if self.makes_masks and position_ids is not None:
            mask = document_mask(position_ids)
        result: Tensor = self.model(
            inputs_embeds=hidden, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return result

    def forward(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Run the stage's layers, and on the last stage whatever the classifier does in it."""
        hidden = self.hidden_states(inputs, position_ids)
        return hidden if self.lm_head is None else self.lm_head(hidden)


@dataclass(frozen=True)
class SpanningRows:
    """Rows of the vocabulary where all stages carry it.

    Attributes:
        counts: how many each rank of the vocab group holds; None for as many on each.
        here: whether the stage holds its rank's: one of a rank's stages does.
    """

    counts: Sequence[int] | None
    here: bool


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
    spanning: SpanningRows | None = None,
) -> Stage:
    """Build one stage and fill it with its weights.

    With a vocab group the last stage has this rank's rows of the classifier, and a tied model's
    first stage its rows of the embedding; without one, both are whole. Where all stages carry the
    vocabulary, ``spanning`` says which rows of both the stage has, if any.

    Raises:
        ValueError: more stages than layers, a model of another build or with buffers of its own, or
            weights that do not fit.
    """
    if num_stages > 1 and config.model_type in _WHOLE_ALONE:
        raise ValueError(
            f"a {config.model_type} {_WHOLE_ALONE[config.model_type]}, which every stage would do "
            f"again: it runs on a pipeline of one stage alone"
        )
    own = layers_of_stage(stage, num_stages, config, spans=spanning is not None)
    whole = model_without_memory(config, dtype)
    model: Any = whole.model
    if len(model.layers) != config.num_hidden_layers:
        raise ValueError(
            f"a {config.model_type} has {len(model.layers)} layers where its configuration counts "
            f"{config.num_hidden_layers}: a model of this family cannot be cut into stages"
        )
    for index in range(config.num_hidden_layers):
        if index not in own:
            model.layers[index] = PassThrough()
    first, last = stage == 0, stage == num_stages - 1
    tied = config.tie_word_embeddings
    # What the stage has of the two, and whether it shares them with the vocab group.
    has_embedding, has_head = first, last
    cuts_embedding, cuts_head = tied and vocab_group is not None, vocab_group is not None
    rows: dict[str, Any] = {"group": vocab_group, "device": "meta", "dtype": dtype}
    if spanning is not None:
        has_embedding = has_head = spanning.here
        cuts_embedding = True
        rows["rows"] = spanning.counts
    sizes = (config.hidden_size, config.vocab_size)
    head: nn.Module | None = whole.lm_head if has_head else None
    if has_head and cuts_head:
        head = VocabParallelClassifier(*sizes, **rows)
    if not has_embedding:
        model.embed_tokens = None
    elif cuts_embedding:
        scale = getattr(model.embed_tokens, "scalar_embed_scale", 1.0)
        model.embed_tokens = VocabParallelEmbedding(*sizes, scale=scale, **rows)
    if not first and hasattr(model, "embedding_multiplier"):
        model.embedding_multiplier = 1.0  # the first stage has multiplied already
    if not last:
        model.norm = nn.Identity()
    cut = Stage(model, head)
    _fill(cut, source, config, device)
    is_one = spanning is not None or not cuts_embedding  # two parameters are `TiedRows`' to sum
    if tied and has_embedding and has_head and is_one:
        cut.lm_head.weight = cut.model.embed_tokens.weight
    return cut


def _fill(
    stage: Stage, source: WeightSource, config: PretrainedConfig, device: torch.device
) -> None:
    """Give every parameter memory and its weight, and every buffer its value."""
    owners = dict(stage.named_modules())
    stored = stored_buffers(stage)
    for name, _ in stage.named_buffers():
        computed = name.startswith("model.rotary_emb.") or name == "model.embed_tokens.embed_scale"
        if not computed and name not in stored:
            raise ValueError(
                f"{type(stage.model).__name__} has a buffer {name}, whose values neither the "
                f"configuration nor the weights give: a model of this family cannot be cut into "
                f"stages"
            )
    stage.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in (*stage.named_parameters(), *stored_buffers(stage).items()):
            owner = owners[name.rpartition(".")[0]]
            rows = slice(owner.start, owner.stop) if hasattr(owner, "start") else None
            in_files = EMBEDDING if config.tie_word_embeddings and name == CLASSIFIER else name
            source.fill(in_files, tensor, rows, owner)
    # The other buffers are computed from the configuration and no part of the weights.
    if stage.model.rotary_emb is not None:  # a family may have no positions at all
        stage.model.rotary_emb = type(stage.model.rotary_emb)(config=config).to(device)
    embedding = stage.model.embed_tokens
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)


def stored_buffers(stage: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are saved with the weights, by name: training leaves them alone.

    Such are DeepSeek-V3's corrections of its routers' scores.
    """
    saved = stage.state_dict(keep_vars=True)  # names alone: the parameters as they are
    return {name: buffer for name, buffer in stage.named_buffers() if name in saved}


def layers_of_stage(
    stage: int, num_stages: int, config: PretrainedConfig, *, spans: bool = False
) -> range:
    """Return the layers of a stage, so that the slowest stage is as fast as can be.

    The last stage has the classifier besides, which costs as much as its parameters do in layers;
    where the classifier spans all stages, none has more of it than another.

    Raises:
        ValueError: more stages than layers.
    """
    if spans:
        counts = layer_counts(config.num_hidden_layers, num_stages, 0.0)
    else:
        counts = ModelShape.of_config(config.model_type, config).layer_counts(num_stages)
    start = sum(counts[:stage])
    return range(start, start + counts[stage])


def vocabulary_rows(stages: nn.Module) -> dict[int, VocabRows]:
    """Return the owner of each parameter that holds rows of the vocabulary, by its id."""
    return {
        id(parameter): module
        for module in stages.modules()
        if isinstance(module, VocabRows)
        for parameter in module.row_parameters()
    }
