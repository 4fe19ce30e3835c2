r"""LSD and LSD+: Euler steps with a learned factor on the score and, in LSD+, learned step sizes.

    P(x_s = v) = 1[v = x_t] + (t_k - t_{k+1}) Q_{t_k}(v, x_t) (Phi_k s(x_t, t_k))_v            (paper, eq. 5, Q transposed)
    tau_k      = 1 - sum_{l <= k} kappa_l                                                      (LSD+, eq. 7)

Phi_k is one number for step k (`coefficients[N]["scale"]`), kappa is stored as the grid it makes (`["times"]`, read with
`grid="learned"`). Without
coefficients Phi = 1 on a uniform grid, which is where training starts.

What it can do: with absorbing noise the score is alpha / (1 - alpha) p_0, so Phi scales the probability to open and leaves
the token's law alone. LSD is then a re-timing of the same sampler, and for a network without time input the same as
another grid. The released code multiplies the *log*-score instead (`scale="log_score"`), which is a temperature on the
token together with a change of rate that depends on the noise.

Source: "Learnable Sampler Distillation for Discrete Diffusion Models", NeurIPS 2025, arXiv 2509.19962. Where the paper is
silent: Phi_k belongs to the step from t_k, and the last step opens all masks (it is the final denoising call, counted).
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
    euler_law,
    jump_law,
)


class LSDScheduler(FactorisedScheduler):
    """Euler steps with learned scale and step sizes. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"learned"` (LSD+) takes the grid of the coefficients.
        scale (`str`, defaults to `"score"`): What Phi multiplies: the `"score"` (paper) or the `"log_score"` (released code).
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        draw (`str`, defaults to `"exact"`): `"exact"`, `"one_stage_float32"` or `"one_stage_1e-6"`.
        coefficients (`dict`, *optional*): `{"8": {"scale": [8 floats], "times": [9 floats]}}`, `"times"` for LSD+ only.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_block = "scale"
    opens_by_chance = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        scale: Literal["score", "log_score"] = "score",
        temperature: float = 1.0,
        top_p: float = 1.0,
        draw: Draw = "exact",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        for budget, blocks in (self.config.coefficients or {}).items():
            if any(value < 0 for value in blocks.get("scale", [])):
                raise ValueError(f"`coefficients` for {budget} steps: 'scale' multiplies a rate, it cannot be negative")

    def phi(self, index: int) -> float:
        """Phi of a step."""
        if self.config.coefficients is None:
            return 1.0
        return self.learned("scale", len(self.timesteps))[index]

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """Equation 5; p_0 in the last step. See [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        t, s = self.times[index], self.times[index + 1]
        p_0 = self.shaped_law(model_output, index, sample)
        if self.config.scale == "score" or s == 0:
            return euler_law(self.noise_process, sample, p_0, t, s, self.phi(index))
        return jump_law(sample, (t - s) * self.power_rate(sample, p_0, t, self.phi(index)))

    def power_rate(self, sample: Tensor, p_0: Tensor, t: Tensor, phi: float) -> Tensor:
        """Reverse rate with the score raised to the power phi, shape (B, L, V), 0 at `sample`."""
        process = self.noise_process
        if isinstance(process, UniformProcess):
            rate = process.jump_speed(t) / process.vocab_size * process.score(sample, p_0, t) ** phi
            return rate.clamp(max=1e9).scatter(-1, sample[..., None], 0.0)
        process = self.absorbing_process
        alpha = process.alpha(t).clamp(min=1e-300)  # linear and cosine noise have alpha_1 = 0
        speed = -process.alpha_slope(t) * torch.exp((phi - 1) * torch.log(alpha) - phi * torch.log(1 - alpha))
        p_0 = process.clean_law(p_0)
        moves = (sample == process.mask_token_id)[..., None] & (p_0 > 0)
        # Without the 0s: 0 ** phi has no slope for phi < 1, and 0 ** 0 is 1
        power = torch.where(p_0 > 0, p_0, 1.0) ** phi
        return torch.where(moves, speed.clamp(max=1e9) * power, 0.0)

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Phi (t - s) times those of the reverse rate; `None` with `scale="log_score"`. See
        [`DiscreteScheduler.jump_intensities`]."""
        process, t, s = self.noise_process, self.times[index], self.times[index + 1]
        is_plain = self.config.draw == "exact" and self.config.scale == "score"
        return euler_jumps(process, t, s, self.phi(index)) if isinstance(process, UniformProcess) and is_plain else None

    def jump_factor(self, index: int, total: Tensor) -> Tensor:
        """Jumps beyond a total of 1 are scaled down. See [`DiscreteScheduler.jump_factor`]."""
        return 1 / total.clamp(min=1.0)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step) = min(1, Phi (t - s) hazard(t)), absorbing process with `scale="score"`; 1 in the last
        step."""
        t, s = self.times[index], self.times[index + 1]
        return 1.0 if s == 0 else min(1.0, float((t - s) * self.phi(index) * self.absorbing_process.hazard(t)))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, or tokens that may jump; `None` with `scale="log_score"`, where that depends on the
        logits. See [`DiscreteScheduler.positions`]."""
        if self.config.draw != "exact" or self.config.scale == "log_score":
            return None
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")
