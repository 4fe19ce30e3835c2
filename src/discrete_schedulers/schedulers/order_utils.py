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
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import (
    BLOCK,
    Generators,
    RowFunction,
    RowLogits,
    RowWeights,
    draw_shaped,
    drawn_from,
    top_subset,
    uniforms,
    weigh,
)
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler

Rounding: TypeAlias = Literal["up", "down"]
Measure: TypeAlias = Literal["token_probability", "max_probability", "margin", "entropy", "law"]


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


def top_two(law: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest of each row (r, V): the second is among the other blocks' largest, or in the block of the first."""
    width = law.shape[1]
    if width < 4 * BLOCK:
        few = law.topk(2, -1).values
        return few[:, 0], few[:, 1]
    whole = width // BLOCK * BLOCK
    best = [law[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1)]
    best += [law[:, whole:].amax(-1, keepdim=True)] if whole < width else []
    largest, block = torch.cat(best, dim=1).topk(2, -1)
    place = block[:, :1] * BLOCK + torch.arange(BLOCK, device=law.device)  # (r, BLOCK)
    inside = law.gather(1, place.clamp(max=width - 1)).masked_fill_(place >= width, 0.0).topk(2, -1).values
    return inside[:, 0], torch.maximum(inside[:, 1], largest[:, 1])


MEASURED: dict[str, Callable[[Tensor, slice], Tensor]] = {
    "max_probability": lambda weights, _: weights.amax(-1),
    "margin": lambda weights, _: torch.sub(*top_two(weights)),
    "law": lambda weights, _: weights.clone(),
}


def measured(weights: RowWeights, name: Measure, tokens: Tensor | None) -> Tensor:
    """A measure of each row, from what was found of its weights, and of its token (R,) for `"token_probability"`."""
    if name == "entropy":
        return weights.entropy()
    if name not in weights.found:
        assert tokens is not None
        return weights.probability(tokens)
    found = weights.found[name]
    return found.div_(weights.total.to(found.dtype).view(-1, *[1] * (found.dim() - 1)))


def token_probabilities(rows: RowLogits, mask_token_id: int, tokens: Tensor) -> Tensor:
    """p(token | x_t) for a token (R,) of each row as the network has it: no mask, no temperature; float64."""
    return weigh(rows, without=mask_token_id).probability(tokens)


class Prediction(NamedTuple):
    """What the network says at the eligible positions. What is measured is what the class `reads`.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool, with R entries true.
        draw (`Callable`): Some of these positions, bool (B, L), to a token for each, int64; a position's is always the same.
        measures (`dict[str, torch.Tensor]`): By their names, (R,), or (R, V) for the law itself; float32 or wider.
    """

    is_eligible: Tensor
    draw: Callable[[Tensor], Tensor]
    measures: Mapping[Measure, Tensor]

    @property
    def tokens(self) -> Tensor:
        """A token drawn for each, (R,), int64."""
        return self.draw(self.is_eligible)

    @property
    def token_probability(self) -> Tensor:
        """The probability of the drawn tokens, (R,)."""
        return self.measures["token_probability"]

    @property
    def max_probability(self) -> Tensor:
        """The largest probability, (R,)."""
        return self.measures["max_probability"]

    @property
    def margin(self) -> Tensor:
        """Difference of the two largest probabilities, (R,)."""
        return self.measures["margin"]

    @property
    def entropy(self) -> Tensor:
        """Entropy in nats, (R,)."""
        return self.measures["entropy"]

    @property
    def law(self) -> Tensor:
        """The law itself, (R, V)."""
        return self.measures["law"]

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
        is_last = index == len(self.calls) - 1
        prediction = self.predict(rows, () if is_last else self.reads(), generator)
        chosen = is_eligible if is_last else self.choose(prediction, index, sample, generator)
        opened = is_eligible & (chosen | opens_all[:, None])
        return sample.masked_scatter(opened, prediction.draw(opened))

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        return self.move_rows(RowLogits.chosen(logits, self.eligible(sample, index)), index, sample, generator)

    def reads(self) -> tuple[Measure, ...]:
        """What `choose` reads of a prediction, beside its tokens."""
        return ("token_probability",)

    def scored_logits(self) -> RowFunction | None:
        """What makes the logits of the law that is measured, from logits (r, V) without a mask. `None`: p(x_0 | x_t) as the
        network has it, no temperature, no top-p."""
        return None

    def predict(self, rows: RowLogits, reads: tuple[Measure, ...], generator: Generators) -> Prediction:
        """Measures in one pass; tokens come out of it too where their law is the same. They are drawn where they are asked for
        only, unless `reads` has their probability."""
        u = rows.pick(uniforms(tuple(rows.positions.shape), generator, rows.positions.device))  # (R,)
        mask = self.absorbing_process.mask_token_id
        is_shaped = self.config.temperature != 1 or self.config.top_p != 1
        shaped = self.scored_logits() if is_shaped else None

        def read_again(where: Tensor) -> Tensor:
            which = rows.pick(where).nonzero().squeeze(1)
            if is_shaped:
                return draw_shaped(rows.some(which), u[which], lambda logits, _: self.token_logits(logits))
            return drawn_from(weigh(rows.some(which), without=mask), u[which])

        def as_weighed(where: Tensor) -> Tensor:
            which = rows.pick(where).nonzero().squeeze(1)
            return weights.among(which).draw(u[which])

        if not reads:
            return Prediction(rows.positions, read_again, {})
        asked: dict[str, Callable[[Tensor, slice], Tensor]] = {n: MEASURED[n] for n in reads if n in MEASURED}
        has_tokens, tokens = "token_probability" in reads, None
        if has_tokens and is_shaped:
            tokens = drawn = read_again(rows.positions)
            if shaped is not None:  # logits that are shaped cannot be read again for one token
                asked["token_probability"] = lambda weights, part: weights.gather(1, drawn[part, None]).squeeze(1)
        weights = weigh(rows, without=mask, measures=asked, shaped=shaped, with_entropy="entropy" in reads)
        weights.check()
        if has_tokens and not is_shaped:
            tokens = weights.draw(u)
        measures = {name: measured(weights, name, tokens) for name in reads}
        if tokens is not None:
            known = tokens
            return Prediction(rows.positions, lambda where: known[rows.pick(where)], measures)
        return Prediction(rows.positions, read_again if is_shaped else as_weighed, measures)
