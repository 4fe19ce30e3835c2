r"""Leave-one-out predictor-corrector: ancestral steps, and at each time that they reach a few tokens are drawn anew, each from
its law given all the others (uniform noise).

    predictor  x_s ~ prod_i q(x_s^i | x_t^i, p_0)                                  one call at t
    corrector  x_s^i ~ p_s(x^i | x^-i) = alpha_s l_i(v) + (1 - alpha_s) / V        one call at s for each repetition

l is the leave-one-out law at (x_s, s), alike for all chosen positions. The clean end has no corrector, so that N steps
take N + (N - 1) num_corrector_steps calls: the published budget rule, where it comes out even (there a budget of calls is
given, and the first steps are corrected).

A correction of one random position (the defaults) leaves p_s exactly as it is, for an exact network: it is a step of Gibbs
sampling. Several positions at once ignore what they mean to each other, and a choice that looks at the tokens favours
those that are left alone: both have another stationary law, although they are said to keep p_s. How far off they are
depends on the share of positions that one correction takes. Exact or not, a correction is a model call: compare it with
ancestral sampling in as many calls.

Source: Gourevitch et al. 2026 (arXiv 2605.22765), whose released settings are 2 corrections of 12 positions,
`selection="lowest_margin"`. A position that the caller keeps as it is can be chosen too: that correction is wasted.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, UniformProcess
from discrete_schedulers.sampling import (
    Generators,
    RowLogits,
    draw_tokens,
    gumbels,
    top_subset,
    uniform_subset,
)
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    DiscreteScheduler,
    Grid,
    ProcessName,
    Selection,
    Tempered,
    check_corrections,
    selection_confidence,
)


class GibbsCorrectorScheduler(DiscreteScheduler):
    """Ancestral steps with leave-one-out corrections, for the uniform process.

    Args:
        vocab_size (`int`): Width V of the logits.
        mask_token_id (`int`, *optional*): `None`: the uniform process has no mask.
        process (`str`, defaults to `"uniform"`): `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"` or `"learned"`.
        num_corrector_steps (`int`, defaults to 1): Corrections, each one model call, after every step but the last.
        positions_per_correction (`int`, defaults to 1): Positions that one correction draws anew; all, where there are fewer.
        selection (`str`, defaults to `"random"`): Which: `"random"`, or those with the `"lowest_margin"` log p_s(x^i) -
            max log p_s(another), the `"lowest_max_probability"` of any token, or the `"lowest_current_probability"`.
        selection_temperature (`float`, defaults to 1.0): Factor of the Gumbel noise on the log of these; 0 for none. Learned
            for each step as `coefficients[N]["selection_temperature"]`, by the step that the correction follows.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        tempered (`str`, defaults to `"leave_one_out"`): What these two sharpen, see [`AncestralScheduler`].
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a number of corrections or positions, or `selection_temperature`, is not allowed.
    """

    processes = ("uniform",)
    learned_knobs = {"selection_temperature": "numbers of at least 0"}
    noise_process: UniformProcess

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "uniform",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        num_corrector_steps: int = 1,
        positions_per_correction: int = 1,
        selection: Selection = "random",
        selection_temperature: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        tempered: Tempered = "leave_one_out",
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        check_corrections(self.config)
        self.order = 1 + num_corrector_steps
        self.prepare()

    def call_times(self, times: Tensor) -> Tensor:
        """The first time, then each inner one for its corrections and for the step that starts there."""
        return torch.cat([times[:1], times[1:-1].repeat_interleave(self.order)])

    def place(self, index: int) -> tuple[int, bool]:
        """The step that the call `index` makes or corrects, and whether it is a correction."""
        return index // self.order, index % self.order > 0

    def conditional(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """p_s(x^i | x^-i), shape (..., V), float64, from logits (..., V) at tokens (...) in the call `index`."""
        process, s = self.noise_process, self.calls[index]
        alpha = process.alpha(s).to(logits.device)
        one_out = process.leave_one_out(sample, self.shaped_law(logits, index, sample), s)
        return alpha * one_out + (1 - alpha) / process.vocab_size

    def least_confident(self, law: Tensor, step: int, sample: Tensor, generator: Generators) -> Tensor:
        """The positions with the lowest confidence after Gumbel noise, bool (B, L). `law` is the conditional, (B, L, V)."""
        noise = self.per_step("selection_temperature", step) * gumbels(tuple(sample.shape), generator, sample.device)
        score = noise - selection_confidence(law.log(), sample, self.config.selection)
        return top_subset(torch.ones_like(sample, dtype=torch.bool), self.count(sample), score)

    def count(self, sample: Tensor) -> Tensor:
        """How many positions of each row a correction draws anew, (B,)."""
        count = min(self.config.positions_per_correction, sample.shape[1])
        return torch.full((len(sample),), count, device=sample.device)

    def jump_intensities(self, index: int) -> tuple[float | Tensor, float | Tensor, float | Tensor] | None:
        """Of the step; not asked for a correction. See [`DiscreteScheduler.jump_intensities`]."""
        step = self.place(index)[0]
        return self.noise_process.posterior_jumps(self.times[step], self.times[step + 1])

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Tokens that may jump, or the positions of a random correction; `None`, all, of a correction that the predictions
        choose. See [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        if not self.place(index)[1]:
            return self.jump_positions(index, sample, generator)
        if self.config.selection != "random":
            return None
        return uniform_subset(torch.ones_like(sample, dtype=torch.bool), self.count(sample), generator)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The jumps of a step, or the chosen positions drawn anew, each from its law given the others. See
        [`DiscreteScheduler.move_rows`]."""
        if not self.place(index)[1]:
            return self.jump_rows(rows, index, sample, generator)
        law = self.conditional(rows.logits, index, sample[rows.positions])
        return sample.masked_scatter(rows.positions, draw_tokens(RowLogits(law.log(), rows.positions), generator))

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """A correction where the predictions choose. See [`DiscreteScheduler.move_all`]."""
        law = self.conditional(logits, index, sample)
        chosen = self.least_confident(law, self.place(index)[0], sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)
