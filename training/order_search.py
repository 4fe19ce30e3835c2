r"""A static order of positions, learned: which of them open in which step, by the likelihood of held-out data.

Positions are divided into groups S_1, ..., S_N that open one after another, all of a group in one call. No draw decides which
ones, so the sampler's law is known and its negative log-likelihood needs no bound:

    p_N(x) = prod_k prod_{i in S_k} p(x_i | x_{S_1}, ..., x_{S_{k-1}}),        KL(data || p_N) = E[-log p_N(x)] - H

with one call of the frozen network for each group and batch of data. What an order gains is what its groups do not know of
each other. `search_order` moves and exchanges positions while the mean over the data falls; `best_order` chooses among given
orders on data that the search has not seen. `order_blocks` is the result as blocks of `LearnedScheduler`.

On a ring of 8 it finds groups of 1, 1, 2 and 4 that are exact: given what is known, the positions of each are independent,
where equal random sets in four calls have KL 0.07. A random order is not beaten everywhere: it is a mixture, and by convexity
better than the mean of its orders; on a ring of 4 in two calls it is better than the best of them.

Source: the objective is the exact form of the any-order bound that learned unmasking orders use (arXiv 2510.05725).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training.objectives import token_nats

Groups: TypeAlias = list[list[int]]  # positions of each step, first step first


def check_groups(groups: Groups) -> int:
    """The number of positions.

    Raises:
        ValueError: If a group is empty, or the groups are not 0, ..., L - 1, each once.
    """
    places = sorted(i for group in groups for i in group)
    if not groups or not all(groups) or places != list(range(len(places))):
        raise ValueError(
            f"`groups` is {groups}; every position from 0 on must be in one of them, and none may be empty"
        )
    return len(places)


def groups_of(priority: Sequence[float], counts: Sequence[int]) -> Groups:
    """Groups of the given sizes, the highest priorities first, the left one first among equals.

    Raises:
        ValueError: If the sizes do not sum to the number of priorities.
    """
    if sum(counts) != len(priority) or min(counts) < 1:
        raise ValueError(
            f"`counts` is {list(counts)}; positive numbers that sum to {len(priority)} positions are needed"
        )
    ranked = sorted(range(len(priority)), key=lambda i: -priority[i])
    starts = [sum(counts[:k]) for k in range(len(counts) + 1)]
    return [sorted(ranked[a:b]) for a, b in pairwise(starts)]


def order_blocks(groups: Groups) -> dict[str, list[float]]:
    """`counts` and `order` of `LearnedScheduler(grid="learned", unmasking="counts")`: the same groups in each run."""
    length = check_groups(groups)
    priority = [0.0] * length
    for k, group in enumerate(groups):
        for i in group:
            priority[i] = float(len(groups) - k)
    return {"counts": [float(len(group)) for group in groups], "order": priority}


@torch.no_grad()
def order_nll(
    denoiser: Callable[..., RowLogits], data: Tensor, groups: Groups, mask_token_id: int, batch_size: int = 64
) -> Tensor:
    """-log p_N(x) of each sequence, (n,), float64, in nats; exact. N calls for each batch.

    Args:
        denoiser (`Callable`): The frozen network: tokens (B, L), a time and positions, bool (B, L), to [`RowLogits`] there.
            It is told the masked share as the time, which is that of linear noise.
        data (`torch.Tensor` of shape `(n, L)`): Clean tokens.
        groups (`list[list[int]]`): Positions of each step.
        mask_token_id (`int`): The mask.
        batch_size (`int`, defaults to 64): Sequences in one call of the network.

    Raises:
        ValueError: If the groups are not the positions of the data.
    """
    length = check_groups(groups)
    if data.shape[1] != length:
        raise ValueError(f"`groups` has {length} positions, but `data` has {data.shape[1]}")
    known: list[int] = []
    total = torch.zeros(len(data), dtype=torch.float64, device=data.device)
    for group in groups:
        total += group_nll(denoiser, data, known, group, mask_token_id, batch_size)
        known += group
    return total


@torch.no_grad()
def group_nll(
    denoiser: Callable[..., RowLogits],
    data: Tensor,
    known: Sequence[int],
    group: Sequence[int],
    mask_token_id: int,
    batch_size: int = 64,
) -> Tensor:
    """-log p(x_i, i in the group | x_i, i known) of each sequence, (n,), float64: one term of `order_nll`, in one call for each
    batch.

    Args:
        denoiser (`Callable`): The frozen network.
        data (`torch.Tensor` of shape `(n, L)`): Clean tokens.
        known (`list[int]`): Positions that are open.
        group (`list[int]`): Positions that open now.
        mask_token_id (`int`): The mask.
        batch_size (`int`, defaults to 64): Sequences in one call of the network.
    """
    places = torch.zeros(2, data.shape[1], dtype=torch.bool)
    places[0, list(known)], places[1, list(group)] = True, True
    is_known, opens_now = places.to(data.device)
    totals = []
    for x_0 in data.split(batch_size):
        x_t, opens = torch.where(is_known, x_0, mask_token_id), opens_now.expand(x_0.shape)
        rows = denoiser(x_t, 1 - len(known) / data.shape[1], opens)
        nats = token_nats(rows, x_0[opens], mask_token_id)  # row-major: as many of each sequence
        totals.append(nats.view(len(x_0), len(group)).sum(1))
    return torch.cat(totals)


def search_order(
    score: Callable[[Groups], float],
    groups: Groups,
    proposals: int,
    generator: torch.Generator,
    keep_counts: bool = False,
) -> Iterator[tuple[Groups, float]]:
    """Exchange two positions of different groups, or move one; keep what has a lower score. Yields each improvement, the start
    first. A local search: start it from several orders.

    Args:
        score (`Callable`): Such as the mean of `order_nll` over one set of data, the same for all.
        groups (`list[list[int]]`): Where to start, at least two groups.
        proposals (`int`): How many are tried.
        generator (`torch.Generator`): Source of the proposals.
        keep_counts (`bool`, defaults to `False`): Only exchange, so that every group keeps its size.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    check_groups(groups)
    if len(groups) < 2:
        raise ValueError(f"`groups` has {len(groups)} group; there is nothing to exchange")
    best, value = [list(group) for group in groups], score(groups)
    yield best, value
    tried = {str(best)}
    for _ in range(proposals):
        first, second = torch.randperm(len(best), generator=generator)[:2].tolist()
        i, j = (int(torch.randint(len(best[k]), (), generator=generator)) for k in (first, second))
        moved = [list(group) for group in best]
        if not keep_counts and len(moved[first]) > 1 and float(torch.rand((), generator=generator)) < 0.5:
            moved[second].append(moved[first].pop(i))
        else:
            moved[first][i], moved[second][j] = moved[second][j], moved[first][i]
        moved = [sorted(group) for group in moved]
        if str(moved) in tried:
            continue
        tried.add(str(moved))
        after = score(moved)
        if after < value:
            best, value = moved, after
            yield best, value


def best_order(candidates: Iterable[Groups], score: Callable[[Groups], float]) -> tuple[Groups, float]:
    """The candidate with the lowest score, and its score: on data that no search has seen.

    Raises:
        ValueError: If there is no candidate.
    """
    scored = [(score(groups), groups) for groups in candidates]
    if not scored:
        raise ValueError("`candidates` is empty; pass at least one order")
    value, groups = min(scored, key=lambda pair: pair[0])
    return groups, value
