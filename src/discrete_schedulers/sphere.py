r"""Diffusion of token laws on a sphere: the logarithm bridge, and its law without simulation.

A law p of V states is the point sqrt(p) of the sphere S^{V-1}; token k is the corner e_k. In each position a bridge runs from a
fixed point x_1 (the mask's corner, or the centre 1 / sqrt(V)) at t = 1 to its token's corner at t = 0. With the noise that is
left, tau_t = int_0^t beta_s ds, and d tau = beta dt seen from t = 1 down,

    dX       = (beta / tau) log_X(e_k) dt + sqrt(beta) dB                             Brownian motion B of the sphere
    log_X(e) = theta / sin theta (e - cos theta X),    cos theta = <X, e>             points to e, length theta
    d theta  = (-(beta / tau) theta + (V - 2) / 2 beta cot theta) dt + sqrt(beta) dW  its one-dimensional shadow

log_X(e) is minus the Riemannian gradient of theta^2 / 2. The drift of the process of all data is the mean over what the token
can be, (beta / tau) sum_k p(k | X_t) log_X(e_k): a denoiser is all that has to be learned, by cross-entropy.

Time enters through tau alone. On a circle (V = 2) theta is a flat Brownian bridge, its law is normal:

    mean theta_1 tau_t / tau_1,    variance tau_t (tau_1 - tau_t) / tau_1

On other spheres the law of X_t is taken for a Riemannian normal, X = exp_mu(rho z) with z normal in the tangent space at mu.
Its two numbers, rho and the angle psi from e_k to mu, are those that give the true mean: E X_t is in the plane of e_k and x_1,
its direction is mu, its length is m(rho) = E cos(rho chi_{V-1}). The mean itself comes from a simulation in three coordinates:
the walk is symmetric about that plane, so what matters of X is its share along e_k, along x_1, and the length of the rest.

Source: Jo and Hwang 2025 (RDLM, NeurIPS, arXiv 2502.11564) and its code, with time reversed: there t = 0 is noise. The code has
exp(-rho^2 / 2) 1F1((V-1)/2; 1/2; -rho^2 / 2) for m; E cos(rho chi_{V-1}) is the second factor alone, so its rho is too small
by about sqrt((V-1) / V), which `rho_scale = 1.14` for V = 4 mends. It also draws the noise of a walk's two coordinates, whose
product is then averaged, independently of each other.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from discrete_schedulers.sampling import Generators, uniforms

Prior: TypeAlias = Literal["mask", "uniform", "mixture"]
BetaSchedule: TypeAlias = Literal["geometric", "linear", "cosine"]

PARTICLES, WALK_STEPS = 4096, 300  # of the simulation behind a table, whose ratios are good to about 0.005
LEAST_SHARE = 1e-4  # of the noise: the table's end, past which the sphere is flat
LEAST_LENGTH = 0.05  # of the mean of X_t: below it the noise covers the sphere


def normals(shape: tuple[int, ...], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal numbers, float64, by inversion of `uniforms`; arguments as there."""
    return torch.special.ndtri(uniforms(shape, generator, device) + 2.0**-54)


def log_map(point: Tensor, end: Tensor) -> Tensor:
    """log_X(e), tangent at `point` (..., V), for any `end` (..., V). Its length is their angle."""
    cosine = (point * end).sum(-1, keepdim=True)
    return angle_over_sine(cosine) * (end - cosine * point)


def exp_map(point: Tensor, tangent: Tensor) -> Tensor:
    """The point where a geodesic from `point` (..., V) with this velocity, tangent there, is after one unit of time."""
    length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
    moved = length.cos() * point + torch.sinc(length / math.pi) * tangent
    return moved / torch.linalg.vector_norm(moved, dim=-1, keepdim=True)  # rounding would add up over steps


def to_tangent(vector: Tensor, point: Tensor) -> Tensor:
    """The part of `vector` (..., V) that is tangent at `point`."""
    return vector - (vector * point).sum(-1, keepdim=True) * point


def mean_log_map(point: Tensor, p_0: Tensor) -> Tensor:
    """sum_k p_k log_X(e_k), tangent at `point`, both (..., V). Linear in V, as cos theta_k = X_k."""
    return to_tangent(p_0 * angle_over_sine(point), point)


def angle_over_sine(cosine: Tensor) -> Tensor:
    """theta / sin theta. 1 at theta = 0, and at pi, where it has no value: all directions lead to the other end."""
    sine = (1 - cosine.square()).clamp(min=0).sqrt()
    return torch.where(sine > 1e-7, torch.atan2(sine, cosine) / sine.clamp(min=1e-7), 1.0)


class Moments(NamedTuple):
    """The law of a bridge on a grid of shares tau_t / tau_1, as ratios to a flat bridge's, which are smooth. All (G,)."""

    share: Tensor  # increasing
    angle_ratio: Tensor  # psi / (theta_1 share)
    variance_ratio: Tensor  # rho^2 / (tau_1 share (1 - share))


def mean_cosine(rho: Tensor, dimension: int) -> Tensor:
    """m(rho) = E cos(rho chi_n) for n = `dimension`, rho (G,): a confluent hypergeometric function, by quadrature."""
    centre = math.sqrt(dimension)
    y = torch.linspace(max(0.0, centre - 7), centre + 7, 1401, dtype=torch.float64)
    log_density = torch.special.xlogy(torch.tensor(dimension - 1.0, dtype=torch.float64), y) - y.square() / 2
    weight = (log_density - log_density.max()).exp()
    weight[1:-1] *= 2 + 2 * (torch.arange(1399) % 2 == 0)  # Simpson's rule
    return torch.cos(rho[:, None] * y) @ (weight / weight.sum())


def spread_of_length(length: Tensor, dimension: int) -> Tensor:
    """rho (G,) with m(rho) = `length` (G,), by bisection on [0, pi / sqrt(n)], where m falls."""
    low, high = torch.zeros_like(length), torch.full_like(length, math.pi / math.sqrt(dimension))
    for _ in range(52):
        middle = (low + high) / 2
        is_short = mean_cosine(middle, dimension) < length
        low, high = torch.where(is_short, low, middle), torch.where(is_short, middle, high)
    return (low + high) / 2


def matched_normals(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the shape of x (P, n) that have mean 0, variance 1 and no correlation with x in each column exactly,
    as in an infinite sample: moments of a nearly linear walk then have next to no Monte Carlo error."""
    half = normals((len(x) // 2, x.shape[1]), generator, "cpu")
    noise, centred = torch.cat([half, -half]), x - x.mean(0)
    noise = noise - (noise * centred).sum(0) / centred.square().sum(0).clamp(min=1e-30) * centred
    return noise / noise.square().mean(0).sqrt()


@functools.lru_cache(maxsize=16)
def bridge_moments(vocab_size: int, cosine: float, total_noise: float) -> Moments:
    """The table of a bridge whose ends have this `cosine`, by a geodesic random walk in three coordinates.

    Of the step's normal vector in V - 1 dimensions, three coordinates are drawn; the squared length of the V - 3 others, which
    only push outwards, is replaced by its mean. The walk keeps its order of convergence, and the work does not depend on V.

    Raises:
        ValueError: If there is so much noise that the mean of X_t all but vanishes.
    """
    if vocab_size == 2:  # a circle is flat
        ends, ones = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        return Moments(ends, ones, ones)
    decay = torch.linspace(0, math.sqrt(-math.log(LEAST_SHARE)), WALK_STEPS + 1, dtype=torch.float64).square()
    share, generator = torch.exp(-decay), torch.Generator().manual_seed(0)  # from 1 down, in small steps at first
    theta = math.acos(cosine)
    x = torch.tensor([cosine, math.sin(theta), 0.0], dtype=torch.float64).expand(PARTICLES, 3)  # along e, x_1, the rest
    end, means = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), [x[0, :2]]
    others = vocab_size - 3
    for now, then in itertools.pairwise(share):
        variance = total_noise * (now - then) * then / now
        noise = matched_normals(x, generator) * variance.sqrt()
        tangent = (1 - then / now) * log_map(x, end) + to_tangent(noise, x)
        outwards = variance * others
        length = (tangent.square().sum(1, keepdim=True) + outwards).sqrt()
        x = length.cos() * x + torch.sinc(length / math.pi) * tangent
        rest = torch.hypot(x[:, 2], torch.sinc(length / math.pi)[:, 0] * outwards.sqrt())
        x = torch.stack([x[:, 0], x[:, 1], rest], dim=1)
        means.append(x[:, :2].mean(0))
    mean = torch.stack(means)[1:]  # (G, 2)
    size = torch.linalg.vector_norm(mean, dim=1)
    if float(size.min()) < LEAST_LENGTH:
        raise ValueError(
            f"`beta_start` and `beta_end` make {total_noise:.3g} of noise, which covers the sphere of {vocab_size} states"
        )
    share = share[1:]
    flat = total_noise * share * (1 - share)
    spread = spread_of_length(size, vocab_size - 1)
    ratios = torch.atan2(mean[:, 1], mean[:, 0]) / (theta * share), spread.square() / flat
    return Moments(share.flip(0), *(ratio.flip(0) for ratio in ratios))


def interpolate(table: Moments, share: Tensor) -> tuple[Tensor, Tensor]:
    """Both ratios of a table at some shares of any shape; constant beyond its ends."""
    right = torch.searchsorted(table.share, share).clamp(1, len(table.share) - 1)
    left = right - 1
    weight = ((share - table.share[left]) / (table.share[right] - table.share[left])).clamp(0, 1)
    return (
        torch.lerp(table.angle_ratio[left], table.angle_ratio[right], weight),
        torch.lerp(table.variance_ratio[left], table.variance_ratio[right], weight),
    )


class LogarithmBridge:
    r"""Bridges from a fixed point at t = 1 to the corners of the clean tokens at t = 0, independent in each position.

    Args:
        vocab_size (`int`): States V, 2 or more, the mask included.
        mask_token_id (`int`, *optional*): The mask, which no clean token is. `None`: there is none.
        prior (`str`, defaults to `"mask"`): Where bridges start: in the `"mask"`, in the centre (`"uniform"`), or the
            `"mixture"`: bridges from the centre at times above `switch_time`, from the mask below it. Its two halves are not
            one process: where they meet, samples go on with a denoiser of states that they were not drawn from, and their
            law stays biased whatever the number of steps.
        beta_start (`float`, defaults to 1e-3): Noise per unit of time at t = 1.
        beta_end (`float`, defaults to 0.2): At t = 0.
        beta_schedule (`str`, defaults to `"geometric"`): How beta goes from one to the other: `"geometric"`, `"linear"` or
            `"cosine"`, a quarter of a wave.
        switch_time (`float`, defaults to 0.65): Only read with `prior="mixture"`; in (0, 1).

    Raises:
        ValueError: If an argument is not allowed.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        prior: Prior = "mask",
        beta_start: float = 1e-3,
        beta_end: float = 0.2,
        beta_schedule: BetaSchedule = "geometric",
        switch_time: float = 0.65,
    ) -> None:
        if vocab_size < 2:
            raise ValueError(f"`vocab_size` is {vocab_size}; it must be at least 2")
        if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
            raise ValueError(f"`mask_token_id` is {mask_token_id}; allowed are 0 to {vocab_size - 1}, or None")
        if prior not in ("mask", "uniform", "mixture"):
            raise ValueError(f"`prior` is {prior!r}; allowed: 'mask', 'uniform', 'mixture'")
        if prior != "uniform" and mask_token_id is None:
            raise ValueError(f"`prior={prior!r}` starts in a mask: pass `mask_token_id`")
        if beta_schedule not in ("geometric", "linear", "cosine"):
            raise ValueError(f"`beta_schedule` is {beta_schedule!r}; allowed: 'geometric', 'linear', 'cosine'")
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` is {value}; it must be a positive number")
        if not 0 < switch_time < 1:
            raise ValueError(f"`switch_time` is {switch_time}; allowed are numbers between 0 and 1")
        self.vocab_size, self.mask_token_id, self.prior = vocab_size, mask_token_id, prior
        self.beta_start, self.beta_end, self.beta_schedule = beta_start, beta_end, beta_schedule
        self.switch_time = switch_time
        self.total_noise = float(self.noise_left(1.0))

    # Noise

    def beta(self, t: float | Tensor) -> Tensor:
        """Noise per unit of time, float64, of the shape of `t`, which is in [0, 1]."""
        t = torch.as_tensor(t, dtype=torch.float64)
        start, end = self.beta_start, self.beta_end
        if self.beta_schedule == "geometric":
            return end * (start / end) ** t
        if self.beta_schedule == "linear":
            return end + (start - end) * t
        return start + (end - start) * torch.cos(math.pi / 2 * t)

    def noise_left(self, t: float | Tensor) -> Tensor:
        """tau_t = int_0^t beta_s ds, float64, of the shape of `t`."""
        t = torch.as_tensor(t, dtype=torch.float64)
        start, end = self.beta_start, self.beta_end
        if self.beta_schedule == "geometric":
            log_ratio = math.log(end / start)
            return -end * torch.expm1(-log_ratio * t) / log_ratio if log_ratio else end * t
        if self.beta_schedule == "linear":
            return end * t + (start - end) * t.square() / 2
        return start * t + (end - start) * 2 / math.pi * torch.sin(math.pi / 2 * t)

    # The law of X_t

    def start_from_centre(self, t: Tensor) -> Tensor:
        """Whether the bridges that X_t belongs to start in the centre, bool, of the shape of `t`; else in the mask."""
        if self.prior == "mixture":
            return t > self.switch_time
        return torch.full(t.shape, self.prior == "uniform", device=t.device)

    def start_points(self, t: Tensor) -> Tensor:
        """x_1 of the bridges that X_t belongs to, float64 (..., V), of `t` (...)."""
        centre = torch.full((self.vocab_size,), self.vocab_size**-0.5, dtype=torch.float64, device=t.device)
        if self.mask_token_id is None:
            return centre.expand(*t.shape, -1)
        mask = torch.zeros_like(centre)
        mask[self.mask_token_id] = 1.0
        return torch.where(self.start_from_centre(t)[..., None], centre, mask)

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """cos theta_1, psi and rho, float64, each of the shape of `t`."""
        share = (self.noise_left(t.cpu()) / self.total_noise).clamp(0, 1)
        from_centre = self.start_from_centre(t.cpu())
        cosine = torch.where(from_centre, self.vocab_size**-0.5, 0.0).double()
        angle, variance = torch.zeros_like(share), torch.zeros_like(share)
        for chosen, start in ((from_centre, self.vocab_size**-0.5), (~from_centre, 0.0)):
            if chosen.any():
                table = bridge_moments(self.vocab_size, start, self.total_noise)
                angle_ratio, variance_ratio = interpolate(table, share[chosen])
                angle[chosen] = angle_ratio * math.acos(start) * share[chosen]
                variance[chosen] = variance_ratio * self.total_noise * share[chosen] * (1 - share[chosen])
        return cosine.to(t.device), angle.to(t.device), variance.sqrt().to(t.device)

    def add_noise(self, x_0: Tensor, t: Tensor, generator: Generators = None) -> Tensor:
        """Draw X_t, float64 (B, L, V), from its Riemannian normal given clean tokens.

        Args:
            x_0 (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
            t (`torch.Tensor` of shape `(B,)`): Times in [0, 1].
            generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        """
        cosine, angle, spread = (value[:, None, None] for value in self.moments(t))
        corner, start = one_hot(x_0, self.vocab_size).double(), self.start_points(t)[:, None]
        aside = (start - cosine * corner) / (1 - cosine.square()).sqrt()  # across from e_k towards x_1, a unit vector
        centre = angle.cos() * corner + angle.sin() * aside
        noise = normals(tuple(centre.shape), generator, x_0.device)
        return exp_map(centre, spread * to_tangent(noise, centre))

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log q(X_t = x | x_0 = k) of the Riemannian normal for every token k, float64 (B, L, V); the mask's is `-inf`. What
        Bayes' rule needs. Geodesics that go around the sphere are left out.

        Args:
            x (`torch.Tensor` of shape `(B, L, V)`): Points of the sphere.
            t (`torch.Tensor` of shape `(B,)`): Times in (0, 1).
        """
        cosine, angle, spread = (value[:, None, None] for value in self.moments(t))
        x = x.double()
        along = (x * self.start_points(t)[:, None]).sum(-1, keepdim=True)
        aside = (along - cosine * x) / (1 - cosine.square()).sqrt()
        distance = (angle.cos() * x + angle.sin() * aside).clamp(-1, 1).arccos()
        density = -(distance / spread).square() / 2 - (self.vocab_size - 1) * (spread.log() + math.log(2 * math.pi) / 2)
        density = density - (self.vocab_size - 2) * torch.sinc(distance / math.pi).log()
        if self.mask_token_id is not None:
            density[..., self.mask_token_id] = -math.inf
        return density
