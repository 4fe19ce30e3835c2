r"""k-Gillespie: every position has an exponential clock; each call lets the k earliest of them ring.

    tau_i = E_i / R_i,    E_i ~ Exp(1),    R_i = sum_v R_t(x_t^i -> v);    the k smallest: x^i -> v ~ R_t(x_t^i -> v) / R_i

k_j is a share of the length: floor(L (j + 1) / N) - floor(L j / N), or what was learned. Rows with known tokens have fewer
masks than L; of theirs the same share of what is left opens.

Absorbing noise: masks have one rate and tokens have none, so the k earliest are a random subset, and one token for each call
is an exact draw from the model's any-order law. Uniform noise: rates differ and change as soon as a token jumps, and L jumps
for L positions is the published number and not the process's own. It is a heuristic, not exact even for k = 1.

Sources: Zhao et al. 2024 (arXiv 2407.21243, algorithm 1), Park et al. 2024 (Jump Your Steps, arXiv 2410.07761). The latter's
code is for absorbing noise, moves the network's time on by the largest of the k clocks at the rates of the call's start, and
adds 1e-6 to rates and to the argument of the logarithm. Here the network's time is the grid's, and clocks are exact.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, NoiseSchedule
from discrete_schedulers.sampling import (
    Generators,
    RowLogits,
    check_finite,
    draw_tokens,
    top_subset,
    uniform_subset,
    uniforms,
)
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName


class GillespieScheduler(DiscreteScheduler):
    """The k earliest jumps in each call, for absorbing and uniform processes.

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"` or `"uniform"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`: times for the network and,
            with uniform noise, for the rates.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): `{"4": {"counts": [1, 2, 4, 9]}}`: whole numbers that sum to the length.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

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
        for budget, blocks in (self.config.coefficients or {}).items():
            if any(value < 0 or value != int(value) for value in blocks.get("counts", [])):
                raise ValueError(f"`coefficients` for {budget} steps: 'counts' are whole numbers, 0 or more")

    def counts(self, length: int) -> list[int]:
        """k_j of each call, for rows in which nothing is known.

        Raises:
            ValueError: If there are learned counts for other budgets only, or their sum is not the length.
        """
        steps = len(self.calls)
        if not self.is_learned("counts"):
            return [length * (j + 1) // steps - length * j // steps for j in range(steps)]
        counts = [int(value) for value in self.learned("counts", steps)]
        if sum(counts) != length:
            raise ValueError(f"'counts' for {steps} steps sum to {sum(counts)}, but `sample` has {length} positions")
        return counts

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that open in this call; with uniform noise `None`, since rates depend on the logits, or none of them where
        no clock is to ring. See [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        counts = self.counts(sample.shape[1])
        if not isinstance(self.noise_process, AbsorbingProcess):
            return None if counts[index] else torch.zeros_like(sample, dtype=torch.bool)
        is_masked = sample == self.config.mask_token_id
        masks, left = is_masked.sum(1), sum(counts[index:])
        count = (masks.double() * counts[index] / max(left, 1)).round().long()  # k_j itself where nothing was known
        return uniform_subset(is_masked, masks if index == len(counts) - 1 else count, generator)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` with a token from p_0 at each of the chosen masks, see [`DiscreteScheduler.move_rows`]."""
        return rows.put(draw_tokens(rows, generator, lambda logits, _: self.token_logits(logits)), sample)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """A jump at each of the k positions whose clocks ring first, uniform noise. See [`DiscreteScheduler.move_all`]."""
        rates = self.noise_process.reverse_rate(
            sample, self.shaped_law(logits, index, sample), self.times[index]
        )  # (B, L, V)
        total = rates.sum(-1)
        check_finite(total)
        clock = -torch.log1p(-uniforms(tuple(sample.shape), generator, sample.device)) / total
        count = torch.full((len(sample),), self.counts(sample.shape[1])[index], device=sample.device)
        rings = top_subset(torch.ones_like(sample, dtype=torch.bool), count, -clock)
        tokens = draw_tokens(RowLogits(rates[rings].log(), rings), generator)
        return sample.masked_scatter(rings, tokens)
