r"""Remasking: ancestral steps in which a token may become a mask again, so that later steps can draw it anew.

    token -> mask   with probability rho,                                        0 <= rho <= min(1, (1 - alpha_s) / alpha_t)
    mask  -> v      with probability (alpha_s - (1 - rho) alpha_t) / (1 - alpha_t) p_0(v)

Given x_0 every rho has the marginals of the forward process, so ReMDM's sigma = rho, the Psi-samplers' kappa with
rho = (1 - kappa) (1 - alpha_s) and discrete DDIM's sigma with rho = 1 - alpha_s - (1 - alpha_t) sigma are one family on masks
(ReMDM goes farther: to kappa below 0). `strength` is the rule for rho:

    cap               min(eta, rho_max)                 ReMDM-cap; published eta 0.008 for 1024 steps
    rescale           eta rho_max                       ReMDM-rescale; published eta 0.015
    psi               eta (1 - alpha_s)                 constant kappa = 1 - eta; published kappa 0.99 (images)
    forward_backward  min((alpha_s - alpha_t) / alpha_t, rho_max)      the reverse and forward rates together
    loop              min(eta, rho_max) while alpha stands still at alpha_on; published eta 0.02, t_on 0.55, t_off 0.05
    learned           remask[k] rho_max

Tokens fall back in steps that start at a time in (t_off, t_on]; ReMDM-switch is `t_on` < 1. The loop makes its own alpha:
it rises linearly from 0 to alpha_on until t_on, stands still until t_off, and rises to 1. `times` and `timesteps` are those
at which the process has this alpha, so that a network with a time input sees the true noise level (it stands still too).

Exact in law for one position. With more, those that open in one step are drawn independently. Measured on two tokens, this
error falls as 1 / N with forward_backward, whose rho does so too; as 1 / sqrt(N) with a fixed eta, since only the last steps,
where rho_max is small, mend it; and not at all in the loop, which has stopped by then.

Sources: Wang et al. 2025 (ReMDM, arXiv 2503.00307), Deschenaux et al. 2026 (Psi, arXiv 2602.21185), Song et al.
2021 (DDIM, appendix A). ReMDM's code bounds neither the loop's rho nor that of forward-backward, and takes both ends of a
step that passes t_on or t_off from the same piece of alpha; DUO's code of rescale multiplies by eta twice.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, indicator, time_of_survival
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, FactorisedScheduler, Grid, ProcessName

Strength: TypeAlias = Literal["cap", "rescale", "psi", "forward_backward", "loop", "learned"]


class RemaskingScheduler(FactorisedScheduler):
    """Ancestral steps with remasking, for the absorbing process. Arguments not named here are those of
    [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`. For the loop it is the grid
            of the clock that t_on and t_off are read from.
        strength (`str`, defaults to `"rescale"`): `"cap"`, `"rescale"`, `"psi"`, `"forward_backward"`, `"loop"` or `"learned"`.
        eta (`float`, defaults to 0.015): The rule's number, in [0, 1]. Not read by `"forward_backward"` and `"learned"`.
        t_on (`float`, defaults to 1.0): Where remasking begins, in (t_off, 1]; below 1 for the loop.
        t_off (`float`, defaults to 0.0): Where it ends, in [0, t_on); above 0 for the loop.
        alpha_on (`float`, defaults to 0.9): Share of tokens while the loop stands still, in (0, 1).
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1]; ReMDM has 0.9.
        coefficients (`dict`, *optional*): `{"8": {"remask": [8 floats in [0, 1]]}}`, fractions of rho_max.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    processes = ("absorbing",)
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
        strength: Strength = "rescale",
        eta: float = 0.015,
        t_on: float = 1.0,
        t_off: float = 0.0,
        alpha_on: float = 0.9,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta}; allowed are numbers in [0, 1]")
        if not 0 <= t_off < t_on <= 1:
            raise ValueError(f"`t_off` and `t_on` are {t_off} and {t_on}; they must be 0 <= t_off < t_on <= 1")
        if not 0 < alpha_on < 1:
            raise ValueError(f"`alpha_on` is {alpha_on}; allowed are numbers in (0, 1)")
        if strength == "loop" and not (t_off > 0 and t_on < 1):
            raise ValueError(
                f"`strength='loop'` needs 0 < t_off and t_on < 1, not {t_off} and {t_on}: it stands between"
            )
        self.learned_block = "remask" if strength == "learned" else None
        self.prepare()
        if strength == "learned" and self.config.coefficients is None:
            raise ValueError("`strength='learned'` needs `coefficients` with a block 'remask' for each step budget")
        for budget, blocks in (self.config.coefficients or {}).items():
            if not all(0 <= value <= 1 for value in blocks.get("remask", [])):
                raise ValueError(f"`coefficients` for {budget} steps: 'remask' has fractions of the maximum, in [0, 1]")

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; also the steps that remask, and for the loop the times at which alpha is its own."""
        config = self.config
        # 1e-9: a time of the grid that is t_on or t_off but for rounding is meant to be it
        self.remasks = (times[:-1] > config.t_off + 1e-9) & (times[:-1] <= config.t_on + 1e-9)
        if config.strength == "loop":
            rising = (1 - times) * config.alpha_on / (1 - config.t_on)
            falling = 1 - times * (1 - config.alpha_on) / config.t_off
            alpha = torch.where(times <= config.t_off, falling, rising.clamp(max=config.alpha_on))
            times = time_of_survival(alpha, config.noise_schedule)
        super().set_grid(times, device)

    def remask_probability(self, index: int) -> float:
        """rho: P(a token becomes a mask in this step)."""
        if not self.remasks[index]:
            return 0.0
        t, s = self.times[index], self.times[index + 1]
        process, eta = self.absorbing_process, self.config.eta
        limit = float(process.remask_limit(t, s))
        if self.config.strength == "rescale":
            return eta * limit
        if self.config.strength == "psi":
            return eta * float(1 - process.alpha(s))
        if self.config.strength == "forward_backward":
            return min(limit, float((process.alpha(s) - process.alpha(t)) / process.alpha(t)))
        if self.config.strength == "learned":
            return self.learned("remask", len(self.remasks))[index] * limit
        return min(eta, limit)

    def open_probability(self, index: int) -> float:
        """P(a mask becomes a token in this step) = (alpha_s - (1 - rho) alpha_t) / (1 - alpha_t)."""
        t, s = self.times[index], self.times[index + 1]
        process = self.absorbing_process
        again = self.remask_probability(index) * process.alpha(t) / (1 - process.alpha(t))
        return min(1.0, float(process.unmask_probability(t, s) + again))

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The two lines of the equation, see [`FactorisedScheduler.transition`]."""
        index = self.step_index(timestep)
        opens, falls = self.open_probability(index), self.remask_probability(index)
        mask = self.noise_process.prior_law(sample.device)  # (V,)
        from_mask = opens * self.clean_law(model_output) + (1 - opens) * mask
        stays = indicator(sample, self.config.vocab_size)
        return torch.where(
            (sample == self.config.mask_token_id)[..., None], from_mask, (1 - falls) * stays + falls * mask
        )

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks that open in this step, see [`DiscreteScheduler.positions`]."""
        probability = self.chance(self.step_index(timestep))
        return self.open_masks(sample, probability, generator, "bernoulli", "random")

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens at the chosen masks, and a mask for each token that falls: that needs no logits, so it is drawn here."""
        moved = super().move_rows(rows, index, sample, generator)
        falls = self.remask_probability(index)
        if falls == 0:  # no draw: the samples are those of ancestral steps
            return moved
        is_token = sample != self.config.mask_token_id
        return moved.masked_fill(bernoulli_subset(is_token, falls, generator), self.config.mask_token_id)
