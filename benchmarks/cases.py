"""What the last-stage study compares: a model on a mesh, and what a contestant took there."""

from dataclasses import dataclass
from typing import Any

from launch.planning.published import PUBLISHED


@dataclass(frozen=True)
class Case:
    """One model on one mesh.

    Attributes:
        name, config: of the model.
        pipeline, vocab: degrees.
        again: whether layers keep their input alone and run again in backward.
    """

    name: str
    config: dict[str, Any]
    pipeline: int
    vocab: int
    again: bool

    @classmethod
    def parse(cls, text: str, recompute_from: float) -> "Case":
        """Read model:PxV; models of at least so many parameters run their layers again."""
        name, _, mesh = text.partition(":")
        pipeline, _, vocab = mesh.partition("x")
        if name not in PUBLISHED or not (pipeline.isdigit() and vocab.isdigit()):
            raise ValueError(f"{text!r} is no model:PxV with one of {sorted(PUBLISHED)}")
        config = dict(PUBLISHED[name])
        size = config["num_hidden_layers"] * 12 * config["hidden_size"] ** 2
        return cls(name, config, int(pipeline), int(vocab), size >= recompute_from)


@dataclass
class Row:
    """What was found of one contestant; milliseconds are of a microbatch."""

    layers: list[int]
    loss_milliseconds: float  # of a rank
    last_milliseconds: float
    first_milliseconds: float
    link_milliseconds: float  # arithmetic; in the last stage's, unless all stages share the loss
    last_peak: int
    first_peak: int
    step_seconds: float  # simulated
