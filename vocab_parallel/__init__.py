"""Linear cross-entropy over a sharded vocabulary, for the last stage of a training pipeline.

mesh -> rows -> classifier -> loss -> schedule
"""

from vocab_parallel.checkpoint import rows_as_dtensor
from vocab_parallel.classifier import VocabParallelClassifier
from vocab_parallel.counting import count_valid_tokens
from vocab_parallel.embedding import VocabParallelEmbedding
from vocab_parallel.gradient_norm import clip_grad_norm_
from vocab_parallel.impls import BackwardPlan, available_impls, plan_backward
from vocab_parallel.logprobs import token_logprobs
from vocab_parallel.loss import linear_cross_entropy
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.pipeline import CCEPipelineLoss, validate_pipeline_loss
from vocab_parallel.predict import Prediction, predict
from vocab_parallel.scores import TokenScores, score_tokens
from vocab_parallel.tied import TiedRows

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
    "linear_cross_entropy",
    "plan_backward",
    "predict",
    "rows_as_dtensor",
    "score_tokens",
    "token_logprobs",
    "validate_pipeline_loss",
]
