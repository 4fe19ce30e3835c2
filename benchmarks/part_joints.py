r"""Part `joints`: exact KL(data || sampler) on joints that can be enumerated, with exact conditionals as the denoiser.

The law of the last sample is computed, not sampled. A state is a row of L tokens or masks, with S tokens there are (S + 1)^L;
one step can connect (2 S + 1)^L pairs of them, with probability

    P(z' | z) = G(masks of z -> masks of z')  prod_{i opens} p(x_i = z'_i | tokens of z)

where G, the law of the next set of masks, is a product for Bernoulli samplers, uniform over subsets for counts, and for the
spread order the mean over all orders in which ties may go. LSD with `scale="log_score"` chooses positions by the logits; there
the product of `transition` over positions is taken. Only learned coefficients depend on the seed.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning import learn
from samplers import SAMPLERS, Plan, Sampler, count_law, plan_of
from store import Store, summary
from torch import Tensor

from discrete_schedulers import DiscreteScheduler, RowLogits
from discrete_schedulers.evaluation import kl_divergence

FULL = {
    "joints": {"ising": [2, 8], "random": [2, 8], "random-3": [3, 5]},  # tokens S, length L
    "budgets": [1, 2, 4, 8, 16, 32, 64],
    "temperatures": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5],
    "sweep_budgets": [2, 4, 8],
    "teacher_steps": 1024,
    "learning_samples": 64,
}
QUICK = FULL | {
    "joints": {"ising": [2, 4], "random-3": [3, 3]},
    "budgets": [1, 2, 4],
    "temperatures": [1.0, 0.8],
    "sweep_budgets": [2],
    "teacher_steps": 64,
    "learning_samples": 8,
}


def joint_law(name: str, num_tokens: int, length: int) -> Tensor:
    """Probabilities of all rows of L tokens, last position fastest, shape (S^L,), float64.

    ising: log p = 1.5 #{d: x_d = x_{d+1}, on a ring} + 0.3 [x_0 = 0] + const; random: log p = 1.5 g + const with g standard
    normal, numpy's RandomState(0).
    """
    if name == "ising":
        x = torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))
        logits = 1.5 * (x == x.roll(-1, 1)).sum(1) + 0.3 * (x[:, 0] == 0)
    else:
        logits = torch.from_numpy(1.5 * np.random.RandomState(0).randn(num_tokens**length))
    return logits.double().softmax(0)


class Joint:
    """A joint, all states with masks, their exact conditionals, and the pairs that a step can connect.

    Args:
        law (`torch.Tensor` of shape `(S^L,)`): Probabilities of the clean rows.
        num_tokens (`int`): S; the mask is id S.
        length (`int`): L.
    """

    def __init__(self, law: Tensor, num_tokens: int, length: int) -> None:
        self.law, self.length = law, length
        self.mask_token_id, self.vocab_size = num_tokens, num_tokens + 1
        self.base = {"vocab_size": self.vocab_size, "mask_token_id": self.mask_token_id}
        self.states = self.product(self.vocab_size)  # (V^L, L)
        self.clean = self.index(self.product(num_tokens))  # (S^L,) places of the clean rows
        self.log_p_0 = self.conditionals().log()  # (V^L, L, V)
        # one position: a token stays, the mask stays, the mask opens
        stays = [(v, v) for v in range(self.vocab_size)]
        moves = torch.tensor(stays + [(self.mask_token_id, v) for v in range(num_tokens)])
        steps = moves[self.product(len(moves))]  # (pairs, L, 2)
        self.first, self.second = self.index(steps[..., 0]), self.index(steps[..., 1])
        self.opens = steps[..., 0] != steps[..., 1]  # (pairs, L)
        self.token_laws: dict[float, Tensor] = {}
        bits = 2 ** torch.arange(length)
        self.masks = ((self.states == self.mask_token_id) * bits).sum(1)  # sets of masks as bits
        self.first_masks = ((steps[..., 0] == self.mask_token_id) * bits).sum(1)
        self.second_masks = ((steps[..., 1] == self.mask_token_id) * bits).sum(1)

    def product(self, size: int) -> Tensor:
        """All rows of L numbers below `size`, last position fastest."""
        return torch.cartesian_prod(*[torch.arange(size)] * self.length)

    def index(self, x: Tensor) -> Tensor:
        """Place of rows in `states`."""
        return x @ self.vocab_size ** torch.arange(self.length - 1, -1, -1)

    def conditionals(self) -> Tensor:
        """p(x_0^i = v | tokens of z) for all states z, (V^L, L, V), 0 at the mask."""
        rows = self.states[self.clean]
        one_hot = torch.nn.functional.one_hot(rows, self.vocab_size).double()  # (S^L, L, V)
        parts = []
        for z in self.states.split(512):
            agrees = ((z[:, None] == rows) | (z[:, None] == self.mask_token_id)).all(-1).double()
            parts.append(torch.einsum("zx,xlv->zlv", agrees * self.law, one_hot))
        p_0 = torch.cat(parts)
        return p_0 / p_0.sum(-1, keepdim=True)

    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None) -> Tensor | RowLogits:
        """The exact denoiser."""
        logits = self.log_p_0[self.index(x_t)]
        return logits if positions is None else RowLogits(logits[positions], positions)

    def information_curve(self) -> list[float]:
        """f(i) = mean entropy of i + 1 random tokens minus that of i."""
        cube = self.law.view([self.vocab_size - 1] * self.length)
        mean = []
        for size in range(self.length + 1):
            entropies = []
            for kept in itertools.combinations(range(self.length), size):
                rest = [d for d in range(self.length) if d not in kept]
                marginal = cube.sum(rest) if rest else cube
                entropies.append(float(torch.special.entr(marginal).sum()))
            mean.append(math.fsum(entropies) / len(entropies))
        return [after - before for before, after in itertools.pairwise(mean)]

    def token_law(self, scheduler: DiscreteScheduler) -> Tensor:
        """Probability of the tokens drawn by each pair, given its positions; kept, since only the temperature changes it."""
        temperature = scheduler.config.temperature
        if temperature not in self.token_laws:
            self.token_laws[temperature] = self.pair_product(scheduler.clean_law(self.log_p_0), self.opens)
        return self.token_laws[temperature]

    def pair_product(self, law: Tensor, counted: Tensor | None = None) -> Tensor:
        """Product over (counted) positions of P(z'_i | z), of a law (V^L, L, V)."""
        weight = torch.ones(len(self.first), dtype=torch.float64)
        target = self.states[self.second]
        for i in range(self.length):
            factor = law[self.first, i, target[:, i]]
            weight *= factor if counted is None else torch.where(counted[:, i], factor, 1.0)
        return weight

    def final_law(self, scheduler: DiscreteScheduler, num_inference_steps: int) -> Tensor:
        """Law of the sampler's output over clean rows, (S^L,)."""
        plan = plan_of(scheduler, num_inference_steps)
        tokens = self.token_law(scheduler) if plan.choice != "logits" else None
        law = torch.zeros(len(self.states), dtype=torch.float64)
        law[-1] = 1.0  # all masks
        for k in range(num_inference_steps):
            if tokens is None:
                weight = self.pair_product(scheduler.transition(self.log_p_0, k, self.states))
            else:
                reached = law.new_zeros(2**self.length).index_add_(0, self.masks, law) > 0
                subsets = next_masks(plan, k, reached)  # (2^L, 2^L)
                weight = tokens * subsets[self.first_masks, self.second_masks]
            law = torch.zeros_like(law).index_add_(0, self.second, law[self.first] * weight)
        return law[self.clean]


def next_masks(plan: Plan, step: int, reached: Tensor) -> Tensor:
    """G: P(set of masks after a step | set before), (2^L, 2^L), sets as bits; 0 in the rows of sets that are not reached."""
    length = len(reached).bit_length() - 1
    sets = torch.arange(2**length)
    size = sum((sets >> i) & 1 for i in range(length))
    is_subset = ((sets[:, None] & sets) == sets) & reached[:, None]
    opened = size[:, None] - size
    probability = plan.numbers[step]
    if plan.choice == "bernoulli":
        law = probability ** opened.double() * (1 - probability) ** size.double()
        return torch.where(is_subset, law, 0.0)
    law = torch.zeros(2**length, 2**length, dtype=torch.float64)
    for masks in sets[reached].tolist():
        for count, chance in count_law(int(size[masks]), probability).items():
            if plan.choice == "random":
                law[masks, is_subset[masks] & (opened[masks] == count)] = chance / math.comb(int(size[masks]), count)
                continue
            for rest, share in spread_law(masks, count, length).items():
                law[masks, rest] = chance * share
    return law


@cache
def spread_law(masks: int, count: int, length: int) -> dict[int, float]:
    """Law of the masks left by `count` farthest-point picks on a ring, ties by a random order of the places: all orders."""
    places = [i for i in range(length) if masks >> i & 1]
    orders = torch.tensor(list(itertools.permutations(range(len(places)))))  # (orders, masks)
    score = torch.full((len(orders), length), -math.inf)
    score[:, places] = orders / len(places)
    place = torch.arange(length)
    gap = (place[:, None] - place).abs()
    gap = torch.minimum(gap, length - gap)  # (L, L)
    known = [i for i in range(length) if i not in places]
    distance = (gap[:, known].amin(1) if known else torch.full((length,), length)).repeat(len(orders), 1)
    for _ in range(count):
        best = (distance + score).argmax(1)
        score[torch.arange(len(orders)), best] = -math.inf
        distance = torch.minimum(distance, gap[best])
    left, number = (score.isfinite() * 2**place).sum(1).unique(return_counts=True)
    return dict(zip(left.tolist(), (number.double() / len(orders)).tolist(), strict=True))


def measure(
    joint: Joint, sampler: Sampler, steps: int, curve: list[float], learned: list[dict], sweep: list[float]
) -> dict:
    """KL(data || sampler) at temperature 1, and at the temperature of the sweep where it is smallest."""
    by_temperature = {}
    for temperature in sweep:
        values: list[float] = []
        for coefficients in learned if sampler.learned is not None else learned[:1]:
            scheduler = sampler.build(joint.base, curve, coefficients, temperature)
            law = joint.final_law(scheduler, steps)
            values.append(max(float(kl_divergence(joint.law, law)), 0.0))  # 0 up to rounding for an exact sampler
        by_temperature[temperature] = summary(values)
    row: dict[str, Any] = {"kl": by_temperature[1.0]}
    if len(sweep) > 1:
        best = min(sweep, key=lambda temperature: by_temperature[temperature]["mean"])
        row["best_temperature"], row["best_kl"] = best, by_temperature[best]
    return row


def run(folder: Path, seeds: list[int], quick: bool) -> Store:
    """Compute what is missing of results/joints.json."""
    settings = {"seeds": seeds} | (QUICK if quick else FULL)
    store = Store(folder, "joints", settings)
    if store.complete:
        return store
    for name, (num_tokens, length) in settings["joints"].items():
        joint = Joint(joint_law(name, num_tokens, length), num_tokens, length)
        curve = joint.information_curve()
        store.put(float(torch.special.entr(joint.law).sum()), "joints", name, "entropy")
        store.put(curve, "joints", name, "information_curve")
        for seed in seeds:
            if store.get("joints", name, "coefficients", str(seed)) is None:
                print(f"joints: {name}, learning, seed {seed}", flush=True)
                numbers = settings["learning_samples"], settings["teacher_steps"]
                learned, _ = learn(joint, joint.base, length, settings["budgets"], seed, *numbers)
                store.put(learned, "joints", name, "coefficients", str(seed))
        learned = [store.get("joints", name, "coefficients", str(seed)) for seed in seeds]
        for sampler in SAMPLERS:
            for steps in settings["budgets"]:
                if store.get("joints", name, "rows", sampler.name, str(steps)) is None:
                    sweep = settings["temperatures"] if steps in settings["sweep_budgets"] else [1.0]
                    row = measure(joint, sampler, steps, curve, learned, sweep)
                    store.put(row, "joints", name, "rows", sampler.name, str(steps))
            print(f"joints: {name}, {sampler.name}", flush=True)
    store.finish()
    return store
