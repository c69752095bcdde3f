"""The data x pipeline x vocab process groups. Knows nothing of losses.

    data x pipeline x vocab mesh; here data = 1, pipeline P = 4, vocab V = 2
    rank = (pipeline_rank * data + data_rank) * V + vocab_rank

            vocab 0      vocab 1
    pp 0    [r0]         [r1]        embedding + layers
    pp 1    [r2]         [r3]        layers
    pp 2    [r4]         [r5]        layers
    pp 3    [r6]         [r7]        layers, norm, classifier rows [0, n/2) | [n/2, n)

A column is one pipeline, with its own point-to-point group; a row is one vocab group. Or all
ranks are (``vocab_over="all_stages"``), and each holds rows of the classifier.
"""

from stage_groups.build import build_host_group, build_stage_groups
from stage_groups.groups import MessageGroups, StageGroups, VocabOver
from stage_groups.placement import StageStyle

__all__ = [
    "MessageGroups",
    "StageGroups",
    "StageStyle",
    "VocabOver",
    "build_host_group",
    "build_stage_groups",
]
