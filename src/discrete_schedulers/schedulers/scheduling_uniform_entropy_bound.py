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
from discrete_schedulers.sampling import Generators, RowLogits, draw_tokens, positive_weights, top_subset
from discrete_schedulers.schedulers.order_utils import entropy_of, normalised
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
        if not entropy_bound >= 0:
            raise ValueError(f"`entropy_bound` is {entropy_bound}; it cannot be negative")
        for name, value in (("first_temperature", first_temperature), ("last_temperature", last_temperature)):
            if not value > 0:
                raise ValueError(f"`{name}` is {value}; it must be positive")

    def annealed(self, logits: Tensor, index: int) -> Tensor:
        """Logits (..., V) divided by T of the step, float32 or wider."""
        first, last, steps = self.config.first_temperature, self.config.last_temperature, len(self.calls)
        annealing = last + (first - last) * (steps - index) / steps
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / annealing

    def is_shaped(self, index: int) -> bool:
        """Always: the logits are annealed. See [`DiscreteScheduler.is_shaped`]."""
        return True

    def shaped_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Annealed, and then as in every scheduler. See [`DiscreteScheduler.shaped_logits`]."""
        return self.token_logits(self.annealed(logits, index))

    def accepted(self, logits: Tensor, index: int) -> Tensor:
        """The positions within the bound, bool (B, L), from logits (B, L, V); all in the last step."""
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        if index == len(self.calls) - 1:
            return everywhere
        rows = (self.annealed(some, index) for _, some in RowLogits.everywhere(logits).chunks())
        entropies = [entropy_of(some, normalised(positive_weights(some))).double() for some in rows]
        entropy = torch.cat([everywhere.new_empty(0, dtype=torch.float64), *entropies]).view(logits.shape[:2])
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
        everywhere = RowLogits.everywhere(logits)
        tokens = draw_tokens(everywhere, generator, lambda some, _: self.token_logits(self.annealed(some, index)))
        noise = self.noise_process.prior(tuple(sample.shape), generator, sample.device)
        return torch.where(self.accepted(logits, index), tokens.view(sample.shape), noise)
