"""What the parts `tiny-text` and `antiberty` have in common: a network, held-out sequences, and all samplers on them.

NLL bound, nats per token, on the same held-out sequences for all samplers and seeds. For samplers with a uniformly random order
it follows from the information curve of these sequences (`samplers.random_order_nll`): the same expectation as
`sampler_nll_bound` without its noise. The spread order and LSD on the log-score are measured with `sampler_nll_bound`. A seed
draws other orders and, for LSD, other coefficients; the error bars are about these, not about the choice of sequences.

Samples come from the pipeline, at temperature 1 and at those of the sweep. Perplexities are compared at one entropy:

    target        the entropy of real data (each part says which), moved into the range that all samplers reach in the
                  sweep if there is one
    temperature   at which a sampler's entropy, the mean over seeds, is the target: linear between the sweep's neighbours
    perplexity    at this temperature, its logarithm linear between the same neighbours, for each seed

Samplers with equal plans are one sampler and share their numbers (`same_as`); the seeds of the samples are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from learning import learn
from samplers import SAMPLERS, Plan, Sampler, plan_of, random_order_nll
from store import Store, summary
from torch import Tensor

from discrete_schedulers import DiscreteDiffusionPipeline, DiscreteScheduler, RowLogits, information_curve
from discrete_schedulers.evaluation import sampler_nll_bound

BATCH = 32  # sequences in one call of the network: larger batches leave the cache


@dataclass
class Subject:
    """A model to measure samplers on.

    Args:
        part (`str`): Name of the part.
        pipe (`DiscreteDiffusionPipeline`): The model's pipeline.
        template (`torch.Tensor` of shape `(1, L')`): What every sample starts from, -1 where it is free, L places.
        score (`Callable`): `score(samples, seed, steps, temperature)` -> metrics of samples, int64 (n, L). Has "perplexity".
        entropy (`str`): The metric at which perplexities are compared.
    """

    part: str
    pipe: DiscreteDiffusionPipeline
    template: Tensor
    score: Callable[[Tensor, int, int, float], dict[str, float]]
    entropy: str

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
        everywhere = torch.zeros(len(x_t), self.template.shape[1], dtype=torch.bool).masked_scatter(
            self.is_free, positions
        )
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


def run(subject: Subject, store: Store, heldout: Tensor) -> None:
    """Fill the store: coefficients, curves, one row for each sampler and budget, and perplexities at one entropy.

    Args:
        subject (`Subject`): The model.
        store (`Store`): With the settings (see the parts) and "reference", the metrics of real data. Without
            "information_curve" the one for the optimal grids is measured on the teachers' samples.
        heldout (`torch.Tensor` of shape `(n, L)`): Sequences for the bound.
    """
    settings = store.get("settings")
    seeds, mask = settings["seeds"], subject.base["mask_token_id"]
    for seed in seeds:
        if store.get("coefficients", str(seed)) is None:
            print(f"{subject.part}: learning LSD, seed {seed}", flush=True)
            numbers = settings["learning_samples"], settings["teacher_steps"]
            learned, final = learn(subject.denoiser, subject.base, subject.length, settings["budgets"], seed, *numbers)
            if store.get("information_curve") is None:
                store.put(final.tolist(), "teacher_samples", str(seed))
            store.put(learned, "coefficients", str(seed))
    learned = [store.get("coefficients", str(seed)) for seed in seeds]
    levels = min(settings["curve_levels"], subject.length)
    if store.get("information_curve") is None:
        fit = torch.cat([torch.tensor(store.get("teacher_samples", str(seed))) for seed in seeds])
        curve = information_curve(subject.denoiser, fit, mask, levels, torch.Generator().manual_seed(0), BATCH)
        store.put(curve.to_config(), "information_curve")
    for seed in seeds:
        if store.get("heldout_curves", str(seed)) is None:
            print(f"{subject.part}: information curve, seed {seed}", flush=True)
            generator = torch.Generator().manual_seed(seed)
            curve = information_curve(subject.denoiser, heldout, mask, levels, generator, BATCH)
            store.put(curve.to_config(), "heldout_curves", str(seed))
    curves = [torch.tensor(store.get("heldout_curves", str(seed)), dtype=torch.float64) for seed in seeds]

    rows = [(sampler, steps) for steps in settings["budgets"] for sampler in SAMPLERS]
    known: dict[Any, str] = {}  # plans of all seeds -> name of the sampler
    for sampler, steps in rows:
        schedulers = [sampler.build(subject.base, store.get("information_curve"), item) for item in learned]
        plans = [plan_of(scheduler, steps) for scheduler in schedulers]
        first = known.setdefault((steps, *(plan.key for plan in plans)), sampler.name)
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
        target = store.get("reference", subject.entropy, "mean")
        store.put(matched_entropy(at, subject.entropy, target), "matched_entropy", str(steps))


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


def matched_entropy(samples: dict[str, dict[str, Any]], metric: str, target: float) -> dict[str, Any]:
    """Temperature and perplexity of each sampler at one entropy; the rule is in the module's docstring.

    Args:
        samples (`dict`): `{sampler: {temperature: {metric: summary, "perplexity": summary}}}`.
        metric (`str`): Name of the entropy.
        target (`float`): Wanted entropy.

    Returns:
        `dict`: `{"entropy": ..., "rows": {sampler: {"temperature": ..., "perplexity": summary}}}`. Where all samplers reach no
        entropy it is the target itself, and there are rows for the samplers that reach it.
    """
    curves = {}  # sampler -> (temperature, entropy, log perplexities of the seeds), temperature rising
    for name, sweep in samples.items():
        points = [
            (float(t), item[metric]["mean"], [math.log(v) for v in item["perplexity"]["values"]])
            for t, item in sweep.items()
        ]
        curves[name] = sorted(points)
    lowest = max(min(entropy for _, entropy, _ in points) for points in curves.values())
    highest = min(max(entropy for _, entropy, _ in points) for points in curves.values())
    entropy = min(max(target, lowest), highest) if lowest <= highest else target
    rows = {name: at_entropy(points, entropy) for name, points in curves.items()}
    return {"entropy": entropy, "rows": {name: row for name, row in rows.items() if row is not None}}


def at_entropy(points: list[tuple[float, float, list[float]]], entropy: float) -> dict[str, Any] | None:
    """Temperature and perplexity at an entropy, of several temperatures the highest; `None` outside the points' range."""
    for low, high in reversed(list(pairwise(points))):
        if min(low[1], high[1]) <= entropy <= max(low[1], high[1]):
            share = (entropy - low[1]) / (high[1] - low[1]) if high[1] != low[1] else 1.0
            values = [math.exp(a + share * (b - a)) for a, b in zip(low[2], high[2], strict=True)]
            return {"temperature": low[0] + share * (high[0] - low[0]), "perplexity": summary(values)}
    return None
