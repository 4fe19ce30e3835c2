r"""Parallel decoding by confidence: all tokens that the network is sure of open at once (Fast-dLLM).

    threshold   c_i > threshold                                            c_i = p(x_0^i = drawn token | x_t)
    factor      the n most confident, n the largest with (n + 1)(1 - c_(n)) < factor

How many open is for the network to say: `num_inference_steps` caps the calls, and a sample without masks costs none. At least
one opens in a call, and as many as the time grid has due. On the uniform grid this is one as long as the masks are no more
than the calls left, as published, and with fewer calls the rest does not wait for the last one, which opens all.

Exact for the most probable tokens (`temperature=0`): where n tokens have c_i > 1 - eps and (n + 1) eps <= 1 their joint
argmax is the argmax of each, which is what `rule="factor"` asks for with a factor of 1. With more, or drawn tokens, neither
rule keeps the model's law. Drawn tokens have the confidence of the law before temperature and top-p.

Released code of the factor rule also accepts the least confident mask of a block where it is the only one that fails
(confidences 0.99, 0.98, 0.1: three instead of two). Not reproduced here.

Source: Wu et al. 2025 (Fast-dLLM, arXiv 2505.22618) and its theorem on greedy parallel decoding.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, top_subset
from discrete_schedulers.schedulers.order_utils import OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import Coefficients, Grid, ProcessName


class ThresholdScheduler(OrderScheduler):
    """Opens all tokens of high confidence. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open at least.
        rule (`str`, defaults to `"threshold"`): `"threshold"` or `"factor"`.
        threshold (`float`, defaults to 0.9): Confidence above which a token is accepted, in [0, 1]; 1 accepts none by itself.
        factor (`float`, defaults to 1.0): Bound of (n + 1)(1 - c_(n)), positive; 1 is that of the theorem.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token, as published.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"threshold": [8 floats]}}`, or `"factor"`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"threshold": "numbers in [0, 1]", "factor": "positive numbers"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        rule: Literal["threshold", "factor"] = "threshold",
        threshold: float = 0.9,
        factor: float = 1.0,
        rounding: Rounding = "up",
        block_length: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        coefficients: Coefficients | None = None,
        learned_for: dict | None = None,
        information_curve: list[float] | None = None,
    ) -> None:
        self.prepare()

    def choose(self, prediction: Prediction, index: int, sample: Tensor, generator: Generators) -> Tensor:
        """The accepted masks, or the most confident ones where fewer than are due. See [`OrderScheduler.choose`]."""
        confidence = prediction.sheet(prediction.token_probability.double(), -torch.inf)  # (B, L)
        if self.config.rule == "threshold":
            accepted = confidence > self.per_step("threshold", index)
        else:
            ranked = confidence.sort(dim=1, descending=True).values  # c_(n) at place n - 1
            n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
            # (n + 1)(1 - c_(n)) grows with n: those that pass come first
            count = ((n + 1) * (1 - ranked) < self.per_step("factor", index)).sum(1)
            accepted = top_subset(prediction.is_eligible, count, confidence)
        at_least = self.due(sample, index).clamp(min=1)
        return accepted | self.take(confidence, at_least, prediction.is_eligible)
