"""Do a model's layers keep documents apart that share a sequence?

transformers makes the mask of position ids that begin again; families differ in whether they hand
them on to it, and a recurrent layer knows no mask. So it is tried, not looked up.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 4  # tokens of each of two documents
_TOLERANCE = 1e-3


@torch.no_grad()
def refuse_to_look_across(stages: Iterable[nn.Module]) -> None:
    """Run this rank's stages on two short documents in one sequence, with two first ones.

    Communicates nothing; waits for a GPU.

    Raises:
        ValueError: the second document's hidden states depend on the first one.
    """
    for stage in stages:
        training = stage.training
        stage.eval()  # no dropout
        with torch.compiler.set_stance("force_eager"):  # of shapes that do not come again
            found, other = _second_document(stage, 0), _second_document(stage, 1)
        stage.train(training)
        if float((found - other).norm()) > _TOLERANCE * float(found.norm()):
            raise ValueError(
                f"{type(stage.model).__name__} looks across the documents of a packed sequence: "
                f"--packed no trains on them as one stream"
            )


def _second_document(stage: Any, first: int) -> Tensor:
    """Return the hidden states [T, D] of one document behind a first one, of that seed."""
    like = next(stage.model.parameters())
    hidden = torch.cat(
        [
            torch.randn(
                _LONG, stage.model.config.hidden_size, generator=torch.Generator().manual_seed(s)
            )
            for s in (first, 2)
        ]
    ).to(like)
    positions = torch.arange(_LONG, device=like.device).repeat(2)
    second: Tensor = stage.hidden_states(hidden[None], positions[None])[0, _LONG:]
    return second
