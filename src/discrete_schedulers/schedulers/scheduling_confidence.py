r"""Confidence orders of masked language models: a fixed number of masks opens in each step, those with the best score.

    confidence   p(drawn token)
    margin       p of the best token - p of the second
    entropy      sum_v p(v) log p(v), the negative entropy
    random       uniform noise

LLaDA: `rounding="up"`, the same as its base count and one more in the first steps, and scores by the network's law as it is
(`score_law="model"`). Dream: `rounding="down"`, and scores by the law after temperature and top-p (`score_law="tempered"`),
which makes a sharper law look surer; at temperature 0, which divides nothing, by the law at 1. Dream's `alg_temp` is
`score_temperature`: positions drawn without replacement with weights softmax(score / score_temperature), over the scores
themselves and not their logarithms; 0 takes the best.

None of them keeps the model's law but `score="random"`, which is ancestral sampling with fixed counts: which position opens
depends on what it says. With blocks LLaDA shares its steps out among them in advance, here the time grid does over all
positions: the same where the count of each step divides the block; otherwise a step that ends a block goes on in the next.

Sources: Nie et al. 2025 (LLaDA, `generate.py`), Ye et al. 2025 (Dream, `generation_utils.py`), Kim et al. 2025 (margin,
arXiv 2502.06768). Released KLASS code takes +entropy for a confidence and so opens the least certain positions.
"""

from __future__ import annotations

from typing import Literal

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from discrete_schedulers.processes import NoiseSchedule
from discrete_schedulers.sampling import Generators, RowFunction, gumbels, uniforms
from discrete_schedulers.schedulers.order_utils import Measure, OrderScheduler, Prediction, Rounding
from discrete_schedulers.schedulers.scheduling_utils import (
    Coefficients,
    Grid,
    ProcessName,
    keep_top_p,
)


class ConfidenceScheduler(OrderScheduler):
    """Opens the positions with the best scores. Arguments not named here are those of [`AncestralScheduler`].

    Args:
        vocab_size (`int`): Width V of the logits, mask included.
        mask_token_id (`int`): The mask's id.
        process (`str`, defaults to `"absorbing"`): Only `"absorbing"`.
        noise_schedule (`str`, defaults to `"loglinear"`): `"loglinear"`, `"linear"`, `"cosine"` or `"geometric"`.
        grid (`str`, defaults to `"uniform"`): `"uniform"`, `"cosine"`, `"optimal"` or `"learned"`; says how many open.
        score (`str`, defaults to `"confidence"`): `"confidence"`, `"margin"`, `"entropy"` or `"random"`.
        score_law (`str`, defaults to `"model"`): The law that scores: `"model"`, or `"tempered"` by temperature and top-p.
        score_temperature (`float`, defaults to 0.0): 0 opens the best scores, more draws them, not negative.
        rounding (`str`, defaults to `"up"`): Of the number that is due: `"up"` or `"down"`.
        block_length (`int`, *optional*): Opens blocks of this length from left to right; `None` is one block.
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most probable token.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept, in (0, 1].
        coefficients (`dict`, *optional*): Learned floats by step budget: `{"8": {"score_temperature": [8 floats]}}`.
        learned_for (`dict`, *optional*): What they were learned for.
        information_curve (`list[float]`, *optional*): Masked cross-entropy of the model by revealed tokens, in nats.
    """

    learned_knobs = {"score_temperature": "numbers of at least 0"}

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int | None = None,
        process: ProcessName = "absorbing",
        noise_schedule: NoiseSchedule = "loglinear",
        grid: Grid = "uniform",
        score: Literal["confidence", "margin", "entropy", "random"] = "confidence",
        score_law: Literal["model", "tempered"] = "model",
        score_temperature: float = 0.0,
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
        """The masks with the best scores, as many as are due. See [`OrderScheduler.choose`]."""
        score = self.score(prediction, generator)
        # The largest of weight w times exp(Gumbel noise) are draws without replacement, here log w = score / temperature
        noise = gumbels(tuple(sample.shape), generator, sample.device)
        score = score + self.per_step("score_temperature", index) * noise
        return self.take(score, self.due(sample, index), prediction.is_eligible)

    def score(self, prediction: Prediction, generator: Generators) -> Tensor:
        """Score of each eligible position, (B, L), float64."""
        if self.config.score == "random":
            return uniforms(tuple(prediction.is_eligible.shape), generator, prediction.is_eligible.device)
        if self.config.score == "confidence":
            return prediction.sheet(prediction.token_probability.double())
        return prediction.sheet((prediction.margin if self.config.score == "margin" else -prediction.entropy).double())

    def reads(self) -> tuple[Measure, ...]:
        """See [`OrderScheduler.reads`]."""
        names: dict[str, tuple[Measure, ...]] = {"confidence": ("token_probability",), "random": ()}
        names |= {"margin": ("margin",), "entropy": ("entropy",)}
        return names[self.config.score]

    def scored_logits(self) -> RowFunction | None:
        """With `score_law="tempered"` after temperature (1 instead of 0) and top-p. See [`OrderScheduler.scored_logits`]."""
        temperature, top_p = self.config.temperature or 1.0, self.config.top_p
        if self.config.score_law == "model":
            return None
        return lambda logits, _: keep_top_p(logits / temperature, top_p) if top_p < 1 else logits / temperature
