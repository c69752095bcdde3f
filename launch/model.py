"""transformers' own Qwen3 as pipeline stages, without a copy of its code.

A stage is the whole model with the other stages' layers replaced by a pass-through, so that names
and layer types keep their global indices, without an embedding off the first stage, and without
a norm and a classifier off the last. Masks and rotary positions are made by the model itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from launch.arguments import TrainArguments
from vocab_parallel import VocabParallelClassifier

HEAD_SIZE = 32


def build_model(arguments: TrainArguments) -> Qwen3ForCausalLM:
    """Build the whole model with random weights; equal on every rank for one seed."""
    torch.manual_seed(arguments.seed)
    heads = arguments.hidden // HEAD_SIZE
    config = Qwen3Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2) if heads % 2 == 0 else heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max(2048, arguments.sequence),
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


class Stage(nn.Module):
    """One stage of the pipeline; parameters have the names that they have in the whole model.

    forward: token ids [b, T] on the first stage, hidden states [b, T, D] on the others; returns
    hidden states [b, T, D].
    """

    def __init__(self, model: Qwen3Model, lm_head: VocabParallelClassifier | None) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head

    def forward(self, inputs: Tensor) -> Tensor:
        """Run the stage's layers."""
        embedding = self.model.embed_tokens
        hidden = inputs if embedding is None else embedding(inputs)
        hidden = self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return hidden if self.lm_head is None else self.lm_head(hidden)


class PassThrough(nn.Module):
    """Stands for a layer that another stage runs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states unchanged."""
        return hidden_states


def cut_stage(
    whole: Qwen3ForCausalLM, stage: int, num_stages: int, vocab_group: ProcessGroup
) -> Stage:
    """Cut one stage out of the whole model, whose parameters it takes over.

    The classifier is replaced by this rank's rows of it, so that the whole one can be freed.

    Raises:
        ValueError: more stages than layers.
    """
    config = whole.config
    own = layers_of_stage(stage, num_stages, config.num_hidden_layers)
    with torch.device("meta"):
        model = Qwen3Model(config)
    for index in range(config.num_hidden_layers):
        model.layers[index] = whole.model.layers[index] if index in own else PassThrough()
    is_last = stage == num_stages - 1
    model.embed_tokens = whole.model.embed_tokens if stage == 0 else None
    model.norm = whole.model.norm if is_last else nn.Identity()
    model.rotary_emb = whole.model.rotary_emb
    head = VocabParallelClassifier.from_linear(whole.lm_head, vocab_group) if is_last else None
    return Stage(model, head)


def layers_of_stage(stage: int, num_stages: int, num_layers: int) -> range:
    """Return the layers of a stage; the first stages hold one more where it is uneven."""
    if num_layers < num_stages:
        raise ValueError(
            f"{num_stages} stages need at least as many layers, got {num_layers}: use fewer "
            f"stages (--pipeline) or more --layers"
        )
    share, remainder = divmod(num_layers, num_stages)
    start = stage * share + min(stage, remainder)
    return range(start, start + share + (stage < remainder))
