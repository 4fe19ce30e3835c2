r"""What samplers share that choose positions by what the network says of them (masked models).

    eligible   masks, or those of the leftmost block that has any (semi-autoregressive decoding)
    x_0^i ~ p_0 at each eligible position, a score for each of them; the chosen ones take their token

How many are due in a step is share * masks, with share = (alpha_s - alpha_t) / (1 - alpha_t): rounded up (LLaDA: the same as
its base count and one more in the first steps) or down (Dream). The last step opens all that is left. These samplers do
not draw from the model's joint law, whatever the number of steps: which position opens depends on its token.

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


def due_counts(is_masked: Tensor, share: float, rounding: Rounding) -> Tensor:
    """A share of the masks (B, L) of each row as a whole number, int64 (B,)."""
    expected = is_masked.sum(1, dtype=torch.float64) * share
    # 1e-9: what is a whole number but for rounding in float64 is meant to be one
    return ((expected - 1e-9).ceil() if rounding == "up" else (expected + 1e-9).floor()).long()


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
        share = float(self.absorbing_process.unmask_probability(self.times[index], self.times[index + 1]))
        return due_counts(sample == self.config.mask_token_id, share, self.config.rounding)

    def eligible(self, sample: Tensor, index: int) -> Tensor:
        """Masks that may open now, bool (B, L): all of them, or those of the leftmost blocks that hold the number due."""
        is_masked = sample == self.config.mask_token_id
        if self.config.get("block_length") is None or index == len(self.calls) - 1:
            return is_masked
        before = self.masks_in_blocks_before(is_masked)
        return is_masked & (before < self.due(sample, index).clamp(min=1)[:, None])

    def masks_in_blocks_before(self, is_masked: Tensor) -> Tensor:
        """For each position the masks of its row that stand in earlier blocks, int64 (B, L)."""
        up_to = torch.nn.functional.pad(is_masked.cumsum(1), (1, 0))  # (B, L + 1), masks before each place
        place = torch.arange(is_masked.shape[1], device=is_masked.device)
        return up_to[:, place - place % self.config.block_length]

    def take(self, score: Tensor, count: Tensor, is_eligible: Tensor) -> Tensor:
        """The `count` (B,) best eligible positions of each row by score (B, L), earlier blocks first, bool (B, L)."""
        count = torch.minimum(count, is_eligible.sum(1))
        if self.config.get("block_length") is not None:
            length = score.shape[1]
            ranked = score.masked_fill(~is_eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
            rank = ranked.argsort(1)
            block = torch.arange(length, device=score.device) // self.config.block_length
            score = -(block * length + rank).double()
        return top_subset(is_eligible, count, score)

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """The positions to choose from, see [`DiscreteScheduler.positions`]."""
        return self.eligible(sample, self.step_index(timestep))

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """Tokens for the chosen ones of the eligible positions, see [`DiscreteScheduler.move_rows`].

        Raises:
            ValueError: If the rows are not those that `positions` names.
        """
        is_eligible = self.eligible(sample, index)
        if not torch.equal(rows.positions, is_eligible):
            raise ValueError("`model_output.positions` are not those that `positions` named for this step and sample")
        logits = self.token_logits(rows.logits)
        tokens = draw_tokens(RowLogits(logits, is_eligible), generator)
        filled = sample.masked_scatter(is_eligible, tokens)
        if index == len(self.calls) - 1:
            return filled
        prediction = Prediction(is_eligible, tokens, self.model_law(rows.logits))
        return torch.where(self.choose(prediction, index, sample, generator), filled, sample)

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        is_eligible = self.eligible(sample, index)
        return self.move_rows(RowLogits(logits[is_eligible], is_eligible), index, sample, generator)

    def model_law(self, logits: Tensor) -> Tensor:
        """p(x_0 | x_t) as the network has it, (R, V): no mask, no temperature, no top-p; float32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
        logits[:, self.config.mask_token_id] = -torch.inf
        return logits.softmax(-1)
