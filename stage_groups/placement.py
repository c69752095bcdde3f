"""Which pipeline stages a pipeline rank runs: arithmetic alone, no process group."""

from typing import Literal, get_args

StageStyle = Literal["loop", "v"]


def stages_of_rank(
    pipeline_rank: int, pipeline_degree: int, num_stages: int, style: StageStyle
) -> list[int]:
    """Return the indices of the stages that a pipeline rank runs, in ascending order.

    With P ranks and S = k P stages, the rank runs k of them:

        "loop"  rank, rank + P, rank + 2 P, ...        (Interleaved1F1B, LoopedBFS, ...)
        "v"     every second pass over the ranks runs backwards, so that with k = 2
                rank runs stages rank and 2 P - 1 - rank (ZBVZeroBubble, DualPipeV)

    With k = 1 the two agree. Under "v" with even k the last stage lies on pipeline rank 0.

    Raises:
        ValueError: an unknown style, or a number of stages that is not a positive multiple
            of the pipeline degree.
    """
    if style not in get_args(StageStyle):
        raise ValueError(f'style must be "loop" or "v", got {style!r}')
    if num_stages < 1 or num_stages % pipeline_degree:
        raise ValueError(
            f"num_stages must be a positive multiple of the pipeline degree "
            f"{pipeline_degree}, got {num_stages}: give every pipeline rank equally many stages"
        )
    passes = num_stages // pipeline_degree
    mirrored = pipeline_degree - 1 - pipeline_rank
    return [
        turn * pipeline_degree + (mirrored if style == "v" and turn % 2 else pipeline_rank)
        for turn in range(passes)
    ]
