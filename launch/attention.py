"""Causal attention over documents: without masks where it can be, without waiting for a GPU.

transformers decides for each microbatch on the host whether position ids begin again: that waits
for everything queued on the GPU. Here the caller knows. Without documents no mask exists, and sdpa
is called with ``is_causal=True``, which flash attention takes; with documents the mask is made on
the device.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# A name that transformers makes no masks for: it hands on a mask [b, 1, T, T], or None.
_UNMASKED = "sdpa_without_masks"


def leave_out_masks(model: Any) -> bool:
    """Let a model's layers be causal without masks where that is all they are; tell whether.

    A model keeps transformers' masks where it has another attention than sdpa, windows, chunks,
    or layers of other parts than attention and MLP.
    """
    config = model.config
    kinds = getattr(config, "layer_types", None) or []
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if (
        config._attn_implementation != "sdpa"
        or any(kind != "full_attention" for kind in kinds)
        or (not kinds and any(windows))
        or not all(map(_attends_only, model.layers))
    ):
        return False
    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    config._attn_implementation = _UNMASKED
    return True


def document_mask(position_ids: Tensor) -> Tensor:
    """Return which earlier tokens each one attends to: bool [b, 1, T, T] of position ids [b, T].

    A document begins where a position does not follow the one before.
    """
    follows = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) == 1
    document = (~follows).cumsum(-1)
    return (document[:, None, :, None] == document[:, None, None, :]).tril()


def _attends_only(layer: Any) -> bool:
    """Whether a layer is attention, an MLP, norms and dropout.

    Attention with parameters beside its projections may add to the mask that it is given, as Doge's
    does, which without one would see what follows.
    """
    return all(
        not any(True for _ in part.parameters(recurse=False))
        if name == "self_attn"
        else name == "mlp" or "norm" in name or "dropout" in name
        for name, part in layer.named_children()
    )


_LONG = 4  # tokens of each of two documents
_TOLERANCE = 1e-3


@torch.no_grad()
def refuse_to_look_across(stages: Iterable[Any]) -> None:
    """Run this rank's stages on two short documents in one sequence, with two first ones.

    transformers makes the mask of position ids that begin again; families differ in whether they
    hand them on to it, and a recurrent layer knows no mask. So it is tried, not looked up.
    Communicates nothing; waits for a GPU.

    Raises:
        ValueError: the second document's hidden states depend on the first one.
    """
    for stage in stages:
        like = next(stage.model.parameters())
        drawn = torch.randn(
            (3, _LONG, stage.model.config.hidden_size), generator=torch.Generator().manual_seed(0)
        ).to(like)
        positions = torch.arange(_LONG, device=like.device).repeat(2)[None]
        training = stage.training
        stage.eval()  # no dropout
        with torch.compiler.set_stance("force_eager"):  # of shapes that do not come again
            found, other = (
                stage.hidden_states(torch.cat([first, drawn[2]])[None], positions)[0, _LONG:]
                for first in drawn[:2]
            )
        stage.train(training)
        if float((found - other).norm()) > _TOLERANCE * float(found.norm()):
            raise ValueError(
                f"{type(stage.model).__name__} looks across the documents of a packed sequence: "
                f"--packed no trains on them as one stream"
            )
