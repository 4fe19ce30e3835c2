r"""Discrete flow matching: Euler steps of the mixture path's velocity, with a divergence-free part.

The path is that of the forward process, kappa = alpha rising to 1: x_t^i is x_1^i (the clean token) with probability kappa, or
else of the prior pi. Given a clean token x_1 ~ p_0, a position jumps to v != x_t at the rate

    u(v) = kappa' / (1 - kappa) 1[v = x_1]  +  c kappa' / (kappa (1 - kappa)) [(1 - kappa) pi(v) + kappa 1[v = x_1]]

once at most: P(v) = E_{x_1 ~ p_0} (1 - e^-lambda) h u(v) / lambda with lambda = h sum_v u(v) and h = t - s. The second term, of
strength c, leaves every p_t as it is: it draws tokens anew from the path. It lets the sampler revise what it has said, at
the price of larger rates, so with few steps c > 0 can cost more than it mends. The last step sets x = x_1.

Absorbing: a mask opens at (1 + c) times the reverse rate, and a token is masked again at the rate c kappa' / kappa: c = 0 is
[`TauLeapingScheduler`], and c > 0 a predictor and a corrector in one leap. First order. Uniform: with c = 0 it is another rate
than the reverse of the forward process, with the same marginals, and finite at t = 1. A step errs by its square, for every c,
but the rates grow as 1 / t near the end, and the samples err by log(N) / N: more than [`EulerScheduler`] from 8 steps on.

Sources: Gat et al. 2024 (discrete flow matching) and the `MixtureDiscreteEulerSolver` of facebookresearch/flow_matching,
where c is a function of time, 0 by default: here a number, or one for each step. ReMDM's baseline of this kind has
c = 10 t^1/4 (1 - t)^1/4.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, NoiseSchedule, UniformProcess, indicator
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    ProcessName,
    jump_share,
)


class FlowMatchingScheduler(FactorisedScheduler):
    """Discrete flow matching's Euler solver, for absorbing and uniform processes.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        divergence_free (`float`, defaults to 0.0): c, at least 0.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"divergence_free": [8 floats]}}`; the last
            is not used.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a c is negative.
    """

    learned_knobs = {"divergence_free": "numbers of at least 0"}
    revises_tokens = True
    opens_by_chance = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        divergence_free: float = 0.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def intensities(self, index: int) -> tuple[float, float]:
        """h (1 + c) kappa' / (1 - kappa), to the clean token, and h c kappa' / kappa, to the prior: of a step before the last.

        Linear and cosine noise have kappa = 0 at t = 1, where nothing is left of the clean tokens: a factor of 1e9 then moves
        all that can fall back to the prior.
        """
        t, s = self.times[index], self.times[index + 1]
        kappa, slope = float(self.noise_process.alpha(t)), -float(self.noise_process.alpha_slope(t))
        h, c = float(t - s), self.per_step("divergence_free", index)
        return h * (1 + c) * slope / (1 - kappa), h * c * (slope / kappa if kappa > 0 else 1e9)

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The expectation over x_1, see [`FactorisedScheduler.transition`]."""
        index, process = self.step_index(timestep), self.noise_process
        p_0 = self.shaped_law(model_output, index, sample)
        if self.times[index + 1] == 0:
            return process.posterior(sample, p_0, self.times[index], self.times[index + 1])
        own = indicator(sample, process.vocab_size)
        if isinstance(process, AbsorbingProcess):  # a token is its own x_1
            p_0 = torch.where((sample == process.mask_token_id)[..., None], p_0, own)
        to_clean, to_prior = self.intensities(index)
        away = to_prior * process.prior_law(sample.device) * (1 - own)  # (B, L, V), to another state of the prior
        same, other = away.sum(-1, keepdim=True), to_clean + away.sum(-1, keepdim=True)  # lambda with x_1 = x_t, or not
        kept = (own * p_0).sum(-1, keepdim=True)  # P(x_1 = x_t)
        share = (1 - kept) * jump_share(other) + kept * jump_share(same)
        law = to_clean * p_0 * jump_share(other) + away * share
        return law.scatter(-1, sample[..., None], (1 - kept) * torch.exp(-other) + kept * torch.exp(-same))

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Leaps of the two kinds, see [`DiscreteScheduler.jump_intensities`]."""
        process, t, s = self.noise_process, self.times[index], self.times[index + 1]
        if not isinstance(process, UniformProcess):
            return None
        if s == 0:
            return process.posterior_jumps(t, s)
        to_clean, to_prior = self.intensities(index)
        away = torch.tensor(to_prior * (1 - 1 / process.vocab_size), dtype=torch.float64)
        share = jump_share(to_clean + away)
        return to_clean * share, away * share, away * jump_share(away)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step), absorbing process; 1 in the last step."""
        return 1.0 if self.times[index + 1] == 0 else -math.expm1(-self.intensities(index)[0])

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, or tokens that may jump. See [`DiscreteScheduler.positions`]."""
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the chosen masks, and with c > 0 a mask for each token that falls, which needs no logits."""
        moved = super().move_rows(rows, index, sample, generator)
        if not isinstance(self.noise_process, AbsorbingProcess) or self.times[index + 1] == 0:
            return moved
        if self.per_step("divergence_free", index) == 0:
            return moved
        falls = -math.expm1(-self.intensities(index)[1])
        is_token = sample != self.config.mask_token_id
        return moved.masked_fill(bernoulli_subset(is_token, falls, generator), self.absorbing_process.mask_token_id)
