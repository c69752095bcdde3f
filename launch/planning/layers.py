"""Decoder layers as transformers computes them, to be timed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class DecoderLayers:
    """A model's decoder layers in training, and one sequence of hidden states to run them on.

    Args:
        config: of the model, as transformers has it.
        count: how many layers.
        sequence: N, tokens.
        dtype: of weights and hidden states.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        count: int,
        sequence: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Not loaded before it is needed.
        from transformers import AutoConfig, AutoModel

        raw = copy.deepcopy(dict(config))
        raw |= {"num_hidden_layers": count, "vocab_size": 8}  # the embedding never runs
        with device:
            self.model: nn.Module = AutoModel.from_config(
                AutoConfig.for_model(**raw), dtype=dtype, trust_remote_code=False
            )
        self.model.train()
        hidden = torch.randn(1, sequence, raw["hidden_size"], device=device)
        self.inputs = hidden.to(dtype).requires_grad_()

    def __call__(self) -> Tensor:
        """Run the layers; returns hidden states [1, N, D]."""
        hidden: Tensor = self.model(inputs_embeds=self.inputs, use_cache=False).last_hidden_state
        return hidden
