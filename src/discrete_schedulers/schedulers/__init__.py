"""Schedulers: one algorithm, one file."""

from discrete_schedulers.schedulers.scheduling_ancestral import AncestralScheduler
from discrete_schedulers.schedulers.scheduling_confidence import ConfidenceScheduler
from discrete_schedulers.schedulers.scheduling_confidence_remasking import ConfidenceRemaskingScheduler
from discrete_schedulers.schedulers.scheduling_discrete_ddim import DiscreteDDIMScheduler
from discrete_schedulers.schedulers.scheduling_entropy_bound import EntropyBoundScheduler
from discrete_schedulers.schedulers.scheduling_euler import EulerScheduler
from discrete_schedulers.schedulers.scheduling_first_hitting import FirstHittingScheduler
from discrete_schedulers.schedulers.scheduling_flow_matching import FlowMatchingScheduler
from discrete_schedulers.schedulers.scheduling_gibbs_corrector import GibbsCorrectorScheduler
from discrete_schedulers.schedulers.scheduling_gillespie import GillespieScheduler
from discrete_schedulers.schedulers.scheduling_informed_corrector import InformedCorrectorScheduler
from discrete_schedulers.schedulers.scheduling_klass import KLASSScheduler
from discrete_schedulers.schedulers.scheduling_learn2pd import Learn2PDScheduler
from discrete_schedulers.schedulers.scheduling_learned import LearnedScheduler
from discrete_schedulers.schedulers.scheduling_lsd import LSDScheduler
from discrete_schedulers.schedulers.scheduling_maskgit import MaskGITScheduler
from discrete_schedulers.schedulers.scheduling_path_planning import PathPlanningScheduler
from discrete_schedulers.schedulers.scheduling_pc_sampler import PCSamplerScheduler
from discrete_schedulers.schedulers.scheduling_predictor_corrector import PredictorCorrectorScheduler
from discrete_schedulers.schedulers.scheduling_psi import PsiScheduler
from discrete_schedulers.schedulers.scheduling_rdlm import RDLMScheduler, RDLMSchedulerOutput
from discrete_schedulers.schedulers.scheduling_remasking import RemaskingScheduler
from discrete_schedulers.schedulers.scheduling_scud import SCUDScheduler
from discrete_schedulers.schedulers.scheduling_spread import SpreadScheduler
from discrete_schedulers.schedulers.scheduling_tau_leaping import TauLeapingScheduler
from discrete_schedulers.schedulers.scheduling_theta_rk2 import ThetaRK2Scheduler
from discrete_schedulers.schedulers.scheduling_theta_trapezoidal import ThetaTrapezoidalScheduler
from discrete_schedulers.schedulers.scheduling_threshold import ThresholdScheduler
from discrete_schedulers.schedulers.scheduling_transition_time import TransitionTimeScheduler
from discrete_schedulers.schedulers.scheduling_uniform_entropy_bound import UniformEntropyBoundScheduler
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler, DiscreteSchedulerOutput
from discrete_schedulers.schedulers.scheduling_wino import WINOScheduler

__all__ = [
    "AncestralScheduler",
    "ConfidenceRemaskingScheduler",
    "ConfidenceScheduler",
    "DiscreteDDIMScheduler",
    "DiscreteScheduler",
    "DiscreteSchedulerOutput",
    "EntropyBoundScheduler",
    "EulerScheduler",
    "FirstHittingScheduler",
    "FlowMatchingScheduler",
    "GibbsCorrectorScheduler",
    "GillespieScheduler",
    "InformedCorrectorScheduler",
    "KLASSScheduler",
    "LSDScheduler",
    "Learn2PDScheduler",
    "LearnedScheduler",
    "MaskGITScheduler",
    "PCSamplerScheduler",
    "PathPlanningScheduler",
    "PredictorCorrectorScheduler",
    "PsiScheduler",
    "RDLMScheduler",
    "RDLMSchedulerOutput",
    "RemaskingScheduler",
    "SCUDScheduler",
    "SpreadScheduler",
    "TauLeapingScheduler",
    "ThetaRK2Scheduler",
    "ThetaTrapezoidalScheduler",
    "ThresholdScheduler",
    "TransitionTimeScheduler",
    "UniformEntropyBoundScheduler",
    "WINOScheduler",
]
