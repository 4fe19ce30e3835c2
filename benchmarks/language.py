"""What the parts `tiny-text` and `antiberty` have in common: a network, held-out sequences, and all samplers on them.

NLL bound, nats per token, on the same held-out sequences for all samplers and seeds. For samplers with a uniformly random order
it follows from the information curve of these sequences (`samplers.random_order_nll`): the same expectation as
`sampler_nll_bound` without its noise. The spread order and LSD on the log-score are measured with `sampler_nll_bound`. A seed
draws other orders and, for LSD, other coefficients; the error bars are about these, not about the choice of sequences.

Samples come from the pipeline, at temperature 1 and at those of the sweep. Perplexities of samplers are compared at one entropy:

    target    = unigram entropy of real data, moved into the range that all samplers reach in the sweep
    perplexity: log perplexity, for each seed interpolated linearly in the entropy between the two temperatures around the target

Samplers with equal plans are one sampler and share their numbers (`same_as`); the seeds of the samples are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler, RowLogits, information_curve
from discrete_schedulers.evaluation import sampler_nll_bound
from learning import learn
from samplers import SAMPLERS, Plan, Sampler, plan_of, random_order_nll
from store import Store, summary

BATCH = 32  # sequences in one call of the network: larger batches leave the cache


@dataclass
class Subject:
    """A model to measure samplers on.

    Args:
        part (`str`): Name of the part.
        pipe (`DiscreteDiffusionPipeline`): The model's pipeline.
        template (`torch.Tensor` of shape `(1, L')`): What every sample starts from, -1 where it is free, L places.
        score (`Callable`): `score(samples, seed, steps, temperature)` -> metrics of samples, int64 (n, L). Has "entropy" and
            "perplexity".
    """

    part: str
    pipe: DiscreteDiffusionPipeline
    template: Tensor
    score: Callable[[Tensor, int, int, float], dict[str, float]]

    @property
    def base(self) -> dict[str, Any]:
        """What every scheduler needs to know."""
        return {name: self.pipe.config.denoiser[name] for name in ("vocab_size", "mask_token_id")}

    @property
    def is_free(self) -> Tensor:
        """Places that are sampled, bool (L',)."""
        return self.template[0] < 0

    @property
    def length(self) -> int:
        """Number of free places L."""
        return int(self.is_free.sum())

    def framed(self, x: Tensor) -> Tensor:
        """Sequences (n, L) put into the template, (n, L')."""
        return self.template.repeat(len(x), 1).masked_scatter(self.is_free, x)

    def denoiser(self, x_t: Tensor, t: Tensor | float, positions: Tensor) -> RowLogits:
        """The network as a function of the free places only."""
        everywhere = torch.zeros(len(x_t), self.template.shape[1], dtype=torch.bool).masked_scatter(self.is_free, positions)
        return RowLogits(self.pipe.denoiser(self.framed(x_t), t, everywhere).logits, positions)

    def sample(self, scheduler: DiscreteScheduler, num_inference_steps: int, seed: int, num_samples: int) -> Tensor:
        """Samples, int64 (num_samples, L); each has its own generator."""
        self.pipe.scheduler = scheduler
        generators = [torch.Generator().manual_seed(10**9 * (seed + 1) + i) for i in range(num_samples)]
        parts = []
        for start in range(0, num_samples, BATCH):
            part = generators[start : start + BATCH]
            output = self.pipe(
                template=self.template,
                num_samples=len(part),
                num_inference_steps=num_inference_steps,
                generator=part,
                output_type="pt",
            )
            parts.append(output.sequences[:, self.is_free])
        return torch.cat(parts)


def run(subject: Subject, store: Store, heldout: Tensor, fit_curve: Callable[[list[Tensor]], list[float]]) -> None:
    """Fill the store: coefficients, curves, one row for each sampler and budget, and perplexities at one entropy.

    Args:
        subject (`Subject`): The model.
        store (`Store`): With the settings: see the parts.
        heldout (`torch.Tensor` of shape `(n, L)`): Sequences for the bound.
        fit_curve (`Callable`): Information curve for the optimal grids, from the teachers' samples of all seeds.
    """
    settings = store.get("settings")
    seeds, mask = settings["seeds"], subject.base["mask_token_id"]
    for seed in seeds:
        if store.get("coefficients", str(seed)) is None:
            print(f"{subject.part}: learning LSD, seed {seed}", flush=True)
            numbers = settings["learning_samples"], settings["teacher_steps"]
            learned, final = learn(subject.denoiser, subject.base, subject.length, settings["budgets"], seed, *numbers)
            store.put(final.tolist(), "teacher_samples", str(seed))
            store.put(learned, "coefficients", str(seed))
    learned = [store.get("coefficients", str(seed)) for seed in seeds]
    if store.get("information_curve") is None:
        store.put(fit_curve([torch.tensor(store.get("teacher_samples", str(seed))) for seed in seeds]), "information_curve")
    for seed in seeds:
        if store.get("heldout_curves", str(seed)) is None:
            print(f"{subject.part}: information curve, seed {seed}", flush=True)
            generator = torch.Generator().manual_seed(seed)
            levels = min(settings["curve_levels"], subject.length)
            curve = information_curve(subject.denoiser, heldout, mask, levels, generator, BATCH)
            store.put(curve.to_config(), "heldout_curves", str(seed))
    curves = [torch.tensor(store.get("heldout_curves", str(seed)), dtype=torch.float64) for seed in seeds]

    rows = [(sampler, steps) for steps in settings["budgets"] for sampler in SAMPLERS]
    known: dict[Any, str] = {}  # plans of all seeds -> name of the sampler
    for sampler, steps in rows:
        schedulers = [sampler.build(subject.base, store.get("information_curve"), item) for item in learned]
        plans = [plan_of(scheduler, steps, subject.length) for scheduler in schedulers]
        first = known.setdefault((steps, *plans), sampler.name)
        row = store.get("rows", sampler.name, str(steps))
        if row is None and first != sampler.name:
            store.put(store.get("rows", first, str(steps)) | {"same_as": first}, "rows", sampler.name, str(steps))
        elif row is None:
            print(f"{subject.part}: {sampler.name}, {steps} steps", flush=True)
            row = {"nll": summary(nll_bounds(subject, schedulers, plans, curves, steps, heldout, seeds))}
            row["samples"] = sample_metrics(subject, sampler, store, steps, learned)
            store.put(row, "rows", sampler.name, str(steps))
    for steps in settings["sweep_budgets"]:
        at = {sampler.name: store.get("rows", sampler.name, str(steps), "samples") for sampler in SAMPLERS}
        target = store.get("reference", "entropy", "mean")
        store.put(matched_entropy(at, target), "matched_entropy", str(steps))


def nll_bounds(
    subject: Subject,
    schedulers: list[DiscreteScheduler],
    plans: list[Plan],
    curves: list[Tensor],
    steps: int,
    heldout: Tensor,
    seeds: list[int],
) -> list[float]:
    """Mean bound over the held-out sequences, nats per token, for each seed."""
    if plans[0].choice in ("bernoulli", "random"):
        return [random_order_nll(curve, plan) for curve, plan in zip(curves, plans, strict=True)]
    values, frozen = [], ~subject.is_free
    for scheduler, seed in zip(schedulers, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        data = subject.framed(heldout)
        bounds = sampler_nll_bound(subject.pipe.denoiser, scheduler, data, steps, generator, BATCH, frozen)
        values.append(float(bounds.mean()))
    return values


def sample_metrics(
    subject: Subject, sampler: Sampler, store: Store, steps: int, learned: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Metrics of samples by temperature: `{"1.0": {"entropy": summary, "perplexity": summary, ...}}`."""
    settings = store.get("settings")
    temperatures = [1.0] if steps in settings["sample_budgets"] else []
    if steps in settings["sweep_budgets"]:
        temperatures = settings["temperatures"]
    metrics = {}
    for temperature in temperatures:
        by_seed = []
        for seed, coefficients in zip(settings["seeds"], learned, strict=True):
            scheduler = sampler.build(subject.base, store.get("information_curve"), coefficients, temperature)
            samples = subject.sample(scheduler, steps, seed, settings["samples"])
            by_seed.append(subject.score(samples, seed, steps, temperature))
        metrics[str(temperature)] = {name: summary([item[name] for item in by_seed]) for name in by_seed[0]}
    return metrics


def matched_entropy(samples: dict[str, dict[str, Any]], target: float) -> dict[str, Any]:
    """Perplexity and temperature of each sampler at one entropy; the rule is in the module's docstring.

    Args:
        samples (`dict`): `{sampler: {temperature: {"entropy": summary, "perplexity": summary}}}`.
        target (`float`): Wanted entropy.

    Raises:
        ValueError: If no entropy is reached by all samplers.
    """
    curves = {}  # sampler -> for each seed its points (entropy, log perplexity, temperature), entropy rising
    for name, by_temperature in samples.items():
        columns = [
            [(entropy, math.log(perplexity), float(temperature)) for entropy, perplexity in zip(*values, strict=True)]
            for temperature, metrics in by_temperature.items()
            for values in [(metrics["entropy"]["values"], metrics["perplexity"]["values"])]
        ]
        curves[name] = [sorted(points) for points in zip(*columns, strict=True)]
    lowest = max(points[0][0] for seeds in curves.values() for points in seeds)
    highest = min(points[-1][0] for seeds in curves.values() for points in seeds)
    if lowest > highest:
        raise ValueError(f"no entropy is reached by all samplers ({lowest} > {highest}): widen the sweep of temperatures")
    entropy = min(max(target, lowest), highest)
    rows = {}
    for name, seeds in curves.items():
        found = [interpolate(points, entropy) for points in seeds]
        rows[name] = {
            "perplexity": summary([math.exp(log_perplexity) for log_perplexity, _ in found]),
            "temperature": summary([temperature for _, temperature in found]),
        }
    return {"entropy": entropy, "rows": rows}


def interpolate(points: list[tuple[float, float, float]], entropy: float) -> tuple[float, float]:
    """Log perplexity and temperature at an entropy within the range of the points, linear between neighbours."""
    for left, right in pairwise(points):
        if left[0] <= entropy <= right[0]:
            share = (entropy - left[0]) / (right[0] - left[0]) if right[0] > left[0] else 0.0
            return left[1] + share * (right[1] - left[1]), left[2] + share * (right[2] - left[2])
    raise ValueError(f"entropy {entropy} is outside the range of the points: {points}")
