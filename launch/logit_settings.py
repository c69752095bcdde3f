"""What a causal language model does besides its classifier, noted while its own forward runs.

A scale that is missed gives a loss that looks right and is not: what is not known is refused.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from launch.configs import model_without_memory
from launch.data.batches import IGNORED
from vocab_parallel.deferred_logits import DeferredLogits, Recipe


class LogitSettings(TypedDict):
    """Keyword arguments of `linear_cross_entropy`; never both a softcap and a temperature."""

    softcap: float | None
    temperature: float


def logit_settings(config: PretrainedConfig) -> LogitSettings:
    """Return what makes the logits of `linear_cross_entropy` the model's own.

    The model is built without memory, and communicates nothing. Its forward runs on three tokens,
    from hidden states in its body's place to a loss in its cross-entropy's place.

    Raises:
        ValueError: a model of other parts, a classifier with a bias, a loss that is more, or other,
            than the mean over shifted labels, or logits that are more than scaled by a positive
            number or capped.
    """
    whole = model_without_memory(config, torch.float32)
    name = type(whole).__name__
    if getattr(whole.config, "output_router_logits", False):
        raise ValueError(
            f"expected a loss without auxiliary terms, got output_router_logits=True in the "
            f"configuration of {name}, which adds the router's: set it to False"
        )
    if whole.lm_head.bias is not None:
        raise ValueError(
            f"expected a classifier without a bias, got that of {name}: its rows are spread over "
            f"ranks by their weight alone"
        )
    try:
        return _noted(whole)
    except Exception as error:  # the model's forward may raise anything over what is noted
        words = str(error).partition(": ")[0]
        raise ValueError(
            f"expected a model whose loss is the mean cross-entropy of shifted labels and of "
            f"logits that are scaled by a positive number or capped, got {name}: "
            f"{type(error).__name__}: {words}; look for a scale or a cap in config.json that is "
            f"not right, or train this model with its own loss"
        ) from error


class _Output(BaseModelOutput):
    """What a model's body returns: hidden states, and None for all else that a family reads."""

    def __getattr__(self, name: str) -> None:
        return None


def _noted(whole: Any) -> LogitSettings:
    """Run a model's forward without its body, its classifier and its cross-entropy."""
    ids = torch.arange(3)[None]
    rows, size = whole.lm_head.weight.shape
    body = torch.arange(1, 3 * size + 1, dtype=torch.float64).view(1, 3, size)
    found: list[LogitSettings] = []

    def classifier(hidden: Tensor) -> Tensor:
        scale = float(hidden[0, 0, 0] / body[0, 0, 0])
        if not torch.allclose(hidden.double(), body * scale):
            raise ValueError("its classifier is given other hidden states than its body's")
        return DeferredLogits(
            Recipe(body, classifier, rows, note, torch.float32, lambda: False, inner=scale)
        )

    def note(
        hidden: Tensor,
        targets: Tensor,
        *,
        softcap: float | None,
        temperature: float,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        counted = targets != IGNORED
        shifted = torch.equal(targets[counted], ids[0, 1:])
        if not (shifted and torch.equal(hidden[counted], body[0, :-1])):
            raise ValueError("its labels are not shifted by one")
        if (ignore_index, reduction) != (IGNORED, "mean"):
            raise ValueError(f"its cross-entropy has {ignore_index=}, {reduction=}")
        if not (temperature > 0 and (softcap is None or (softcap > 0 and temperature == 1.0))):
            raise ValueError(f"its logits have {softcap=}, {temperature=}")
        found.append(LogitSettings(softcap=softcap, temperature=temperature))
        return torch.ones(())

    # Copies: a forward may change what it is given.
    whole.model.forward = lambda *_, **__: _Output(last_hidden_state=body.clone())
    whole.lm_head.forward = classifier
    loss = float(whole(input_ids=ids, labels=ids.clone()).loss)
    if loss != 1.0 or len(found) != 1:
        raise ValueError("its loss is not one cross-entropy alone")
    return found[0]
