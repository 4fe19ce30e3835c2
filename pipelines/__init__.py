"""Pipelines: a network, a scheduler and the loop between them."""

from discrete_schedulers.pipelines.pipeline_discrete_diffusion import (
    DiscreteDiffusionPipeline,
    DiscreteDiffusionPipelineOutput,
)
from discrete_schedulers.pipelines.pipeline_discrete_image import DiscreteImagePipeline, DiscreteImagePipelineOutput

__all__ = [
    "DiscreteDiffusionPipeline",
    "DiscreteDiffusionPipelineOutput",
    "DiscreteImagePipeline",
    "DiscreteImagePipelineOutput",
]
