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
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import (
    BLOCK,
    Generators,
    RowLogits,
    check_finite,
    invert,
    positive_weights,
    row_sums,
    top_subset,
    uniforms,
)
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler, without_column_

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


def entropy_of(logits: Tensor, law: Tensor) -> Tensor:
    """Entropy (r,) in nats of laws (r, V) = softmax(logits), without a logarithm for each of their numbers. Overwrites logits.

    H = log Z - sum_v p(v) d(v),  d = logits - max,  log Z = -log max p
    """
    below = logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=-800.0)  # where p is 0; 0 * inf is NaN
    return -row_sums(below.mul_(law)) - law.amax(-1).log()


def measured(name: Measure, logits: Tensor, law: Tensor, tokens: Tensor) -> Tensor:
    """One of the measures for a few rows: logits and laws (r, V), tokens (r,)."""
    if name == "token_probability":
        return law.gather(-1, tokens[:, None]).squeeze(-1)
    if name == "max_probability":
        return law.amax(-1)
    if name == "margin":
        best, second = top_two(law)
        return best - second
    return entropy_of(logits, law) if name == "entropy" else law.clone()


def token_probabilities(rows: RowLogits, mask_token_id: int, tokens: Tensor) -> Tensor:
    """p(token | x_t) for a token (R,) of each row as the network has it: no mask, no temperature; float32 or wider."""
    found = [torch.empty(0, device=tokens.device)]
    for part, logits in rows.chunks(writable=True):
        law = normalised(positive_weights(without_column_(logits, mask_token_id), logits))
        found.append(measured("token_probability", logits, law, tokens[part]))
    return torch.cat(found)


def normalised(weights: Tensor) -> Tensor:
    """Weights (r, V) as probabilities: those of float32 already are."""
    return weights / row_sums(weights)[:, None] if weights.dtype == torch.float64 else weights


class Prediction(NamedTuple):
    """What the network says at the eligible positions. What is measured is what the class `reads`.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool, with R entries true.
        tokens (`torch.Tensor` of shape `(R,)`): A token drawn for each, int64.
        measures (`dict[str, torch.Tensor]`): By their names, (R,), or (R, V) for the law itself; float32 or wider.
    """

    is_eligible: Tensor
    tokens: Tensor
    measures: Mapping[Measure, Tensor]

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
        prediction = self.predict(rows, () if index == len(self.calls) - 1 else self.reads(), generator)
        filled = rows.put(prediction.tokens, sample)
        if index == len(self.calls) - 1:
            return filled
        chosen = self.choose(prediction, index, sample, generator)
        return torch.where(chosen | opens_all[:, None], filled, sample)  # the same as before where nothing is eligible

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        return self.move_rows(RowLogits.chosen(logits, self.eligible(sample, index)), index, sample, generator)

    def reads(self) -> tuple[Measure, ...]:
        """What `choose` reads of a prediction, beside its tokens."""
        return ("token_probability",)

    def scored_logits(self, logits: Tensor) -> Tensor:
        """Logits of the law that is measured, from logits (r, V) without a mask: p(x_0 | x_t) as the network has it, no
        temperature, no top-p, where a class does not say otherwise."""
        return logits

    def predict(self, rows: RowLogits, reads: tuple[Measure, ...], generator: Generators) -> Prediction:
        """Tokens and measures in one pass: a few rows at a time, and their weights once where both laws are the network's."""
        u = rows.pick(uniforms(tuple(rows.positions.shape), generator, rows.positions.device))  # (R,)
        is_shaped = self.config.temperature != 1 or self.config.top_p != 1
        tokens, totals = [u.new_empty(0, dtype=torch.int64)], [u.new_empty(0)]
        found: dict[Measure, list[Tensor]] = {name: [] for name in reads}
        kept: Tensor | None = None  # memory for weights where logits are read again afterwards
        for part, logits in rows.chunks(writable=True):
            without_column_(logits, self.absorbing_process.mask_token_id)
            if kept is None:
                kept = torch.empty_like(logits) if is_shaped or "entropy" in reads else logits
            out = kept[: len(logits)]
            shaped = self.token_logits(logits) if is_shaped else logits
            weights = positive_weights(shaped, shaped if is_shaped else out)
            token, total = invert(weights, u[part])
            tokens.append(token)
            totals.append(total)
            if reads:
                scored = self.scored_logits(logits) if is_shaped else logits
                law = normalised(positive_weights(scored, out) if is_shaped else weights)
                for name in reads:
                    found[name].append(measured(name, scored, law, token))
        check_finite(torch.cat(totals))
        nothing = {"law": rows.source.new_empty(0, rows.source.shape[-1])}
        measures = {name: torch.cat(parts or [nothing.get(name, u.new_empty(0))]) for name, parts in found.items()}
        return Prediction(rows.positions, torch.cat(tokens), measures)
