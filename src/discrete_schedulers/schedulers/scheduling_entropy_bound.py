r"""EB-Sampler: as many tokens open at once as a bound on their dependence allows.

    the first n masks, best first by `proxy`, n the largest with   sum_i H_i - max_i H_i <= entropy_bound

H_i is the entropy of p(x_0^i | x_t) in nats. KL(joint law of n tokens || product of their laws) is their total correlation,
sum_i H_i - H(all), and H(all) is no less than the largest H_i: so the bound holds for what a call adds to the KL to the data,
for a network that is right about single tokens. Which ones open does not depend on their tokens; with one draw for each, at
temperature 1, the KL of whole samples is at most entropy_bound for each call, and 0 with entropy_bound = 0 (one by one, but
for tokens that are certain).

That is so where the bound decides. `num_inference_steps` caps the calls: at least one token opens in each, as many as the time
grid has due, and in the last one all. On the uniform grid that is one as long as the masks are no more than the calls left, as
published. A sample without masks costs no call. Entropies are those of the law before temperature and top-p.

For the uniform process diffusers has an adaptation, here [`UniformEntropyBoundScheduler`].

Source: Ben-Hamu et al. 2025 (EB-Sampler, arXiv 2505.24857).
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, top_subset
from discrete_schedulers.schedulers.order_utils import Measure, OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName

PROXIES: dict[str, Measure] = {"confidence": "max_probability", "margin": "margin"}


class EntropyBoundScheduler(OrderScheduler):
    """Opens tokens up to a bound on their dependence. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open at least.
        proxy (`str`, defaults to `"entropy"`): Order of the masks: lowest `"entropy"`, highest `"confidence"` (largest
            probability) or `"margin"` (of the two largest).
        entropy_bound (`float`, defaults to 0.1): In nats, not negative.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"entropy_bound": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"entropy_bound": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        proxy: Literal["entropy", "confidence", "margin"] = "entropy",
        entropy_bound: float = 0.1,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def reads(self) -> tuple[Measure, ...]:
        """See [`OrderScheduler.reads`]."""
        return ("entropy",) if self.config.proxy == "entropy" else ("entropy", PROXIES[self.config.proxy])

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The masks within the bound, or the first ones where fewer than are due. See [`OrderScheduler.choose`]."""
        eligible, entropy = prediction.is_eligible, prediction.entropy.double()  # (B, L), (R,)
        certainty = -entropy if self.config.proxy == "entropy" else prediction.measures[PROXIES[self.config.proxy]]
        score = prediction.sheet(certainty.double(), -torch.inf)  # (B, L)
        ranked = score.argsort(dim=1, descending=True, stable=True)
        sheet = prediction.sheet(entropy).gather(1, ranked)
        excess = sheet.cumsum(1) - sheet.cummax(1).values  # grows along the row: those within the bound come first
        within = (excess <= self.per_step("entropy_bound", index)) & eligible.gather(1, ranked)
        at_least = self.due(sample, index).clamp(min=1)
        return top_subset(eligible, within.sum(1), score) | self.take(score, at_least, eligible)
