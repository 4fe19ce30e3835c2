"""Networks that published checkpoints or samplers need and no library has."""

from discrete_schedulers.models.ddit import DDiTModel
from discrete_schedulers.models.hollow import HollowTransformerModel
from discrete_schedulers.models.latent import LatentModel

__all__ = ["DDiTModel", "HollowTransformerModel", "LatentModel"]
