r"""Predictor-corrector: tau-leaping steps, and at each time that they reach leaps that only correct.

    predictor  lambda_v = (t - s) R_t(x -> v)                                       one call at t
    corrector  lambda_v = c h [Q_s(x -> v) + R_s(x -> v)],  h the step that led to s    one call at s for each repetition

Q is the rate of the forward process, R that of its reverse: together they leave p_s as it is, for an exact network, so that a
long enough run of correctors at s forgets the predictor's error. With Lambda = sum_v lambda_v, a position takes the first
of its jumps: P(v) = (1 - e^-Lambda) lambda_v / Lambda. A leap keeps p_s up to (c h)^2; the rate keeps it exactly.

Absorbing: Q takes a token to the mask at the rate -alpha'_s / alpha_s, R opens a mask. Uniform: Q takes a token to every other
state at that rate over V. The last step, to s = 0, draws from p_0 and is not corrected: N steps take N calls, and
`num_corrector_steps` more for each inner time of the grid that is not above `corrector_entry_time`. With the published
0.1, meant for 500 steps, an even grid of fewer than 10 has none.

A correction is a model call: compare with as many predictor steps. With an exact network those are better: on an enumerated
joint with masks one correction after each step errs 1.2 (c = 0.5) to 1.5 times (c = 1.5) as much as steps alone. Released
code for absorbing noise (JYS, LSD) adds the transposed Q, which opens masks to random tokens and never masks one.

Source: Campbell et al. 2022 (tauLDR-C); its released code has 10 corrections and a factor of 1.5.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, UniformProcess
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    FactorisedScheduler,
    Grid,
    ProcessName,
    euler_jumps,
    jump_share,
    leap_law,
)


class PredictorCorrectorScheduler(FactorisedScheduler):
    """Tau-leaping with correctors, for absorbing and uniform processes.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        num_corrector_steps (`int`, defaults to 1): Corrections, each one model call, at every time that is corrected.
        corrector_step (`float`, defaults to 1.5): c, the length of a correction in units of the step before it.
        corrector_entry_time (`float`, defaults to 0.1): Times above it are not corrected; in [0, 1].
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"corrector_step": [8 floats]}}`, by the
            step that the correction follows; the last is not used.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If the number, the length or the first time of corrections is not allowed.
    """

    order = 2  # at most, with one correction; each scheduler has its own number
    learned_knobs = {"corrector_step": "numbers of at least 0"}
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
        num_corrector_steps: int = 1,
        corrector_step: float = 1.5,
        corrector_entry_time: float = 0.1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        if num_corrector_steps < 0:
            raise ValueError(f"`num_corrector_steps` is {num_corrector_steps}; it must be at least 0")
        if not 0 <= corrector_entry_time <= 1:
            raise ValueError(f"`corrector_entry_time` is {corrector_entry_time}; allowed are times in [0, 1]")
        self.order = 1 + num_corrector_steps
        self.prepare()

    def calls_at(self, times: Tensor) -> Tensor:
        """Calls at each time of a grid but the last, (N,): the corrections, and the step that starts there."""
        entry = (
            self.config.corrector_entry_time + 1e-9
        )  # a time that is meant to be the first one is it, but for rounding
        is_corrected = (times[:-1] <= entry) & (times[:-1] < 1)
        return 1 + self.config.num_corrector_steps * is_corrected.long()

    def call_times(self, times: Tensor) -> Tensor:
        """Each time once for each of its calls."""
        return times[:-1].repeat_interleave(self.calls_at(times))

    def place(self, index: int) -> tuple[int, bool]:
        """The step that starts at the time of the call `index`, and whether the call is a correction before it."""
        ends = self.calls_at(self.times).cumsum(0)
        step = int((ends <= index).sum())
        return step, index + 1 < int(ends[step])

    def correction_length(self, step: int) -> float:
        """c h of a correction before the step `step`."""
        return self.per_step("corrector_step", step - 1) * float(self.times[step - 1] - self.times[step])

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The law of the leap, or of the correction. See [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        step, is_correction = self.place(index)
        t, s, process = self.times[step], self.times[step + 1], self.noise_process
        p_0 = self.shaped_law(model_output, index, sample)
        if s == 0 and not is_correction:
            return process.posterior(sample, p_0, t, s)
        rate = process.reverse_rate(sample, p_0, t)
        if not is_correction:
            return leap_law(sample, (t - s) * rate)
        forward = (-process.alpha_slope(t) / process.alpha(t)).to(sample.device) * process.prior_law(sample.device)
        rate = (rate + forward).scatter(-1, sample[..., None], 0.0)
        return leap_law(sample, self.correction_length(step) * rate)

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Of the leap, or of the correction, which has the forward rate too. See [`DiscreteScheduler.jump_intensities`]."""
        step, is_correction = self.place(index)
        t, s, process = self.times[step], self.times[step + 1], self.noise_process
        if not isinstance(process, UniformProcess):
            return None
        if not is_correction:
            return euler_jumps(process, t, s)
        length = self.correction_length(step)
        forward = length * process.jump_speed(t) * (process.vocab_size - 1) / process.vocab_size
        to_clean, at_random, at_random_own = (length * rate for rate in process.rate_jumps(t))
        return to_clean, at_random + forward, at_random_own + forward

    def jump_factor(self, index: int, total: Tensor) -> Tensor:
        """See [`DiscreteScheduler.jump_factor`]; the last step is no leap."""
        step, is_correction = self.place(index)
        return torch.ones_like(total) if self.times[step + 1] == 0 and not is_correction else jump_share(total)

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this call), absorbing process; 1 in the last step."""
        step, is_correction = self.place(index)
        t, s = self.times[step], self.times[step + 1]
        if s == 0 and not is_correction:
            return 1.0
        length = self.correction_length(step) if is_correction else t - s
        return -float(torch.expm1(-length * self.absorbing_process.hazard(t)))

    def remask_probability(self, index: int) -> float:
        """P(a token becomes a mask in this call), absorbing process; 0 but in a correction."""
        step, is_correction = self.place(index)
        if not is_correction:
            return 0.0
        t, process = self.times[step], self.absorbing_process
        return -float(torch.expm1(self.correction_length(step) * process.alpha_slope(t) / process.alpha(t)))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this call, or tokens that may jump. See [`DiscreteScheduler.positions`]."""
        if isinstance(self.noise_process, UniformProcess):
            return self.jump_positions(self.step_index(timestep), sample, generator)
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the chosen masks; in a correction also a mask for each token that falls, which needs no logits."""
        moved = super().move_rows(rows, index, sample, generator)
        if isinstance(self.noise_process, UniformProcess) or not self.place(index)[1]:
            return moved
        is_token = sample != self.config.mask_token_id
        falls = bernoulli_subset(is_token, self.remask_probability(index), generator)
        return moved.masked_fill(falls, self.absorbing_process.mask_token_id)
