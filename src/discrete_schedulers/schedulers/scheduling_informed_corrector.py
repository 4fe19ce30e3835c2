r"""Informed correctors: ancestral steps, and at each time that they reach a few revealed tokens are drawn anew, each from its
law given all the others (absorbing noise).

    predictor  a mask opens with probability (alpha_s - alpha_t) / (1 - alpha_t), to v ~ p_0          one call at t
    corrector  x_s^i ~ p(x^i | x_s^-i) at the chosen revealed positions i           one call at s for each repetition

The network must know the law of a token that it sees, given the others: a [`HollowTransformerModel`] does
(`needs_revealed_logits`). Masks stay masks in a correction.

A correction of one random position (the defaults) leaves p_s exactly as it is, for an exact network: it is a step of Gibbs
sampling. Several positions at once ignore what they mean to each other, and a choice that looks at the tokens favours
those that are left alone: both have another stationary law. The published choices (`lowest_margin`; in released code the
`lowest_current_probability` of 4 positions with Gumbel noise on the logs) are of that kind. On enumerated joints, with masks
that open on their own, the error of the exact correction falls nearly as N^-2 (of plain steps: N^-1), since the errors of
early steps are forgotten; that of the others goes to a limit, which they reach from below: they repair more in few steps.

N steps take N + (N - 1) num_corrector_steps calls. With `correct_last_step` the finished sample is corrected too, as published;
these calls come at `LAST_TIME`, since there is none at 0. A correction is a model call: compare it with as many steps.

Source: Zhao et al. 2025 (informed correctors, arXiv 2407.21243, section 4). A position that the caller keeps as it is can be
chosen too: that correction is wasted.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, gumbels, top_subset, uniform_subset
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    DiscreteScheduler,
    Grid,
    ProcessName,
    Selection,
    Unmasking,
    check_corrections,
    selection_confidence,
)

LAST_TIME = 1e-5  # where published samplers end their grids: a network with a time input takes it for clean


class InformedCorrectorScheduler(DiscreteScheduler):
    """Ancestral steps with corrections of revealed tokens. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"` (as published), `"optimal"` or `"learned"`.
        unmasking (`str`, defaults to `"counts"`): `"counts"` opens a fixed number of positions in each step, `"bernoulli"`
            each position on its own.
        num_corrector_steps (`int`, defaults to 1): Corrections, each one model call, after every step but the last.
        correct_last_step (`bool`, defaults to `False`): After the last one too.
        positions_per_correction (`int`, defaults to 1): Positions that one correction draws anew; all, where there are fewer.
        selection (`str`, defaults to `"random"`): Which: `"random"`, or those with the `"lowest_margin"` log p(x^i) -
            max log p(another), the `"lowest_max_probability"` of any token, or the `"lowest_current_probability"`.
        selection_temperature (`float`, defaults to 1.0): Factor of the Gumbel noise on the log of these; 0 for none. Learned
            for each step as `coefficients[N]["selection_temperature"]`, by the step that the correction follows.
        temperature (`float`, defaults to 1.0): Divides the logits that are drawn from; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1]; published 0.98.
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a number of corrections or positions, or `selection_temperature`, is not allowed.
    """

    processes = ("absorbing",)
    revises_tokens = True
    needs_revealed_logits = True
    learned_knobs = {"selection_temperature": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        unmasking: Unmasking = "counts",
        num_corrector_steps: int = 1,
        correct_last_step: bool = False,
        positions_per_correction: int = 1,
        selection: Selection = "random",
        selection_temperature: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        check_corrections(self.config)
        self.order = 1 + num_corrector_steps
        self.prepare()

    def call_times(self, times: Tensor) -> Tensor:
        """The first time, each inner one for the corrections and the step that start there, and the last corrections."""
        last = torch.full((self.order - 1,), min(LAST_TIME, float(times[-2]) / 2), dtype=torch.float64)
        calls = torch.cat([times[:1], times[1:-1].repeat_interleave(self.order)])
        return torch.cat([calls, last]) if self.config.correct_last_step else calls

    def place(self, index: int) -> tuple[int, bool]:
        """The step that the call `index` makes or corrects, and whether it is a correction."""
        return index // self.order, index % self.order > 0

    def open_probability(self, index: int) -> float:
        """P(a mask opens in the step that the call `index` makes or corrects)."""
        step, _ = self.place(index)
        return float(self.absorbing_process.unmask_probability(self.times[step], self.times[step + 1]))

    def count(self, is_revealed: Tensor) -> Tensor:
        """How many positions of each row a correction draws anew, (B,)."""
        return is_revealed.sum(1).clamp(max=self.config.positions_per_correction)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks that open in a step; in a correction the chosen positions, or all revealed ones where the predictions choose.
        See [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        if not self.place(index)[1]:
            return self.open_masks(sample, self.open_probability(index), generator, self.config.unmasking, "random")
        is_revealed = sample != self.config.mask_token_id
        if self.config.selection != "random":
            return is_revealed
        return uniform_subset(is_revealed, self.count(is_revealed), generator)

    def least_confident(self, rows: RowLogits, step: int, sample: Tensor, generator: Generators) -> Tensor:
        """The revealed positions with the lowest confidence after Gumbel noise, bool (B, L)."""
        noise = gumbels(tuple(sample.shape), generator, sample.device)
        score = self.per_step("selection_temperature", step) * noise
        logits = rows.logits.double().clone()
        logits[:, self.config.mask_token_id] = -torch.inf
        confidence = selection_confidence(logits.log_softmax(-1), sample[rows.positions], self.config.selection)
        score[rows.positions] -= confidence.clamp(
            max=1e9
        )  # infinite where nothing else can be; `top_subset` needs numbers
        return top_subset(rows.positions, self.count(rows.positions), score)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the masks that open, or at the positions that are corrected. See [`DiscreteScheduler.move_rows`]."""
        step, is_correction = self.place(index)
        if is_correction and self.config.selection != "random":
            rows = rows.among(self.least_confident(rows, step, sample, generator))
        return rows.put(self.clean_tokens(rows, index, sample, generator), sample)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        chosen = self.positions(index, sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)
