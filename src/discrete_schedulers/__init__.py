"""Fast, honest, learnable samplers for discrete diffusion models, in the shape of diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin  # diffusers looks it up here to load our schedulers

from discrete_schedulers.denoisers import Denoiser, NetworkDenoiser
from discrete_schedulers.information import InformationCurve, information_curve, optimal_counts, optimal_times
from discrete_schedulers.processes import AbsorbingProcess, UniformProcess
from discrete_schedulers.registration import register
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.schedulers import (
    AncestralScheduler,
    DiscreteScheduler,
    DiscreteSchedulerOutput,
    EulerScheduler,
    LSDScheduler,
    TauLeapingScheduler,
)

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from discrete_schedulers.models import DDiTModel
    from discrete_schedulers.pipelines import DiscreteDiffusionPipeline, DiscreteDiffusionPipelineOutput

__version__ = "0.1.0"

# Models and pipelines pull in transformers; they are imported when somebody asks for them.
LAZY = {
    "DDiTModel": "discrete_schedulers.models",
    "DiscreteDiffusionPipeline": "discrete_schedulers.pipelines",
    "DiscreteDiffusionPipelineOutput": "discrete_schedulers.pipelines",
    "ModelMixin": "diffusers",
}

__all__ = [
    "AbsorbingProcess",
    "AncestralScheduler",
    "DDiTModel",
    "Denoiser",
    "DiscreteDiffusionPipeline",
    "DiscreteDiffusionPipelineOutput",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "EulerScheduler",
    "InformationCurve",
    "LSDScheduler",
    "ModelMixin",
    "NetworkDenoiser",
    "RowLogits",
    "SchedulerMixin",
    "TauLeapingScheduler",
    "UniformProcess",
    "information_curve",
    "optimal_counts",
    "optimal_times",
]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
