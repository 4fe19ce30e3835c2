r"""PC-Sampler: confident tokens first, but early positions before late ones and rare tokens before common ones.

    score_i = exp(-position_decay * i) * min(score_cap, -p_i log f(v_i))        v_i drawn from p_i, p_i = p_i(v_i)

i counts from the start of the block, f is the frequency of a token in the language: a common token ("the", a full stop) says
little, however sure the network is of it. The number that opens in a call is fixed, see order_utils. The origin of i does not
matter, since scores are compared within a block only and it multiplies all of them. A heuristic: exact for nothing but one
token in each call.

The README of the released code leaves out the minus sign; the code, with which this agrees, has it.

Source: Huang et al. 2025 (PC-Sampler, arXiv 2508.13021).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.order_utils import OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName


class PCSamplerScheduler(OrderScheduler):
    """Opens tokens by confidence, position and rarity. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open.
        position_decay (`float`, defaults to 0.25): Pull to the left for each position, not negative. Published: 0.25, and 0
            and 0.5 for two tasks.
        score_cap (`float`, defaults to 10.0): Largest value of -p log f, positive.
        token_frequencies (`list[float]`, *optional*): f, one number in (0, 1] for each of the V ids; give those that are
            not in the corpus 1 / its length. They do not have to sum to 1, and that of the mask is not read. `None` is
            1 / V for all: rarity then says nothing. They are part of the method and hence saved with it, some 25
            bytes of JSON for each id: 1.3 MB for 50,000.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token, as published.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget.
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
        position_decay: float = 0.25,
        score_cap: float = 10.0,
        token_frequencies: list[float] | None = None,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()
        if not position_decay >= 0:
            raise ValueError(f"`position_decay` is {position_decay}; it cannot be negative")
        if not score_cap > 0:
            raise ValueError(f"`score_cap` is {score_cap}; it must be positive")
        frequencies = self.config.token_frequencies
        if frequencies is None:
            frequencies = [1 / vocab_size] * vocab_size
        if len(frequencies) != vocab_size:
            raise ValueError(f"`token_frequencies` has {len(frequencies)} numbers; `vocab_size` is {vocab_size}")
        if not all(0 < f <= 1 for f in frequencies):
            raise ValueError(
                "`token_frequencies` has numbers that are not in (0, 1]; a token that is never seen has no log"
            )
        self.surprise = torch.tensor([-math.log(f) for f in frequencies], dtype=torch.float64)  # (V,)

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The masks with the highest scores, as many as are due. See [`OrderScheduler.choose`]."""
        surprise = self.surprise.to(sample.device)[prediction.tokens]  # (R,)
        rarity = (prediction.token_probability.double() * surprise).clamp(max=self.config.score_cap)
        place = torch.arange(sample.shape[1], device=sample.device)
        # The log of the score: exp(-position_decay i) is 0 in float64 from i = 3000 on, where all would be equal
        score = prediction.sheet(rarity.clamp(min=1e-300).log()) - self.config.position_decay * place
        return self.take(score, self.due(sample, index), prediction.is_eligible)
