r"""Orders of positions that look at nothing: low-discrepancy orders of a ring or a torus, and the shift that a row has.

    dilated          strides ceil(L / 2), ceil(L / 4), ..., 1; the places of one stride from left to right (row by row, L the
                     longer side)
    van_der_corput   floor(phi_2(n) L), n = 0, 1, ...
    halton           (floor(phi_2(n) H), floor(phi_3(n) W)), n = 1, 2, ...

with phi_b(n) the radical inverse: the digits of n in base b behind the point, last digit first. A place that has been visited
is passed over. An order is a (H, W) sheet of ranks, 0 first; a sequence has H = 1.

Each row follows a cyclic shift of the order, so that no place is favoured, and nobody has to remember which: it is a shift
under which what is known holds the longest beginning of the order, all such being equally likely (`fitting_shifts`). Where
the m known places are the first m of a shift, these are the shifts that could have been drawn at the start. What is known
and what opens next then have the law that they have under one shift for the whole run. Where other places are known too (a
prompt, a template) the row goes on with the shift that they fit best. The places of one step always come from one shift.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, check_count, top_subset, uniforms

Pattern: TypeAlias = Literal["farthest", "dilated", "van_der_corput", "halton"]


def radical_inverse_places(numbers: Tensor, base: int, size: int) -> Tensor:
    """floor(phi_base(n) * size) of whole numbers n, int64. Exact: phi is a whole number over a power of the base."""
    inverse, power = torch.zeros_like(numbers), 1
    while bool((numbers > 0).any()):
        inverse = inverse * base + numbers % base
        numbers = numbers // base
        power *= base
    return inverse * size // power


def ranks_of_visits(places: Tensor, length: int) -> Tensor:
    """Rank of each of `length` places, int64 (L,), when they are visited in this order, with repetitions."""
    visits = torch.arange(len(places))
    first_visit = torch.full((length,), len(places)).scatter_reduce(0, places, visits, "amin")
    assert bool((first_visit < len(places)).all()), "a place is never visited"
    return first_visit.argsort().argsort()


def van_der_corput_ranks(length: int) -> Tensor:
    """Ranks (1, L). On a ring each power of two of them is evenly spaced, up to rounding."""
    numbers = torch.arange(1 << (length - 1).bit_length())  # 2^k >= L of them: spaced by 1 or less, no place is missed
    return ranks_of_visits(radical_inverse_places(numbers, 2, length), length)[None]


def dilated_ranks(height: int, width: int) -> Tensor:
    """Ranks (H, W). Strides are rounded up: rounded down (3 after 6, then 1) the last one would take neighbours together. On a
    grid the cells of a stride whose row and column, in strides, have an even sum come before the others."""
    size = max(height, width)
    visits = [torch.zeros(1, dtype=torch.int64)]
    for stride in (-(-size // 2**k) for k in range(1, (size - 1).bit_length() + 1)):
        rows, columns = torch.arange(0, height, stride)[:, None], torch.arange(0, width, stride)
        cells, is_even = rows * width + columns, (rows + columns) // stride % 2 == 0
        visits += [cells[is_even], cells.flatten()] if min(height, width) > 1 else [cells.flatten()]
    return ranks_of_visits(torch.cat(visits), height * width).view(height, width)


def halton_ranks(height: int, width: int) -> Tensor:
    """Ranks (H, W): the points go on until every cell has one. Each of 2^j 3^k consecutive points lies in another of the
    2^j x 3^k equal boxes of the unit square, and with 2^j >= 2 H, 3^k >= 2 W each cell holds one of these boxes."""
    boxes = 1 << (2 * height - 1).bit_length()
    columns = 1
    while columns < 2 * width:
        columns *= 3
    numbers = torch.arange(1, boxes * columns + 1)
    cells = radical_inverse_places(numbers, 2, height) * width + radical_inverse_places(numbers, 3, width)
    return ranks_of_visits(cells, height * width).view(height, width)


@lru_cache(maxsize=64)
def pattern_ranks(pattern: Pattern, height: int, width: int) -> Tensor:
    """Ranks (H, W) of a fixed order; not to be written to.

    Raises:
        ValueError: If the pattern is for sequences and the grid has several rows, or is no fixed order.
    """
    if height * width == 0:
        return torch.zeros(height, width, dtype=torch.int64)
    if pattern == "dilated":
        return dilated_ranks(height, width)
    if pattern == "halton":
        return halton_ranks(height, width)
    if pattern == "van_der_corput" and height == 1:
        return van_der_corput_ranks(width)
    raise ValueError(f"`pattern` {pattern!r} has no fixed order of a grid of {height} x {width}")


def fitting_shifts(is_known: Tensor, ranks: Tensor) -> Tensor:
    """The cyclic shifts of an order under which the longest beginning is known.

    Under the shift o the place p has rank `ranks[p - o]`. How many of the first r places are known under each shift is the
    correlation of `is_known` with `ranks < r`; the largest r for which some shift has all r is found by halving.

    Args:
        is_known (`torch.Tensor` of shape `(B, H, W)`): Bool.
        ranks (`torch.Tensor` of shape `(H, W)`): A permutation of 0 to H W - 1.

    Returns:
        `torch.Tensor` of shape `(B, H, W)`: Bool, at least one true in each row; entry (y, x) is the order moved by y rows
            and x columns.
    """
    known = torch.fft.rfft2(is_known.double())

    def fits(longest: Tensor) -> Tensor:
        beginning = (ranks < longest[:, None, None]).double()  # (B, H, W)
        held = torch.fft.irfft2(known * torch.fft.rfft2(beginning).conj(), s=ranks.shape)
        return held > longest[:, None, None] - 0.5  # whole numbers, but for rounding in float64

    low = torch.zeros(len(is_known), dtype=torch.int64, device=is_known.device)
    high = is_known.flatten(1).sum(1)
    for _ in range(ranks.numel().bit_length()):
        middle = (low + high + 1) // 2
        fit = fits(middle).flatten(1).any(1)
        low, high = torch.where(fit, middle, low), torch.where(fit, high, middle - 1)
    return fits(low)


def ordered_subset(is_eligible: Tensor, count: Tensor, generator: Generators, ranks: Tensor) -> Tensor:
    """Exactly `count` eligible positions of each row, the first ones of a fitting shift of an order.

    Args:
        is_eligible (`torch.Tensor` of shape `(B, L)`): Bool; the other positions count as known.
        count (`torch.Tensor` of shape `(B,)`): Int64, at most the number of eligible positions of the row.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        ranks (`torch.Tensor` of shape `(H, W)`): A permutation of 0 to L - 1, with H W = L.

    Returns:
        `torch.Tensor` of shape `(B, L)`: Bool, with `count` entries true in each row.

    Raises:
        ValueError: If `ranks` does not hold L positions, or a count is negative or too large.
    """
    check_count(is_eligible, count)
    batch, length = is_eligible.shape
    height, width = ranks.shape
    if height * width != length:
        raise ValueError(
            f"`ranks` has {height} x {width} cells, but the sample has {length} positions: they must be equal"
        )
    if is_eligible.numel() == 0:
        return torch.zeros_like(is_eligible)
    device = is_eligible.device
    ranks = ranks.to(device)
    fitting = fitting_shifts(~is_eligible.view(batch, height, width), ranks).view(batch, length)
    shift = uniforms((batch, length), generator, device).masked_fill(~fitting, -1.0).argmax(1, keepdim=True)  # (B, 1)
    place = torch.arange(length, device=device)
    row, column = (place // width - shift // width) % height, (place % width - shift % width) % width
    return top_subset(is_eligible, count, -ranks[row, column])
