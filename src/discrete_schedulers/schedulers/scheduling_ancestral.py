r"""Ancestral sampling: the exact factorised reverse kernel (Tweedie).

    q(x_s | x_t) = prod_i sum_{x_0} q(x_s^i | x_t^i, x_0) p(x_0^i = x_0 | x_t)

Absorbing: each mask opens with probability r = (alpha_s - alpha_t) / (1 - alpha_t), to v ~ p_0. Uniform: see
`UniformProcess.posterior`. Exact in law for one token per step; with more, exact up to the dependence between tokens that
move in the same step.

Sources: Austin et al. 2021 (D3PM), Sahoo et al. 2024 (MDLM, eq. 7), Lou et al. 2024 (SEDD, theorem 4.2). Fixed counts: LLaDA
(Nie et al. 2025) and Chen, Cong, Li 2025 (arXiv 2511.04647), whose theorem 4 makes their error computable.
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
    Order,
    ProcessName,
    Tempered,
    Unmasking,
)


class AncestralScheduler(FactorisedScheduler):
    """Ancestral sampling for absorbing and uniform processes.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` (needs `information_curve`) or
            `"learned"` (needs `coefficients` with `"times"`).
        unmasking (`str`, defaults to `"counts"`): Absorbing only. `"counts"` opens a fixed number of positions in each step,
            `"bernoulli"` each position on its own.
        order (`str`, defaults to `"random"`): Which positions a count takes: `"random"`, or `"spread"`: far from what is
            known and from each other.
        grid_shape (`list[int]`, *optional*): (height, width) for `order="spread"` on images.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        tempered (`str`, defaults to `"leave_one_out"`): Uniform only. What temperature and top-p sharpen: the
            `"leave_one_out"` law, or the `"denoiser"`'s p_0 (diffusers' discrete DDIM), which nears certainty of x_t as
            t falls, so that top-p keeps every token as it is. Absorbing noise has only one law of a masked token.
        draw (`str`, defaults to `"exact"`): `"exact"`, or the published float32 races `"one_stage_float32"` and
            `"one_stage_1e-6"` (with `unmasking="bernoulli"`).
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"times": [...]}}`.
        learned_for (`dict`, *optional*): What they were learned for: base model, revision, vocabulary, method, metrics.
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
        unmasking: Unmasking = "counts",
        order: Order = "random",
        grid_shape: list[int] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tempered: Tempered = "leave_one_out",
        draw: Draw = "exact",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        if draw != "exact" and unmasking != "bernoulli":
            raise ValueError(f"`draw={draw!r}` draws position and token in one; it needs `unmasking='bernoulli'`")

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """q(x_s | x_t, p_0), see [`FactorisedScheduler.transition`]. With `unmasking="counts"` this is the law of each
        position, while positions of a row exclude each other."""
        index = self.step_index(timestep)
        t, s = self.times[index], self.times[index + 1]
        p_0 = self.shaped_law(model_output, index, sample)
        return self.noise_process.posterior(sample, p_0, t, s)

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Those of `UniformProcess.posterior_jumps`. See [`DiscreteScheduler.jump_intensities`]."""
        if not isinstance(self.noise_process, UniformProcess) or self.config.draw != "exact":
            return None
        return self.noise_process.posterior_jumps(self.times[index], self.times[index + 1])

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step) = (alpha_s - alpha_t) / (1 - alpha_t), absorbing process."""
        return float(self.absorbing_process.unmask_probability(self.times[index], self.times[index + 1]))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this step, or tokens that may jump. See [`DiscreteScheduler.positions`]."""
        if self.config.draw != "exact":
            return None
        if not isinstance(self.noise_process, AbsorbingProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, self.config.unmasking, self.config.order)
