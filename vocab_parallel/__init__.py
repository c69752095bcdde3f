"""Linear cross-entropy over a sharded vocabulary, for the last stage of a training pipeline.

mesh -> rows -> classifier -> loss -> schedule
"""

from vocab_parallel.evaluation import (
    Prediction,
    TokenScores,
    count_valid_tokens,
    predict,
    score_tokens,
)
from vocab_parallel.local.backward_plan import BackwardPlan, plan_backward
from vocab_parallel.local.registry import available_impls
from vocab_parallel.loss import linear_cross_entropy, token_logprobs
from vocab_parallel.modules.checkpoint import rows_as_dtensor, rows_for_checkpoint
from vocab_parallel.modules.classifier import VocabParallelClassifier
from vocab_parallel.modules.embedding import VocabParallelEmbedding
from vocab_parallel.modules.gradient_norm import clip_grad_norm_
from vocab_parallel.modules.tied import TiedRows
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.partition import filled_rows
from vocab_parallel.pipeline import CCEPipelineLoss, no_loss, validate_pipeline_loss

__all__ = [
    "BackwardPlan",
    "CCEPipelineLoss",
    "Prediction",
    "TiedRows",
    "TokenScores",
    "VocabParallelClassifier",
    "VocabParallelEmbedding",
    "VocabParallelOptions",
    "available_impls",
    "clip_grad_norm_",
    "count_valid_tokens",
    "filled_rows",
    "linear_cross_entropy",
    "no_loss",
    "plan_backward",
    "predict",
    "rows_as_dtensor",
    "rows_for_checkpoint",
    "score_tokens",
    "token_logprobs",
    "validate_pipeline_loss",
]
