r"""SCUD: diffusion that is told how many events each position has had, and undoes a number of them in each call.

    S_i ~ Poisson(Lambda_1), at least 1 (0 where the token is known)              drawn once, at the start of a run
    the E events of a row in random order: after the step to s the first round(E Lambda_s / Lambda_1) are left
    x'  ~ K^k(x', x_t) (l K^(S - k))(x'),   l(v) ∝ p_0(v) / K^S(v, x_t),          k events of a position undone

`ScheduleConditionedProcess` (scud.py) says what K, Lambda and l are. Which events go in which step is drawn before the network
runs and does not depend on it. Exact in law where each call undoes events of one position only, for every order of them;
else exact up to the dependence between positions that move in the same call. What remains is the prior: exact for kernels
that forget (masks, uniform), otherwise as near as `event_rate` makes it.

The network is called with `event_counts`, int64 (B, L), beside the tokens: see `model_inputs`. The counts of masks say
nothing, so with `process="absorbing"` any masked model will do, and this is masked diffusion.

Source: Amin, Gruver, Wilson 2025 (arXiv 2506.08316) and its code's `SCUD.sample_sequence`. That code has powers of K from
eigenvectors or in float32, up to 5000; leaves a token of the prior where S = 0; and undoes equal shares of the events, which
for few calls leaves most masks to the last. Its corrector sweeps (10 for each step by default) are not here.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule, check_tokens
from discrete_schedulers.sampling import Generators, RowLogits, draw_tokens
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, DiscreteScheduler, Grid, ProcessName
from discrete_schedulers.scud import EventOrder, JumpKernel, MatrixKernel, ScheduleConditionedProcess


class SCUDScheduler(DiscreteScheduler):
    """Schedule-conditioned sampling. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`, *optional*): The mask's id; `None` for the uniform process.
        process (`str`, defaults to `"absorbing"`): `"absorbing"`: an event masks. `"uniform"`: no mask; an event draws any
            token, or does what `event_kernel` says.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`.
        event_kernel (`list[list[float]]` or `torch.Tensor`, *optional*): (V, V), in row v the law of the token that an event
            makes of v; with `process="uniform"`.
        event_rate (`float`, defaults to 1.0): Expected events for each unit of -log alpha, positive; a kernel with small steps
            needs more of them. Only with `event_kernel`.
        event_share (`str`, defaults to `"grid"`): What share of a row's events each call undoes: those of its piece of the time
            `"grid"`; `"equal"` shares, as published; or shares in proportion to positive `"learned"` numbers (needs
            `coefficients` with `"events"`). The last two set the times themselves, so `grid` must be `"uniform"`.
        temperature (`float`, defaults to 1.0): Divides the logits of the leave-one-out law; 0 takes its best token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens of this law that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"events": [...]}}`, or `"times"`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        event_kernel: list[list[float]] | None = None,
        event_rate: float = 1.0,
        event_share: Literal["grid", "equal", "learned"] = "grid",
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        if event_kernel is None:
            if event_rate != 1:
                raise ValueError(f"`event_rate` is {event_rate}; without `event_kernel` it must be 1")
            self.event_process = ScheduleConditionedProcess(JumpKernel(self.noise_process.prior_law()), noise_schedule)
        else:
            try:
                matrix = torch.as_tensor(event_kernel, dtype=torch.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"`event_kernel` is {event_kernel!r}; it must be rows of numbers") from error
            if process != "uniform" or matrix.shape != (vocab_size, vocab_size):
                raise ValueError(
                    f"`event_kernel` has shape {tuple(matrix.shape)} and `process` is {process!r}; allowed are (vocab_size, "
                    f"vocab_size), here {(vocab_size, vocab_size)}, and 'uniform'"
                )
            self.register_to_config(event_kernel=matrix.tolist())
            self.event_process = ScheduleConditionedProcess(MatrixKernel(matrix), noise_schedule, event_rate)
            self.noise_process = self.event_process
        if event_share != "grid" and grid != "uniform":
            raise ValueError(f"`event_share={event_share!r}` sets the times, so `grid` must be 'uniform', not {grid!r}")
        if event_share == "learned" and coefficients is None:
            raise ValueError("`event_share='learned'` needs `coefficients` with a block 'events' for each step budget")
        for budget, blocks in (self.config.coefficients or {}).items():
            if any(not value > 0 for value in blocks.get("events", [])):
                raise ValueError(f"`coefficients` for {budget} steps: 'events' are shares, they must be positive")

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        super().set_grid(times, device)
        self.events: EventOrder | None = None  # of the run: drawn at its first call
        self.first_call = self.latest_call = 0

    def time_grid(self, num_inference_steps: int) -> Tensor:
        """The times at which the shares of events that are due are undone."""
        if self.config.event_share == "grid":
            return super().time_grid(num_inference_steps)
        shares = torch.ones(num_inference_steps, dtype=torch.float64)
        if self.config.event_share == "learned":
            shares = torch.tensor(self.learned("events", num_inference_steps), dtype=torch.float64)
        left = 1 - shares.cumsum(0)[:-1] / shares.sum()
        times = self.event_process.time_of_events(left * self.event_process.expected_events(1.0))
        return torch.cat([torch.ones(1, dtype=torch.float64), times, torch.zeros(1, dtype=torch.float64)])

    def begin(
        self,
        timestep: int | float | Tensor,
        sample: Tensor,
        event_counts: Tensor | None = None,
        frozen: Tensor | None = None,
        generator: Generators = None,
    ) -> None:
        """Begin a run at a time: set the events of each position and the order in which they will be undone. Runs that nobody
        begins do so at their first call, with drawn counts.

        Args:
            timestep (`float`, `int` or `torch.Tensor`): A time out of `timesteps`, or an index.
            sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
            event_counts (`torch.Tensor` of shape `(B, L)`, *optional*): Int64, where they are known, as from
                `event_process.add_events`. Drawn when `None`: 1 or more for every position that is not known.
            frozen (`torch.Tensor` of shape `(B, L)`, *optional*): Bool; known tokens, which have no events. Tokens beside masks
                have none anyway.
            generator (`torch.Generator`, `list[torch.Generator]`, *optional*): Source of randomness.

        Raises:
            ValueError: If counts are negative, or not int64 of the sample's shape.
        """
        check_tokens("sample", sample, self.config.vocab_size)
        index, batch, length = self.step_index(timestep), *sample.shape
        if event_counts is None:
            t = self.calls[index]
            event_counts = self.event_process.draw_counts((batch, length), t, generator, sample.device, least=1)
        if event_counts.shape != sample.shape or event_counts.dtype != torch.int64 or (event_counts < 0).any():
            raise ValueError(
                f"`event_counts` are {event_counts.dtype} of shape {tuple(event_counts.shape)}; they must be int64 of shape "
                f"{tuple(sample.shape)} and not negative"
            )
        if self.config.mask_token_id is not None:
            event_counts = torch.where(sample == self.config.mask_token_id, event_counts, 0)
        if frozen is not None:
            event_counts = torch.where(frozen, 0, event_counts)
        self.events = self.event_process.draw_order(event_counts, generator)
        self.first_call = self.latest_call = index
        self.last_call = None

    def continue_or_begin(self, index: int, sample: Tensor, frozen: Tensor | None, generator: Generators) -> None:
        """Begin a run unless the call `index` belongs to the one that there is.

        Raises:
            ValueError: If the sample has another shape than the run that it belongs to.
        """
        again = self.last_call is not None or self.latest_call > self.first_call  # the run is past its first call
        fits = self.events is not None and self.events.rank.shape[:2] == sample.shape
        if self.events is None or index < self.first_call or (index == self.first_call and (again or not fits)):
            self.begin(index, sample, None, frozen, generator)
        elif not fits:
            shapes = tuple(sample.shape), tuple(self.events.rank.shape[:2])
            raise ValueError(
                f"`sample` has shape {shapes[0]}, but this run began with {shapes[1]}: call `set_timesteps`"
            )
        self.latest_call = max(index, self.latest_call)

    def counts(self, index: int, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The events of each position before the call `index` and after it, int64 (B, L)."""
        assert self.events is not None
        first, now, then = (
            self.event_process.expected_events(self.times[i]) for i in (self.first_call, index, index + 1)
        )
        now, then = (self.events.counts(float(expected / first)) for expected in (now, then))
        if self.config.mask_token_id is None:
            return now, then
        is_masked = sample == self.config.mask_token_id
        return torch.where(is_masked, now.clamp(min=1), 0), then  # also where a callback has changed the tokens

    def model_inputs(
        self,
        timestep: int | float | Tensor,
        sample: Tensor,
        frozen: Tensor | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """`event_counts` of this call; nothing for masks. See [`DiscreteScheduler.model_inputs`]."""
        index = self.step_index(timestep)
        self.continue_or_begin(index, sample, frozen, generator)
        return {"event_counts": self.counts(index, sample)[0]} if self.config.mask_token_id is None else {}

    def positions(self, timestep: int | float | Tensor, sample: Tensor, generator: Generators = None) -> Tensor:
        """Positions with an event to undo, of masks those with none left then. See [`DiscreteScheduler.positions`]."""
        index = self.step_index(timestep)
        self.continue_or_begin(index, sample, None, generator)
        now, then = self.counts(index, sample)
        return (now > then) & ((then == 0) | (self.config.mask_token_id is None))

    def shaped_logits(self, logits: Tensor, index: int, sample: Tensor) -> Tensor:
        """Logits of p_0 after temperature and top-p have sharpened l. See [`DiscreteScheduler.shaped_logits`]."""
        reach = self.event_process.kernel.reach(sample, self.counts(index, sample)[0]).log()
        return self.one_out_logits(logits, reach) + reach

    def one_out_logits(self, logits: Tensor, log_reach: Tensor) -> Tensor:
        """Logits (..., V) of the leave-one-out law that is drawn from; `-inf` where x_t cannot come from."""
        one_out = torch.where(log_reach > -torch.inf, logits.double() - log_reach, -torch.inf)
        return self.token_logits(one_out)

    def move_rows(self, rows: RowLogits, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """`sample` with the events of this call undone at the chosen positions. See [`DiscreteScheduler.move_rows`].

        Raises:
            ValueError: If the rows are not those that `positions` names.
        """
        chosen = self.positions(index, sample, generator)
        if not torch.equal(rows.positions, chosen):
            raise ValueError("`model_output.positions` are not those that `positions` named for this step and sample")
        now, then = (counts[chosen] for counts in self.counts(index, sample))  # (R,)
        x_t, process = sample[chosen], self.event_process
        one_out = self.one_out_logits(rows.logits, process.kernel.reach(x_t, now).log()).softmax(-1)
        law = process.counted_posterior(x_t, one_out, now, now - then)
        return sample.masked_scatter(chosen, draw_tokens(RowLogits(law.log(), chosen), generator))

    def move_all(self, logits: Tensor, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """As `move_rows`, see [`DiscreteScheduler.move_all`]."""
        chosen = self.positions(index, sample, generator)
        return self.move_rows(RowLogits.chosen(logits, chosen), index, sample, generator)
