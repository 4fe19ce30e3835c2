"""Schedulers: one algorithm, one file."""

from discrete_schedulers.schedulers.scheduling_ancestral import AncestralScheduler
from discrete_schedulers.schedulers.scheduling_euler import EulerScheduler
from discrete_schedulers.schedulers.scheduling_lsd import LSDScheduler
from discrete_schedulers.schedulers.scheduling_tau_leaping import TauLeapingScheduler
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler, DiscreteSchedulerOutput

__all__ = [
    "AncestralScheduler",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "EulerScheduler",
    "LSDScheduler",
    "TauLeapingScheduler",
]
