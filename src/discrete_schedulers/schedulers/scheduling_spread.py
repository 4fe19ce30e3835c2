r"""Spread orders: the tokens of one step stand far from each other, by an order that does not look at the predictions.

    farthest         each pick has the largest distance to all known places and earlier picks
    dilated          multiples of ceil(L / 2), then of ceil(L / 4), ..., then the rest, each group from left to right
    van_der_corput   floor(phi_2(n) L): bit-reversed places
    halton           (floor(phi_2(n) H), floor(phi_3(n) W)): images

See `spread_subset` for the first and `position_orders` for the others, which follow a random cyclic shift in each row. In each
step the next ceil or floor of share * masks places open, share = (alpha_s - alpha_t) / (1 - alpha_t), each to v ~ p_0.

Exact in law for one token per step, whatever the order. With more, the error is the dependence between tokens that open
in the same step, given what is known: small where near tokens depend on each other most (text, images), nothing gained
where dependence knows no distance. Where a sequence of 2^k tokens opens in counts of 2^j all patterns do equally well; with
other counts, or after a prompt, farthest picks end with neighbours in one step. On a Markov chain of 32 tokens at 4 calls
the KL is 0.05 for each of them and 5.9 for a random order; with 11 tokens known it is 1.9, 0.2 and 0.5 in the order above,
4.4 for a random one. A block is a ring of its own.

Where it differs from the papers: DUS opens one stride per call and rounds strides down, which for L = 12 opens neighbours
in the same call; here the budget decides how many open. The Halton sampler's published 10,000 points never reach 6 cells of
a 64 x 64 grid, 1,787 of 96 x 96 and 7,116 of 128 x 128, which keep the mask; here the points go on until every cell is
reached. It leaves 2 / pi arccos(k / N) of the masks after k of N steps, here the time grid says how many.

Sources: Luxembourg et al. 2025 (DUS, arXiv 2506.19037); Besnier et al. 2025 (Halton scheduler for MaskGIT, ICLR).
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, spread_subset
from discrete_schedulers.schedulers.order_utils import Rounding, check_block_length, due_counts, open_blocks
from discrete_schedulers.schedulers.position_orders import Pattern, ordered_subset, pattern_ranks
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, FactorisedScheduler, Grid, ProcessName


class SpreadScheduler(FactorisedScheduler):
    """Ancestral sampling with fixed counts in a spread order. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open.
        pattern (`str`, defaults to `"farthest"`): `"farthest"`, `"dilated"`, `"van_der_corput"` (sequences) or
            `"halton"` (images).
        grid_shape (`list[int]`, *optional*): (height, width) of an image, height * width = L; `None` for a sequence.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right, each in its own spread order;
            `None` is one block. For sequences.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"times": [...]}}`.
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
        pattern: Pattern = "farthest",
        grid_shape: list[int] | None = None,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        check_block_length(block_length)
        if pattern == "halton" and grid_shape is None:
            raise ValueError(
                "`pattern='halton'` needs `grid_shape`: (height, width); for sequences there is 'van_der_corput'"
            )
        if pattern == "van_der_corput" and grid_shape is not None:
            raise ValueError(
                "`pattern='van_der_corput'` is for sequences; with `grid_shape` there are the other patterns"
            )
        if block_length is not None and grid_shape is not None:
            raise ValueError("`block_length` and `grid_shape` cannot both be given: blocks are for sequences")

    def transition(self, model_output: Tensor, timestep: int | float | Tensor, sample: Tensor) -> Tensor:
        """q(x_s | x_t, p_0), see [`FactorisedScheduler.transition`]: the law of each position where the number due is a whole
        one, while positions of a row exclude each other."""
        index = self.step_index(timestep)
        t, s = self.times[index], self.times[index + 1]
        return self.noise_process.posterior(sample, self.clean_law(model_output), t, s)

    def open_probability(self, index: int) -> float:
        """Share of the masks that is due in this step, (alpha_s - alpha_t) / (1 - alpha_t)."""
        return float(self.absorbing_process.unmask_probability(self.times[index], self.times[index + 1]))

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks that open in this step, see [`DiscreteScheduler.positions`]."""
        index, length = self.step_index(timestep), max(sample.shape[1], 1)
        is_masked, share = sample == self.config.mask_token_id, self.open_probability(index)
        current, opens_all = open_blocks(is_masked, self.config.block_length, len(self.calls) - index)
        by_blocks = None if self.config.block_length is None else current
        left = due_counts(is_masked, share, self.config.rounding, by_blocks)  # (B,)
        left = torch.where(opens_all, current.sum(1), left)
        chosen = []
        for block in current.split(self.config.block_length or length, dim=1):
            count = torch.minimum(left, block.sum(1))
            chosen.append(self.spread(block, count, generator))
            left = left - count
        return torch.cat(chosen, dim=1)

    def spread(self, is_masked: Tensor, count: Tensor, generator: Generators) -> Tensor:
        """`count` (B,) masks of each row of a block (B, L'), in the order of the pattern."""
        shape = None if self.config.grid_shape is None else tuple(self.config.grid_shape)
        if self.config.pattern == "farthest":
            return spread_subset(is_masked, count, generator, shape)
        height, width = shape or (1, is_masked.shape[1])
        return ordered_subset(is_masked, count, generator, pattern_ranks(self.config.pattern, height, width))
