r"""Forward processes: continuous-time Markov chains that carry clean tokens to noise, and their exact reverses.

With survival alpha_t = P(token still clean at t) and prior pi (all mass on the mask, or uniform):

    q(x_t | x_0)       = alpha_t 1[x_t = x_0] + (1 - alpha_t) pi(x_t)
    q(x_s | x_t, p_0)  = sum_{x_0} q(x_s | x_t, x_0) p_0(x_0)                     for s < t
    R_t(x -> v)        = lim_{s -> t} q(x_s = v | x_t = x, p_0) / (t - s)         for v != x

p_0 = p(x_0 | x_t) is what a denoiser predicts for each position, shape (B, L, V). Times are floats in [0, 1], 1 is noise;
everything is computed in float64, because 1 - alpha cancels near t = 0 and log-ratios reach log V near t = 1.

Sources: Austin et al. 2021 (D3PM), Campbell et al. 2022, Lou et al. 2024 (SEDD), Sahoo et al. 2024 (MDLM, eq. 6),
Schiff et al. 2024 (UDLM, eq. 14).
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, on_host, uniforms

NoiseSchedule: TypeAlias = Literal["loglinear", "linear", "cosine", "geometric"]

LOGLINEAR_EPS = 1e-3  # SEDD, MDLM, RADD, DUO: alpha_1 = eps
SIGMA_MIN, SIGMA_MAX = 1e-4, 20.0  # SEDD's geometric noise
# To step back from, 9e-16: below that float64 rounds alpha_t to 1, and no noise is left to take away
LEAST_TIME = 2.0**-50


def survival(t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """alpha_t. Time 0 is clean data by definition: alpha_0 = 1 for every schedule (geometric noise jumps there from
    exp(-1e-4), which is the published final denoising step)."""
    if noise_schedule == "loglinear":
        return 1 - (1 - LOGLINEAR_EPS) * t
    if noise_schedule == "linear":
        return 1 - t
    if noise_schedule == "cosine":
        return 1 - torch.sin(math.pi / 2 * t)  # 1 - cos(pi / 2 (1 - t)), and exactly 1 and 0 at the ends
    if noise_schedule == "geometric":
        return torch.where(t > 0, torch.exp(-(SIGMA_MIN ** (1 - t)) * SIGMA_MAX**t), 1.0)
    raise ValueError(f"`noise_schedule` is {noise_schedule!r}; allowed: 'loglinear', 'linear', 'cosine', 'geometric'")


def time_of_survival(alpha: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """The time t in [0, 1] with alpha_t = alpha: the inverse of `survival`. Survivals that no time has give the nearest end."""
    if noise_schedule == "loglinear":
        t = (1 - alpha) / (1 - LOGLINEAR_EPS)
    elif noise_schedule == "linear":
        t = 1 - alpha
    elif noise_schedule == "cosine":
        t = 2 / math.pi * torch.asin((1 - alpha).clamp(0, 1))
    else:
        t = torch.log(-torch.log(alpha) / SIGMA_MIN) / math.log(SIGMA_MAX / SIGMA_MIN)
    return torch.where(alpha >= 1, 0.0, t.clamp(0, 1))


def survival_slope(t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
    """d alpha / dt, negative."""
    if noise_schedule == "loglinear":
        return torch.full_like(t, -(1 - LOGLINEAR_EPS))
    if noise_schedule == "linear":
        return torch.full_like(t, -1.0)
    if noise_schedule == "cosine":
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))
    sigma = SIGMA_MIN ** (1 - t) * SIGMA_MAX**t
    return -math.log(SIGMA_MAX / SIGMA_MIN) * sigma * torch.exp(-sigma)


def as_time(t: Tensor | float, device: torch.device | str = "cpu") -> Tensor:
    """A time as a float64 tensor that broadcasts over (B, L, V): a scalar, or shape (B, 1, 1) from shape (B,).

    Raises:
        ValueError: If a time lies outside [0, 1]; not looked at where the host would have to wait for it.
    """
    if not isinstance(t, Tensor | numbers.Real):
        raise ValueError(f"`t` is {t!r}; a time is a number from 0 (clean) to 1 (noise), or a tensor of them")
    t = torch.as_tensor(t, dtype=torch.float64, device=device)
    if on_host(t) and not (0 <= float(t.detach()) <= 1 if t.dim() == 0 else ((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"`t` is {t.tolist()}; a time is a number from 0 (clean) to 1 (noise)")
    return t[:, None, None] if t.dim() == 1 else t


def check_step_back(t: Tensor | float, s: Tensor | float) -> None:
    """Raises `ValueError` if a reverse step does not go from a time t, `LEAST_TIME` or more, to a time s <= t; not looked at
    where the host would have to wait for it."""
    for name, time in (("t", t), ("s", s)):
        if not isinstance(time, Tensor | numbers.Real):
            raise ValueError(
                f"`{name}` is {time!r}; a time is a number from 0 (clean) to 1 (noise), or a tensor of them"
            )
    t, s = (time.detach() if isinstance(time, Tensor) else time for time in (t, s))
    times = [time for time in (t, s) if isinstance(time, Tensor)]
    if not all(map(on_host, times)):
        return
    if any(time.dim() for time in times):
        t, s = torch.as_tensor(t, dtype=torch.float64), torch.as_tensor(s, dtype=torch.float64)
        is_right = bool(((s <= t) & (t >= LEAST_TIME)).all())
    else:  # several times as fast
        is_right = LEAST_TIME <= float(t) >= float(s)
    if not is_right:
        wrong = [time.tolist() if isinstance(time, Tensor) else time for time in (t, s)]
        raise ValueError(
            f"`t` is {wrong[0]} and `s` is {wrong[1]}; a reverse step needs 0 <= s <= t and t >= {LEAST_TIME:.1g}"
        )


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Raises `ValueError` if these are not ids of V states, int64 (B, L); their values are not looked at where the host would
    have to wait for them."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"`{name}` is a {type(tokens).__name__}; it must be an int64 tensor (B, L)")
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"`{name}` is {tokens.dtype} of shape {tuple(tokens.shape)}; it must be int64 (B, L)")
    if not on_host(tokens) or not tokens.numel():
        return
    least, most = (int(end) for end in tokens.aminmax())
    if not 0 <= least <= most < vocab_size:
        raise ValueError(f"`{name}` has ids from {least} to {most}; allowed are 0 to {vocab_size - 1}")


def indicator(tokens: Tensor, vocab_size: int) -> Tensor:
    """1 at each token and 0 elsewhere, float64 (..., V). torch's `one_hot` makes int64 first, and looks at all values."""
    zeros = torch.zeros(*tokens.shape, vocab_size, dtype=torch.float64, device=tokens.device)
    return zeros.scatter_(-1, tokens[..., None], 1.0)


class Process(ABC):
    """What an absorbing and a uniform process have in common.

    Args:
        vocab_size (`int`): Number of states V, the mask included where there is one.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
    """

    def __init__(self, vocab_size: int, noise_schedule: NoiseSchedule = "loglinear") -> None:
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
            raise ValueError(f"`vocab_size` is {vocab_size!r}; it must be an integer of at least 2")
        if vocab_size < 2:
            raise ValueError(f"`vocab_size` is {vocab_size}; at least 2 states are needed")
        survival(torch.tensor(0.5), noise_schedule)  # rejects unknown names
        self.vocab_size = vocab_size
        self.noise_schedule: NoiseSchedule = noise_schedule

    def alpha(self, t: Tensor | float) -> Tensor:
        """P(token still clean at t), float64, in [0, 1]; a time of shape (B,) gives shape (B, 1, 1)."""
        return survival(as_time(t, t.device if isinstance(t, Tensor) else "cpu"), self.noise_schedule)

    def alpha_slope(self, t: Tensor | float) -> Tensor:
        """d alpha / dt, negative, float64, shape as `alpha`."""
        return survival_slope(as_time(t, t.device if isinstance(t, Tensor) else "cpu"), self.noise_schedule)

    def time_of_noise(self, share: Tensor) -> Tensor:
        """The time at which a share of (1 - alpha_t) / (1 - alpha_1) of the noise at t = 1 is there, float64, in [0, 1]."""
        share = share.double()
        last = survival(torch.ones((), dtype=torch.float64), self.noise_schedule)
        return torch.where(share >= 1, 1.0, time_of_survival(1 - share * (1 - last), self.noise_schedule))

    def total_noise(self, t: Tensor | float) -> Tensor:
        """sigma(t) = -log alpha_t, what SEDD-type networks take as their time input."""
        return -torch.log(self.alpha(t))

    def marginal(self, x_0: Tensor, t: Tensor | float) -> Tensor:
        """q(x_t | x_0) of every position, shape (B, L, V), float64."""
        check_tokens("x_0", x_0, self.vocab_size)
        alpha = self.alpha(t).to(x_0.device)
        clean = indicator(x_0, self.vocab_size)
        return alpha * clean + (1 - alpha) * self.prior_law(x_0.device)

    def add_noise(
        self, x_0: Tensor, t: Tensor | float, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """Draw x_t ~ q(x_t | x_0).

        Args:
            x_0 (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
            t (`float` or `torch.Tensor` of shape `(B,)`): Time in [0, 1], one for all or one per row.
            generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
            noise (`torch.Tensor` of shape `(B, L)`, *optional*): Int64 tokens of the prior to fall to; drawn when `None`.

        Returns:
            `torch.Tensor` of shape `(B, L)`: Noisy tokens, int64.

        Raises:
            ValueError: If tokens, times or noise are not of these shapes, dtypes and ranges.
        """
        check_tokens("x_0", x_0, self.vocab_size)
        if isinstance(t, Tensor) and t.shape not in ((), (1,), (len(x_0),)):
            raise ValueError(f"`t` has shape {tuple(t.shape)}; it must be one time, or one for each of {len(x_0)} rows")
        if noise is not None:
            check_tokens("noise", noise, self.vocab_size)
            if noise.shape != x_0.shape:
                raise ValueError(
                    f"`noise` has shape {tuple(noise.shape)}; it must be that of `x_0`, {tuple(x_0.shape)}"
                )
        moves = uniforms(tuple(x_0.shape), generator, x_0.device) >= self.alpha(t).to(x_0.device).squeeze(-1)
        if noise is None:
            noise = self.prior(tuple(x_0.shape), generator, x_0.device)
        return torch.where(moves, noise, x_0)

    def check_reverse(self, x_t: Tensor, p_0: Tensor) -> None:
        """Raises `ValueError` if these are not tokens (B, L) and laws (B, L, V) of this process."""
        check_tokens("x_t", x_t, self.vocab_size)
        if p_0.shape != (*x_t.shape, self.vocab_size):
            shapes = tuple(p_0.shape), (*x_t.shape, self.vocab_size)
            raise ValueError(f"`p_0` has shape {shapes[0]}; it must be (B, L, V), here {shapes[1]}")

    @abstractmethod
    def prior_law(self, device: torch.device | str = "cpu") -> Tensor:
        """pi, the law of one token at t = 1 (up to alpha_1), shape (V,), float64."""

    @abstractmethod
    def prior(self, shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
        """Tokens drawn from pi, int64, of the given shape (B, L)."""

    @abstractmethod
    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """q(x_s | x_t, p_0), the exact factorised reverse kernel (Tweedie), shape (B, L, V), float64.

        Args:
            x_t (`torch.Tensor` of shape `(B, L)`): Tokens now, int64.
            p_0 (`torch.Tensor` of shape `(B, L, V)`): p(x_0 | x_t) of each position.
            t (`float` or `torch.Tensor`): Time now, in [2^-50, 1]: before that float64 has no noise to take away.
            s (`float` or `torch.Tensor`): Time next, in [0, t].

        Raises:
            ValueError: If tokens, laws or times are not of these shapes and ranges.
        """

    @abstractmethod
    def reverse_rate(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        """R_t(x_t -> v) of every position, shape (B, L, V), float64, per unit of t; 0 where v = x_t. Arguments as in
        `posterior`."""


class AbsorbingProcess(Process):
    """Tokens fall to the mask and stay there.

    Args:
        vocab_size (`int`): Number of states V, the mask included.
        mask_token_id (`int`): The absorbing state, in [0, V).
        noise_schedule (`str`, defaults to `"loglinear"`): See [`Process`].

    Raises:
        ValueError: If `mask_token_id` is missing or outside [0, V).
    """

    def __init__(self, vocab_size: int, mask_token_id: int | None, noise_schedule: NoiseSchedule = "loglinear") -> None:
        super().__init__(vocab_size, noise_schedule)
        is_id = isinstance(mask_token_id, int) and not isinstance(mask_token_id, bool)
        if mask_token_id is None or not is_id or not 0 <= mask_token_id < vocab_size:
            raise ValueError(
                f"`mask_token_id` is {mask_token_id!r}; an absorbing process needs one in [0, {vocab_size})"
            )
        self.mask_token_id = mask_token_id

    def prior_law(self, device: torch.device | str = "cpu") -> Tensor:
        law = torch.zeros(self.vocab_size, dtype=torch.float64, device=device)
        law[self.mask_token_id] = 1.0
        return law

    def prior(self, shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
        return torch.full(shape, self.mask_token_id, dtype=torch.int64, device=device)

    def unmask_probability(self, t: Tensor | float, s: Tensor | float) -> Tensor:
        """(alpha_s - alpha_t) / (1 - alpha_t): P(a mask at t is a token at s), in [0, 1], for s <= t."""
        check_step_back(t, s)
        return (self.alpha(s) - self.alpha(t)) / (1 - self.alpha(t))

    def remask_limit(self, t: Tensor | float, s: Tensor | float) -> Tensor:
        """min(1, (1 - alpha_s) / alpha_t): the most often that a token at t can be a mask at s with the marginals kept; 0 for
        s = 0, also from alpha_t = 0."""
        return ((1 - self.alpha(s)) / self.alpha(t)).nan_to_num(nan=0.0, posinf=1.0).clamp(max=1.0)

    def hazard(self, t: Tensor | float) -> Tensor:
        """-alpha'_t / (1 - alpha_t): the rate at which a mask opens in reverse time, per unit of t."""
        return -self.alpha_slope(t) / (1 - self.alpha(t))

    def clean_law(self, p_0: Tensor) -> Tensor:
        """p_0 without its mask column, renormalised: a clean token is never the mask."""
        p_0 = p_0.double().clone()
        p_0[..., self.mask_token_id] = 0.0
        return p_0 / p_0.sum(-1, keepdim=True)

    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """A mask opens with probability (alpha_s - alpha_t) / (1 - alpha_t) to v ~ p_0; a token stays. See
        [`Process.posterior`]."""
        self.check_reverse(x_t, p_0)
        opens = self.unmask_probability(t, s).to(x_t.device)
        law = opens * self.clean_law(p_0)
        law[..., self.mask_token_id] = (1 - opens).expand(law.shape[:2] + (1,)).squeeze(-1)
        stays = indicator(x_t, self.vocab_size)
        return torch.where((x_t == self.mask_token_id)[..., None], law, stays)

    def reverse_rate(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        """hazard(t) p_0(v) at a mask, 0 at a token. See [`Process.reverse_rate`]."""
        self.check_reverse(x_t, p_0)
        check_step_back(t, 0.0)
        rate = self.hazard(t).to(x_t.device) * self.clean_law(p_0)
        return torch.where((x_t == self.mask_token_id)[..., None], rate, 0.0)


class UniformProcess(Process):
    """Tokens jump to a uniformly random state. Arguments as in [`Process`]."""

    def prior_law(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((self.vocab_size,), 1.0 / self.vocab_size, dtype=torch.float64, device=device)

    def prior(self, shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
        return (uniforms(shape, generator, device) * self.vocab_size).long()

    def own_gain(self, t: Tensor | float) -> Tensor:
        """q(x_t | x_0 = x_t) / q(x_t | another x_0) = 1 + V alpha / (1 - alpha): what a token says of itself, float64."""
        alpha = self.alpha(t)
        return 1 + self.vocab_size * alpha / (1 - alpha)

    def kept(self, t: Tensor | float, s: Tensor | float) -> Tensor:
        """alpha_t / alpha_s, survival from s to t, float64; 1 where alpha_s is 0 already: from noise to noise nothing moves."""
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        return torch.where(alpha_s > 0, alpha_t / alpha_s, 1.0)

    def leave_one_out(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        r"""l(v) = p(x_0 = v | the other positions of x_t), from p_0(v) = p(x_0 = v | x_t), shape (B, L, V), float64.

        Bayes: p_0(v) is proportional to l(v) q(x_t | v), hence l to p_0(v) / (1 + 1[v = x_t] V alpha_t / (1 - alpha_t)).
        """
        gain = self.own_gain(t).to(x_t.device)
        p_0, own = p_0.double(), x_t[..., None]  # (B, L, 1)
        law = p_0.scatter(-1, own, p_0.gather(-1, own) / gain)
        return law / law.sum(-1, keepdim=True)

    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Proportional to q(x_t | x_s = v) [alpha_s l(v) + (1 - alpha_s) / V], l the leave-one-out law. See
        [`Process.posterior`]."""
        self.check_reverse(x_t, p_0)
        check_step_back(t, s)
        alpha_s, kept = self.alpha(s).to(x_t.device), self.kept(t, s).to(x_t.device)
        other = (1 - kept) / self.vocab_size  # the likelihood of x_t under v != x_t; under x_t it is kept + other
        law = alpha_s * self.leave_one_out(x_t, p_0, t) + (1 - alpha_s) / self.vocab_size
        own = law.gather(-1, x_t[..., None]) * (kept + other)
        law = (law * other).scatter(-1, x_t[..., None], own)
        return law / law.sum(-1, keepdim=True)

    def posterior_jumps(self, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        r"""q(x_s | x_t, p_0) by its jumps, float64. With x_0 ~ p_0, v != x_t and kept = alpha_t / alpha_s:

            q(v | x_t, x_0 != x_t) = (1 - kept) [alpha_s 1[v = x_0] + (1 - alpha_s) / V] / (1 - alpha_t)
            q(v | x_t, x_0 = x_t)  = (1 - kept) (1 - alpha_s) / V / (1 - alpha_t + V alpha_t)

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: P(jump to x_0) and P(jump to another state at random) given
                x_0 != x_t, and P(jump to another state at random) given x_0 = x_t.
        """
        alpha_t, alpha_s, others = self.alpha(t), self.alpha(s), (self.vocab_size - 1) / self.vocab_size
        leaves = (1 - self.kept(t, s)) / (1 - alpha_t)
        at_random = others * leaves * (1 - alpha_s)
        return leaves * alpha_s, at_random, at_random / self.own_gain(t)

    def rate_jumps(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """The reverse rate by its jumps, as in `posterior_jumps`, per unit of t: g = 1 + V alpha / (1 - alpha) times as likely
        to x_0 as to any other state, and g times as rare from x_t = x_0."""
        gain, speed = self.own_gain(t), self.jump_speed(t) / self.vocab_size
        at_random = (self.vocab_size - 1) * speed
        return (gain - 1) * speed, at_random, at_random / gain

    def score(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        """Concrete score s(v) = p_t(x_t with v) / p_t(x_t) of every position, shape (B, L, V), float64, 1 at v = x_t."""
        alpha = self.alpha(t).to(x_t.device)
        law = alpha * self.leave_one_out(x_t, p_0, t) + (1 - alpha) / self.vocab_size
        return law / law.gather(-1, x_t[..., None])

    def jump_speed(self, t: Tensor | float) -> Tensor:
        """-alpha'_t / alpha_t: the rate at which a token is redrawn in forward time, per unit of t. Linear and cosine noise
        start at an infinite rate, alpha_1 = 0; 1e9 stands for it, since any rate that large moves every token."""
        alpha = self.alpha(t)
        return torch.where(alpha > 0, -self.alpha_slope(t) / alpha, 1e9)

    def reverse_rate(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        """-(alpha'_t / alpha_t) s(v) / V for v != x_t. See [`Process.reverse_rate`]."""
        self.check_reverse(x_t, p_0)
        check_step_back(t, 0.0)
        speed = (self.jump_speed(t) / self.vocab_size).to(x_t.device)
        return speed * self.score(x_t, p_0, t).scatter(-1, x_t[..., None], 0.0)
