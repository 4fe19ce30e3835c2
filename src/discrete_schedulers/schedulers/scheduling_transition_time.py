r"""Transition times: each position moves once, at a random time of its own, from noise to a token that stays (DNDM).

    tau_i ~ F on (0, 1],    x_s^i = x_0^i ~ p_0(x_t)  if s < tau_i <= t,    else x_t^i

The step from t to s takes the positions that are still to move, each with probability (F(t) - F(s)) / F(t): the same law as
drawing all tau_i beforehand. The last step moves all that are left. A step in which nothing moves costs no call.

F is that of the noise, F(t) = (1 - alpha_t) / (1 - alpha_1), or Beta(a, b). Masks say themselves that they have not moved, so
with absorbing noise this is ancestral sampling (each position on its own), and with Beta the same on another grid. With
uniform noise a position keeps its first token until it moves; which have moved is this method's memory.

With absorbing noise first order, and exact for one token per step. With uniform noise not exact, however many steps: p_0 weighs
all of x_t by the same chance to be clean, although it is known which positions have moved (three dependent bits: total
variation 0.18 after 16 and after 256 steps, ancestral sampling 0.03 after 16).

Source: Chen et al. 2024 (DNDM, arXiv 2312.09193). Its released code takes the best token always (`temperature=0` here), draws
one set of times for a whole batch, and by default chooses positions by score instead of by their times. Its Beta parameters
are 3, 3 by default and 5, 3 to 20, 5 (100, 4 for networks of continuous time) as tuned for translation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset, draw_tokens
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName

NEVER = 2**62


class TransitionTimeScheduler(DiscreteScheduler):
    """One move for each position, for absorbing and uniform processes.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        density (`str`, defaults to `"schedule"`): Law of the transition times: the noise `"schedule"`'s, or `"beta"`.
        beta_a (`float`, defaults to 3.0): First parameter of the Beta law, positive: large ones move tokens early.
        beta_b (`float`, defaults to 3.0): Second parameter of the Beta law, positive.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        density: Literal["schedule", "beta"] = "schedule",
        beta_a: float = 3.0,
        beta_b: float = 3.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        if not (beta_a > 0 and beta_b > 0):
            raise ValueError(f"`beta_a` and `beta_b` are {beta_a} and {beta_b}; both must be positive")
        self.prepare()

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; a new run has not moved anything."""
        super().set_grid(times, device)
        self.moved_in: Tensor | None = None  # (B, L), the call in which each position moved, uniform process

    def share_left(self, t: Tensor) -> float:
        """F(t): the share of positions that are still to move at t."""
        if self.config.density == "beta":
            return beta_cdf(float(t), self.config.beta_a, self.config.beta_b)
        return float((1 - self.noise_process.alpha(t)) / (1 - self.noise_process.alpha(1.0)))

    def move_probability(self, index: int) -> float:
        """P(a position that is still to move does so in this step) = (F(t) - F(s)) / F(t)."""
        now, after = self.share_left(self.times[index]), self.share_left(self.times[index + 1])
        if index == len(self.calls) - 1:
            return 1.0
        return (now - after) / now if now > 0 else 0.0  # Beta's tail is 0 in float64: nobody is left there

    def still_to_move(self, sample: Tensor, index: int) -> Tensor:
        """The positions that have not moved before this call, bool (B, L).

        Raises:
            ValueError: If `sample` has another shape than in the calls before, uniform process.
        """
        if isinstance(self.noise_process, AbsorbingProcess):
            return sample == self.config.mask_token_id
        if self.moved_in is None:
            return torch.ones_like(sample, dtype=torch.bool)
        if self.moved_in.shape != sample.shape:
            shapes = tuple(sample.shape), tuple(self.moved_in.shape)
            raise ValueError(
                f"`sample` has shape {shapes[0]}, but this run has {shapes[1]}: `set_timesteps` begins a new one"
            )
        return self.moved_in >= index

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Positions that move in this step, see [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        return bernoulli_subset(self.still_to_move(sample, index), self.move_probability(index), generator)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` with a token from p_0 at each of the chosen positions, see [`DiscreteScheduler.move_rows`]."""
        if not isinstance(self.noise_process, AbsorbingProcess):
            before = sample.new_full(sample.shape, NEVER) if self.moved_in is None else self.moved_in
            # a call that is made again forgets what it and later ones have moved
            before = before.masked_fill(self.still_to_move(sample, index), NEVER)
            self.moved_in = before.masked_fill(rows.positions, index)
        tokens = draw_tokens(rows, generator, lambda logits, _: self.token_logits(logits))
        return sample.masked_scatter(rows.positions, tokens)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        chosen = self.positions(index, sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)


def beta_cdf(x: float, a: float, b: float) -> float:
    """P(Beta(a, b) <= x), the regularised incomplete beta function I_x(a, b), for x in [0, 1].

    By its continued fraction, from the far end, in float64: relative error below 1e-11 for parameters up to 1000. Both
    halves use the side of a / (a + b) on which it converges fast: I_x(a, b) = 1 - I_{1-x}(b, a).
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    fraction = 1.0
    for m in range(400, -1, -1):
        odd = (a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))  # of term 2 m + 1, negative
        even = (m + 1) * (b - m - 1) / ((a + 2 * m + 1) * (a + 2 * m + 2))  # of term 2 m + 2
        fraction = 1 - odd * x / (1 + even * x / fraction)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a + 1) - math.lgamma(b)
    return math.exp(log_front) / fraction
