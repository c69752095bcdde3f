"""Linear cross-entropy over a sharded vocabulary, for the last stage of a pipeline, or all stages.

mesh -> rows -> classifier -> loss -> schedule
"""

from typing import TYPE_CHECKING, Any

from vocab_parallel.backends.registry import available_impls
from vocab_parallel.distillation.loss import linear_distillation, linear_distillation_from_top_k
from vocab_parallel.evaluation import (
    Prediction,
    TokenScores,
    count_valid_tokens,
    predict,
    score_tokens,
)
from vocab_parallel.functional import linear_cross_entropy, token_logprobs
from vocab_parallel.metrics import LossMetrics
from vocab_parallel.modules.checkpoint import rows_as_dtensor, rows_for_checkpoint
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.columns import sum_over_columns, validate_columns
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.gradient_norm import clip_grad_norm_
from vocab_parallel.modules.tied import TiedRows
from vocab_parallel.multi_token import multi_token_cross_entropy
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.partition import filled_rows
from vocab_parallel.pipeline import (
    CCEPipelineLoss,
    DistillationPipelineLoss,
    LogprobsPipelineLoss,
    no_loss,
    validate_pipeline_loss,
)
from vocab_parallel.plan import BackwardPlan, plan_backward
from vocab_parallel.trainer_callback import WholeRowsCallback

if TYPE_CHECKING:
    from vocab_parallel.pipeline.spanning.schedule import SpanningSchedule
    from vocab_parallel.transformers import remove_vocab_parallel_loss, use_vocab_parallel_loss

__all__ = [
    "BackwardPlan",
    "CCEPipelineLoss",
    "DistillationPipelineLoss",
    "LogprobsPipelineLoss",
    "LossMetrics",
    "Prediction",
    "SpanningSchedule",
    "TiedRows",
    "TokenScores",
    "VocabParallelClassifier",
    "VocabParallelEmbedding",
    "VocabParallelOptions",
    "WholeRowsCallback",
    "available_impls",
    "clip_grad_norm_",
    "count_valid_tokens",
    "filled_rows",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_distillation_from_top_k",
    "multi_token_cross_entropy",
    "no_loss",
    "plan_backward",
    "predict",
    "remove_vocab_parallel_loss",
    "rows_as_dtensor",
    "rows_for_checkpoint",
    "score_tokens",
    "sum_over_columns",
    "token_logprobs",
    "use_vocab_parallel_loss",
    "validate_columns",
    "validate_pipeline_loss",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch.distributed.pipelining, FSDP and the compiler take a second to import, which a loss
    # alone should not cost.
    if name == "SpanningSchedule":
        from vocab_parallel.pipeline.spanning.schedule import SpanningSchedule

        return SpanningSchedule
    if name in ("remove_vocab_parallel_loss", "use_vocab_parallel_loss"):
        from vocab_parallel import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
