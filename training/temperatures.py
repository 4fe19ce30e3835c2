r"""One inverse temperature for each step of a [`LearnedScheduler`], learned on the law of its last samples.

A path opens some masks in each step and draws their tokens from q = softmax(beta_k l), l the network's logits. Which masks open
does not depend on beta, so that the slope of the path's log-probability needs no call of the network beyond those that drew it:

    d log P(path) / d log beta_k = sum over tokens v drawn in step k of  beta_k ( l(v) - sum_u q(u) l(u) )

With w of the path's end (`marginal.divergence_weights` of log(q_c / p), a learned ratio) the gradient of the divergence is
mean_b (w_b - mean of the other rows) slope_b. What the ratio sees of samples is `features.py`'s.

Source: `training/marginal.py`. Sums in float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import LearnedScheduler
from discrete_schedulers.training.features import row_sums
from discrete_schedulers.training.marginal import centred

BETA_RANGE = (0.2, 5.0)


class Rolled(NamedTuple):
    """Samples, and how their paths' log-probabilities change with the temperatures.

    Args:
        x_0 (`torch.Tensor` of shape `(B, L)`): Samples, int64.
        slopes (`torch.Tensor` of shape `(B, N)`): d log P(path) / d log beta_k, float64.
    """

    x_0: Tensor
    slopes: Tensor


def with_temperatures(scheduler: LearnedScheduler, log_beta: Tensor) -> LearnedScheduler:
    """The scheduler with exp(log_beta), (N,), as the inverse temperatures of N steps, beside the blocks it has there.

    Raises:
        ValueError: If another temperature, top-p or mixture makes the token law.
    """
    config = scheduler.config
    if config.temperature != 1 or config.top_p != 1:
        raise ValueError(f"`temperature` is {config.temperature} and `top_p` {config.top_p}; both must be 1 to learn")
    steps = str(len(log_beta))
    blocks = dict((config.coefficients or {}).get(steps, {}))
    if "mixture_weight" in blocks:
        raise ValueError("the scheduler has a mixture: its tokens have no temperature of their own")
    if "top_p" in blocks:
        raise ValueError(
            "the scheduler has 'top_p': the tokens it keeps depend on the temperature, and slopes leave that out"
        )
    if "contrast" in blocks:
        raise ValueError("the scheduler has a 'contrast': slopes are those of the network's own logits")
    blocks["inverse_temperature"] = log_beta.exp().tolist()
    return LearnedScheduler.from_config(config, coefficients={steps: blocks})


def token_slopes(logits: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """d log q(token) / d log beta, (R,), float64, of tokens (R,) drawn from q = softmax(beta logits), logits (R, V)."""
    wide = logits.double()
    q = (beta * wide).softmax(-1)
    mean = (q * wide.masked_fill(q == 0, 0.0)).sum(-1)  # 0 * -inf is NaN
    return beta * (wide.gather(-1, tokens[:, None]).squeeze(-1) - mean)


@torch.no_grad()
def roll(
    denoiser: Denoiser,
    scheduler: LearnedScheduler,
    log_beta: Tensor,
    shape: tuple[int, int],
    generator: Generators,
    device: torch.device | str = "cpu",
) -> Rolled:
    """Draw paths.

    Args:
        denoiser (`Denoiser`): The frozen network.
        scheduler (`LearnedScheduler`): Its grid, order and other blocks; absorbing process, no gate.
        log_beta (`torch.Tensor` of shape `(N,)`): Logarithms of the inverse temperatures, float64.
        shape (`tuple[int, int]`): Rows B and positions L.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the network is.

    Raises:
        ValueError: If the scheduler has a gate, a mixture, or another temperature.
    """
    scheduler = with_temperatures(scheduler, log_beta)
    scheduler.set_timesteps(len(log_beta))
    if scheduler.chooses_by_logits:
        raise ValueError("the scheduler has a gate, which sees the logits: its openings are part of the path's law")
    x = scheduler.sample_prior(shape, generator, device)
    slopes = torch.zeros(shape[0], len(log_beta), dtype=torch.float64, device=device)
    for k, t in enumerate(scheduler.timesteps):
        chosen = scheduler.positions(k, x, generator)
        assert chosen is not None  # absorbing
        rows = denoiser(x, t, chosen)
        x = scheduler.step(rows, k, x, generator=generator, return_dict=False)[0]
        tokens, found = x[chosen], [slopes.new_empty(0)]
        for part, some in rows.chunks():
            found.append(token_slopes(some, tokens[part], float(log_beta[k].exp())))
        slopes[:, k] = row_sums(rows, torch.cat(found))
    return Rolled(x, slopes)


def descend_temperatures(
    rolled: Callable[[Tensor, int], Rolled],
    weights: Callable[[Tensor], Tensor],
    num_steps: int,
    iterations: int,
    learning_rate: float = 0.05,
    averaged: int = 20,
) -> Iterator[Tensor]:
    """Adam on the score-function gradient, clipped to `BETA_RANGE`; yields the mean of the last iterates.

    Args:
        rolled (`Callable`): Draws the paths of an iteration, from log beta (N,) and its number.
        weights (`Callable`): w at samples (B, L), (B,): `marginal.divergence_weights` of a log ratio.
        num_steps (`int`): N.
        iterations (`int`): Gradient steps.
        learning_rate (`float`, defaults to 0.05): Of Adam, on log beta; it falls to a tenth over the run, by a cosine.
        averaged (`int`, defaults to 20): Iterates in the mean.

    Yields:
        `torch.Tensor` of shape `(N,)`: log beta, after each iteration.
    """
    log_beta = torch.zeros(num_steps, dtype=torch.float64)
    optimizer = torch.optim.Adam([log_beta], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=learning_rate / 10)
    latest: deque[Tensor] = deque(maxlen=averaged)
    for iteration in range(iterations):
        x_0, slopes = rolled(log_beta, iteration)
        log_beta.grad = (centred(weights(x_0))[:, None] * slopes).mean(0).to(log_beta.device)
        optimizer.step()
        schedule.step()
        log_beta.clamp_(*map(math.log, BETA_RANGE))
        latest.append(log_beta.clone())
        yield torch.stack(list(latest)).mean(0)
