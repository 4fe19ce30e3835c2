"""The one list of samplers that every part measures, and what can be said of them without running a network.

For a network without time input, an absorbing sampler that chooses positions without looking at the logits is its plan: with
which probability a mask opens in each step, whether each on its own or a number of them, and in which order. Samplers with
equal plans are one sampler.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteScheduler,
    LSDScheduler,
    TauLeapingScheduler,
)


@dataclass(frozen=True)
class Sampler:
    """A scheduler and its arguments.

    Args:
        name (`str`): Key in the JSON files.
        label (`str`): Name in the tables.
        cls (`type`): Class of the scheduler.
        arguments (`dict`): Its arguments, but for the model's facts.
        learned (`str`, *optional*): Which learned coefficients it takes, a key of `learning.METHODS`.
    """

    name: str
    label: str
    cls: type[DiscreteScheduler]
    arguments: dict[str, Any] = field(default_factory=dict)
    learned: str | None = None

    def build(
        self, base: dict[str, Any], curve: list[float], coefficients: dict[str, Any], temperature: float = 1.0
    ) -> DiscreteScheduler:
        """The scheduler.

        Args:
            base (`dict`): `vocab_size` and `mask_token_id`.
            curve (`list[float]`): The model's information curve, for optimal grids.
            coefficients (`dict`): Learned coefficients by method.
            temperature (`float`, defaults to 1.0): Divides the logits.
        """
        arguments = base | self.arguments | {"temperature": temperature}
        if self.arguments.get("grid") == "optimal":
            arguments["information_curve"] = curve
        if self.learned is not None:
            arguments["coefficients"] = coefficients[self.learned]
        return self.cls(**arguments)


A, L = AncestralScheduler, LSDScheduler
BERNOULLI = {"unmasking": "bernoulli"}
SAMPLERS = [
    Sampler("bernoulli-uniform", "Bernoulli, uniform grid (= Euler = Tweedie)", A, BERNOULLI),
    Sampler("bernoulli-cosine", "Bernoulli, cosine grid", A, BERNOULLI | {"grid": "cosine"}),
    Sampler("bernoulli-optimal", "Bernoulli, optimal grid", A, BERNOULLI | {"grid": "optimal"}),
    Sampler("tau-leaping", "tau-leaping", TauLeapingScheduler),
    Sampler("counts-uniform", "counts, uniform grid", A),
    Sampler("counts-cosine", "counts, cosine grid", A, {"grid": "cosine"}),
    Sampler("counts-optimal", "counts, optimal grid", A, {"grid": "optimal"}),
    Sampler("spread-uniform", "counts, spread order, uniform grid", A, {"order": "spread"}),
    Sampler("spread-optimal", "counts, spread order, optimal grid", A, {"order": "spread", "grid": "optimal"}),
    Sampler("lsd-score-kl", "LSD, score, generalised KL", L, learned="lsd-score-kl"),
    Sampler("lsd-score-l2", "LSD, score, L2", L, learned="lsd-score-l2"),
    Sampler("lsd-log-score", "LSD, log-score, softmax KL", L, {"scale": "log_score"}, "lsd-log-score"),
    Sampler("lsd-plus-literal", "LSD+ as printed", L, {"grid": "learned"}, "lsd-plus-literal"),
    Sampler("lsd-plus-repaired", "LSD+ repaired", L, {"grid": "learned"}, "lsd-plus-repaired"),
]


class Plan(NamedTuple):
    """How positions are chosen.

    Args:
        choice (`str`): `"bernoulli"` (each mask on its own), `"random"` or `"spread"` (a number of masks, see `count_law`), or
            `"logits"` (the choice depends on the network).
        numbers (`tuple[float, ...]`): For each step the probability that a mask opens; with `"logits"` the learned factor.
    """

    choice: str
    numbers: tuple[float, ...]

    @property
    def key(self) -> tuple[str, tuple[float, ...]]:
        """Equal for equal samplers: a factor that differs from 1 in the last digits is 1."""
        return self.choice, tuple(round(number, 12) for number in self.numbers)


def plan_of(scheduler: DiscreteScheduler, num_inference_steps: int) -> Plan:
    """The plan of a scheduler. Sets its timesteps."""
    scheduler.set_timesteps(num_inference_steps)
    config, steps = scheduler.config, range(num_inference_steps)
    if config.get("scale") == "log_score":
        return Plan("logits", tuple(scheduler.phi(k) for k in steps))
    choice = config.order if config.get("unmasking") == "counts" else "bernoulli"
    return Plan(choice, tuple(scheduler.open_probability(k) for k in steps))


def count_law(num_masks: int, probability: float) -> dict[int, float]:
    """Law of the number that opens with `unmasking="counts"`: what is due, rounded; a coin where less than a half is due."""
    due = num_masks * probability
    return {0: 1 - due, 1: due} if 0 < due < 0.5 else {round(due): 1.0}


def random_order_nll(curve: Tensor, plan: Plan) -> float:
    r"""Bound on the negative log-likelihood of a sampler with uniformly random order, in nats per token.

    With f(i) the cross-entropy of a masked token when i random others are known, and m the masks before a step, of which n
    open, the bound is E sum_steps n f(L - m) / L. For Bernoulli m is Binomial(L, survival) and n has the mean m p; for counts
    m is followed from step to step. There is no noise but the curve's, which is the same for all samplers.

    Args:
        curve (`torch.Tensor` of shape `(L,)`): f(0), ..., f(L - 1), float64.
        plan (`Plan`): With choice `"bernoulli"` or `"random"`.

    Raises:
        ValueError: If the order is not uniformly random.
    """
    length = len(curve)
    if plan.choice == "random":
        law, nats = {length: 1.0}, 0.0  # of the number of masks
        for probability in plan.numbers:
            following: dict[int, float] = defaultdict(float)
            for masks, p in law.items():
                for count, chance in count_law(masks, probability).items():
                    nats += p * chance * count * (float(curve[length - masks]) if masks else 0.0)
                    following[masks - count] += p * chance
            law = following
        return nats / length
    if plan.choice != "bernoulli":
        raise ValueError(f"`plan` has choice {plan.choice!r}; allowed: 'bernoulli', 'random'")
    masks = torch.arange(1, length + 1, dtype=torch.float64)
    cost = masks * curve.flip(0)  # m f(L - m), m = 1..L
    nats, survival = 0.0, 1.0
    for probability in plan.numbers:
        binomial = torch.distributions.Binomial(length, torch.tensor(survival, dtype=torch.float64))
        nats += probability * float((binomial.log_prob(masks).exp() * cost).sum())
        survival *= 1 - probability
    return nats / length
