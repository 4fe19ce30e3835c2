"""Networks that published checkpoints or samplers need and no library has."""

from discrete_schedulers.models.ddit import DDiTModel
from discrete_schedulers.models.halton import HaltonMaskGITModel
from discrete_schedulers.models.hollow import HollowTransformerModel
from discrete_schedulers.models.meissonic import MeissonicTransformerModel
from discrete_schedulers.models.patch_codebook import PatchCodebook

__all__ = ["DDiTModel", "HaltonMaskGITModel", "HollowTransformerModel", "MeissonicTransformerModel", "PatchCodebook"]
