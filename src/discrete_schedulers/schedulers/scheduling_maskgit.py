r"""MaskGIT: tokens are drawn everywhere, and the least confident of them are masked again.

    confidence_i = log p_i(x_i) + tau_k Gumbel_i,   x_i ~ p_i,   tau_k = choice_temperature (1 - r_k),   r_k = (k + 1) / N
    masks after step k:  n_k = max(1, min(n_{k-1} - 1, floor(n_0 gamma(r_k)))),  those with the lowest confidence; 0 at the end

    gamma   linear 1 - r, square 1 - r^2, cubic 1 - r^3, root 1 - sqrt(r), cosine cos(pi r / 2), log -log2(r) / log2(n_0),
            exp 1 - n_0^-(1 - r), or grid: the share of masks that the time grid has at the end of the step

Not the model's law, whatever N. Given the drawn tokens, positions are chosen with weights p_i(x_i)^(1/tau) without replacement,
so that where many positions are masked a token is chosen in proportion to p_i(v)^(1 + 1/tau): a sampling temperature of
tau / (1 + tau), which falls to 0 (Hayakawa et al. 2025, arXiv 2510.04525). That is a limit. With few positions the weights of
the others do not average out, and a single one has the law p.

n_0, the masks at the start, is not remembered: it is the largest number, up to L, that leaves as many masks as there are now.
The counts are those of the formula where nothing was known at the start; where something was (an image to fill in) they are
off by a few: at most 4 in 16 steps, of 256 positions. Confidence is that of the law before temperature and top-p, which
MaskGIT does not have. The network is told the times of `grid`: one that reads them wants `grid="cosine"` with the cosine, or
`mask_schedule="grid"`.

Source: Chang et al. 2022 (MaskGIT, `parallel_decode.py`, `mask_schedule.py`). aMUSEd is the same with L instead of n_0 and
tau_k = 2 (1 - k / (N - 1)).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, gumbels
from discrete_schedulers.schedulers.order_utils import OrderScheduler, Prediction
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName


class MaskGITScheduler(OrderScheduler):
    """Opens the tokens of highest perturbed confidence. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`: the times that the network
            is told. Says how many open with `mask_schedule="grid"` only.
        mask_schedule (`str`, defaults to `"cosine"`): gamma: `"cosine"`, `"linear"`, `"square"`, `"cubic"`, `"root"`, `"log"`,
            `"exp"` or `"grid"`.
        choice_temperature (`float`, defaults to 4.5): Noise on the confidence at the start, not negative.
        block_length (`int`, *optional*): Positions of a block; blocks are filled from left to right. `None`: one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"choice_temperature": [8 floats]}}`, each
            multiplied by 1 - r_k.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"choice_temperature": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        mask_schedule: Literal["cosine", "linear", "square", "cubic", "root", "log", "exp", "grid"] = "cosine",
        choice_temperature: float = 4.5,
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def set_grid(self, times: Tensor, device: torch.device | str | None = None) -> None:
        """As in [`DiscreteScheduler`]; the counts belong to the grid."""
        super().set_grid(times, device)
        self.tables: dict[int, list[Tensor]] = {}  # length -> see `masks_before`

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The tokens that are not masked again. See [`OrderScheduler.choose`]."""
        tau = self.per_step("choice_temperature", index) * (1 - (index + 1) / len(self.calls))
        # 1e-300: a drawn token can have the probability 0 in float32, before a temperature above 1
        confidence = prediction.sheet(prediction.token_probability.double().clamp(min=1e-300).log())  # (B, L)
        confidence = confidence + tau * gumbels(tuple(sample.shape), generator, sample.device)
        return self.take(confidence, self.due(sample, index), prediction.is_eligible)

    def due(self, sample: Tensor, index: int) -> Tensor:
        """n_{k-1} - n_k, see [`OrderScheduler.due`]."""
        masks = (sample == self.config.mask_token_id).sum(1)
        return masks - self.masks_after(index, masks, sample.shape[1])

    def masks_after(self, index: int, masks: Tensor, length: int) -> Tensor:
        """n_k (B,) after the call `index`, given the masks (B,) before it."""
        start = torch.arange(length + 1)  # all n_0
        before = self.masks_before(index, length).to(masks.device)
        first = torch.where(before <= masks[:, None], start.to(masks.device), 0).amax(
            1
        )  # the largest that leaves so many
        return self.fewer(masks, self.quota(index, start).to(masks.device)[first])

    def masks_before(self, index: int, length: int) -> Tensor:
        """n_{k-1} (L + 1,) before the call `index`, for each n_0. Kept for the calls to come: they go on from there."""
        table = self.tables.setdefault(length, [torch.arange(length + 1)])
        while len(table) <= index:
            table.append(self.fewer(table[-1], self.quota(len(table) - 1, table[0])))
        return table[index]

    def fewer(self, masks: Tensor, quota: Tensor) -> Tensor:
        """max(1, min(masks - 1, quota)), and 0 masks stay 0."""
        return torch.minimum(torch.minimum(masks - 1, quota).clamp(min=1), masks)

    def quota(self, index: int, start: Tensor) -> Tensor:
        """floor(n_0 gamma(r_k)) for each n_0 (...), int64."""
        # 1e-9: what is a whole number but for rounding in float64 is meant to be one
        return (start * self.masked_share(index, start.double()) + 1e-9).floor().long()

    def masked_share(self, index: int, start: Tensor) -> Tensor | float:
        """gamma(r_k)."""
        r = (index + 1) / len(self.calls)
        schedule, process = self.config.mask_schedule, self.absorbing_process
        if schedule == "grid":
            return float((1 - process.alpha(self.times[index + 1])) / (1 - process.alpha(1.0)))
        if schedule == "cosine":
            return math.cos(math.pi / 2 * r)
        if schedule == "log":
            return (-math.log2(r) / start.clamp(min=2).log2()).clamp(1e-6, 1)
        if schedule == "exp":
            return (1 - start.clamp(min=1) ** (r - 1)).clamp(1e-6, 1)
        return 1 - r ** {"linear": 1, "square": 2, "cubic": 3, "root": 0.5}[schedule]
