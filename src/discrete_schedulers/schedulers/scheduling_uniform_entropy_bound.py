r"""diffusers' adaptation of EB-Sampler to uniform noise: keep what fits the bound, make the rest noise again.

    p_i       softmax(logits_i / T),   T from `first_temperature` down to `last_temperature`, linear in the step
    accepted  the n positions of lowest entropy, n the largest with   sum_i H_i - max_i H_i <= entropy_bound
    x_s^i     drawn from p_i where accepted, a uniformly random token elsewhere

There is no mask, so all L positions are drawn anew in every step and nothing remembers what was accepted before: a network
that sees a token as right keeps it, by its low entropy. The last step accepts all, as the final denoising call does in every
scheduler here (diffusers leaves noise in what is not accepted). A heuristic: unlike that of masks it has no bound on its error
and no law that it tends to; the time grid only tells the network how noisy to take x_t.

Differs from the absorbing [`EntropyBoundScheduler`] in all but the bound: entropies are those of the annealed law,
and no number is due.

Sources: diffusers 0.42 (`EntropyBoundScheduler`); Ben-Hamu et al. 2025 (EB-Sampler, arXiv 2505.24857).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, RowWeights, draw_shaped, top_subset, uniforms, weigh
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName


class UniformEntropyBoundScheduler(DiscreteScheduler):
    """Keeps tokens up to a bound on their dependence. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits.
        mask_token_id (`int`, *optional*): `None`: there is no mask.
        process (`str`, defaults to `"uniform"`): Only `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"` or `"learned"`.
        entropy_bound (`float`, defaults to 0.1): In nats, not negative.
        first_temperature (`float`, defaults to 0.8): T of the first step, positive: of the tokens and the entropies.
        last_temperature (`float`, defaults to 0.4): T that the steps go down to; the last of N has 1 / N of the way left.
        temperature (`float`, defaults to 1.0): Divides the logits once more, for the tokens only; 0 takes the most probable.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"entropy_bound": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Not read: it counts masks.
    """

    processes = ("uniform",)
    learned_knobs = {"entropy_bound": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "uniform",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        entropy_bound: float = 0.1,
        first_temperature: float = 0.8,
        last_temperature: float = 0.4,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        for name, value in (("first_temperature", first_temperature), ("last_temperature", last_temperature)):
            if not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be positive")

    def annealing(self, index: int) -> float:
        """T of the step."""
        first, last, steps = self.config.first_temperature, self.config.last_temperature, len(self.calls)
        return last + (first - last) * (steps - index) / steps

    def annealed(self, logits: Tensor, index: int) -> Tensor:
        """Logits (..., V) divided by T of the step, float32 or wider."""
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.annealing(index)

    def is_shaped(self, index: int) -> bool:
        """Always: the logits are annealed. See [`DiscreteScheduler.is_shaped`]."""
        return True

    def shaped_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Annealed, and then as in every scheduler. See [`DiscreteScheduler.shaped_logits`]."""
        return self.token_logits(self.annealed(logits, index))

    def weighed(self, logits: Tensor, index: int) -> RowWeights:
        """The annealed laws of all positions and, but for the last step, what their entropies need: one pass."""
        rows, is_last = RowLogits.everywhere(logits), index == len(self.calls) - 1
        return weigh(rows, 1 / self.annealing(index), with_entropy=not is_last)

    def accepted(self, weights: RowWeights, index: int) -> Tensor:
        """The positions within the bound, bool (B, L), from `weighed`; all in the last step."""
        everywhere = weights.rows.positions
        if index == len(self.calls) - 1:
            return everywhere
        entropy = weights.entropy().view(everywhere.shape)
        ranked = entropy.sort(dim=1, stable=True).values
        count = (ranked.cumsum(1) - ranked <= self.per_step("entropy_bound", index)).sum(1)
        return top_subset(everywhere, count, -entropy)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> None:
        """`None`: every position is drawn anew. See [`DiscreteScheduler.positions`]."""

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """See [`DiscreteScheduler.move_rows`].

        Raises:
            ValueError: If positions are missing.
        """
        if not rows.positions.all():
            raise ValueError("`model_output` has logits of some positions only; this scheduler needs all of them")
        return self.move_all(rows.logits.view(*sample.shape, -1), index, sample, generator)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens where accepted, noise elsewhere, see [`DiscreteScheduler.move_all`]."""
        u = uniforms(tuple(sample.shape), generator, sample.device).flatten()
        moved = self.noise_process.prior(tuple(sample.shape), generator, sample.device)
        weights = self.weighed(logits, index)
        weights.check()
        chosen = self.accepted(weights, index)
        if self.config.temperature == 1 and self.config.top_p == 1:
            tokens = weights.draw(u)
        else:
            tokens = draw_shaped(weights.rows, u, lambda some, _: self.token_logits(self.annealed(some, index)))
        return torch.where(chosen, tokens.view(sample.shape), moved)
