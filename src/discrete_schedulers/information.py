r"""Information curve of a masked model, and the step sizes that are optimal for it.

Let f(i) = E[-log p(x_j | x_S)], the cross-entropy of a masked token j when i uniformly random other tokens S are
revealed. A sampler that reveals n_1, n_2, ... tokens at uniformly random positions, those of one step drawn
independently of each other, has exactly

    E_orders KL(data || sampler given the order) = sum_k n_k f(i_k) - H(data),     i_k = n_1 + ... + n_{k-1}

for *any* model p, exact or learned. The sum bounds the negative log-likelihood of the sampler, in nats per sequence.
For a given model it depends on the counts alone, and dynamic programming minimises it for every number of steps at
once: no teacher, no samples, only data. (The sampler's law, a mixture over orders, is at least as close: convexity.)

Sources: Chen, Cong, Li 2025, "Optimal inference schedules for masked diffusion models" (arXiv 2511.04647), Theorem 4
(exact model); Lavenant, Zanella 2025 (arXiv 2510.25544). The identity holds for uniformly random orders only, not for
orders that look at the tokens (confidence, entropy bound) or at the places (spread).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from discrete_schedulers.sampling import Generators, uniforms

_ROWS_IN_FLOAT64 = 256  # rows of logits held in float64 at a time: 100 MB at V = 50,000
_SHORT = 512  # up to this length all pairs at once take less time than a search between neighbours
_EVENNESS = 1e-9  # share of the curve's range that breaks ties between optimal counts


@dataclass(frozen=True, eq=False)
class InformationCurve:
    """Masked cross-entropy of a model against the number of revealed tokens.

    Args:
        values (`torch.Tensor` of shape `(L,)`): float64 nats per token; `values[i]` = f(i), with i = 0..L-1 of the L
            tokens revealed. Non-increasing if it comes from `information_curve`; the bounds hold for any finite values.
        standard_error (`torch.Tensor` of shape `(L,)`): float64, over sequences; NaN where it is not known.
        num_evaluations (`int`): Sequences passed through the network to measure it.

    Raises:
        ValueError: If `values` is not a finite float64 vector of at least one entry, or the shapes differ.
    """

    values: Tensor
    standard_error: Tensor
    num_evaluations: int

    def __post_init__(self) -> None:
        """Check shapes, precision and finiteness."""
        values = self.values
        if values.dtype != torch.float64 or values.dim() != 1 or len(values) == 0 or not values.isfinite().all():
            raise ValueError(
                f"`values` has shape {tuple(values.shape)}, {values.dtype} and {int(values.isfinite().sum())} finite "
                "entries, allowed is a float64 vector of L >= 1 finite numbers"
            )
        if self.standard_error.shape != values.shape:
            raise ValueError(
                f"`standard_error` has shape {tuple(self.standard_error.shape)}, allowed is that of `values`, "
                f"{tuple(values.shape)}"
            )

    def to_config(self) -> list[float]:
        """The L values as Python floats, which JSON keeps bit for bit: `information_curve` in a scheduler's config."""
        return self.values.tolist()

    @classmethod
    def from_config(cls, values: Sequence[float]) -> InformationCurve:
        """The curve with these values, bit for bit. A config does not keep the rest: NaN errors, 0 evaluations.

        Args:
            values (`list[float]`): f(0), ..., f(L-1) in nats per token.

        Returns:
            `InformationCurve`: Of length L.

        Raises:
            ValueError: If the list is empty or has an entry that is not finite.
        """
        curve = torch.tensor(values, dtype=torch.float64)
        return cls(curve, torch.full_like(curve, math.nan), 0)


def information_curve(
    denoiser: Callable[..., Any],
    data: Tensor,
    mask_token_id: int,
    num_levels: int | None = None,
    generator: Generators = None,
    batch_size: int = 64,
) -> InformationCurve:
    """Measure the curve of a model on held-out sequences.

    Every sequence draws one random order of its positions, and level i reveals the first i of that order: masks are
    nested, and the difference of neighbouring levels, whose masked tokens are nearly the same, has little noise. The
    estimate at a level is the mean of -log p over its L - i masked positions, then over sequences. A non-increasing fit
    (`isotonic_fit`, weights L - i) and linear interpolation between the levels follow. The standard errors are those of
    the means before the fit, and between two levels an upper bound.

    Args:
        denoiser (`Callable`): `denoiser(x_t, t, positions=is_masked)` -> `RowLogits` of log p(x_0 | x_t); t is the
            masked share, a float in (0, 1].
        data (`torch.Tensor` of shape `(B, L)`): int64 clean sequences, B >= 2, where the network runs.
        mask_token_id (`int`): State that stands for a masked token.
        num_levels (`int`, *optional*): Number of levels to measure, 2 to L, evenly spread from 0 to L - 1; `None` for
            all L.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the orders.
        batch_size (`int`, defaults to 64): Sequences in one call of the network. It does not change the masks.

    Returns:
        `InformationCurve`: On the CPU, with `num_evaluations` = B times the number of levels.

    Raises:
        ValueError: If an argument is not as above, `data` has a mask token, or the network gives NaN or a clean token
            probability 0 (then the curve is infinite).
    """
    levels, rank = curve_plan(data, mask_token_id, num_levels, generator, batch_size)
    return curve_of(level_nats(denoiser, data, rank, levels, mask_token_id, batch_size), levels, data.shape[1])


def curve_plan(
    data: Tensor, mask_token_id: int, num_levels: int | None, generator: Generators, batch_size: int
) -> tuple[list[int], Tensor]:
    """What `information_curve` measures: the levels, and the rank of each position in its sequence's order, (B, L). Arguments
    and errors as there."""
    if data.dim() != 2 or data.dtype != torch.int64 or len(data) < 2 or data.shape[1] == 0:
        raise ValueError(
            f"`data` has shape {tuple(data.shape)} and {data.dtype}, allowed is int64 (B, L) with B >= 2 (for the "
            "standard errors) and L >= 1"
        )
    num_masks = int((data == mask_token_id).sum())
    if num_masks > 0:
        raise ValueError(f"`data` has the mask token {mask_token_id} in {num_masks} places: pass clean sequences")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, allowed is at least 1")
    batch, length = data.shape
    return _levels(length, num_levels), uniforms((batch, length), generator, data.device).argsort(dim=1)


@torch.no_grad()
def level_nats(
    denoiser: Callable[..., Any], data: Tensor, rank: Tensor, levels: list[int], mask_token_id: int, batch_size: int
) -> Tensor:
    """Mean of -log p over the masked positions of each sequence at each level, float64 (B, levels) on the CPU. Rows do not know
    of each other: what several processes have measured goes into one `curve_of`."""
    batches = zip(data.split(batch_size), rank.split(batch_size), strict=True)
    return torch.cat([_level_means(denoiser, x_0, order, levels, mask_token_id) for x_0, order in batches]).cpu()


def curve_of(nll: Tensor, levels: list[int], length: int) -> InformationCurve:
    """The fitted curve of L values from `level_nats`, (B, levels)."""
    batch, at = len(nll), torch.tensor(levels)
    fitted = isotonic_fit(nll.mean(0), (length - at).double())
    # Rounding in the interpolation may lift a value by one unit in the last place; the running minimum takes that back.
    values = _interpolate(at, fitted, length).cummin(0).values
    error = _interpolate(at, nll.std(0) / math.sqrt(batch), length)
    return InformationCurve(values, error, nll.numel())


def isotonic_fit(values: Tensor, weights: Tensor) -> Tensor:
    """Non-increasing vector with the least weighted squared distance to `values`: pool adjacent violators, in O(n).

    Args:
        values (`torch.Tensor` of shape `(n,)`): Finite numbers.
        weights (`torch.Tensor` of shape `(n,)`): Positive numbers.

    Returns:
        `torch.Tensor` of shape `(n,)`: float64.
    """
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, mass, size = value, weight, 1
        while means and means[-1] < mean:
            left = masses.pop()
            mean = (left * means.pop() + mass * mean) / (left + mass)
            mass, size = left + mass, size + sizes.pop()
        means.append(mean)
        masses.append(mass)
        sizes.append(size)
    return torch.tensor(means, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))


def expected_nll(curve: InformationCurve, counts: Sequence[int]) -> float:
    """Bound on the negative log-likelihood of a random-order sampler: sum_k n_k f(i_k), i_k tokens known before step k.

    Args:
        curve (`InformationCurve`): Of the model that samples, on the data of interest.
        counts (`list[int]`): Tokens revealed in each step, positive, with sum L.

    Returns:
        `float`: Nats per sequence. It is E_orders E_data[-log q(x | order)], hence at least the sampler's own NLL.

    Raises:
        ValueError: If `counts` are not positive ints with sum L.
    """
    length = len(curve.values)
    if not all(isinstance(n, int) and n > 0 for n in counts) or sum(counts) != length:
        raise ValueError(f"`counts` is {list(counts)}, allowed are positive ints with sum {length}, the curve's length")
    size = torch.tensor(counts)
    return float((size * curve.values[size.cumsum(0) - size]).sum())


def kl_bound(curve: InformationCurve, counts: Sequence[int], entropy: float) -> float:
    """Bound on KL(data || random-order sampler): `expected_nll` minus the entropy of the data.

    Args:
        curve (`InformationCurve`): Of the model that samples, on the data of interest.
        counts (`list[int]`): Tokens revealed in each step, positive, with sum L.
        entropy (`float`): H(data) in nats per sequence.

    Returns:
        `float`: Nats per sequence: the mean over orders of the KL given the order.

    Raises:
        ValueError: If `counts` are not positive ints with sum L.
    """
    return expected_nll(curve, counts) - entropy


def optimal_counts(curve: InformationCurve, max_steps: int) -> list[list[int]]:
    """Counts with the smallest `expected_nll`, for every number of steps up to `max_steps` at once.

    Dynamic programming over the number of revealed tokens:

        F_0(0) = 0,     F_k(j) = min_{i < j} F_{k-1}(i) + (j - i) f(i),     then follow F_N(L) back to F_0(0).

    Where f does not increase, (j - i) f(i) has Monge's inequality, so that the best i never falls as j grows: only what lies
    between the best i of two neighbours is looked at, O(max_steps L log L). Other curves (`information_curve` gives none) cost
    O(max_steps L^2). Both are exact.

    Where several counts are equally good (flat pieces of the curve), the most even ones win: f gets an extra slope of
    1e-9 of its range, whose own optimum is the uniform grid. This costs at most 1e-9 of that range per token.

    Args:
        curve (`InformationCurve`): Of length L.
        max_steps (`int`): Largest number of steps, 1 to L.

    Returns:
        `list[list[int]]`: Entry N - 1 holds the N counts for N steps, first step first: positive, with sum L.

    Raises:
        ValueError: If `max_steps` is not in 1..L.
    """
    length = len(curve.values)
    if not 1 <= max_steps <= length:
        raise ValueError(f"`max_steps` is {max_steps}, allowed is 1 to {length}, the length of the curve")
    # A constant in f adds the same to all counts: without it the totals are smaller, and so is their rounding.
    price = curve.values - curve.values.min()
    price = price - _EVENNESS * (float(price.max()) or 1.0) * torch.arange(length) / length
    is_dense = length <= _SHORT or bool((curve.values.diff() > 0).any())
    cost, levels = (_costs(price), []) if is_dense else (None, _halvings(length))
    best = torch.full((length + 1,), math.inf, dtype=torch.float64)  # F_{k-1}(i), i = 0..L
    best[0] = 0.0
    previous = torch.zeros(max_steps, length + 1, dtype=torch.int32)  # [k - 1, j] = the best i
    for step in range(max_steps):
        if cost is not None:
            best, previous[step] = (cost + best[:-1]).min(dim=1)
        else:
            best, previous[step] = _monotone_minima(best, price, step, levels)
    return _traced(previous)


def _costs(price: Tensor) -> Tensor:
    """(j - i) price(i) for j = 0..L and i = 0..L - 1, infinite where i >= j, float64 (L + 1, L)."""
    size = torch.arange(len(price) + 1)[:, None] - torch.arange(len(price))
    return (size * price).masked_fill_(size <= 0, math.inf)


def _halvings(length: int) -> list[Tensor]:
    """The numbers 1..L in the order in which `_monotone_minima` takes them, in turns: in each its numbers j, the neighbours
    below them and those above them that were taken before (0 and L + 1 always were), int64 (3, n)."""
    stride, levels = 2 ** (length.bit_length() - 1), []
    while stride:
        j = torch.arange(stride, length + 1, 2 * stride)
        levels.append(torch.stack([j, j - stride, (j + stride).clamp(max=length + 1)]))
        stride //= 2
    return levels


def _monotone_minima(best: Tensor, price: Tensor, step: int, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest best(i) + (j - i) price(i) over all i < j, and the first i that has it, for j = 0..L; (L + 1,) each.

    The price falls, and `best` (L + 1,) is finite for i >= `step` only (in step 0: for i = 0 only).
    """
    length = len(price)
    at = torch.full((length + 2,), step)  # the best i of each j
    at[-1] = length - 1
    least = torch.full((length + 1,), math.inf, dtype=torch.float64)
    for j, below, above in levels:
        low = at[below]
        number = (torch.minimum(at[above], j - 1) - low + 1).clamp_(min=1)  # 1: j <= step, which has no i at all
        owner = torch.arange(len(j)).repeat_interleave(number)
        i = torch.arange(len(owner)) + (low + number - number.cumsum(0))[owner]
        total = best[i] + (j[owner] - i) * price[i]
        smallest = torch.full((len(j),), math.inf, dtype=torch.float64).scatter_reduce_(0, owner, total, "amin")
        least[j] = smallest
        is_best = total == smallest[owner]
        at[j] = low.scatter_reduce(0, owner[is_best], i[is_best], "amin", include_self=False)
    return least, at[:-1]


def optimal_times(curve: InformationCurve, num_inference_steps: int) -> Tensor:
    """The optimal counts as a time grid.

    Args:
        curve (`InformationCurve`): Of length L.
        num_inference_steps (`int`): Number of steps N >= 1.

    Returns:
        `torch.Tensor` of shape `(N + 1,)`: float64, strictly decreasing from 1 to exactly 0; entry k is the masked
        share after step k, so that L times the differences are the counts. The uniform grid where N >= L.

    Raises:
        ValueError: If `num_inference_steps` is not an integer of at least 1.
    """
    length = len(curve.values)
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` is {num_inference_steps!r}, allowed is an integer of at least 1")
    if num_inference_steps >= length:
        return torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) / num_inference_steps
    counts = optimal_counts(curve, num_inference_steps)[-1]
    revealed = torch.tensor([0, *counts]).cumsum(0)
    return (length - revealed).double() / length


def schedule_gain(curve: InformationCurve) -> float:
    """What a time schedule can gain: R = (int sqrt(c'))^2 / int c', with c(t) the curve against the masked share t.

    For many steps, the excess of the best grid over infinitely many steps is R times that of the uniform grid (calculus
    of variations: nodes with density sqrt(c')). So R = 1 says that no grid beats the uniform one.
    On the L - 1 differences d_i = f(i) - f(i + 1):

        R = (sum_i sqrt(d_i))^2 / ((L - 1) sum_i d_i)

    A noisy curve is a staircase after its isotonic fit, and stairs have a small R: measure R with `num_levels` of about
    16. `optimal_counts` gives the gain for a given number of steps.

    Args:
        curve (`InformationCurve`): Non-increasing.

    Returns:
        `float`: In (0, 1]; 1 for a linear curve, and by definition for a flat one and for L = 1.

    Raises:
        ValueError: If the curve increases somewhere.
    """
    drops = curve.values[:-1] - curve.values[1:]
    if (drops < 0).any():
        place = int((drops < 0).nonzero()[0])
        raise ValueError(
            f"`curve` increases after i = {place}, allowed is non-increasing: use `isotonic_fit` on its values"
        )
    if not (drops > 0).any():
        return 1.0
    return float(drops.sqrt().sum() ** 2 / (len(drops) * drops.sum()))


def _levels(length: int, num_levels: int | None) -> list[int]:
    """Numbers of revealed tokens at which the curve is measured: 0 to L - 1, all or evenly spread."""
    if num_levels is None:
        return list(range(length))
    if not 2 <= num_levels <= length:
        raise ValueError(f"`num_levels` is {num_levels}, allowed is 2 to {length} (the sequence length) or None")
    return [k * (length - 1) // (num_levels - 1) for k in range(num_levels)]


def _level_means(
    denoiser: Callable[..., Any], x_0: Tensor, rank: Tensor, levels: list[int], mask_token_id: int
) -> Tensor:
    """Mean of -log p over the masked positions of each sequence at each level, float64 (B, levels)."""
    means = []
    length = x_0.shape[1]
    for level in levels:
        is_masked = rank >= level
        x_t = x_0.masked_fill(is_masked, mask_token_id)
        logits = denoiser(x_t, (length - level) / length, positions=is_masked).logits  # (R, V), R = B (L - level)
        rows = zip(logits.split(_ROWS_IN_FLOAT64), x_0[is_masked].split(_ROWS_IN_FLOAT64), strict=True)
        nll = torch.cat([cross_entropy(row.double(), token, reduction="none") for row, token in rows])
        if not nll.isfinite().all():
            num_nan, num_zero = int(nll.isnan().sum()), int(nll.isposinf().sum())
            raise ValueError(
                f"`denoiser` gives NaN for {num_nan} and probability 0 for {num_zero} of {len(nll)} masked tokens, "
                f"with {level} of {length} revealed: neither is allowed"
            )
        means.append(nll.view(-1, length - level).mean(1))  # rows come in row-major order, as many for each sequence
    return torch.stack(means, dim=1)


def _interpolate(levels: Tensor, values: Tensor, length: int) -> Tensor:
    """Piecewise linear from `levels`, increasing from 0 to L - 1, to all of 0..L-1; exact at the levels."""
    at = torch.arange(length)
    right = torch.searchsorted(levels, at)  # the first level that is not below
    left = (right - 1).clamp(min=0)
    share = (levels[right] - at).double() / (levels[right] - levels[left]).clamp(min=1)  # 0 at a level
    return torch.lerp(values[right], values[left], share)


def _traced(previous: Tensor) -> list[list[int]]:
    """Counts for 1..N steps, first step first, from the best number of tokens before each step where j are known after it,
    (N, L + 1): all runs are followed back from L to 0 together."""
    num_steps, length = len(previous), previous.shape[1] - 1
    ends = torch.full((num_steps,), length)  # of the runs of 1..N steps
    counts = torch.zeros(num_steps, num_steps, dtype=torch.int64)
    for step in reversed(range(num_steps)):
        ends_before = previous[step][ends[step:]].long()
        counts[step:, step] = ends[step:] - ends_before
        ends[step:] = ends_before
    return [row[:number] for number, row in enumerate(counts.tolist(), start=1)]
