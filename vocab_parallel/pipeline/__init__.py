"""What a pipeline schedule needs: the loss that it calls, and the check that the two fit."""

from vocab_parallel.pipeline.distillation_loss import DistillationPipelineLoss
from vocab_parallel.pipeline.logprobs_loss import LogprobsPipelineLoss
from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss, no_loss
from vocab_parallel.pipeline.validation import validate_pipeline_loss

__all__ = [
    "CCEPipelineLoss",
    "DistillationPipelineLoss",
    "LogprobsPipelineLoss",
    "no_loss",
    "validate_pipeline_loss",
]
