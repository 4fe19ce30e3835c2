r"""P2, path planning with the network as its own planner: tokens that it no longer believes in become masks again.

    z ~ p(x_0 | x_t)
    score_i = stochasticity * p_i(z_i)  at a mask,  p_i(x_i)  at a token          p_i = p(x_0^i | x_t)
    the best kappa * L positions: masks among them take z_i, tokens stay; all others are masks

kappa is the share that is revealed at the end of the step by the time grid, (alpha_s - alpha_1) / (1 - alpha_1): linear in the
step for log-linear noise on the uniform grid, and 1 in the last one. A larger stochasticity ranks the masks higher, so that
more of the tokens fall back. A heuristic: it does not keep the model's law, and reads what a masked model says at positions
that are not masked, where nobody has trained it. Where it repeats the token with certainty, none falls back with a
stochasticity below 1 unless there are more than kappa L of them.

With blocks only the leftmost blocks that hold kappa L positions take part, beside tokens that stand farther right.

It counts as the paper does: kappa L of all L positions, prompts included. A scheduler does not know which tokens are frozen: a
prompt token can be ranked below the rest, and the pipeline then puts it back; there are fewer masks then, by as many.

Released code scales log p by the stochasticity, at tokens or (in copies) at masks: an exponent, which at masks acts
in the opposite direction. It scores a token by the probability of a fresh draw at its place, and takes it from logits with
the noise of that draw. Here a token's score is its own probability, before temperature and top-p.

Source: Peng et al. 2025 (P2, arXiv 2502.03540, eq. 7 and algorithm 1).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, check_finite, top_subset
from discrete_schedulers.schedulers.order_utils import check_block_length, token_probabilities
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName


class PathPlanningScheduler(DiscreteScheduler):
    """Opens the best tokens and masks the worst again. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`: the planned shares.
        stochasticity (`float`, defaults to 1.0): The paper's eta, not negative. 0 keeps every token that fits in.
        block_length (`int`, *optional*): Positions of a block; blocks are taken in from left to right. `None`: one block.
        temperature (`float`, defaults to 1.0): Divides the logits of z; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"stochasticity": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    processes = ("absorbing",)
    revises_tokens = True
    learned_knobs = {"stochasticity": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        stochasticity: float = 1.0,
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        check_block_length(block_length)
        self.prepare()

    def num_masks(self, index: int, length: int) -> int:
        """How many of L positions are masks after the call `index`: (1 - kappa) L, rounded down."""
        process = self.absorbing_process
        share = (1 - process.alpha(self.times[index + 1])) / (1 - process.alpha(self.times[0]))
        # 1e-9: what is a whole number but for rounding in float64 is meant to be one
        return int(float(share) * length + 1e-9)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """`None`, all; the masks where none of the positions is to be a mask afterwards, as in the last step. See
        [`DiscreteScheduler.positions`]."""
        if self.num_masks(self.step_index(timestep), sample.shape[1]):
            return None
        return sample == self.config.mask_token_id

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """A token for each mask: all open. See [`DiscreteScheduler.move_rows`].

        Raises:
            ValueError: If the rows are not the masks, or the step needs all logits.
        """
        is_masked = sample == self.config.mask_token_id
        if self.num_masks(index, sample.shape[1]) or not torch.equal(rows.positions, is_masked):
            raise ValueError("`model_output.positions` are not those that `positions` named for this step and sample")
        return rows.put(self.clean_tokens(rows, index, sample, generator), sample)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The best positions, and masks elsewhere, see [`DiscreteScheduler.move_all`]."""
        mask, length = self.config.mask_token_id, sample.shape[1]
        is_masked = sample == mask
        rows = RowLogits.chosen(logits, is_masked)
        tokens = rows.put(self.clean_tokens(rows, index, sample, generator), sample)
        everywhere, column = RowLogits.everywhere(logits), self.absorbing_process.mask_token_id
        belief = token_probabilities(everywhere, column, tokens.flatten()).view(tokens.shape).double()  # (B, L)
        check_finite(belief)
        score = torch.where(is_masked, self.per_step("stochasticity", index) * belief, belief)
        count = length - self.num_masks(index, length)
        block = self.config.block_length or length
        is_near = torch.arange(length, device=sample.device) < math.ceil(count / block) * block  # (L,)
        counts = torch.full((len(sample),), count, device=sample.device)
        return torch.where(top_subset(is_near | ~is_masked, counts, score), tokens, mask)
