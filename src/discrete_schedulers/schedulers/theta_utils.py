r"""What the theta methods share: two model calls in a step, at t and at rho = t - theta (t - s), and what is kept between.

    y   ~ first law    from x_t over [t, rho], with p_0 = p(x_0 | x_t)
    x_s ~ second law   from y over [rho, s] (trapezoidal) or from x_t over [t, s] (RK-2), with p_0 and p* = p(x_0 | y)

Both laws come in two forms, `hazard`:

    "frozen"   as published: Poisson events at rates that stand still, of which a position takes the first
    "exact"    q(. | ., p_0), the reverse kernel of a clean law that stands still: a mask opens with its exact probability,
               which leaves none behind, and the second call says only *what* it becomes

The last step, to s = 0, is one plain call: p_0 at every position that can still move. N steps are 2 N - 1 calls.

Which masks may open in which half is drawn before the network runs, with a bound on the chance that needs no logits. The
first call reads these rows, the second those of its half; the law of a row is divided by its bound, so that the
product is the law as written.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, UniformProcess, indicator
from discrete_schedulers.sampling import Generators, RowLogits, bernoulli_subset, draw_states, draw_tokens, uniforms
from discrete_schedulers.schedulers.scheduling_utils import DiscreteScheduler, leap_law

Hazard: TypeAlias = Literal["exact", "frozen"]


class Half(NamedTuple):
    """What the first call of a step leaves for the second.

    Args:
        call (`int`): The first call's place in `timesteps`.
        sample (`torch.Tensor` of shape `(B, L)`): x_t, int64.
        positions (`torch.Tensor` of shape `(B, L)`): Bool, with R entries true: what may move in the second call.
        logits (`torch.Tensor` of shape `(R, V)`): Logits of p(x_0 | x_t) there.
    """

    call: int
    sample: Tensor
    positions: Tensor
    logits: Tensor


class ThetaScheduler(DiscreteScheduler):
    """Abstract: a theta method, with `theta` and `hazard` in its config. A concrete class has `second_law` and
    `second_chance`.

    Class attributes:
        restarts (`bool`): Whether the second call starts from x_t again, and not from y.
    """

    order = 2
    learned_knobs = {"theta": "numbers in (0, 1)"}
    restarts: bool

    @abstractmethod
    def second_law(self, p_0: Tensor, p_star: Tensor, step: int, x_t: Tensor, y: Tensor) -> Tensor:
        """Law of x_s in the step `step`, shape (B, L, V), float64, given x_t and y (B, L) and the clean laws at both."""

    @abstractmethod
    def second_chance(self, step: int) -> float:
        """The most that P(a mask opens in the second call) can be, absorbing process."""

    def first_law(self, p_0: Tensor, step: int, x_t: Tensor) -> Tensor:
        """Law of y in the step `step`, shape (B, L, V), float64; p_0 itself in the last step."""
        t, rho, s = self.times_of(step)
        if self.config.hazard == "exact" or s == 0:
            return self.noise_process.posterior(x_t, p_0, t, s if s == 0 else rho)
        return leap_law(x_t, (t - rho) * self.noise_process.reverse_rate(x_t, p_0, t))

    def first_chance(self, step: int) -> float:
        """P(a mask opens in the first call), absorbing process; 1 in the last step."""
        t, rho, s = self.times_of(step)
        if s == 0:
            return 1.0
        if self.config.hazard == "exact":
            return float(self.absorbing_process.unmask_probability(t, rho))
        return -float(torch.expm1(-(t - rho) * self.absorbing_process.hazard(t)))

    def call_times(self, times: Tensor) -> Tensor:
        """t and rho of each step, and t alone of the last, (2 N - 1,)."""
        theta = [self.per_step("theta", step) for step in range(len(times) - 2)]
        weight = torch.tensor([*theta, 0.5], dtype=torch.float64)
        rho = torch.lerp(times[:-1], times[1:], weight)  # lerp: exactly s where theta is 1
        return torch.stack([times[:-1], rho], 1).flatten()[:-1]

    def times_of(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """t, rho and s of a step; rho of the last is not used."""
        return self.times[step], self.calls[min(2 * step + 1, len(self.calls) - 1)], self.times[step + 1]

    def share(self, step: int) -> float:
        """The theta of the weights. In the exact form the part of the step's masks that opens in the first half, since this
        makes the law of two masks that open in one step exact; with (log-)linear noise it is theta itself."""
        if self.config.hazard == "frozen":
            return self.per_step("theta", step)
        at_t, at_rho, at_s = (float(self.noise_process.alpha(time)) for time in self.times_of(step))
        return (at_rho - at_t) / (at_s - at_t)

    def carried(self, p_0: Tensor, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor) -> Tensor:
        """p_0, read at (x_t, t), as it is for a token y at time r with the same neighbours, shape (B, L, V)."""
        process = self.noise_process
        if not isinstance(process, UniformProcess):
            return p_0
        law = process.leave_one_out(x_t, p_0, t)
        own = indicator(y, process.vocab_size).bool()
        law = torch.where(own, process.own_gain(r).to(law.device) * law, law)
        return law / law.sum(-1, keepdim=True)

    def extrapolated(self, x: Tensor, later: Tensor, earlier: Tensor, weight: float) -> Tensor:
        """weight * later - (weight - 1) * earlier, for two laws of what becomes of the tokens x, shape (B, L, V). The
        probability to stay is that, and the jumps share the rest in proportion to its positive part."""
        law = weight * later - (weight - 1) * earlier
        stays = law.gather(-1, x[..., None]).clamp(0, 1)
        jumps = law.clamp(min=0).scatter(-1, x[..., None], 0.0)
        jumps = jumps * ((1 - stays) / jumps.sum(-1, keepdim=True).clamp(min=1e-300))
        return jumps.scatter(-1, x[..., None], stays)

    # State and step

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; no half step is pending."""
        super().set_grid(times, device)
        self.half: Half | None = None

    def pending(self, index: int, sample: Tensor) -> Half:
        """The half that the call `index` completes.

        Raises:
            ValueError: If the first call of its step was not the one before, or had another shape.
        """
        half = self.half
        if half is None or half.call != index - 1 or half.sample.shape != sample.shape:
            raise ValueError(
                f"call {index} is the second of its step: `step` must run call {index - 1} before, alike in shape"
            )
        return half

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor | None:
        """Masks that may open in this step, or in its second half. See [`DiscreteScheduler.positions`]."""
        if not isinstance(self.noise_process, AbsorbingProcess):
            return None
        index, is_masked = self.step_index(timestep), sample == self.config.mask_token_id
        if index % 2:
            return self.pending(index, sample).positions & is_masked
        return bernoulli_subset(is_masked, self.either_chance(index // 2), generator)

    def either_chance(self, step: int) -> float:
        """P(a mask may open in one half or the other)."""
        first = self.first_chance(step)
        return first if first == 1 else 1 - (1 - first) * (1 - self.second_chance(step))

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """See [`DiscreteScheduler.move_rows`]."""
        logits, step = self.token_logits(rows.logits), index // 2
        if index % 2:
            return self.complete(RowLogits(logits, rows.positions), index, sample, generator)
        filled = sample.masked_scatter(rows.positions, draw_tokens(RowLogits(logits, rows.positions), generator))
        if index == len(self.calls) - 1:
            return filled
        first, second = self.first_chance(step), self.second_chance(step)
        # Given that it may open in one of them: the first alone, both, or the second alone
        coin = uniforms(tuple(sample.shape), generator, sample.device) * self.either_chance(step)  # (B, L)
        is_later = (coin >= first) | (coin < first * second) if self.restarts else coin >= first
        waits = rows.positions & is_later
        self.half = Half(index, sample, waits, logits[waits[rows.positions]])
        return torch.where(coin < first, filled, sample)

    def complete(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """x_s from the half that is pending; `sample` is y, and the rows are those that are still masked in it."""
        half = self.pending(index, sample)
        start, waits = half.sample if self.restarts else sample, half.positions
        again = half.logits.double().clone()
        again[rows.positions[waits]] = rows.logits.double()  # elsewhere y has a token, and `second_law` asks for no p*
        clean = half.logits.double().softmax(-1)[None], again.softmax(-1)[None]  # (1, R, V)
        law = self.second_law(*clean, index // 2, half.sample[waits][None], sample[waits][None])[0]
        mask = self.absorbing_process.mask_token_id
        law[:, mask] = (law[:, mask] - 1 + self.second_chance(index // 2)).clamp(min=0)  # given that it may open
        return start.masked_scatter(waits, draw_tokens(RowLogits(law.log(), waits), generator))

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """See [`DiscreteScheduler.move_all`]."""
        logits, step = self.shaped_logits(logits, index, sample), index // 2
        p_0 = logits.double().softmax(-1)
        if index % 2 == 0:
            everywhere = torch.ones_like(sample, dtype=torch.bool)
            self.half = Half(index, sample, everywhere, logits.flatten(0, 1))
            return draw_states(self.first_law(p_0, step, sample), generator)
        half = self.pending(index, sample)
        before = half.logits.double().softmax(-1).view(p_0.shape)
        return draw_states(self.second_law(before, p_0, step, half.sample, sample), generator)
