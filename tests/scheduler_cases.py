"""The one list of schedulers. Every law and contract test runs over it; a new scheduler is a line here.

Those whose steps have a law that can be written down as a product (`has_law`) meet the law tests too.

`BUDGETS` are the step numbers that the learned cases have coefficients for, and so the ones that tests may ask for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceRemaskingScheduler,
    ConfidenceScheduler,
    DiscreteDDIMScheduler,
    DiscreteScheduler,
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
from discrete_schedulers.schedulers.scheduling_utils import FactorisedScheduler

BUDGETS = (1, 2, 3, 4, 7, 8, 64)

# Falls quickly at first: the optimal grid is far from uniform. Exact in binary, with 16 tokens.
INFORMATION_CURVE = [1 + 3 * (1 - i / 16) ** 3 for i in range(16)]


def learned_times(num_steps: int) -> list[float]:
    """An uneven grid from 1 to 0."""
    return [(1 - k / num_steps) ** 1.3 for k in range(num_steps + 1)]


def learned_scale(num_steps: int) -> list[float]:
    """Factors around 1, the last of them not 1."""
    return [0.7 + 0.15 * (k % 5) for k in range(num_steps)]


TIMES = {str(n): {"times": learned_times(n)} for n in BUDGETS}
SCALE = {str(n): {"scale": learned_scale(n)} for n in BUDGETS}
SIGMA_SHARE = {str(n): {"sigma_share": [0.2 + 0.2 * (k % 5) for k in range(n)]} for n in BUDGETS}
KAPPA = {str(n): {"kappa": [0.2 + 0.2 * (k % 5) for k in range(n)]} for n in BUDGETS}
FACTORS = {str(n): {"factor": [1.0 + 0.2 * (k % 4) for k in range(n)]} for n in BUDGETS}
REMASK = {str(n): {"remask": [0.2 + 0.2 * (k % 5) for k in range(n)]} for n in BUDGETS}
CHOICE = {str(n): {"choice_temperature": [2.0 + (k % 3) for k in range(n)]} for n in BUDGETS}
DREAM = {"score": "entropy", "score_law": "tempered", "score_temperature": 0.3, "rounding": "down"}
DREAM |= {"temperature": 0.7, "top_p": 0.9}
CORRECTED = {str(n): {"divergence_free": [0.3 * (k % 4) for k in range(n)]} for n in BUDGETS}
THETA = {str(n): {"theta": [0.3 + 0.1 * (k % 4) for k in range(n)]} for n in BUDGETS}
SCALE_AND_TIMES = {str(n): {"scale": learned_scale(n), "times": learned_times(n)} for n in BUDGETS}

FILTER = {  # three hidden units over blocks of four
    "hidden_weight": [[2.0, -0.5, 0.3, 0.0], [0.0, 1.5, -1.0, 1.0], [-1.0, 0.5, 1.0, 2.0]],
    "hidden_bias": [0.1, -0.2, 0.3],
    "output_weight": [[1.0, -2.0, 0.5], [-1.0, 1.5, 0.2], [0.3, 0.3, -0.8], [2.0, -1.0, 0.4]],
    "output_bias": [0.2, -0.1, 0.4, -0.6],
}
EVENTS = {str(n): {"events": [1.0 + k for k in range(n)]} for n in BUDGETS}


COUNTS = {str(n): {"counts": [1.0 + k % 3 for k in range(n)]} for n in BUDGETS}
CONTRAST = {str(n): {"contrast": [0.0] + [0.3] * (n - 1)} for n in BUDGETS}  # none where N = 1 draws the marginals
GATED = {
    str(n): {
        "rate": [0.8 + 0.1 * (k % 4) for k in range(n)],
        "inverse_temperature": [
            1.0 + 0.3 * (k % 3) for k in range(n)
        ],  # 1 in the first step: N = 1 draws the marginals
        "gate_a": [0.5 - 0.3 * (k % 3) for k in range(n)],
        "gate_b": [0.4 * (k % 4) for k in range(n)],
        "remask": [0.1 * (k % 4) for k in range(n)],
    }
    for n in BUDGETS
}
UNIFORM_BLOCKS = {
    str(n): {"times": learned_times(n), "inverse_temperature": GATED[str(n)]["inverse_temperature"]} for n in BUDGETS
}


class SchedulerCase(NamedTuple):
    """A scheduler and its constructor's arguments, but for the vocabulary."""

    name: str
    cls: type[DiscreteScheduler]
    kwargs: dict[str, Any]

    @property
    def is_absorbing(self) -> bool:
        """Whether there is a mask."""
        return self.kwargs.get("process", "absorbing") == "absorbing"

    @property
    def has_law(self) -> bool:
        """Whether `laws.step_matrix` has the law of its steps. The others have tests of their own."""
        return issubclass(self.cls, FactorisedScheduler) and self.cls.order == 1

    @property
    def keeps_tokens(self) -> bool:
        """Whether a token, once revealed, stays."""
        return self.is_absorbing and not self.cls.revises_tokens

    def build(self, vocab_size: int, **overrides: Any) -> DiscreteScheduler:
        """The scheduler for V states; the mask is the last of them."""
        mask_token_id = vocab_size - 1 if self.is_absorbing else None
        arguments = {"vocab_size": vocab_size, "mask_token_id": mask_token_id} | self.kwargs | overrides
        if arguments.get("coefficients") is CONTRAST:
            arguments["token_prior"] = [-0.5 * (v % 3) for v in range(vocab_size)]
        return self.cls(**arguments)


A, E, T, L = AncestralScheduler, EulerScheduler, TauLeapingScheduler, LSDScheduler
CASES = [
    SchedulerCase("ancestral", A, {}),
    SchedulerCase("ancestral-linear", A, {"noise_schedule": "linear"}),
    SchedulerCase("ancestral-cosine", A, {"noise_schedule": "cosine"}),
    SchedulerCase("ancestral-geometric", A, {"noise_schedule": "geometric"}),
    SchedulerCase("ancestral-spread", A, {"order": "spread"}),
    SchedulerCase(
        "ancestral-spread-optimal", A, {"order": "spread", "grid": "optimal", "information_curve": INFORMATION_CURVE}
    ),
    SchedulerCase("ancestral-grid-cosine", A, {"grid": "cosine"}),
    SchedulerCase("ancestral-grid-optimal", A, {"grid": "optimal", "information_curve": INFORMATION_CURVE}),
    SchedulerCase("ancestral-grid-learned", A, {"grid": "learned", "coefficients": TIMES}),
    SchedulerCase("ancestral-sharpened", A, {"temperature": 0.7, "top_p": 0.8}),
    SchedulerCase("ancestral-bernoulli", A, {"unmasking": "bernoulli"}),
    SchedulerCase("ancestral-bernoulli-linear", A, {"unmasking": "bernoulli", "noise_schedule": "linear"}),
    SchedulerCase("ancestral-bernoulli-cosine", A, {"unmasking": "bernoulli", "noise_schedule": "cosine"}),
    SchedulerCase("ancestral-bernoulli-geometric", A, {"unmasking": "bernoulli", "noise_schedule": "geometric"}),
    SchedulerCase("ancestral-float32-race", A, {"unmasking": "bernoulli", "draw": "one_stage_float32"}),
    SchedulerCase("ancestral-1e-6-race", A, {"unmasking": "bernoulli", "draw": "one_stage_1e-6"}),
    SchedulerCase("ancestral-uniform", A, {"process": "uniform"}),
    SchedulerCase("ancestral-uniform-linear", A, {"process": "uniform", "noise_schedule": "linear"}),
    SchedulerCase("ancestral-uniform-cosine", A, {"process": "uniform", "noise_schedule": "cosine"}),
    SchedulerCase("ancestral-uniform-geometric", A, {"process": "uniform", "noise_schedule": "geometric"}),
    SchedulerCase("euler", E, {}),
    SchedulerCase("euler-cosine", E, {"noise_schedule": "cosine", "grid": "cosine"}),
    SchedulerCase("euler-uniform", E, {"process": "uniform"}),
    SchedulerCase("euler-uniform-linear", E, {"process": "uniform", "noise_schedule": "linear"}),
    SchedulerCase("euler-uniform-cosine", E, {"process": "uniform", "noise_schedule": "cosine"}),
    SchedulerCase("tau-leaping", T, {}),
    SchedulerCase("tau-leaping-reject", T, {"jumps": "reject"}),
    SchedulerCase("tau-leaping-uniform", T, {"process": "uniform"}),
    SchedulerCase("tau-leaping-uniform-reject", T, {"process": "uniform", "jumps": "reject"}),
    SchedulerCase("tau-leaping-uniform-cosine", T, {"process": "uniform", "noise_schedule": "cosine"}),
    SchedulerCase("lsd-untrained", L, {}),
    SchedulerCase("lsd", L, {"coefficients": SCALE}),
    SchedulerCase("lsd-plus", L, {"grid": "learned", "coefficients": SCALE_AND_TIMES}),
    SchedulerCase("lsd-optimal", L, {"grid": "optimal", "information_curve": INFORMATION_CURVE, "coefficients": SCALE}),
    SchedulerCase("lsd-log-score", L, {"scale": "log_score", "coefficients": SCALE}),
    SchedulerCase("lsd-plus-log-score", L, {"scale": "log_score", "grid": "learned", "coefficients": SCALE_AND_TIMES}),
    SchedulerCase("lsd-uniform", L, {"process": "uniform", "coefficients": SCALE}),
    SchedulerCase("lsd-plus-uniform", L, {"process": "uniform", "grid": "learned", "coefficients": SCALE_AND_TIMES}),
    SchedulerCase("lsd-uniform-log-score", L, {"process": "uniform", "scale": "log_score", "coefficients": SCALE}),
    SchedulerCase(
        "lsd-uniform-cosine-log-score",
        L,
        {"process": "uniform", "noise_schedule": "cosine", "scale": "log_score", "coefficients": SCALE},
    ),
    SchedulerCase("learned-counts", LearnedScheduler, {"grid": "learned", "coefficients": COUNTS}),
    SchedulerCase("learned-contrast", LearnedScheduler, {"unmasking": "bernoulli", "coefficients": CONTRAST}),
    SchedulerCase("learned-gate", LearnedScheduler, {"unmasking": "bernoulli", "coefficients": GATED}),
    SchedulerCase(
        "learned-uniform",
        LearnedScheduler,
        {"process": "uniform", "grid": "learned", "temperature": 0.9, "coefficients": UNIFORM_BLOCKS},
    ),
    SchedulerCase("discrete-ddim", DiscreteDDIMScheduler, {"process": "uniform"}),
    SchedulerCase(
        "discrete-ddim-learned",
        DiscreteDDIMScheduler,
        {"process": "uniform", "temperature": 0.7, "top_p": 0.9, "coefficients": SIGMA_SHARE},
    ),
    SchedulerCase("psi", PsiScheduler, {"process": "uniform", "coefficients": KAPPA}),
    SchedulerCase("gibbs-corrector", GibbsCorrectorScheduler, {"process": "uniform"}),
    SchedulerCase(
        "gibbs-corrector-informed",
        GibbsCorrectorScheduler,
        {
            "process": "uniform",
            "num_corrector_steps": 2,
            "positions_per_correction": 3,
            "selection": "lowest_margin",
            "temperature": 0.7,
        },
    ),
    # Two calls in a step, correctors, rates with a divergence-free part
    SchedulerCase("theta-trapezoidal", ThetaTrapezoidalScheduler, {"coefficients": THETA}),
    SchedulerCase("theta-trapezoidal-frozen", ThetaTrapezoidalScheduler, {"hazard": "frozen", "temperature": 0.7}),
    SchedulerCase("theta-trapezoidal-uniform", ThetaTrapezoidalScheduler, {"process": "uniform"}),
    SchedulerCase("theta-rk2", ThetaRK2Scheduler, {"theta": 0.7}),
    SchedulerCase("theta-rk2-frozen", ThetaRK2Scheduler, {"hazard": "frozen", "theta": 0.9}),
    SchedulerCase("theta-rk2-uniform", ThetaRK2Scheduler, {"process": "uniform", "hazard": "frozen"}),
    SchedulerCase("predictor-corrector", PredictorCorrectorScheduler, {"corrector_entry_time": 1.0}),
    SchedulerCase(
        "predictor-corrector-uniform",
        PredictorCorrectorScheduler,
        {"process": "uniform", "corrector_entry_time": 0.5, "num_corrector_steps": 2},
    ),
    SchedulerCase("flow-matching", FlowMatchingScheduler, {"divergence_free": 0.5}),
    SchedulerCase("flow-matching-uniform", FlowMatchingScheduler, {"process": "uniform", "coefficients": CORRECTED}),
    # Remasking and exact simulation
    SchedulerCase("remasking-both-rates", RemaskingScheduler, {"strength": "forward_backward"}),
    SchedulerCase("remasking-learned", RemaskingScheduler, {"strength": "learned", "coefficients": REMASK}),
    SchedulerCase("remasking-confidence", ConfidenceRemaskingScheduler, {"remask_mass": 3.0, "top_p": 0.9}),
    SchedulerCase("first-hitting", FirstHittingScheduler, {}),
    SchedulerCase("transition-time", TransitionTimeScheduler, {}),
    SchedulerCase("transition-time-beta-uniform", TransitionTimeScheduler, {"process": "uniform", "density": "beta"}),
    SchedulerCase("gillespie", GillespieScheduler, {}),
    SchedulerCase("gillespie-uniform", GillespieScheduler, {"process": "uniform"}),
    # Orders: fixed, and by the predictions
    SchedulerCase("spread", SpreadScheduler, {}),
    SchedulerCase("spread-van-der-corput", SpreadScheduler, {"pattern": "van_der_corput", "rounding": "down"}),
    SchedulerCase("spread-dilated-blocks", SpreadScheduler, {"pattern": "dilated", "block_length": 4}),
    SchedulerCase("confidence", ConfidenceScheduler, {}),
    SchedulerCase("confidence-llada", ConfidenceScheduler, {"score": "margin", "block_length": 4, "temperature": 0.7}),
    SchedulerCase("confidence-dream", ConfidenceScheduler, DREAM),
    SchedulerCase("maskgit", MaskGITScheduler, {}),
    SchedulerCase("maskgit-blocks", MaskGITScheduler, {"block_length": 4}),
    SchedulerCase("maskgit-learned", MaskGITScheduler, {"mask_schedule": "grid", "coefficients": CHOICE}),
    # Adaptive: the predictions decide how many open, too
    SchedulerCase("scud", SCUDScheduler, {}),
    SchedulerCase(
        "scud-uniform", SCUDScheduler, {"process": "uniform", "event_share": "learned", "coefficients": EVENTS}
    ),
    SchedulerCase("threshold", ThresholdScheduler, {"threshold": 0.3}),
    SchedulerCase("threshold-blocks", ThresholdScheduler, {"threshold": 0.3, "block_length": 4, "temperature": 0.7}),
    SchedulerCase("factor", ThresholdScheduler, {"rule": "factor", "factor": 1.7, "coefficients": FACTORS}),
    SchedulerCase("learn2pd", Learn2PDScheduler, {"threshold": 0.5, "filter": FILTER, "block_length": 4}),
    SchedulerCase("klass", KLASSScheduler, {"threshold": 0.3, "kl_threshold": 3.0, "history_length": 1}),
    SchedulerCase("pc-sampler", PCSamplerScheduler, {"block_length": 4, "grid": "cosine"}),
    SchedulerCase("entropy-bound", EntropyBoundScheduler, {"entropy_bound": 1.5}),
    SchedulerCase("entropy-bound-margin", EntropyBoundScheduler, {"proxy": "margin", "entropy_bound": 1.5}),
    SchedulerCase("uniform-entropy-bound", UniformEntropyBoundScheduler, {"process": "uniform", "entropy_bound": 1.5}),
    SchedulerCase("path-planning", PathPlanningScheduler, {"stochasticity": 1.2}),
    SchedulerCase("path-planning-blocks", PathPlanningScheduler, {"block_length": 4}),
    # Those that read the law of revealed tokens
    SchedulerCase(
        "informed-corrector",
        InformedCorrectorScheduler,
        {"selection": "lowest_margin", "positions_per_correction": 3, "correct_last_step": True, "temperature": 0.7},
    ),
    SchedulerCase("informed-corrector-random", InformedCorrectorScheduler, {"num_corrector_steps": 2}),
    SchedulerCase("wino", WINOScheduler, {"accept_threshold": 0.3, "temperature": 0.7}),
    SchedulerCase("wino-blocks", WINOScheduler, {"accept_threshold": 0.2, "remask_threshold": 0.5, "block_length": 4}),
]
