r"""Euler steps of the reverse continuous-time Markov chain.

    P(x_s = v) = 1[v = x_t] + (t - s) R_t(x_t -> v),     rows sum to 1, jumps beyond a total of 1 are scaled down

First order. For absorbing log-linear noise this *is* the ancestral kernel, for every network and every grid, since
(t - s) sigma'(t) = exp(sigma(t) - sigma(s)) - 1 there: the two names on such models are one sampler. They differ for other
noise schedules and for the uniform process.

Sources: Campbell et al. 2022, Lou et al. 2024 (SEDD, section 4.1).
"""

from __future__ import annotations

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
)


class EulerScheduler(FactorisedScheduler):
    """Euler steps for absorbing and uniform processes. The arguments are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
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
        temperature: float = 1.0,
        top_p: float = 1.0,
        draw: Draw = "exact",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The Euler law, see [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        p_0 = self.shaped_law(model_output, index, sample)
        return euler_law(self.noise_process, sample, p_0, self.times[index], self.times[index + 1])

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """(t - s) times those of the reverse rate, see [`DiscreteScheduler.jump_intensities`]."""
        process, t, s = self.noise_process, self.times[index], self.times[index + 1]
        if not isinstance(process, UniformProcess) or self.config.draw != "exact":
            return None
        return euler_jumps(process, t, s)

    def jump_factor(self, index: int, total: Tensor) -> Tensor:
        """Jumps beyond a total of 1 are scaled down. See [`DiscreteScheduler.jump_factor`]."""
        return 1 / total.clamp(min=1.0)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step) = min(1, (t - s) hazard(t)), absorbing process; 1 in the last step."""
        t, s = self.times[index], self.times[index + 1]
        return 1.0 if s == 0 else min(1.0, float((t - s) * self.absorbing_process.hazard(t)))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, or tokens that may jump. See [`DiscreteScheduler.positions`]."""
        if self.config.draw != "exact":
            return None
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")
