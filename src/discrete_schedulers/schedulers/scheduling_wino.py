r"""Wide in, narrow out (WINO): many tokens open at once, and each call checks those that earlier calls opened.

    draft    masks open with  p(x_0^i = drawn token | x_t) > accept_threshold:  at least one, at most `accept_share` of the
             masks (a number that is kept between 5 and 20), the most confident first
    verify   tokens become masks again with  p(x^i | x_t without i) < remask_threshold:  only if more than one opened, fewer
             of them than opened in the call before, the least confident first

Both read one call at x_t. The law of a token that the network sees, given the others, must come from a hollow network or from
shadow masks (`needs_revealed_logits`). Only tokens that this run opened are verified: which and how many is its memory.

A heuristic: it does not keep the model's law. `num_inference_steps` caps the calls, and a sample without masks costs none. At
least as many open as the time grid has due, so that the last call, which opens all and verifies nothing, is not a flood:
with as many calls as masks that is the published one.

Source: WINO (Hong et al. 2025, `decoding_wino`). There the shadow of a token also sees the shadows of the others, so that it
reads a mask beside each of their tokens; here it sees the tokens only, and with one layer it is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowLogits, top_subset
from discrete_schedulers.schedulers.order_utils import OrderScheduler, Prediction, Rounding, token_probabilities
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName, check_knob

FEWEST, MOST = 5, 20  # what the largest number of accepted tokens is kept between, whatever the share


class Memory(NamedTuple):
    """What a call knows of the calls before: the tokens they opened, bool (B, L), and how many the last one did, (B,)."""

    opened: Tensor
    last_accept: Tensor


class WINOScheduler(OrderScheduler):
    """Drafts and verifies in each call. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open at least.
        accept_threshold (`float`, defaults to 0.6): Probability above which a drafted token opens, in [0, 1].
        remask_threshold (`float`, defaults to 0.9): Probability below which an opened token falls, in [0, 1]; 0 verifies none.
        accept_share (`float`, defaults to 0.7): Share of the masks that may open in a call, in [0, 1].
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right, and verifies the current one; `None`
            is one block.
        temperature (`float`, defaults to 1.0): Divides the logits of drafts; 0 takes the most probable token, as published.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"accept_threshold": [8 floats]}}`, or
            `"remask_threshold"`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.

    Raises:
        ValueError: If a threshold or the share lies outside [0, 1].
    """

    revises_tokens = True
    needs_revealed_logits = True
    learned_knobs = {"accept_threshold": "numbers in [0, 1]", "remask_threshold": "numbers in [0, 1]"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        accept_threshold: float = 0.6,
        remask_threshold: float = 0.9,
        accept_share: float = 0.7,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        check_knob(self.config, "accept_share", "numbers in [0, 1]")

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; a new run has no memory."""
        super().set_grid(times, device)
        self.memories: dict[int, Memory] = {}  # by the call that reads it

    def memory(self, index: int, sample: Tensor) -> Memory:
        """What the call `index` knows: nothing, in the first one.

        Raises:
            ValueError: If `sample` has another shape than in the call before.
        """
        nothing = Memory(torch.zeros_like(sample, dtype=torch.bool), sample.new_zeros(len(sample)))
        known = self.memories.get(index, nothing) if index > 0 else nothing
        if known.opened.shape != sample.shape:
            shapes = tuple(sample.shape), tuple(known.opened.shape)
            raise ValueError(
                f"`sample` has shape {shapes[0]}, but this run has {shapes[1]}: `set_timesteps` begins a new one"
            )
        return known

    def verified(self, sample: Tensor, index: int) -> Tensor:
        """Tokens to check, bool (B, L): those that this run opened, in the first block with masks; none in the last call."""
        is_masked = sample == self.config.mask_token_id
        checked = self.memory(index, sample).opened & ~is_masked & is_masked.any(1, keepdim=True)
        if index == len(self.calls) - 1:
            return torch.zeros_like(checked)
        if self.config.block_length is None or checked.numel() == 0:
            return checked
        block = torch.arange(sample.shape[1], device=sample.device) // self.config.block_length
        first = is_masked.long().argmax(1, keepdim=True)  # the first mask of each row
        return checked & (block == first // self.config.block_length)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Masks to choose from and tokens to check, see [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        return self.eligible(sample, index) | self.verified(sample, index)

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The drafted tokens that open. See [`OrderScheduler.choose`]."""
        confidence = prediction.sheet(prediction.token_probability.double(), -torch.inf)  # (B, L)
        accepted = (confidence > self.per_step("accept_threshold", index)).sum(1)
        limit = (prediction.is_eligible.sum(1) * self.config.accept_share).long().clamp(FEWEST, MOST)
        at_least = self.due(sample, index).clamp(min=1)
        return self.take(confidence, accepted.minimum(limit).maximum(at_least), prediction.is_eligible)

    def falls(self, rows: RowLogits, num_accepted: Tensor, index: int, sample: Tensor) -> Tensor:
        """Checked tokens that become masks again, bool (B, L), from their logits (R, V)."""
        mask = self.absorbing_process.mask_token_id
        now = token_probabilities(rows, mask, sample[rows.positions])  # (R,)
        belief = torch.zeros(sample.shape, dtype=now.dtype, device=now.device).masked_scatter(rows.positions, now)
        doubted = rows.positions & (belief < self.per_step("remask_threshold", index)) & (num_accepted > 1)[:, None]
        count = doubted.sum(1).minimum((self.memory(index, sample).last_accept - 1).clamp(min=0))
        return top_subset(doubted, count, -belief)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` with drafted tokens at some masks, and masks at some tokens. See [`DiscreteScheduler.move_rows`]."""
        is_eligible, checked = self.eligible(sample, index), self.verified(sample, index)
        if not torch.equal(rows.positions, is_eligible | checked):
            raise ValueError("`model_output.positions` are not those that `positions` named for this step and sample")
        drafts, others = rows.among(is_eligible), rows.among(checked)
        drafted = super().move_rows(drafts, index, sample, generator)
        accepted = drafted != sample
        falls = self.falls(others, accepted.sum(1), index, sample)
        before = self.memory(index, sample)
        after = Memory((before.opened | accepted) & ~falls, accepted.sum(1))
        self.memories = {index: before, index + 1: after}  # of this call too: it may be asked for again
        return drafted.masked_fill(falls, self.config.mask_token_id)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        chosen = self.positions(index, sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)
