"""Networks that published checkpoints need and no library has."""

from discrete_schedulers.models.ddit import DDiTModel

__all__ = ["DDiTModel"]
