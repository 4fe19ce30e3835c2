r"""What samplers share that choose positions by what the network says of them (masked models).

    eligible   masks, or those of the leftmost block that has any (semi-autoregressive decoding)
    x_0^i ~ p_0 at each eligible position, a score for each of them; the chosen ones take their token

How many are due in a step is share * masks, with share = (alpha_s - alpha_t) / (1 - alpha_t): rounded up (LLaDA: the same as
its base count and one more in the first steps) or down (Dream). The last step opens all that is left. These samplers do
not draw from the model's joint law, whatever the number of steps: which position opens depends on its token.

A call opens masks of one block only, so that every token is drawn with all blocks before it finished (a network whose
attention goes by blocks knows nothing else). What is due is spread evenly over the calls that the block takes at this
pace: with masks everywhere, and a multiple of the blocks for steps, these are LLaDA's counts. A block is opened whole
where as many blocks as calls are left; only where there are fewer calls than blocks a call opens several.

Sources: Nie et al. 2025 (LLaDA), Ye et al. 2025 (Dream); blocks: Arriola et al. 2025 (BD3-LM) and LLaDA.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, RowLogits, draw_tokens, top_subset
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler

Rounding: TypeAlias = Literal["up", "down"]


def due_counts(is_masked: Tensor, share: float, rounding: Rounding, current: Tensor | None = None) -> Tensor:
    """A share of the masks (B, L) of each row as a whole number, int64 (B,).

    With `current`, bool (B, L), the masks of the current block: these are shared out evenly over the calls that they take at
    this pace.
    """
    expected = is_masked.sum(1, dtype=torch.float64) * share
    # 1e-9: what is a whole number but for rounding in float64 is meant to be one
    if current is not None:
        masks = current.sum(1, dtype=torch.float64)
        expected = masks / (masks / expected.clamp(min=1e-300) - 1e-9).ceil().clamp(min=1)
    return ((expected - 1e-9).ceil() if rounding == "up" else (expected + 1e-9).floor()).long()


def open_blocks(is_masked: Tensor, block_length: int | None, calls_left: int) -> tuple[Tensor, Tensor]:
    """Where masks may open in a call that goes by blocks from left to right.

    Args:
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool.
        block_length (`int`, *optional*): Positions of a block; `None`: one block.
        calls_left (`int`): Calls of the run, this one included.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The masks of the leftmost block that has any, bool (B, L), or of more blocks where
            there are more blocks than calls; and the rows that have no call to spare, bool (B,): there they all open.
    """
    length = is_masked.shape[1]
    width = block_length or max(length, 1)
    block = torch.arange(length, device=is_masked.device) // width
    masks = is_masked.new_zeros(len(is_masked), -(-length // width), dtype=torch.int64)
    masks = masks.index_add(1, block, is_masked.long())  # (B, blocks)
    blocks_left = (masks > 0).sum(1)  # (B,)
    number = (masks > 0).cumsum(1)[
        :, block
    ]  # (B, L), of each position's block among those with masks: 1 is the leftmost
    now = (blocks_left + calls_left - 1) // calls_left
    return is_masked & (number <= now[:, None]), blocks_left >= calls_left


def check_block_length(block_length: int | None) -> None:
    """Raises `ValueError` if a block length is not a positive number or `None`."""
    if block_length is not None and block_length < 1:
        raise ValueError(f"`block_length` is {block_length}; it must be at least 1, or None for one block")


class Prediction(NamedTuple):
    """What the network says at the eligible positions.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool, with R entries true.
        tokens (`torch.Tensor` of shape `(R,)`): A token drawn for each, int64.
        law (`torch.Tensor` of shape `(R, V)`): p(x_0 | x_t) of each before temperature and top-p, float32 or wider.
    """

    is_eligible: Tensor
    tokens: Tensor
    law: Tensor

    @property
    def token_probability(self) -> Tensor:
        """The probability of the drawn tokens, (R,)."""
        return self.law.gather(-1, self.tokens[:, None]).squeeze(-1)

    @property
    def margin(self) -> Tensor:
        """Difference of the two largest probabilities, (R,)."""
        best = self.law.topk(2, -1).values
        return best[:, 0] - best[:, 1]

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, (R,)."""
        return -torch.xlogy(self.law, self.law).sum(-1)

    def sheet(self, values: Tensor, elsewhere: Any = 0) -> Tensor:
        """Values (R,) at their positions, (B, L), and `elsewhere` at the others."""
        sheet = torch.full(self.is_eligible.shape, elsewhere, dtype=values.dtype, device=values.device)
        return sheet.masked_scatter(self.is_eligible, values)


class OrderScheduler(DiscreteScheduler):
    """Abstract: masks open in an order that the network's predictions decide. A concrete class has `choose`.

    Its config has `block_length`, if it goes by blocks, and `rounding`, if it opens the number `due` by the time grid. It reads
    the logits of all eligible positions: with blocks, of the current block only.
    """

    processes = ("absorbing",)
    chooses_by_logits = True

    def prepare(self) -> None:
        super().prepare()
        check_block_length(self.config.get("block_length"))

    @abstractmethod
    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The eligible positions that open in the call `index`, bool (B, L). Not asked in the last call: it opens all."""

    def due(self, sample: Tensor, index: int) -> Tensor:
        """How many masks of each row are to open, int64 (B,): by the time grid, where a class has no counts of its own."""
        is_masked = sample == self.config.mask_token_id
        share = float(self.absorbing_process.unmask_probability(self.times[index], self.times[index + 1]))
        current = None if self.config.get("block_length") is None else self.eligible(sample, index)
        return due_counts(is_masked, share, self.config.rounding, current)

    def eligible(self, sample: Tensor, index: int) -> Tensor:
        """Masks that may open now, bool (B, L): all of them, or those of the leftmost block that has any."""
        return self.blocks_now(sample, index)[0]

    def blocks_now(self, sample: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Eligible masks (B, L), and rows (B,) in which they all open: see `open_blocks`. In the last call all do."""
        is_masked = sample == self.config.mask_token_id
        return open_blocks(is_masked, self.config.get("block_length"), len(self.calls) - index)

    def take(self, score: Tensor, count: Tensor, is_eligible: Tensor) -> Tensor:
        """The `count` (B,) best eligible positions of each row by score (B, L), bool (B, L); all where these are fewer."""
        return top_subset(is_eligible, torch.minimum(count, is_eligible.sum(1)), score)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """The positions to choose from, see [`DiscreteScheduler.positions`]."""
        return self.eligible(sample, self.step_index(timestep))

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens for the chosen ones of the eligible positions, see [`DiscreteScheduler.move_rows`].

        Raises:
            ValueError: If the rows are not those that `positions` names.
        """
        is_eligible, opens_all = self.blocks_now(sample, index)
        if not torch.equal(rows.positions, is_eligible):
            raise ValueError("`model_output.positions` are not those that `positions` named for this step and sample")
        logits = self.token_logits(rows.logits)
        tokens = draw_tokens(RowLogits(logits, is_eligible), generator)
        filled = sample.masked_scatter(is_eligible, tokens)
        if index == len(self.calls) - 1:
            return filled
        prediction = Prediction(is_eligible, tokens, self.model_law(rows.logits))
        chosen = self.choose(prediction, index, sample, generator)
        return torch.where(chosen | opens_all[:, None], filled, sample)  # the same as before where nothing is eligible

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        is_eligible = self.eligible(sample, index)
        return self.move_rows(RowLogits(logits[is_eligible], is_eligible), index, sample, generator)

    def model_law(self, logits: Tensor) -> Tensor:
        """p(x_0 | x_t) as the network has it, (R, V): no mask, no temperature, no top-p; float32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
        logits[:, self.config.mask_token_id] = -torch.inf
        return logits.softmax(-1)
