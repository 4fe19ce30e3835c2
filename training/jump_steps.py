r"""Time grids without gradients: Jump Your Steps as published, its unbiased part solved exactly, and the Beta schedule.

**Jump Your Steps** (JYS, arXiv 2410.07761, theorem 3.2 and algorithm 2) inserts t2 between t1 > t3 where the step
t1 -> t2 -> t3 differs most from t1 -> t3, by golden section on

    KLUB(t1, t2, t3) = (t2 - t3) E sum_v R_t2(v) [ log R_t2(v) - log R_t1(v) ]                          a position's mean

x_t1 and x_t2 noised from one x_0 by one set of random numbers, R the reverse rate of the network there. The compensator
- int (R_t2 - R_t1) of the KL of two jump processes is missing in print and in code. For absorbing noise the KLUB is

    (t2 - t3) h(t2) E sum_masked KL(p(. | x_t2) || p(. | x_t1))  +  (t2 - t3) h(t2) (1 - alpha_t2) log(h(t2) / h(t1))

with h the hazard. The second term knows nothing of the data; alone it puts t2 at 1/e between 1 and 0. It is an error of
samplers that freeze the rate of opening, which ancestral sampling does not. The first, for a calibrated network and noise
linear in t, is

    (m2 - m3) [ c(m1) - c(m2) ]   in masked shares m = 1 - alpha,     c(m) = mean cross-entropy of a masked token

exactly what inserting m2 takes off the bound sum_k (m_k - m_{k+1}) c(m_k) - H / L on the KL of ancestral sampling (per token).
So JYS without its bias is a greedy bisection of that bound, and `optimal_shares` solves it for any number of steps by dynamic
programming.

**Beta schedule** (arXiv 2509.13866): alpha = sin^2(pi/2 I_u(a, b)) at progress u, I the regularised incomplete beta function;
(1/2, 1/2) is linear and (1, 1) is sin^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, Process
from discrete_schedulers.sampling import RowLogits

FLOOR = 1e-8  # JYS's code adds it to both rates
GOLDEN = (math.sqrt(5) - 1) / 2


def nested_states(process: Process, x_0: Tensor, thresholds: Tensor, noise: Tensor, t: float) -> Tensor:
    """x_t from shared randomness: a token has moved at t if its threshold is at least alpha_t; so moves of a smaller t are
    among those of a larger one.

    Args:
        process (`Process`): The forward process.
        x_0 (`torch.Tensor` of shape `(B, L)`): Clean tokens.
        thresholds (`torch.Tensor` of shape `(B, L)`): Uniforms in [0, 1).
        noise (`torch.Tensor` of shape `(B, L)`): Tokens of the prior to fall to.
        t (`float`): Time in [0, 1].
    """
    return torch.where(thresholds >= process.alpha(t), noise, x_0)


def rate_divergence(rate: Tensor, coarse_rate: Tensor) -> Tensor:
    """sum_v R (log(R + 1e-8) - log(R' + 1e-8)) of each position, (B, L).

    Args:
        rate (`torch.Tensor` of shape `(B, L, V)`): R, of the refined step.
        coarse_rate (`torch.Tensor` of shape `(B, L, V)`): R', of the step it refines.
    """
    return (rate * ((rate + FLOOR).log() - (coarse_rate + FLOOR).log())).sum(-1)


@torch.no_grad()
def klub(
    denoiser: Callable[..., RowLogits],
    process: Process,
    x_0: Tensor,
    thresholds: Tensor,
    noise: Tensor,
    times: tuple[float, float, float],
) -> float:
    """JYS's KLUB(t1, t2, t3) as its code has it, a position's mean, with two calls of the network. With absorbing noise it is
    asked for the masks of x_t2 only: the others have no rate there.

    Args:
        denoiser (`Callable`): The frozen network: tokens (B, L), a time and positions, bool (B, L), to [`RowLogits`] there.
        process (`Process`): The forward process.
        x_0 (`torch.Tensor` of shape `(B, L)`): Data; the paper takes 64 sequences.
        thresholds (`torch.Tensor` of shape `(B, L)`): Uniforms, the same in all calls of a search.
        noise (`torch.Tensor` of shape `(B, L)`): Tokens of the prior, likewise.
        times (`tuple[float, float, float]`): t1 > t2 > t3, in [0, 1] and t2 > 0.

    Raises:
        ValueError: If the times do not fall.
    """
    t1, t2, t3 = times
    if not 1 >= t1 > t2 > t3 >= 0:
        raise ValueError(f"`times` is {times}; allowed are 1 >= t1 > t2 > t3 >= 0")
    states = [(nested_states(process, x_0, thresholds, noise, t), t) for t in (t2, t1)]
    asked = torch.ones_like(x_0, dtype=torch.bool)
    if isinstance(process, AbsorbingProcess):
        asked = states[0][0] == process.mask_token_id
    tokens = [(x_t[asked], t) for x_t, t in states]
    total = 0.0
    for pieces in zip(*(denoiser(x_t, t, asked).chunks() for x_t, t in states), strict=True):  # a few rows of both
        rates = [
            process.reverse_rate(own[part, None], some[:, None].double().softmax(-1), t)
            for (part, some), (own, t) in zip(pieces, tokens, strict=True)
        ]
        total += float(rate_divergence(*rates).sum())
    return (t2 - t3) * total / x_0.numel()


def golden_section(
    gain: Callable[[float], float], low: float, high: float, tolerance: float, max_calls: int = 32
) -> tuple[float, float]:
    """A local maximum of `gain` on [low, high], the global one if it has a single peak.

    Args:
        gain (`Callable`): A function of one number.
        low (`float`): Lower end.
        high (`float`): Upper end, above the lower.
        tolerance (`float`): Width of the bracket to stop at.
        max_calls (`int`, defaults to 32): Evaluations at most.

    Returns:
        `tuple[float, float]`: The best point that was evaluated, and its gain.

    Raises:
        ValueError: If the interval is empty.
    """
    if not low < high:
        raise ValueError(f"`low` is {low} and `high` {high}; allowed is low < high")
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = gain(left), gain(right)
    best = max((at_left, left), (at_right, right))
    for _ in range(max_calls - 2):
        if high - low < tolerance:
            break
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = gain(left)
            best = max(best, (at_left, left))
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = gain(right)
            best = max(best, (at_right, right))
    return best[1], best[0]


def jump_your_steps(
    gain: Callable[[float, float, float], float], num_steps: int, margin: float = 1e-3, resolution: int = 1024
) -> list[float]:
    """Algorithm 2 of JYS: from (1, 0), halve every interval where the gain is largest, until there are N.

    Points are rounded to multiples of 1 / `resolution`, and intervals keep room for those still to come. The published search
    ends at 1e-5 and denoises from there; here the grid ends at 0.

    Args:
        gain (`Callable`): (t1, t2, t3) -> what t2 gains: `klub`, or `token_gain` in masked shares.
        num_steps (`int`): N, a power of two.
        margin (`float`, defaults to 1e-3): Distance of t2 to the ends of its interval, at least.
        resolution (`int`, defaults to 1024): Points of the grid, at least N.

    Returns:
        `list[float]`: N + 1 times from 1 to 0, strictly falling.

    Raises:
        ValueError: If N is not a power of two up to `resolution`.
    """
    levels = num_steps.bit_length() - 1
    if num_steps < 1 or num_steps != 2**levels or num_steps > resolution:
        raise ValueError(f"`num_steps` is {num_steps}; allowed are powers of two up to {resolution}")
    points = [resolution, 0]
    for level in range(levels):
        room = 2 ** (levels - level - 1)  # halvings of either side that are still to come need this many cells
        refined = points[:1]
        for upper, lower in pairwise(points):
            t1, t3 = upper / resolution, lower / resolution
            edge = min(margin, (t1 - t3) / 4)  # a narrow interval keeps a bracket

            def inserted(t2: float, t1: float = t1, t3: float = t3) -> float:
                return gain(t1, t2, t3)

            t2, _ = golden_section(inserted, t3 + edge, t1 - edge, 0.25 / resolution)
            refined += [min(max(round(t2 * resolution), lower + room), upper - room), lower]
        points = refined
    return [point / resolution for point in points]


# Masked shares: the part of KLUB that ancestral sampling pays, and its exact optimum


def share_cross_entropy(curve: Tensor, share: Tensor) -> Tensor:
    """c(m), mean cross-entropy of a masked token when each other token is masked with chance m, from the information curve.

        c(m) = sum_i binomial(L - 1, i) (1 - m)^i m^(L - 1 - i) f(i)

    Args:
        curve (`torch.Tensor` of shape `(L,)`): f(i), cross-entropy with i tokens revealed (`InformationCurve.values`).
        share (`torch.Tensor` of shape `(G,)`): m, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(G,)`: Float64, in nats per token.
    """
    others = len(curve) - 1
    revealed = torch.arange(others + 1, dtype=torch.float64)
    log_ways = math.lgamma(others + 1) - torch.lgamma(revealed + 1) - torch.lgamma(others - revealed + 1)
    m = share.double()[:, None]
    log_law = log_ways + torch.xlogy(revealed, 1 - m) + torch.xlogy(others - revealed, m)
    return log_law.exp() @ curve.double()


def token_gain(c: Callable[[float], float], m1: float, m2: float, m3: float) -> float:
    """(m2 - m3) (c(m1) - c(m2)): what inserting m2 between m1 > m3 takes off the bound, in nats per token."""
    return (m2 - m3) * (c(m1) - c(m2))


def share_bound(shares: Sequence[float], c: Callable[[float], float]) -> float:
    """sum_k (m_k - m_{k+1}) c(m_k): bound on the NLL of ancestral sampling with independent openings, in nats per token. With
    the data's own conditionals it exceeds H / L by the path-wise KL per token, exactly."""
    return math.fsum((m - after) * c(m) for m, after in pairwise(shares))


def optimal_shares(shares: Tensor, price: Tensor, num_steps: int) -> list[float]:
    """The N + 1 of the given shares with the smallest `share_bound`, from the first to the last of them.

    Dynamic programming, O(N G^2):  F_0(0) = 0,  F_k(j) = min_{i < j} F_{k-1}(i) + (m_i - m_j) c(m_i).

    Args:
        shares (`torch.Tensor` of shape `(G,)`): Candidates, strictly falling from 1 to 0.
        price (`torch.Tensor` of shape `(G,)`): c at the candidates; the last is not used.
        num_steps (`int`): N, 1 to G - 1.

    Returns:
        `list[float]`: Strictly falling. With `1 - alpha_t = m`, `Process.time_of_noise` makes times of them.

    Raises:
        ValueError: If the number of steps is out of range or the shares do not fall.
    """
    count = len(shares)
    if not 1 <= num_steps < count:
        raise ValueError(f"`num_steps` is {num_steps}; allowed is 1 to {count - 1}, one less than the candidates")
    if not (shares[:-1] > shares[1:]).all():
        raise ValueError("`shares` has neighbours that do not fall; pass distinct candidates, largest first")
    cost = (shares[:, None] - shares[None, :]).double() * price.double()[:, None]  # (i, j)
    cost = cost.masked_fill(torch.ones(count, count, dtype=torch.bool).tril(), math.inf)  # j after i only
    best = torch.full((count,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    previous = []
    for _ in range(num_steps):
        best, argmin = (best[:, None] + cost).min(0)
        previous.append(argmin)
    place = count - 1
    chosen = [place]
    for argmin in reversed(previous):
        place = int(argmin[place])
        chosen.append(place)
    return [float(shares[i]) for i in reversed(chosen)]


# The Beta schedule


def beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, by its continued fraction (DLMF 8.17.22), to 1e-14.

    Args:
        x (`float`): In [0, 1].
        a (`float`): Positive.
        b (`float`): Positive.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not (0 <= x <= 1 and a > 0 and b > 0):
        raise ValueError(f"`x`, `a`, `b` are {x}, {a}, {b}; allowed are x in [0, 1] and positive a, b")
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - beta_cdf(1 - x, b, a)
    value, upper, lower = 1.0, 1.0, 0.0  # Lentz's method, modified by Thompson and Barnett: C and D of the fraction
    for n in range(1000):
        m = n // 2
        if n == 0:
            term = 1.0
        elif n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower = 1 / ((1 + term * lower) or 1e-300)
        upper = (1 + term / upper) or 1e-300
        value *= upper * lower
        if n > 0 and abs(upper * lower - 1) < 1e-15:
            break
    front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / a * (value - 1)


def beta_shares(a: float, b: float, num_steps: int) -> list[float]:
    """Masked shares of the Beta schedule at even progress: 1 - sin^2(pi/2 I_{k/N}(a, b)), k = 0..N, from 1 to 0.

    Args:
        a (`float`): Positive; below `b`, most opens early.
        b (`float`): Positive.
        num_steps (`int`): N.
    """
    inner = [math.cos(math.pi / 2 * beta_cdf(k / num_steps, a, b)) ** 2 for k in range(1, num_steps)]
    return [1.0, *inner, 0.0]
