"""Linear cross-entropy over a sharded vocabulary, for the last stage of a training pipeline.

mesh -> rows -> classifier -> loss -> schedule
"""

from vocab_parallel.classifier import VocabParallelClassifier
from vocab_parallel.impls import available_impls
from vocab_parallel.loss import linear_cross_entropy
from vocab_parallel.options import VocabParallelOptions
from vocab_parallel.pipeline import CCEPipelineLoss, validate_pipeline_loss

__all__ = [
    "CCEPipelineLoss",
    "VocabParallelClassifier",
    "VocabParallelOptions",
    "available_impls",
    "linear_cross_entropy",
    "validate_pipeline_loss",
]
