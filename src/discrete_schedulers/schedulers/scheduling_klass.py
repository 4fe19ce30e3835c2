r"""KLASS: tokens open when the network is sure of them and has stopped changing its mind.

    stable    p_t^i(drawn token) > threshold,  and  KL(p_t^i || p_{t-1}^i) < kl_threshold  in each of the last n calls

All stable masks open; where a row has none, the `fallback_count` most confident ones. So that N calls are enough, at least as
many as the time grid has due: one on the uniform grid as long as the masks are no more than the calls left. The last call opens
all. A sample without masks costs no call. A heuristic: exact for nothing but one token in each call.

The KL compares laws before temperature and top-p. It needs both of them, so nothing is stable in the first n calls of a mask
that could open; with blocks these are calls of its own block, since no others are computed.

Memory: the method is defined by what it remembers, which is in this object and begins anew with `set_timesteps`: the laws of
the eligible masks of a call, R V numbers as wide as the network's logits (at least float32), the size of the logits
themselves. Those of two calls are kept, so that a call can be made a second time.

Released code differs: its order "entropy" opens the most uncertain tokens first; with a temperature it compares the laws
of exp(logits) / noise, not of the logits; it goes on remembering masks of later blocks. Not reproduced here.

Source: Kim, Hong et al. 2025 (KLASS, arXiv 2511.05664).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.order_utils import Measure, OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName


class Memory(NamedTuple):
    """What a call leaves to the next: where it could choose, bool (B, L); the laws there, (R, V); for how many calls in a row
    each of these has been within `kl_threshold`, int64 (B, L)."""

    is_eligible: Tensor
    law: Tensor
    quiet_calls: Tensor


class KLASSScheduler(OrderScheduler):
    """Opens confident tokens whose law has settled. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open at least.
        threshold (`float`, defaults to 0.9): Confidence above which a token can be stable, in [0, 1].
        kl_threshold (`float`, defaults to 0.01): Change of its law, in nats, below which it can be, at least 0.
        history_length (`int`, defaults to 2): Number n of calls without a larger change, 1 or more.
        fallback_count (`int`, defaults to 1): Masks that open where none is stable, 1 or more.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token, as published.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget, of `"threshold"` and `"kl_threshold"`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"threshold": "numbers in [0, 1]", "kl_threshold": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        threshold: float = 0.9,
        kl_threshold: float = 0.01,
        history_length: int = 2,
        fallback_count: int = 1,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        for name, value in (("history_length", history_length), ("fallback_count", fallback_count)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1")

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """See [`DiscreteScheduler.set_grid`]; forgets what was remembered."""
        super().set_grid(times, device)
        self.memory: dict[int, Memory] = {}  # by call

    def reads(self) -> tuple[Measure, ...]:
        """See [`OrderScheduler.reads`]."""
        return ("token_probability", "law")

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The stable masks, or the most confident ones. See [`OrderScheduler.choose`]."""
        confidence = prediction.sheet(prediction.token_probability.double(), -torch.inf)  # (B, L)
        quiet_calls = self.remember(prediction, index)
        stable = (quiet_calls >= self.config.history_length) & (confidence > self.per_step("threshold", index))
        at_least = self.due(sample, index).clamp(min=1)  # (B,)
        fallback = at_least.clamp(min=self.config.fallback_count)
        at_least = torch.where(stable.any(1), at_least, fallback)
        return stable | self.take(confidence + stable.double(), at_least, prediction.is_eligible)  # stable ones first

    def remember(self, prediction: Prediction, index: int) -> Tensor:
        """For how many calls in a row, this one included, each mask has been within `kl_threshold`, int64 (B, L).

        Raises:
            ValueError: If the call before was made for samples of another shape.
        """
        eligible, law = prediction.is_eligible, prediction.law
        quiet_calls = torch.zeros_like(eligible, dtype=torch.int64)
        before = self.memory.get(index - 1)
        if before is not None:
            if before.is_eligible.shape != eligible.shape:
                shapes = tuple(eligible.shape), tuple(before.is_eligible.shape)
                raise ValueError(
                    f"`sample` has shape {shapes[0]}, but {shapes[1]} in the call before: set_timesteps first"
                )
            both = eligible & before.is_eligible
            p, q = law[both[eligible]].double(), before.law[both[before.is_eligible]].double()  # (R', V)
            divergence = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
            still = divergence < self.per_step("kl_threshold", index)
            quiet_calls = quiet_calls.masked_scatter(both, (before.quiet_calls[both] + 1) * still)
        self.memory = {} if before is None else {index - 1: before}
        self.memory[index] = Memory(eligible, law, quiet_calls)
        return quiet_calls
