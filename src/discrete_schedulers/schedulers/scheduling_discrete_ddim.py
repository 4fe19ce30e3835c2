r"""Discrete DDIM: a share of the tokens is carried over, the others are drawn anew and noised again (uniform noise).

    q(x_s | x_t, x_0) = sigma 1[x_s = x_t] + (alpha_s - sigma alpha_t) 1[x_s = x_0] + (1 - alpha_s - sigma (1 - alpha_t)) / V
    sigma             = sigma_share (1 - alpha_s) / (1 - alpha_t),    sigma_share in [0, 1]

with x_0 ~ p_0. Every sigma keeps the law of each single position exact. sigma_share = 1 never adds noise (the maximal coupling
of x_t and x_s); 0 forgets x_t. Which of the three happens to a position depends on no logits, so that the network's head is
asked at the redrawn positions only.

First order for sigma_share = 1. A constant share below 1 redraws a part of the positions, independently given x_t, in every
step, however short it is: the error of the joint law all but stops falling (three dependent tokens: total variation 0.024
at 0.5 and 0.052 at 0 after 128 steps, 0.004 at 1). Learned for each step it has to approach 1 as 1 / N.

Not the `DiscreteDDIMScheduler` of diffusers, which is [`AncestralScheduler`] with `noise_schedule="linear"`. On masks this
family is ReMDM's.

Sources: Song, Meng, Ermon 2021 (DDIM, appendix A); sigma_share = 1: Gourevitch et al. 2026 (arXiv 2605.22765).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, indicator
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    ProcessName,
    Tempered,
)


class DiscreteDDIMScheduler(FactorisedScheduler):
    """The discrete DDIM family for the uniform process.

    Args:
        vocab_size (`int`): Width V of the logits.
        mask_token_id (`int`, *optional*): `None`: the uniform process has no mask.
        process (`str`, defaults to `"uniform"`): `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"` or `"learned"`.
        sigma_share (`float`, defaults to 1.0): Part of the largest possible sigma, in [0, 1]: 1 never adds noise.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        tempered (`str`, defaults to `"leave_one_out"`): What these two sharpen, see [`AncestralScheduler`].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"sigma_share": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If `sigma_share` lies outside [0, 1], as a constant or in the coefficients.
    """

    processes = ("uniform",)
    learned_knobs = {"sigma_share": "numbers in [0, 1]"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "uniform",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        sigma_share: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tempered: Tempered = "leave_one_out",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def routes(self, index: int) -> tuple[float, float, float]:
        """The chances to be carried over, drawn from p_0, and noised; their sum is 1."""
        alpha_t, alpha_s = (float(self.noise_process.alpha(time)) for time in self.times[index : index + 2])
        sigma = self.per_step("sigma_share", index) * (1 - alpha_s) / (1 - alpha_t)
        noised = max(0.0, (1 - alpha_s) - sigma * (1 - alpha_t))  # sigma_share = 1: 0 but for rounding
        return sigma, alpha_s - sigma * alpha_t, noised

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The equation of this file, averaged over x_0 ~ p_0. See [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        carried, clean, noised = self.routes(index)
        p_0 = self.shaped_law(model_output, index, sample)
        own = indicator(sample, self.config.vocab_size)
        return carried * own + clean * p_0 + noised / self.config.vocab_size

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Positions that are drawn from p_0 in this step, see [`DiscreteScheduler.positions`]."""
        clean = self.routes(self.step_index(timestep))[1]
        return bernoulli_subset(torch.ones_like(sample, dtype=torch.bool), clean, generator)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens from p_0 at the chosen positions, noise at some of the others. See [`DiscreteScheduler.move_rows`]."""
        carried, _, noised = self.routes(index)
        tokens = self.clean_tokens(rows, index, sample, generator)
        is_noised = bernoulli_subset(~rows.positions, noised / max(carried + noised, 1e-300), generator)
        noise = self.noise_process.prior(tuple(sample.shape), generator, sample.device)
        return rows.put(tokens, torch.where(is_noised, noise, sample))
