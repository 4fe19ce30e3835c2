"""Pipelines: a network, a scheduler and the loop between them."""

from discrete_schedulers.pipelines.pipeline_discrete_diffusion import (
    DiscreteDiffusionPipeline,
    DiscreteDiffusionPipelineOutput,
)
from discrete_schedulers.pipelines.pipeline_discrete_image import DiscreteImagePipeline, DiscreteImagePipelineOutput
from discrete_schedulers.pipelines.pipeline_rdlm import RDLMPipeline

__all__ = [
    "DiscreteDiffusionPipeline",
    "DiscreteDiffusionPipelineOutput",
    "DiscreteImagePipeline",
    "DiscreteImagePipelineOutput",
    "RDLMPipeline",
]
