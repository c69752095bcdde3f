"""Linear cross-entropy over a sharded vocabulary, for the last stage of a training pipeline.

mesh -> rows -> classifier -> loss -> schedule
"""

from vocab_parallel.classifier import VocabParallelClassifier
from vocab_parallel.counting import count_valid_tokens
from vocab_parallel.gradient_norm import clip_grad_norm_
from vocab_parallel.impls import BackwardPlan, available_impls, plan_backward
from vocab_parallel.logprobs import token_logprobs
from vocab_parallel.loss import linear_cross_entropy
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.pipeline import CCEPipelineLoss, validate_pipeline_loss
from vocab_parallel.predict import Prediction, predict

__all__ = [
    "BackwardPlan",
    "CCEPipelineLoss",
    "Prediction",
    "VocabParallelClassifier",
    "VocabParallelOptions",
    "available_impls",
    "clip_grad_norm_",
    "count_valid_tokens",
    "linear_cross_entropy",
    "plan_backward",
    "predict",
    "token_logprobs",
    "validate_pipeline_loss",
]
