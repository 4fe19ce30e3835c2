r"""Tau-leaping: the rates are frozen over the step and every jump is a Poisson event.

    J_v ~ Poisson(lambda_v),  lambda_v = (t - s) R_t(x_t -> v),  Lambda = sum_v lambda_v

On categorical data a sum of jumps means nothing, so a position takes the first of its jumps, P(v) = (1 - e^-Lambda)
lambda_v / Lambda, or is kept unless it has exactly one (`jumps="reject"`), P(v) = lambda_v e^-Lambda. Both open too few masks:
with log-linear noise on a uniform grid of 8 steps 18 % and 24 % are left before the last step (ancestral: 12.5 %). That
step opens them all, as the final denoising call does; as a leap like the others it would leave 6.6 % and 15 %.

Sources: Campbell et al. 2022 (tauLDR, section 4.2 and its `ConditionalTauLeaping`).
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, NoiseSchedule, UniformProcess
from discrete_schedulers.sampling import Draw, Generators
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    ProcessName,
    euler_jumps,
    jump_law,
    jump_share,
)


class TauLeapingScheduler(FactorisedScheduler):
    """Tau-leaping for absorbing and uniform processes. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        jumps (`str`, defaults to `"first"`): What a position with several jumps does: take the `"first"`, or `"reject"` them.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        draw (`str`, defaults to `"exact"`): `"exact"`, `"one_stage_float32"` or `"one_stage_1e-6"`.
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    opens_by_chance = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        jumps: Literal["first", "reject"] = "first",
        temperature: float = 1.0,
        top_p: float = 1.0,
        draw: Draw = "exact",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def jump_share(self, total: Tensor) -> Tensor:
        """P(jump) / Lambda for a total intensity Lambda."""
        if self.config.jumps == "reject":
            return torch.exp(-total)
        return jump_share(total)

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The law of the leap; p_0 in the last step. See [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        t, s = self.times[index], self.times[index + 1]
        p_0 = self.shaped_law(model_output, index, sample)
        if s == 0:
            return self.noise_process.posterior(sample, p_0, t, s)
        intensity = (t - s) * self.noise_process.reverse_rate(sample, p_0, t)
        return jump_law(sample, intensity * self.jump_share(intensity.sum(-1, keepdim=True)))

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """(t - s) times those of the reverse rate; `None` with `jumps="reject"`, where more intensity can mean fewer jumps. See
        [`DiscreteScheduler.jump_intensities`]."""
        process, t, s = self.noise_process, self.times[index], self.times[index + 1]
        is_exact = self.config.draw == "exact" and self.config.jumps == "first"
        return euler_jumps(process, t, s) if isinstance(process, UniformProcess) and is_exact else None

    def jump_factor(self, index: int, total: Tensor) -> Tensor:
        """See [`DiscreteScheduler.jump_factor`]; the last step is no leap."""
        return torch.ones_like(total) if self.times[index + 1] == 0 else jump_share(total)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step), absorbing process; 1 in the last step."""
        t, s = self.times[index], self.times[index + 1]
        intensity = (t - s) * self.absorbing_process.hazard(t)
        return 1.0 if s == 0 else float(intensity * self.jump_share(intensity))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, or tokens that may jump. See [`DiscreteScheduler.positions`]."""
        if self.config.draw != "exact":
            return None
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")
