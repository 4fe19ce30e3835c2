r"""The best grid for an order of positions, for every number of calls at once.

Where positions are opened along an order, how many each call opens decides which tokens are drawn without seeing each other.
With x_(j) the token of rank j, and the first m ranks known,

    F[m, j] = E -log p(x_(j) | x_(0), ..., x_(m - 1)),   j >= m            one pass over the data for each m
    NLL(counts) = sum over calls, from m to m', of  F[m, m] + ... + F[m, m' - 1]

is the path-wise bound, and dynamic programming over m finds the counts that make it smallest. For a random order F[m, j]
depends on m alone, it is the information curve, and the counts are those of the optimal grid (`information.optimal_counts`).
In the spread order a call that opens neighbours together costs more, and the counts follow the halvings of the distance.

The bound is flat around its optimum, while the law of the samples is not: it pays to judge a few plans by samples. Besides the
optimum there are the even plan and one whose numbers double, which in the spread order leaves all places between known ones to
the last calls.

Source: the optimal grid is that of the information curve (see `information.py`); for an order it is this library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, spread_subset
from discrete_schedulers.training.objectives import token_nats


def spread_ranks(shape: tuple[int, int], generator: Generators, grid_shape: tuple[int, int] | None = None) -> Tensor:
    """Orders of `order="spread"`: rank of each position in each row, int64 (B, L), 0 opens first.

    Args:
        shape (`tuple[int, int]`): Rows B and positions L.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        grid_shape (`tuple[int, int]`, *optional*): (height, width) with height * width = L.
    """
    is_masked = torch.ones(shape, dtype=torch.bool)
    ranks, one = torch.zeros(shape, dtype=torch.int64), torch.ones(shape[0], dtype=torch.int64)
    for rank in range(shape[1]):
        opened = spread_subset(is_masked, one, generator, grid_shape)
        ranks[opened] = rank
        is_masked &= ~opened
    return ranks


@torch.no_grad()
def ordered_information(
    denoiser: Callable[..., Any],
    data: Tensor,
    ranks: Tensor,
    mask_token_id: int,
    batch_size: int = 64,
    starts: Iterable[int] | None = None,
) -> Tensor:
    """F of the head of the file, nats, float64 (L, L) on the CPU; 0 where j < m. B sequence evaluations for each m.

    Args:
        denoiser (`Callable`): `denoiser(x_t, t, positions)` -> `RowLogits` of log p(x_0 | x_t).
        data (`torch.Tensor` of shape `(B, L)`): Clean sequences, where the network runs.
        ranks (`torch.Tensor` of shape `(B, L)`): A permutation of 0..L - 1 in each row.
        mask_token_id (`int`): State that stands for a masked token.
        batch_size (`int`, defaults to 64): Sequences in one call of the network.
        starts (`Iterable[int]`, *optional*): The m that are measured, 0 and others below L; all by default. The other rows are
            infinite: no call of an optimal plan begins there.

    Raises:
        ValueError: If a row of `ranks` is no permutation, `data` has a mask, or the network gives a clean token no
            probability or NaN.
    """
    batch, length = data.shape
    if ranks.shape != data.shape or not (ranks.sort(1).values == torch.arange(length, device=ranks.device)).all():
        raise ValueError(
            f"`ranks` has shape {tuple(ranks.shape)}; allowed are permutations of 0..{length - 1} for {batch} rows"
        )
    if (data == mask_token_id).any():
        raise ValueError(f"`data` has the mask token {mask_token_id}: pass clean sequences")
    ranks = ranks.to(data.device)
    by_rank = ranks.argsort(1)
    measured = sorted(set(range(length) if starts is None else starts))
    table = torch.full((length, length), math.inf, dtype=torch.float64)
    table[measured] = 0.0
    for known in measured:
        for start in range(0, batch, batch_size):
            part = slice(start, start + batch_size)
            x_0, hidden = data[part], ranks[part] >= known
            rows = denoiser(x_0.masked_fill(hidden, mask_token_id), (length - known) / length, hidden)
            nats = token_nats(rows, x_0[hidden], mask_token_id)
            placed = torch.zeros(x_0.shape, dtype=torch.float64, device=data.device).masked_scatter(hidden, nats)
            table[known] += placed.gather(1, by_rank[part]).sum(0).cpu() / batch
    if not table[measured].isfinite().all():
        raise ValueError("the network gives NaN, or a token of `data` has probability 0: there is no finite bound")
    return table


def exchangeable(table: Tensor) -> Tensor:
    """F of a random order, (L, L): what is known does not depend on which position is asked, so that the mean of a row is what
    all of it estimates."""
    length = len(table)
    return (table.sum(1) / torch.arange(length, 0, -1))[:, None].expand_as(table).triu()


def ordered_nll(table: Tensor, counts: Sequence[int]) -> float:
    """The bound of `counts` on the whole sequence, nats, for `table` (L, L) of `ordered_information`.

    Raises:
        ValueError: If the counts are not positive with the sum L.
    """
    if sum(counts) != len(table) or min(counts) < 1:
        raise ValueError(f"`counts` {list(counts)} must be positive and have the sum {len(table)}")
    ends = list(accumulate(counts))
    return sum(float(table[start, start:end].sum()) for start, end in pairwise([0, *ends]))


def optimal_ordered_counts(table: Tensor, max_steps: int) -> list[list[int]]:
    """Counts with the smallest `ordered_nll`, for every number of calls up to `max_steps`. O(max_steps L^2).

    Args:
        table (`torch.Tensor` of shape `(L, L)`): Of `ordered_information`.
        max_steps (`int`): Largest number of calls, 1 to the number of finite rows, L if all were measured.

    Returns:
        `list[list[int]]`: Entry N - 1 holds the N counts for N calls, first call first.

    Raises:
        ValueError: If `max_steps` is out of range.
    """
    length, most = len(table), int(table.isfinite().all(1).sum())
    if not 1 <= max_steps <= most:
        raise ValueError(f"`max_steps` is {max_steps}, allowed is 1 to {most}, the numbers of known tokens in `table`")
    is_later = torch.ones(length, length, dtype=torch.bool).triu()
    cost = table.cumsum(1).masked_fill(~is_later, math.inf)  # [m, m' - 1]: from m to m'
    best = torch.full((length,), math.inf, dtype=torch.float64)  # before this call, m known
    best[0] = 0.0
    came_from: list[list[int]] = []  # for each call: [m' - 1] -> m
    found = []
    for _ in range(max_steps):
        total, previous = (best[:, None] + cost).min(0)
        came_from.append(previous.tolist())
        best = torch.cat([total.new_tensor([math.inf]), total[:-1]])
        end, counts = length, []
        for step in reversed(came_from):
            counts.append(end - step[end - 1])
            end = step[end - 1]
        found.append(counts[::-1])
    return found


def equal_counts(length: int, num_steps: int) -> list[int]:
    """Counts of N calls that differ by one at most, 1 <= N <= L."""
    check_steps(length, num_steps)
    ends = [length * k // num_steps for k in range(num_steps + 1)]
    return [b - a for a, b in pairwise(ends)]


def doubling_counts(length: int, num_steps: int) -> list[int]:
    """Counts of N calls, 1 <= N <= L, after which an eighth of the positions is known when a quarter of the calls is over, a
    quarter at half, and half at three quarters; on straight lines between these, and at least one in each call."""
    check_steps(length, num_steps)
    known = [0]
    for call in range(1, num_steps):
        quarter, rest = divmod(4 * call / num_steps, 1)
        low, high = (0.0 if q == 0 else 2.0 ** (q - 4) for q in (quarter, quarter + 1))
        ahead = num_steps - call  # calls that still need one
        known.append(min(max(round(length * (low + rest * (high - low))), known[-1] + 1), length - ahead))
    return [b - a for a, b in pairwise([*known, length])]


def check_steps(length: int, num_steps: int) -> None:
    if not 1 <= num_steps <= length:
        raise ValueError(f"`num_steps` is {num_steps}; allowed is 1 to {length}, the length of the sequences")
