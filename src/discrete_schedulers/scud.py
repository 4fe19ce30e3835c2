r"""Forward processes whose events are counted: how often each position has jumped is known, only where it went is not.

A position has had S ~ Poisson(Lambda_t) events at time t, Lambda_t = -rate log alpha_t, and each of them moved its token by a
stochastic kernel K (V, V):

    q(x_t | x_0, S)           = K^S(x_0, x_t)
    q(x' | x_t, x_0, S, k)    = K^(S-k)(x_0, x') K^k(x', x_t) / K^S(x_0, x_t)                  k events undone
    q(x' | x_t, p_0, S, k)    = sum_{x_0} q(x' | x_t, x_0, S, k) p_0(x_0)
                              ∝ K^k(x', x_t) (l K^(S-k))(x'),      l(v) ∝ p_0(v) / K^S(v, x_t)

p_0 = p(x_0 | x_t, S) is what a denoiser that is told S predicts; l, the leave-one-out law, is the same without what the token
itself says. The last line holds for l, not for p_0. S does not depend on x_0, so given S the reverse is exact however S was
drawn. Averaged over S this is the classical process, a Markov chain with rate K - 1 per unit of Lambda.

Where every event forgets the token (masks, K = 1/V) a count says no more than "some" or "none": this is masked diffusion, and
linear in V. Powers of other kernels are taken by repeated squaring in float64: no eigenvectors, which a kernel need not
have, no difference of large numbers, and no largest count.

Source: Amin, Gruver, Wilson 2025 (SCUD, arXiv 2506.08316) and its code. The code's gamma, from full conditioning on the events
(0) to the classical process (1), is the kernel gamma 1 + (1 - gamma) K with events 1 / (1 - gamma) times as often. Its
uniform kernel never stays; 1/V is that one at gamma = 1/V. Its loss makes the network l; log p_0 is log l + log K^S(., x_t).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from discrete_schedulers.processes import SIGMA_MAX, NoiseSchedule, Process, time_of_survival
from discrete_schedulers.sampling import Generators, categorical, uniforms

MOST_NOISE = (
    SIGMA_MAX  # linear and cosine noise have -log alpha_1 = inf; they start where geometric noise does, at alpha 2e-9
)
REMEMBERED = 0.01  # total variation of x_1 given x_0 to the prior, above which a kernel is refused


class EventKernel(ABC):
    """What one event does to a token: a stochastic matrix K, in whatever form its powers are cheapest.

    Args:
        prior_law (`torch.Tensor` of shape `(V,)`): The law that many events lead to.

    Raises:
        ValueError: If it is no law.
    """

    def __init__(self, prior_law: Tensor) -> None:
        law = prior_law.double().cpu()
        if law.dim() != 1 or not ((law >= 0).all() and abs(float(law.sum()) - 1) < 1e-6):
            raise ValueError(f"`prior_law` must be a vector of probabilities that sum to 1, got {law.tolist()}")
        self.prior_law = law / law.sum()

    @abstractmethod
    def after(self, law: Tensor, counts: Tensor) -> Tensor:
        """law K^S, shape (..., V): the law of a token `counts` (...) events later."""

    @abstractmethod
    def before(self, values: Tensor, counts: Tensor) -> Tensor:
        """K^S values, shape (..., V): the mean of a function of the token, seen from `counts` (...) events earlier."""

    @abstractmethod
    def average_after(self, law: Tensor, mean: Tensor) -> Tensor:
        """`after`, averaged over Poisson counts of a mean that is a scalar or of shape (B, 1, 1); shape of `law` (B, L, V)."""

    @abstractmethod
    def average_before(self, values: Tensor, mean: Tensor) -> Tensor:
        """`before`, averaged in the same way."""

    def reach(self, x_t: Tensor, counts: Tensor) -> Tensor:
        """K^S(v, x_t) for every v, shape (..., V): the likelihood of a clean token v."""
        return self.before(one_hot(x_t, len(self.prior_law)).double(), counts)

    @abstractmethod
    def draw(self, x_0: Tensor, counts: Tensor, u: Tensor) -> Tensor:
        """Tokens drawn from K^S(x_0, .) with uniforms u, all of one shape."""


class JumpKernel(EventKernel):
    """Every event draws the token anew, whatever it was: K(v, .) = `prior_law`. All mass on one state: a mask."""

    def after(self, law: Tensor, counts: Tensor) -> Tensor:
        return torch.where(counts[..., None] > 0, law.sum(-1, keepdim=True) * self.prior_law.to(law.device), law)

    def before(self, values: Tensor, counts: Tensor) -> Tensor:
        mean = (values * self.prior_law.to(values.device)).sum(-1, keepdim=True)
        return torch.where(counts[..., None] > 0, mean, values)

    def average_after(self, law: Tensor, mean: Tensor) -> Tensor:
        return torch.lerp(self.after(law, torch.ones_like(law[..., 0])), law, torch.exp(-mean).to(law.device))

    def average_before(self, values: Tensor, mean: Tensor) -> Tensor:
        return torch.lerp(
            self.before(values, torch.ones_like(values[..., 0])), values, torch.exp(-mean).to(values.device)
        )

    def draw(self, x_0: Tensor, counts: Tensor, u: Tensor) -> Tensor:
        return torch.where(counts > 0, inverse_cdf(self.prior_law.to(u.device).cumsum(0), u), x_0)


class MatrixKernel(EventKernel):
    """Any kernel that forgets its start after many events. Memory V^2 for each doubling of the largest count.

    Args:
        matrix (`torch.Tensor` of shape `(V, V)`): P(token v -> token w) in row v. Rows sum to 1 up to float32 rounding.

    Raises:
        ValueError: If the matrix is not stochastic, or has no single law that all starts lead to.
    """

    def __init__(self, matrix: Tensor) -> None:
        matrix = matrix.double().cpu()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`event_kernel` has shape {tuple(matrix.shape)}; it must be square, (V, V)")
        total = matrix.sum(1)
        if not ((matrix >= 0).all() and ((total - 1).abs() < 1e-6).all()):
            raise ValueError(
                f"`event_kernel` is not stochastic: its smallest entry is {matrix.min():.3g}, and its rows sum to "
                f"{total.min():.6g} to {total.max():.6g}; they must be probabilities that sum to 1"
            )
        self.squares = [matrix / total[:, None]]  # K, K^2, K^4, ...
        doublings = next((d for d in range(60) if spread(self.square(d)) < 1e-12), None)
        if doublings is None:
            raise ValueError(
                "`event_kernel` never forgets its start: some states cannot reach each other, or it goes round in a cycle; "
                "a part of the identity, or of 1 / V, mends that"
            )
        super().__init__(self.square(doublings)[0])

    def square(self, doublings: int) -> Tensor:
        """K to the power 2^doublings."""
        while len(self.squares) <= doublings:
            power = self.squares[-1] @ self.squares[-1]  # no difference is taken: small entries keep their precision
            self.squares.append(power / power.sum(1, keepdim=True))
        return self.squares[doublings]

    def apply(self, vectors: Tensor, counts: Tensor, transposed: bool) -> Tensor:
        """Rows (..., V) times K^S or its transpose, by the binary digits of S."""
        counts, shape = counts.expand(vectors.shape[:-1]).reshape(-1), vectors.shape
        rows = vectors.reshape(-1, shape[-1]).clone()
        for digit in range(int(counts.max()).bit_length() if counts.numel() else 0):
            is_set = (counts >> digit) % 2 == 1
            power = self.square(digit).to(rows.device)
            rows[is_set] = rows[is_set] @ (power.T if transposed else power)
        return rows.view(shape)

    def after(self, law: Tensor, counts: Tensor) -> Tensor:
        return self.apply(law, counts, transposed=False)

    def before(self, values: Tensor, counts: Tensor) -> Tensor:
        return self.apply(values, counts, transposed=True)

    def average(self, mean: Tensor) -> Tensor:
        """sum_S Poisson(S; mean) K^S, (V, V) or (B, V, V): the series for a mean of at most 1, then squared. The exponential of
        mean (K - 1) would take differences."""
        doublings = max(0, math.frexp(float(mean.max()))[1])
        small, kernel = mean / 2**doublings, self.squares[0]
        total = term = torch.exp(-small) * torch.eye(len(kernel), dtype=torch.float64)
        for k in range(1, 22):
            term = small / k * (term @ kernel)
            total = total + term
        for _ in range(doublings):
            total = total @ total
        return total / total.sum(-1, keepdim=True)

    def average_after(self, law: Tensor, mean: Tensor) -> Tensor:
        return law @ self.average(mean.cpu()).to(law.device)

    def average_before(self, values: Tensor, mean: Tensor) -> Tensor:
        return values @ self.average(mean.cpu()).mT.to(values.device)

    def draw(self, x_0: Tensor, counts: Tensor, u: Tensor) -> Tensor:
        law = self.after(one_hot(x_0, len(self.prior_law)).double(), counts)
        return categorical(law.log().flatten(0, -2), u.flatten()).view(x_0.shape)


class EventOrder(NamedTuple):
    """The events of a batch of rows, in the order of their times.

    Args:
        rank (`torch.Tensor` of shape `(B, L, M)`): Place of each event in the order of its row, int64; places from the row's
            total on are no events.
        total (`torch.Tensor` of shape `(B,)`): Events of each row.
    """

    rank: Tensor
    total: Tensor

    def counts(self, share: float) -> Tensor:
        """How many events each position has when of its row's first events a share is left, rounded, int64 (B, L)."""
        left = (self.total * share).round()
        return (self.rank < left[:, None, None]).sum(-1)


class ScheduleConditionedProcess(Process):
    """A process that draws x_t together with the number of events of each position.

    Args:
        kernel (`EventKernel`): What one event does.
        noise_schedule (`str`, defaults to `"loglinear"`): See [`Process`].
        event_rate (`float`, defaults to 1.0): Expected events for each unit of -log alpha_t, positive.

    Raises:
        ValueError: If the rate is not positive, or x_1 would still tell x_0.
    """

    def __init__(
        self, kernel: EventKernel, noise_schedule: NoiseSchedule = "loglinear", event_rate: float = 1.0
    ) -> None:
        super().__init__(len(kernel.prior_law), noise_schedule)
        if not 0 < event_rate < math.inf:
            raise ValueError(f"`event_rate` is {event_rate}; it must be a positive number")
        self.kernel, self.event_rate = kernel, event_rate
        mean = self.expected_events(1.0)
        cdf = poisson_cdf(mean, math.ceil(float(mean) + 12 * math.sqrt(float(mean)) + 30))
        self.most_events = int((cdf < 1 - 2**-53).sum())  # no uniform number asks for more
        remembered = self.remembered()
        if remembered > REMEMBERED:
            raise ValueError(
                f"`event_rate` {event_rate} is too low for this kernel: after {float(mean):.3g} events x_1 still tells x_0 "
                f"(total variation to the prior {remembered:.2g}; at most {REMEMBERED}). Raise it, or let events move further"
            )

    def expected_events(self, t: Tensor | float) -> Tensor:
        """Lambda_t, float64; a time of shape (B,) gives shape (B, 1, 1)."""
        return self.event_rate * self.total_noise(t).clamp(max=MOST_NOISE)

    def time_of_events(self, expected: Tensor) -> Tensor:
        """The time t with Lambda_t = expected: the inverse of `expected_events`."""
        return time_of_survival(torch.exp(-expected / self.event_rate), self.noise_schedule)

    def remembered(self) -> float:
        """The largest total variation of x_1, given x_0 and that its position has had an event, to the prior."""
        if isinstance(self.kernel, JumpKernel):
            return 0.0
        mean, clean = self.expected_events(1.0), torch.eye(self.vocab_size, dtype=torch.float64)
        some = self.kernel.average_after(clean, mean) - torch.exp(-mean) * clean  # without S = 0
        return 0.5 * float((some / -torch.expm1(-mean) - self.kernel.prior_law).abs().sum(-1).max())

    # Counts

    def draw_counts(
        self,
        shape: tuple[int, int],
        t: Tensor | float,
        generator: Generators,
        device: torch.device | str,
        least: int = 0,
    ) -> Tensor:
        """Numbers of events at time t, int64 (B, L): Poisson, or with `least=1` Poisson but not 0."""
        mean = self.expected_events(t).to(device).reshape(-1, 1)  # (B, 1) or (1, 1)
        u = uniforms(shape, generator, device)
        if least == 1:
            u = 1 + torch.expm1(-mean) * (1 - u)  # from P(0) to 1
        cdf = poisson_cdf(mean, self.most_events).expand(shape[0], -1).contiguous()
        return torch.searchsorted(cdf, u.contiguous(), right=True).clamp(least, self.most_events)

    def draw_order(self, counts: Tensor, generator: Generators) -> EventOrder:
        """A time for each event: in each row every order of its events is equally likely."""
        places = max(self.most_events, int(counts.max()) if counts.numel() else 0)
        time = uniforms((*counts.shape, places), generator, counts.device)  # (B, L, M)
        is_event = torch.arange(places, device=counts.device) < counts[..., None]
        order = time.masked_fill(~is_event, math.inf).flatten(1).argsort(dim=1, stable=True)
        return EventOrder(order.argsort(1).view(time.shape), counts.sum(1))

    def add_events(self, x_0: Tensor, t: Tensor | float, generator: Generators = None) -> tuple[Tensor, Tensor]:
        """Draw S and x_t ~ q(x_t | x_0, S): what a network that is told S learns from.

        Args:
            x_0 (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
            t (`float` or `torch.Tensor` of shape `(B,)`): Time in [0, 1], one for all or one per row.
            generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(B, L)`: x_t and S, int64.
        """
        batch, length = x_0.shape
        counts = self.draw_counts((batch, length), t, generator, x_0.device)
        return self.kernel.draw(x_0, counts, uniforms((batch, length), generator, x_0.device)), counts

    def counted_posterior(self, x_t: Tensor, one_out: Tensor, counts: Tensor, removed: Tensor) -> Tensor:
        """The law of a token before its last `removed` events, shape (..., V), float64.

        Args:
            x_t (`torch.Tensor` of shape `(...)`): Tokens now, int64.
            one_out (`torch.Tensor` of shape `(..., V)`): The leave-one-out law l, up to a factor.
            counts (`torch.Tensor` of shape `(...)`): Events S of each position, int64.
            removed (`torch.Tensor` of shape `(...)`): Events k to undo, from 0 to S.

        Raises:
            ValueError: If a count is negative, or more events are to be undone than there are.
        """
        if ((removed < 0) | (removed > counts)).any():
            raise ValueError(
                f"`counts` are {int(counts.min())} or more and `removed` from {int(removed.min())} to {int(removed.max())}; "
                "each position must have 0 <= removed <= counts"
            )
        law = self.kernel.reach(x_t, removed) * self.kernel.after(one_out, counts - removed)
        return law / law.sum(-1, keepdim=True)

    # The classical process: the average over the counts

    def prior_law(self, device: torch.device | str = "cpu") -> Tensor:
        return self.kernel.prior_law.to(device)

    def prior(self, shape: tuple[int, ...], generator: Generators = None, device: torch.device | str = "cpu") -> Tensor:
        return inverse_cdf(self.prior_law(device).cumsum(0), uniforms(shape, generator, device))

    def marginal(self, x_0: Tensor, t: Tensor | float) -> Tensor:
        clean = one_hot(x_0, self.vocab_size).double()
        return self.kernel.average_after(clean, self.expected_events(t))

    def add_noise(
        self, x_0: Tensor, t: Tensor | float, generator: Generators = None, noise: Tensor | None = None
    ) -> Tensor:
        """As [`Process.add_noise`]; `noise` is not read, since where a token goes depends on where it was."""
        return self.add_events(x_0, t, generator)[0]

    def posterior(self, x_t: Tensor, p_0: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Without the counts, see [`Process.posterior`]."""
        now, then = self.expected_events(t), self.expected_events(s)
        here = one_hot(x_t, self.vocab_size).double()
        one_out = leave_one_out(p_0, self.kernel.average_before(here, now))
        back = self.kernel.average_before(here, now - then)
        law = back * self.kernel.average_after(one_out, then)
        return law / law.sum(-1, keepdim=True)

    def reverse_rate(self, x_t: Tensor, p_0: Tensor, t: Tensor | float) -> Tensor:
        """Without the counts: K(v, x_t) p_t(v) / p_t(x_t) per event, see [`Process.reverse_rate`]."""
        now = self.expected_events(t)
        here = one_hot(x_t, self.vocab_size).double()
        noisy = self.kernel.average_after(leave_one_out(p_0, self.kernel.average_before(here, now)), now)
        speed = (-self.event_rate * self.alpha_slope(t) / self.alpha(t)).to(x_t.device)
        rate = speed * self.kernel.reach(x_t, torch.ones_like(x_t)) * noisy / (noisy * here).sum(-1, keepdim=True)
        return rate.scatter(-1, x_t[..., None], 0.0)


def leave_one_out(p_0: Tensor, likelihood: Tensor) -> Tensor:
    """l up to a factor, from p_0 and the likelihood of the token for each x_0; 0 where x_0 cannot have led to it."""
    return torch.where(likelihood > 0, p_0.double() / likelihood, 0.0)


def spread(matrix: Tensor) -> float:
    """The largest difference of two entries in a column."""
    return float((matrix.amax(0) - matrix.amin(0)).max())


def poisson_cdf(mean: Tensor, most: int) -> Tensor:
    """P(count <= k) for k = 0 to `most`, along a last axis that `mean` has with size 1 or lacks."""
    k = torch.arange(most + 1, dtype=torch.float64, device=mean.device)
    return torch.exp(torch.xlogy(k, mean) - mean - torch.lgamma(k + 1)).cumsum(-1)


def inverse_cdf(cdf: Tensor, u: Tensor) -> Tensor:
    """States drawn from a cumulative law (V,) with uniforms of any shape; a state of probability 0 is never drawn."""
    return torch.searchsorted(cdf, u.contiguous() * cdf[-1], right=True)
