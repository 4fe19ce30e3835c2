"""Networks that published checkpoints or samplers need and no library has."""

from discrete_schedulers.models.ddit import DDiTModel
from discrete_schedulers.models.halton import HaltonMaskGITModel
from discrete_schedulers.models.hollow import HollowTransformerModel
from discrete_schedulers.models.latent import LatentModel
from discrete_schedulers.models.meissonic import MeissonicTransformerModel
from discrete_schedulers.models.patch_codebook import PatchCodebook
from discrete_schedulers.models.sphere_transformer import SphereTransformerModel

__all__ = [
    "DDiTModel",
    "HaltonMaskGITModel",
    "HollowTransformerModel",
    "LatentModel",
    "MeissonicTransformerModel",
    "PatchCodebook",
    "SphereTransformerModel",
]
