r"""The theta-trapezoidal method: a second model call in each step, and second order.

With rho = t - theta (t - s), first y from x_t over [t, rho], then x_s from y over [rho, s] at the extrapolated rate, with
a = 1 / (2 theta (1 - theta)):

    "frozen"   Lambda_v = (rho - s) [a R_rho(y -> v) - (a - 1) R_t(x_t -> v)]_+,   P(v) = (1 - e^-Lambda) Lambda_v / Lambda
    "exact"    P(v) in proportion to [a q(v | y, p*) - (a - 1) q(v | y, p_0)]_+,    q the reverse kernel from rho to s

For a mask the second line is: open with the exact probability, to a token of the law [a p* - (a - 1) p_0]_+. There, theta
in the weights is the share of alpha that the first half gains, and two masks that open in one step have their exact joint
law, whatever the step; what is left of the error are three and more, and the last step.

While no bracket is negative (for theta = 1/2: no token that opens halves the probability of another one's) the error of the
samples' law falls as N^-2, or N^-1.8 with frozen rates, which grow as 1 / t. Where tokens depend on each other more than that,
it falls as N^-1 in the end. Against ancestral steps with as many calls, each mask opening on its own, on enumerated joints:
with masks the error is smaller from 3 calls on, at 63 calls by a third to a factor of ten; with uniform noise it is larger
at first, and smaller from 15 to 63 calls on. Frozen rates leave a few masks more: before the last of 8 steps, which opens
them, 13.0 % and not 12.5 %.

Source: Ren et al. 2025 (arXiv 2502.00234), algorithm theta-trapezoidal; theta in [0.3, 0.5] is advised there. The exact
form is ours. A position with several Poisson events takes the first; released code turns such moves down.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName, leap_law
from discrete_schedulers.schedulers.theta_utils import Hazard, ThetaScheduler


class ThetaTrapezoidalScheduler(ThetaScheduler):
    """The theta-trapezoidal method for absorbing and uniform processes: 2 N - 1 model calls in N steps.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        theta (`float`, defaults to 0.5): Where in a step the second call is, in (0, 1).
        hazard (`str`, defaults to `"exact"`): When a position moves: with its `"exact"` probability, or at the published
            `"frozen"` rates.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"theta": [8 floats]}}`; the last is not
            used.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a theta is not in (0, 1).
    """

    restarts = False

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

    def weight(self, step: int) -> float:
        """a = 1 / (2 theta (1 - theta))."""
        theta = self.share(step)
        return 1 / (2 * theta * (1 - theta))

    def second_law(self, p_0: Tensor, p_star: Tensor, step: int, x_t: Tensor, y: Tensor) -> Tensor:
        """See [`ThetaScheduler.second_law`]."""
        t, rho, s = self.times_of(step)
        process, a = self.noise_process, self.weight(step)
        if self.config.hazard == "frozen":
            rate = a * process.reverse_rate(y, p_star, rho) - (a - 1) * process.reverse_rate(x_t, p_0, t)
            return leap_law(y, (rho - s) * rate.clamp(min=0))  # 0 at y, where the first rate is 0
        before = self.carried(p_0, x_t, t, y, rho)
        return self.extrapolated(y, process.posterior(y, p_star, rho, s), process.posterior(y, before, rho, s), a)

    def second_chance(self, step: int) -> float:
        """See [`ThetaScheduler.second_chance`]."""
        _, rho, s = self.times_of(step)
        if self.config.hazard == "frozen":
            return 1 - float((-(rho - s) * self.weight(step) * self.absorbing_process.hazard(rho)).exp())
        return float(self.absorbing_process.unmask_probability(rho, s))
