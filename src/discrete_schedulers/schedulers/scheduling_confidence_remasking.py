r"""Remasking by confidence (ReMDM-conf): tokens that were unlikely when they were drawn are the likeliest to fall back.

    mask  -> v      with probability (alpha_s - alpha_t) / (1 - alpha_t) p_0(v)
    token -> mask   with probability mass rho_max softmax_i(-psi_i / T),      rho_max = min(1, (1 - alpha_s) / alpha_t)

psi_i is the probability that the token of position i had in the law it was drawn from, after temperature and top-p. It is
this method's memory, one number for each position. Tokens that were there from the start have none, and never fall.

The softmax runs over the tokens of a row, so that `mass` bounds how many of them fall in a step, whatever the length. Not
exact: which tokens fall depends on what they are, and no more masks open for those that fall, so that a run is behind its
alpha until the last step, which opens all.

Source: Wang et al. 2025 (ReMDM, arXiv 2503.00307). Its code has mass 1 and T 1, keeps psi in bfloat16, and has no
window; `t_on` and `t_off` are those of ReMDM-switch and of [`RemaskingScheduler`].
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset, draw_tokens
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName


class ConfidenceRemaskingScheduler(DiscreteScheduler):
    """Ancestral steps with remasking of unlikely tokens, for the absorbing process.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        remask_mass (`float`, defaults to 1.0): Tokens of a row that fall in a step where rho_max is 1, on average; 0 or more.
            Learned for each step as `coefficients[N]["remask_mass"]`.
        remask_temperature (`float`, defaults to 1.0): T, positive: small ones take the least likely token.
        t_on (`float`, defaults to 1.0): Where remasking begins, in (t_off, 1].
        t_off (`float`, defaults to 0.0): Where it ends, in [0, t_on).
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1]; ReMDM has 0.9.
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    processes = ("absorbing",)
    revises_tokens = True
    learned_knobs = {"remask_mass": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        remask_mass: float = 1.0,
        remask_temperature: float = 1.0,
        t_on: float = 1.0,
        t_off: float = 0.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        if not remask_temperature > 0:
            raise ValueError(f"`remask_temperature` is {remask_temperature}; it must be positive")
        if not 0 <= t_off < t_on <= 1:
            raise ValueError(f"`t_off` and `t_on` are {t_off} and {t_on}; they must be 0 <= t_off < t_on <= 1")
        self.prepare()

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; a new run has no memory."""
        super().set_grid(times, device)
        self.psi: Tensor | None = None  # (B, L), infinite where no token was drawn in this run; not read at masks

    def open_probability(self, index: int) -> float:
        """P(a mask opens in this step) = (alpha_s - alpha_t) / (1 - alpha_t)."""
        return float(self.absorbing_process.unmask_probability(self.times[index], self.times[index + 1]))

    def fall_mass(self, index: int) -> float:
        """How many tokens of a row fall in this step on average, where none is certain to: mass rho_max."""
        t, s = self.times[index], self.times[index + 1]
        if not self.config.t_off + 1e-9 < t <= self.config.t_on + 1e-9:  # as in RemaskingScheduler
            return 0.0
        return self.per_step("remask_mass", index) * float(self.absorbing_process.remask_limit(t, s))

    def fall_probability(self, psi: Tensor, is_token: Tensor, mass: float) -> Tensor:
        """P(a token falls), (B, L), 0 where there is no token that was drawn in this run."""
        weight = torch.exp(-psi / self.config.remask_temperature) * is_token  # psi lies in [0, 1]; exp(-inf) is 0
        return (mass * weight / weight.sum(1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks that open in this step, see [`DiscreteScheduler.positions`]."""
        probability = self.open_probability(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the chosen masks, and a mask for each token that falls.

        Raises:
            ValueError: If `sample` has another shape than in the calls before.
        """
        psi = torch.full(sample.shape, torch.inf, dtype=torch.float64, device=sample.device)
        psi = psi if self.psi is None else self.psi
        if psi.shape != sample.shape:
            shapes = tuple(sample.shape), tuple(psi.shape)
            raise ValueError(
                f"`sample` has shape {shapes[0]}, but this run has {shapes[1]}: `set_timesteps` begins a new one"
            )
        logits = self.token_logits(rows.logits)
        tokens = draw_tokens(RowLogits(logits, rows.positions), generator)
        drawn = logits.double().softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)  # (R,)
        moved, is_token = sample.masked_scatter(rows.positions, tokens), sample != self.config.mask_token_id
        mass = self.fall_mass(index)
        if mass > 0:
            falls = bernoulli_subset(is_token, self.fall_probability(psi, is_token, mass), generator)
            moved = moved.masked_fill(falls, self.config.mask_token_id)
        self.psi = psi.masked_scatter(rows.positions, drawn)  # who falls keeps its number until it is drawn again
        return moved

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        chosen = self.positions(index, sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)
