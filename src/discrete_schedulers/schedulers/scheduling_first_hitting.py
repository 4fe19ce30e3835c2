r"""First hitting: the order in which masks open, drawn without a time grid.

    count = ceil(masks left / calls left),   a uniformly random set of that many masks opens, each to v ~ p_0

In continuous time all masks of a row have one hazard, so the next one to open is uniformly random, and a network without
time input does not care when that was: one token for each call is an exact draw from the model's any-order law. A run of N
calls opens a row of M masks in min(N, M) of them: with fewer calls than masks they open in groups of (nearly) equal size,
exact up to the dependence inside a group; after M calls nothing is left to do, which costs no call.

Counts do not depend on `grid` and `noise_schedule`; these only make the time that is passed to the network. A network with
a time input thus sees the grid's time and not the random time at which the published sampler's next mask opens,
tau <- alpha^-1(1 - u^(1/n) (1 - alpha_tau)): on the uniform grid of log-linear noise it is the one at which the share of
masks is the expected one.

Source: Zheng et al. 2024 (arXiv 2409.02908, first-hitting sampler and its parallel form).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, indicator
from discrete_schedulers.sampling import Generators, uniform_subset
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, FactorisedScheduler, Grid, ProcessName


class FirstHittingScheduler(FactorisedScheduler):
    """One random mask at a time, or as few as the number of calls allows, for the absorbing process. Arguments not named here
    are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`: times for the network.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    processes = ("absorbing",)

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
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def count(self, masks: Tensor, index: int) -> Tensor:
        """How many of the masks left (B,) open in this call, int64 (B,): ceil(masks / calls left)."""
        calls_left = len(self.calls) - index
        return (masks + calls_left - 1) // calls_left

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """The law of each position, while positions of a row exclude each other: see [`FactorisedScheduler.transition`]."""
        is_masked = sample == self.config.mask_token_id
        masks = is_masked.sum(1)  # (B,)
        opens = (self.count(masks, self.step_index(timestep)) / masks.clamp(min=1).double())[:, None, None]
        mask = self.noise_process.prior_law(sample.device)  # (V,)
        from_mask = opens * self.clean_law(model_output) + (1 - opens) * mask
        stays = indicator(sample, self.config.vocab_size)
        return torch.where(is_masked[..., None], from_mask, stays)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks that open in this call, see [`DiscreteScheduler.positions`]."""
        is_masked = sample == self.config.mask_token_id
        return uniform_subset(is_masked, self.count(is_masked.sum(1), self.step_index(timestep)), generator)
