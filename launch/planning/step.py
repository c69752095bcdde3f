"""One step of a column on paper: what both places of the vocabulary are planned as."""

from dataclasses import dataclass

from launch.planning.estimate import StageEstimate
from vocab_parallel.pipeline.spanning.order import Event


@dataclass(frozen=True, kw_only=True)
class Step:
    """A column's step, without what its replicas communicate after it.

    Attributes:
        stages: one rank's part of each.
        ranks: the stages that each rank runs.
        seconds: until the last rank has done its part.
        bubble: the share of the ranks' time in which they wait.
        microbatches: of it.
        passes: who does what when, in a step of ``drawn`` microbatches; none where no order was
            simulated.
        simulated: whether this mesh's own order was simulated.
        hidden_held: microbatches whose hidden states a rank holds for the loss at the worst moment.
    """

    stages: list[StageEstimate]
    ranks: list[list[int]]
    seconds: float
    bubble: float
    microbatches: int
    passes: list[Event]
    drawn: int
    simulated: bool = True
    hidden_held: int = 0

    @property
    def rank_memory(self) -> list[float]:
        """Bytes of each rank."""
        return self.of_ranks("memory")

    def of_ranks(self, part: str) -> list[float]:
        """Add up one part of each rank's stages, in bytes."""
        return [sum(getattr(self.stages[stage], part) for stage in own) for own in self.ranks]
