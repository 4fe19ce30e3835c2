"""Fast, honest, learnable samplers for discrete diffusion models, in the shape of diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin  # diffusers looks it up here to load our schedulers

from discrete_schedulers.denoisers import Denoiser, NetworkDenoiser
from discrete_schedulers.guidance import GuidedDenoiser, guidance_schedule
from discrete_schedulers.information import InformationCurve, information_curve, optimal_counts, optimal_times
from discrete_schedulers.interop import BlockRefinementAdapter, ForeignScheduler
from discrete_schedulers.likelihood import LikelihoodEstimate, conditional_nll, log_likelihood_ratio, nll
from discrete_schedulers.processes import AbsorbingProcess, UniformProcess
from discrete_schedulers.registration import register
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.schedulers import (
    AncestralScheduler,
    ConfidenceRemaskingScheduler,
    ConfidenceScheduler,
    DiscreteDDIMScheduler,
    DiscreteScheduler,
    DiscreteSchedulerOutput,
    EntropyBoundScheduler,
    EulerScheduler,
    FirstHittingScheduler,
    FlowMatchingScheduler,
    GibbsCorrectorScheduler,
    GillespieScheduler,
    InformedCorrectorScheduler,
    KLASSScheduler,
    Learn2PDScheduler,
    LearnedScheduler,
    LSDScheduler,
    MaskGITScheduler,
    PathPlanningScheduler,
    PCSamplerScheduler,
    PredictorCorrectorScheduler,
    PsiScheduler,
    RDLMScheduler,
    RDLMSchedulerOutput,
    RemaskingScheduler,
    SCUDScheduler,
    SpreadScheduler,
    TauLeapingScheduler,
    ThetaRK2Scheduler,
    ThetaTrapezoidalScheduler,
    ThresholdScheduler,
    TransitionTimeScheduler,
    UniformEntropyBoundScheduler,
    WINOScheduler,
)
from discrete_schedulers.scud import ScheduleConditionedProcess
from discrete_schedulers.sphere import LogarithmBridge

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from discrete_schedulers.models import (
        DDiTModel,
        HaltonMaskGITModel,
        HollowTransformerModel,
        LatentModel,
        MeissonicTransformerModel,
        PatchCodebook,
        SphereTransformerModel,
    )
    from discrete_schedulers.pipelines import (
        DiscreteDiffusionPipeline,
        DiscreteDiffusionPipelineOutput,
        DiscreteImagePipeline,
        DiscreteImagePipelineOutput,
        RDLMPipeline,
    )

__version__ = "0.1.0"

# Models and pipelines pull in transformers; they are imported when somebody asks for them.
LAZY = {
    "DDiTModel": "discrete_schedulers.models",
    "DiscreteDiffusionPipeline": "discrete_schedulers.pipelines",
    "DiscreteDiffusionPipelineOutput": "discrete_schedulers.pipelines",
    "DiscreteImagePipeline": "discrete_schedulers.pipelines",
    "DiscreteImagePipelineOutput": "discrete_schedulers.pipelines",
    "HaltonMaskGITModel": "discrete_schedulers.models",
    "HollowTransformerModel": "discrete_schedulers.models",
    "LatentModel": "discrete_schedulers.models",
    "MeissonicTransformerModel": "discrete_schedulers.models",
    "ModelMixin": "diffusers",
    "PatchCodebook": "discrete_schedulers.models",
    "RDLMPipeline": "discrete_schedulers.pipelines",
    "SphereTransformerModel": "discrete_schedulers.models",
}

__all__ = [
    "AbsorbingProcess",
    "AncestralScheduler",
    "BlockRefinementAdapter",
    "ConfidenceRemaskingScheduler",
    "ConfidenceScheduler",
    "DDiTModel",
    "Denoiser",
    "DiscreteDDIMScheduler",
    "DiscreteDiffusionPipeline",
    "DiscreteDiffusionPipelineOutput",
    "DiscreteImagePipeline",
    "DiscreteImagePipelineOutput",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "EntropyBoundScheduler",
    "EulerScheduler",
    "FirstHittingScheduler",
    "FlowMatchingScheduler",
    "ForeignScheduler",
    "GibbsCorrectorScheduler",
    "GillespieScheduler",
    "GuidedDenoiser",
    "HaltonMaskGITModel",
    "HollowTransformerModel",
    "InformationCurve",
    "InformedCorrectorScheduler",
    "KLASSScheduler",
    "LSDScheduler",
    "LatentModel",
    "Learn2PDScheduler",
    "LearnedScheduler",
    "LikelihoodEstimate",
    "LogarithmBridge",
    "MaskGITScheduler",
    "MeissonicTransformerModel",
    "ModelMixin",
    "NetworkDenoiser",
    "PCSamplerScheduler",
    "PatchCodebook",
    "PathPlanningScheduler",
    "PredictorCorrectorScheduler",
    "PsiScheduler",
    "RDLMPipeline",
    "RDLMScheduler",
    "RDLMSchedulerOutput",
    "RemaskingScheduler",
    "RowLogits",
    "SCUDScheduler",
    "ScheduleConditionedProcess",
    "SchedulerMixin",
    "SphereTransformerModel",
    "SpreadScheduler",
    "TauLeapingScheduler",
    "ThetaRK2Scheduler",
    "ThetaTrapezoidalScheduler",
    "ThresholdScheduler",
    "TransitionTimeScheduler",
    "UniformEntropyBoundScheduler",
    "UniformProcess",
    "WINOScheduler",
    "conditional_nll",
    "guidance_schedule",
    "information_curve",
    "log_likelihood_ratio",
    "nll",
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
