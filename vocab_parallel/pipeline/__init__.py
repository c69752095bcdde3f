"""What a pipeline schedule needs: the loss that it calls, and the check that the two fit."""

from vocab_parallel.pipeline.pipeline_loss import CCEPipelineLoss
from vocab_parallel.pipeline.validation import validate_pipeline_loss

__all__ = ["CCEPipelineLoss", "validate_pipeline_loss"]
