r"""Psi samplers: the reverse step, and now and then a fresh draw of x_0 with fresh noise instead (uniform noise).

    Psi(x_s | x_t) = kappa q(x_s | x_t, p_0) + (1 - kappa) [alpha_s p_0(x_s) + (1 - alpha_s) / V],    kappa in [0, 1]

kappa = 1 is ancestral sampling, kappa = 0 predicts x_0 everywhere and noises it. Every kappa keeps the law of each single
position exact. On uniform noise this is not the curve of [`DiscreteDDIMScheduler`]: the first term is the bridge, which
redraws and noises tokens too. On masks both are ReMDM.

First order for kappa = 1. A constant kappa below 1 redraws a part of the positions, independently given x_t, in every step:
the error of the joint law all but stops falling as N grows (see [`DiscreteDDIMScheduler`]). The published runs have kappa
< 1 in a stretch of the times only: `coefficients` with one number for each step can say so.

Source: Deschenaux et al. 2026 (The Diffusion Duality, Chapter II, arXiv 2602.21185); 0.95 is its setting for CIFAR-10.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, UniformProcess
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    ProcessName,
    Tempered,
)


class PsiScheduler(FactorisedScheduler):
    """Psi samplers for the uniform process.

    Args:
        vocab_size (`int`): Width V of the logits.
        mask_token_id (`int`, *optional*): `None`: the uniform process has no mask.
        process (`str`, defaults to `"uniform"`): `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"` or `"learned"`.
        kappa (`float`, defaults to 0.95): Weight of the reverse step, in [0, 1].
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        tempered (`str`, defaults to `"leave_one_out"`): What these two sharpen, see [`AncestralScheduler`].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"kappa": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If `kappa` lies outside [0, 1], as a constant or in the coefficients.
    """

    processes = ("uniform",)
    learned_knobs = {"kappa": "numbers in [0, 1]"}
    noise_process: UniformProcess

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "uniform",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        kappa: float = 0.95,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tempered: Tempered = "leave_one_out",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The equation of this file. See [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        t, s = self.times[index], self.times[index + 1]
        process, kappa = self.noise_process, self.per_step("kappa", index)
        p_0 = self.shaped_law(model_output, index, sample)
        alpha = process.alpha(s).to(p_0.device)
        noised_again = alpha * p_0 + (1 - alpha) / self.config.vocab_size
        return kappa * process.posterior(sample, p_0, t, s) + (1 - kappa) * noised_again

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Those of both terms, see [`DiscreteScheduler.jump_intensities`]."""
        t, s, kappa = self.times[index], self.times[index + 1], self.per_step("kappa", index)
        alpha, width = self.noise_process.alpha(s), self.config.vocab_size
        noise = (1 - alpha) * (width - 1) / width
        jumps = zip(self.noise_process.posterior_jumps(t, s), (alpha, noise, noise), strict=True)
        to_clean, at_random, at_random_own = (kappa * step + (1 - kappa) * again for step, again in jumps)
        return to_clean, at_random, at_random_own

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Tokens that may jump, see [`DiscreteScheduler.positions`]."""
        return self.jump_positions(self.step_index(timestep), sample, generator)
