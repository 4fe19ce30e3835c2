r"""The theta-RK-2 method: a second model call in each step, whose prediction the whole step is then taken with.

With rho = t - theta (t - s), first y from x_t over [t, rho], then x_s from x_t over [t, s], with b = 1 / (2 theta):

    "frozen"   Lambda_v = (t - s) [b R_rho(y -> v) - (b - 1) R_t(x_t -> v)]_+ where R_t(x_t -> v) > 0
    "exact"    P(v) in proportion to [b q(v | x_t, p*) - (b - 1) q(v | x_t, p_0)]_+,   q the reverse kernel from t to s

and P(v) = (1 - e^-Lambda) Lambda_v / Lambda in the first form. For a mask the second line is: open with the exact
probability, to a token of the law [b p* - (b - 1) p_0]_+; a position that y has opened has no p* and keeps p_0. y is only a
guess: what it opens is masked again in x_s, so that tokens do not stay between the two calls of a step.

Said to have second order for theta <= 1/2. Measured, on enumerated joints, samples and paths have first order for every
theta: two positions that move in one step are drawn independently of each other, and y, which is thrown away, tells
x_s nothing of their dependence. N steps err as N ancestral steps do (within 1 % in the exact form), which are N calls and
not 2 N - 1. It is here for comparison: take [`ThetaTrapezoidalScheduler`], which goes on from y.

Source: Ren et al. 2025 (arXiv 2502.00234), algorithm theta-RK-2. The exact form is ours. A position with several Poisson
events takes the first.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, NoiseSchedule
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName, leap_law
from discrete_schedulers.schedulers.theta_utils import Hazard, ThetaScheduler


class ThetaRK2Scheduler(ThetaScheduler):
    """The theta-RK-2 method for absorbing and uniform processes: 2 N - 1 model calls in N steps.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        theta (`float`, defaults to 0.5): Where in a step the second call is, in (0, 1].
        hazard (`str`, defaults to `"exact"`): When a position moves: with its `"exact"` probability, or at the published
            `"frozen"` rates.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"theta": [8 floats]}}`; the last is not
            used.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a theta is not in (0, 1].
    """

    revises_tokens = True  # the tokens of y
    restarts = True
    learned_knobs = {"theta": "numbers in (0, 1]"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        theta: float = 0.5,
        hazard: Hazard = "exact",
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def second_law(self, p_0: Tensor, p_star: Tensor, step: int, x_t: Tensor, y: Tensor) -> Tensor:
        """See [`ThetaScheduler.second_law`]."""
        t, rho, s = self.times_of(step)
        process, b = self.noise_process, 1 / (2 * self.share(step))
        if self.config.hazard == "frozen":
            rate = process.reverse_rate(x_t, p_0, t)
            mixed = b * process.reverse_rate(y, p_star, rho) - (b - 1) * rate
            return leap_law(x_t, (t - s) * torch.where(rate > 0, mixed, 0.0).clamp(min=0))
        after = self.carried(p_star, y, rho, x_t, t)
        if isinstance(process, AbsorbingProcess):
            after = torch.where((y == x_t)[..., None], after, p_0)
        return self.extrapolated(x_t, process.posterior(x_t, after, t, s), process.posterior(x_t, p_0, t, s), b)

    def second_chance(self, step: int) -> float:
        """See [`ThetaScheduler.second_chance`]."""
        t, rho, s = self.times_of(step)
        process, b = self.absorbing_process, 1 / (2 * self.share(step))
        if self.config.hazard == "frozen":
            most = b * process.hazard(rho) + max(1 - b, 0.0) * process.hazard(t)
            return 1 - float((-(t - s) * most).exp())
        return float(process.unmask_probability(t, s))
