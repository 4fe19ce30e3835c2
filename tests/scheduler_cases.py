"""The one list of schedulers. Every law and contract test runs over it; a new scheduler is a line here.

Those whose steps have a law that can be written down as a product (`has_law`) meet the law tests too.

`BUDGETS` are the step numbers that the learned cases have coefficients for, and so the ones that tests may ask for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from discrete_schedulers import AncestralScheduler, DiscreteScheduler, EulerScheduler, LSDScheduler, TauLeapingScheduler
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
SCALE_AND_TIMES = {str(n): {"scale": learned_scale(n), "times": learned_times(n)} for n in BUDGETS}


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
]
