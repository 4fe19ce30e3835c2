r"""Exact simulation of the reverse process of a denoiser, by uniformization: a reference for tests, not a sampler to use.

On an interval of noise levels the total rate of a row, in units of a clock that runs with the noise, is at most L b:

    candidates come at rate L b;  at each of them  x -> y with probability R(x -> y) / (L b),  else x stays
    absorbing   clock log(1 - alpha), rate 1 for each mask,                                      b = 1
    uniform     clock -log alpha, rate sum_{v != x} s(v) / V <= 1 / (1 - alpha) - 1 / V,         b at the interval's cleaner end

The bound holds for every network, since s(v) = m(v) / m(x) with a law m of at least (1 - alpha) / V. The intervals halve
the noise, from t = 1 to t = delta, because rates grow without end as noise vanishes. There is no error from steps and none
from tokens that move together; the law is the denoiser's own at delta. Each candidate is a call, also where x stays, and
their number is random: L log(1 / (1 - alpha_delta)) on average with absorbing noise, 1.4 times that and 12 L more with
uniform log-linear noise.

Source: Chen and Ying 2024 (arXiv 2402.08095); the bound is derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, UniformProcess
from discrete_schedulers.sampling import Generators, categorical, check_finite, uniforms


class ExactSamples(NamedTuple):
    """What `uniformization` returns.

    Args:
        samples (`torch.Tensor` of shape `(B, L)`): Tokens at t = delta, int64.
        num_model_calls (`torch.Tensor` of shape `(B,)`): Calls that each row took, int64.
    """

    samples: Tensor
    num_model_calls: Tensor


class Intervals(NamedTuple):
    """Intervals of noise 1 - alpha, from t = 1 down.

    Args:
        start (`torch.Tensor` of shape `(K,)`): Noise at which each begins, float64.
        span (`torch.Tensor` of shape `(K,)`): How long each takes by the clock.
        bound (`torch.Tensor` of shape `(K,)`): Largest rate of one position, per unit of the clock.
    """

    start: Tensor
    span: Tensor
    bound: Tensor


def uniformization(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    process: AbsorbingProcess | UniformProcess,
    shape: tuple[int, int],
    delta: float = 1e-3,
    generator: Generators = None,
    device: torch.device | str = "cpu",
) -> ExactSamples:
    """Draw from the reverse process that a denoiser defines, without discretisation.

    Args:
        denoiser (`Callable`): From tokens (R, L) and times (R,), float64, to logits of log p(x_0 | x_t), (R, L, V).
        process (`AbsorbingProcess` or `UniformProcess`): The forward process. A uniform one needs alpha_1 > 0.
        shape (`tuple[int, int]`): (B, L).
        delta (`float`, defaults to 1e-3): Time at which to stop, in (0, 1).
        generator (`torch.Generator`, `list[torch.Generator]`, *optional*): One for all rows or one for each.
        device (`torch.device`, defaults to `"cpu"`): Where the samples live.

    Returns:
        `ExactSamples`: `samples`, noised to delta still, and `num_model_calls` of each row.

    Raises:
        ValueError: If `delta` is not in (0, 1), the uniform process starts at an infinite rate, or logits are not finite.
    """
    if not 0 < delta < 1:
        raise ValueError(f"`delta` is {delta}; allowed are numbers in (0, 1)")
    intervals = Intervals(*(values.to(device) for values in halving_intervals(process, delta)))
    x = process.prior(shape, generator, device)
    calls, interval = (torch.zeros(shape[0], dtype=torch.int64, device=device) for _ in range(2))
    elapsed = torch.zeros(shape[0], dtype=torch.float64, device=device)  # by the clock, in the row's interval
    while (rows := (interval < len(intervals.start)).nonzero().flatten()).numel():
        now = interval[rows]
        source = [generator[row] for row in rows.tolist()] if isinstance(generator, list) else generator
        u = uniforms((len(rows), 2), source, device)
        elapsed[rows] -= torch.log1p(-u[:, 0]) / (shape[1] * intervals.bound[now])
        is_over = elapsed[rows] >= intervals.span[now]
        interval[rows[is_over]] += 1  # exponential gaps have no memory: the next interval begins afresh
        elapsed[rows[is_over]] = 0.0
        at, now = rows[~is_over], now[~is_over]
        if at.numel():
            noise = noise_after(process, intervals.start[now], elapsed[at])
            t = process.time_of_noise(noise / (1 - process.alpha(1.0)).to(device))  # (R,)
            x[at] = jump(process, denoiser(x[at], t), x[at], t, intervals.bound[now], u[~is_over, 1])
            calls[at] += 1
    return ExactSamples(x, calls)


def halving_intervals(process: AbsorbingProcess | UniformProcess, delta: float) -> Intervals:
    """Intervals from the noise of t = 1 to that of t = delta, each to half of its noise."""
    first, last = float(1 - process.alpha(1.0)), float(1 - process.alpha(delta))
    levels = [first]
    while levels[-1] / 2 > last:
        levels.append(levels[-1] / 2)
    start, end = torch.tensor(levels, dtype=torch.float64), torch.tensor([*levels[1:], last], dtype=torch.float64)
    if isinstance(process, AbsorbingProcess):
        return Intervals(start, torch.log(start / end), torch.ones_like(start))
    if first == 1:
        raise ValueError(
            f"`noise_schedule={process.noise_schedule!r}` has alpha_1 = 0: the uniform rate is infinite at t = 1"
        )
    return Intervals(start, torch.log((1 - end) / (1 - start)), 1 / end - 1 / process.vocab_size)


def noise_after(process: AbsorbingProcess | UniformProcess, start: Tensor, elapsed: Tensor) -> Tensor:
    """Noise 1 - alpha after some time by the clock."""
    if isinstance(process, AbsorbingProcess):
        return start * torch.exp(-elapsed)
    return 1 - (1 - start) * torch.exp(elapsed)


def jump(
    process: AbsorbingProcess | UniformProcess, logits: Tensor, x: Tensor, t: Tensor, bound: Tensor, u: Tensor
) -> Tensor:
    """x after a candidate at time t (R,): one position moved, or none.

    Args:
        process (`AbsorbingProcess` or `UniformProcess`): The forward process.
        logits (`torch.Tensor` of shape `(R, L, V)`): Logits of log p(x_0 | x_t).
        x (`torch.Tensor` of shape `(R, L)`): Tokens, int64.
        t (`torch.Tensor` of shape `(R,)`): Times.
        bound (`torch.Tensor` of shape `(R,)`): Largest rate of one position, per unit of the clock.
        u (`torch.Tensor` of shape `(R,)`): Uniforms in [0, 1).
    """
    speed = process.hazard(t) if isinstance(process, AbsorbingProcess) else process.jump_speed(t)  # of the clock, in t
    rate = process.reverse_rate(x, logits.double().softmax(-1), t) / speed  # (R, L, V)
    total, most = rate.sum((1, 2)), x.shape[1] * bound
    check_finite(total)
    assert (total <= most * (1 + 1e-9)).all(), "the rate exceeds its bound: candidates are too few"
    weights = torch.cat([rate.flatten(1), (most - total).clamp(min=0)[:, None]], 1)  # (R, L V + 1), the last one stays
    choice = categorical(weights.log(), u)
    moved = torch.nn.functional.pad(x, (0, 1))  # whoever stays writes into the column that is cut off
    moved.scatter_(1, (choice // process.vocab_size)[:, None], (choice % process.vocab_size)[:, None])
    return moved[:, :-1]
