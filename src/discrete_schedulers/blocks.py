r"""Networks whose attention goes by blocks: a position sees its own block and those before it, and nothing after.

    sees[q, k] = block(q) >= block(k),    block(i) = floor(i / block_size)

What such a network says of a block does not depend on later ones, so nothing after the last position that is asked for is run;
and the keys and values of a block that does not change any more can be kept. Both are exact.

Sources: Arriola et al. 2025 (BD3-LM), Wu et al. 2025 (Fast-dLLM v2), Cheng et al. 2025 (SDAR).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class BlockCache:
    """Keys and values of the tokens that a network has seen last, and what they were computed for. State of one run.

    It asks nothing of the scheduler: what is kept for a block holds as long as its tokens, all before it and the conditions are
    the same, which is compared in each call. So a block is run once more when it is finished, together with the next one, and
    then never again.

    Args:
        new_store (`Callable`): Makes what the network keeps them in: transformers' `DynamicCache`.
    """

    new_store: Callable[[], Any]
    store: Any = None
    ids: Tensor | None = None  # (B, K), the tokens whose keys and values are there
    rows: Tensor | None = None  # (B of the whole batch,), bool: which of its rows these are
    conditions: dict[str, Any] = field(default_factory=dict)
    ends: dict[int, Tensor] = field(default_factory=dict)  # output (B, width) at the last position of a block

    def follow(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, bool (B,); those that are left out do not come back, or all is forgotten."""
        before = self.rows
        self.rows = rows
        if before is None or before.shape != rows.shape or bool((rows & ~before).any()):
            self.forget(0)
        elif self.ids is not None and not torch.equal(before, rows):
            some = rows[before].nonzero().squeeze(1)
            self.store.batch_select_indices(some)
            self.ids = self.ids[some]
            self.ends = {place: output[some] for place, output in self.ends.items()}
            self.conditions = {k: v[some] if isinstance(v, Tensor) else v for k, v in self.conditions.items()}

    def keep(self, x_t: Tensor, first: int, last: int, block_size: int, conditions: Mapping[str, Any]) -> int:
        """Forget what does not hold for these tokens (B, L) and conditions, and what has to be run since its output is asked
        for, from the position `first` to `last` - 1. Returns how many positions are kept."""
        if self.ids is None:
            return self.forget(0)
        known = min(self.ids.shape[1], x_t.shape[1])
        if len(self.ids) != len(x_t) or not same(self.conditions, conditions):
            return self.forget(0)
        differs = (self.ids[:, :known] != x_t[:, :known]).any(0)
        equal = int(differs.long().argmax()) if differs.any() else known
        if first in self.ends and equal > first and last > first + 1:  # its output is known: run from the next block on
            return self.forget(first + 1)
        return self.forget(min(equal, first) // block_size * block_size)

    def forget(self, number: int) -> int:
        """Keep the first `number` positions only."""
        if number == 0:
            self.store, self.ids = self.new_store(), None
        elif self.ids is not None and self.ids.shape[1] > number:
            self.store.crop(number - self.ids.shape[1])  # negative: so many are taken off
            self.ids = self.ids[:, :number]
        self.ends = {place: output for place, output in self.ends.items() if place == number - 1}
        return number

    def learn(self, ids: Tensor, conditions: Mapping[str, Any]) -> None:
        """The network has run on these tokens (B, W), behind those that are kept."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.conditions = dict(conditions)


def same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two sets of conditions are equal."""
    if before.keys() != now.keys():
        return False
    pairs = [(before[name], now[name]) for name in now]
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b for a, b in pairs
    )


def run_by_blocks(
    network: Callable[..., Tensor],
    x_t: Tensor,
    first: int,
    last: int,
    block_size: int,
    conditions: Mapping[str, Any],
    cache: BlockCache | None = None,
) -> Tensor:
    """The network's output at the positions from `first` to `last` - 1, whose blocks and all before them are run or kept.

    Args:
        network (`Callable`): Takes ids (B, W), `attention_mask`, bool (1 or B, 1, W, K) for K >= W positions of which the W
            are the last, `position_ids` (1 or B, W), the conditions, and with a cache `past_key_values`; returns (B, W, width).
        x_t (`torch.Tensor` of shape `(B, L)`): Tokens, int64.
        first (`int`): First position that is asked for.
        last (`int`): One after the last.
        block_size (`int`): Positions of a block.
        conditions (`dict`): For the network. Of these `attention_mask` (B, L), 0 at padding, `position_ids` (1 or B, L) and
            `positions` (B, L) are cut to the positions that are run; with `positions` the output is (R, width).
        cache (`BlockCache`, *optional*): What is kept between calls.

    Returns:
        `torch.Tensor` of shape `(B, last - first, width)`, or (R, width).

    Raises:
        ValueError: If there is an attention mask of another shape.
    """
    length = x_t.shape[1]
    end = min(-(-last // block_size) * block_size, length)
    positions = conditions.get("positions")
    conditions = {name: value for name, value in conditions.items() if name != "positions"}
    start = 0 if cache is None else cache.keep(x_t, first, last, block_size, conditions)
    if cache is not None and start == 0:
        stop = first // block_size * block_size
        start = prefill(network, x_t, stop, block_size, conditions, cache, positions is not None)
    arguments = windowed(conditions, start, end, block_size, x_t)
    if positions is not None:
        arguments["positions"] = positions[:, start:end]
    if cache is not None:
        arguments["past_key_values"] = cache.store
    output = network(x_t[:, start:end], **arguments)
    known = None if cache is None else cache.ends.get(first)
    if cache is not None:
        cache.learn(x_t[:, start:end], conditions)
    if positions is not None:
        return output
    if cache is not None:  # for networks whose logits at a position are for the next one
        ends = range(first // block_size * block_size + block_size, end + 1, block_size)
        cache.ends |= {place - 1: output[:, place - 1 - start].clone() for place in ends if place > start}
    if first < start:
        assert known is not None
        return torch.cat([known[:, None], output[:, : last - start]], dim=1)
    return output[:, first - start : last - start]


def windowed(conditions: Mapping[str, Any], start: int, end: int, block_size: int, x_t: Tensor) -> dict[str, Any]:
    """Conditions of a call at the positions from `start` to `end` - 1 that sees all before them by blocks.

    Raises:
        ValueError: If there is an attention mask of another shape than (B, L).
    """
    place = torch.arange(end, device=x_t.device)
    sees = (place[start:, None] // block_size >= place // block_size)[None, None]  # (1, 1, W, K)
    padding = conditions.get("attention_mask")
    if padding is not None:
        if padding.dim() != 2:
            raise ValueError(
                f"`attention_mask` has shape {tuple(padding.shape)}; where attention goes by blocks it must be (B, L)"
            )
        itself = torch.eye(end, dtype=torch.bool, device=x_t.device)[start:]  # a row that sees nothing would be NaN
        sees = sees & (padding[:, None, None, :end].bool() | itself)
    place_ids = conditions.get("position_ids", place[None])[:, start:end]
    return dict(conditions) | {"position_ids": place_ids, "attention_mask": sees}


def prefill(
    network: Callable[..., Tensor],
    x_t: Tensor,
    stop: int,
    block_size: int,
    conditions: Mapping[str, Any],
    cache: BlockCache,
    takes_positions: bool,
) -> int:
    """Run the blocks before the position `stop`, of which no output is asked for, once for all rows that are equal there, as
    samples of one prompt are. Returns how many positions are kept: `stop`, or 0 where no two rows are equal. Arguments as in
    `run_by_blocks`."""
    batch, known = len(x_t), {"tokens": x_t[:, :stop]}
    for name, value in conditions.items():
        if isinstance(value, Tensor) and len(value) == batch:
            known[name] = value[:, :stop] if name in ("attention_mask", "position_ids") else value
        elif isinstance(value, dict):
            return 0
    if stop == 0 or batch == 1:
        return 0
    alike = torch.stack([(v[:, None] == v).reshape(batch, batch, -1).all(2) for v in known.values()]).all(0)  # (B, B)
    leader = alike.long().argmax(1)  # the first row that is equal to each
    leaders, number = leader.unique(return_inverse=True)
    if len(leaders) == batch:
        return 0
    some = {n: v[leaders] if isinstance(v, Tensor) and len(v) == batch else v for n, v in conditions.items()}
    arguments = windowed(some, 0, stop, block_size, x_t)
    if takes_positions:  # no head is needed
        arguments["positions"] = torch.zeros(len(leaders), stop, dtype=torch.bool, device=x_t.device)
    network(x_t[leaders, :stop], **arguments, past_key_values=cache.store)
    cache.store.batch_select_indices(number)
    cache.learn(x_t[:, :stop], conditions)
    return stop
