"""What the parts `learned-text` and `learned-image` have in common: learned floats against other samplers, at matched entropy.

Each sampler gets one temperature, that at which the unigram entropy of its samples is that of real data; the learned scheduler
too, beside its own. The metrics of a seed's samples are the part's.

The learned scheduler opens positions in the spread order, on images in that or the random one, whichever is better. How many in
each call is chosen among three plans: equally many, doubling ones, and the optimum of the path-wise bound for this order
(`ordered_grid`). A contrast, the same in all calls, and the inverse temperatures of the first and last call, on a line between
them, are found by CMA-ES. All of it by `marginal.two_sample_statistic` on what `features.text_features` or `image_features`
see, none of the metrics. All is learned anew for each seed, on data that the model was trained on: some to search, others to
choose. `spread-grid` has the order and counts of the first seed without the floats; `spread-contrast` and `random-contrast`
have a contrast that was set by hand, and nothing learned. `shipped` is what a model brings: floats of `distill.py --method
search`.

Budgets are calls of the network. theta-trapezoidal makes two in a step; the entropy bound is tuned until its mean number of
calls is the budget. JYS is its token part, found by its own search on the bundled information curve. LSD+ is the repaired
objective.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from store import Store, summary
from torch import Tensor, nn

import discrete_schedulers as ds
from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.evaluation import unigram_entropy
from discrete_schedulers.schedulers.scheduling_utils import Order
from discrete_schedulers.training.features import Features
from discrete_schedulers.training.jump_steps import jump_your_steps, share_cross_entropy, token_gain
from discrete_schedulers.training.marginal import (
    Coefficients,
    Verdict,
    fit_logistic,
    keep_best,
    two_sample_statistic,
)
from discrete_schedulers.training.ordered_grid import (
    doubling_counts,
    equal_counts,
    exchangeable,
    optimal_ordered_counts,
    ordered_information,
    spread_ranks,
)
from discrete_schedulers.training.search import evolve, judged

BATCH = 32  # sequences in one call of the network
SEARCH_START = {"contrast": [0.2], "temperature": [0.0, 0.0]}  # logarithms of the first and last inverse temperature
SEARCH_BOUNDS = {"contrast": (0.0, 1.0), "temperature": (-0.5, 1.0)}
SEARCH_SPREAD = 0.1
ENTROPY_RANGE = (0.99, 1.01)  # of real data's
BUCKETS = 8  # of the statistic that is searched with
CENTRES = 5  # of a search that are judged again, with other data and numbers
TOP_P = 0.8  # of `spread-top-p`
CONTRAST = 0.2  # of `spread-contrast` and `random-contrast`

Build = Callable[[float], ds.DiscreteScheduler]  # a temperature to a scheduler


class Subject(Protocol):
    """A model, data and metrics.

    Args:
        network (`torch.nn.Module`): Its calls are counted.
        denoiser (`Denoiser`): The network for `train`, without a class.
        base (`dict`): What every scheduler needs to know.
        curve (`list[float]`): The bundled information curve.
        prior (`list[float]`): `features.token_prior`.
        shipped (`LearnedScheduler`, *optional*): What `distill.py` has learned for it, for all seeds the same.
        train (`torch.Tensor` of shape `(n, L)`): Data to learn on.
        classes (`torch.Tensor` of shape `(n,)`, *optional*): Of these, in a model that has classes; that of a sample is its
            number modulo theirs.
        orders (`tuple`): Of positions, that are tried.
        features (`Features`): What the statistic of the search sees.
        entropy (`float`): Of real data.
    """

    network: nn.Module
    denoiser: Denoiser
    base: dict[str, Any]
    curve: list[float]
    prior: list[float]
    shipped: ds.LearnedScheduler | None
    train: Tensor
    classes: Tensor | None
    orders: tuple[Order, ...]
    features: Features
    entropy: float

    def draw(self, scheduler: ds.DiscreteScheduler, steps: int, numbers: list[int]) -> Tensor:
        """One sample for each seed of `numbers`, int64 (n, L)."""

    def score(self, x: Tensor, seed: int) -> dict[str, float]:
        """Metrics of one seed's samples."""


def classifier_accuracy(a: Tensor, b: Tensor, seed: int, folds: int = 5, penalty: float = 1e-2) -> float:
    """Balanced accuracy, on held-out folds, of a logistic classifier of features (n, F) against (m, F), each scaled to
    deviation 1."""
    both = torch.cat([a, b])
    mean, deviation = both.mean(0), both.std(0).clamp(min=1e-9)
    sides = [(side - mean) / deviation for side in (a, b)]
    generator = torch.Generator().manual_seed(seed)
    place = [torch.randperm(len(side), generator=generator) % folds for side in sides]
    right = []
    for fold in range(folds):
        known = [side[at != fold] for side, at in zip(sides, place, strict=True)]
        w = fit_logistic(*known, penalty, torch.zeros(a.shape[1] + 1, dtype=torch.float64))
        z = [w[0] + side[at == fold] @ w[1:] for side, at in zip(sides, place, strict=True)]
        right.append((float((z[0] > 0).double().mean()) + float((z[1] < 0).double().mean())) / 2)
    return sum(right) / folds


def mean_entropy(x: Tensor) -> float:
    """Unigram entropy of a sequence, the mean, in nats."""
    return float(unigram_entropy(x).mean())


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Sequences in each call of the network meanwhile."""
    passed: list[int] = []
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: passed.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    yield passed
    hook.remove()


def calibrated(subject: Subject, build: Build, steps: int, samples: int) -> float:
    """The temperature at which the entropy of samples is that of real data: three steps of the secant method."""
    points: list[tuple[float, float]] = []  # (temperature, entropy above the target)
    temperature = 0.9
    for _ in range(4):
        found = mean_entropy(subject.draw(build(temperature), steps, list(range(samples)))) - subject.entropy
        points = sorted([*points, (temperature, found)], key=lambda point: abs(point[1]))
        if abs(found) < 2e-3:
            break
        slope = 1.0  # nats for a unit of temperature, about
        if len(points) > 1 and points[0][0] != points[1][0]:
            slope = max((points[0][1] - points[1][1]) / (points[0][0] - points[1][0]), 0.2)
        temperature = min(max(points[0][0] - points[0][1] / slope, 0.2), 3.0)
    return points[0][0]


# Learning


def learn(subject: Subject, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Coefficients for each budget, and what they cost in sequences through the network and seconds."""
    started, length = time.perf_counter(), subject.train.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sizes = [settings["curve_sequences"], settings["data_sequences"], settings["data_sequences"]]
    rows = torch.randperm(len(subject.train), generator=generator)[: sum(sizes)].split(sizes)
    learned: dict[str, Any] = {"orders": {}, "coefficients": {}, "losses": {}, "evaluations": {}, "seconds": {}}
    with counted(subject.network) as passed:
        optimal = {
            order: optimal_counts(subject, order, subject.train[rows[0]], max(settings["budgets"]), generator)
            for order in subject.orders
        }
    learned["evaluations"]["grid"], learned["seconds"]["grid"] = sum(passed), time.perf_counter() - started
    start = {name: torch.tensor(value, dtype=torch.float64) for name, value in SEARCH_START.items()}
    for number, steps in enumerate(settings["budgets"]):
        started = time.perf_counter()
        with counted(subject.network) as passed:
            # judges with other data and numbers: one to search with, one to choose with
            search, choose = (
                nearness(subject, steps, part, settings, 10 * seed + i) for i, part in enumerate(rows[1:])
            )
            plans: dict[str, tuple[Order, list[int]]] = {}
            for order in subject.orders:
                plans[f"{order}, equal"] = order, equal_counts(length, steps)
                plans[f"{order}, doubling"] = order, doubling_counts(length, steps)
                plans[f"{order}, optimal"] = order, optimal[order][steps - 1]
            losses = {name: judged(partial(search, *plan), ENTROPY_RANGE)(start) for name, plan in plans.items()}
            order, counts = plans[min(losses, key=losses.__getitem__)]
            loss = judged(partial(search, order, counts), ENTROPY_RANGE)
            tries = settings["next_search" if number else "first_search"]
            centres = list(evolve(loss, start, SEARCH_SPREAD, SEARCH_BOUNDS, tries, seed))
            kept = keep_best([start, *centres[-CENTRES:]], partial(choose, order, counts), ENTROPY_RANGE)
        learned["orders"][str(steps)] = order
        start = kept.coefficients  # where the next budget begins
        learned["coefficients"][str(steps)] = blocks(counts, start)
        learned["losses"][str(steps)] = losses
        learned["evaluations"][str(steps)], learned["seconds"][str(steps)] = sum(passed), time.perf_counter() - started
        print(
            f"seed {seed}, {steps} calls: {learned['coefficients'][str(steps)]}, {losses}, {kept.verdict}", flush=True
        )
    return learned


def optimal_counts(
    subject: Subject, order: Order, data: Tensor, most: int, generator: torch.Generator
) -> list[list[int]]:
    """The counts of the smallest bound along an order, for every number of calls up to `most`."""
    if order == "spread":
        ranks = spread_ranks((len(data), data.shape[1]), generator, grid_shape(subject))
    else:
        ranks = torch.rand(data.shape, generator=generator).argsort(1)
    table = ordered_information(subject.denoiser, data, ranks, subject.base["mask_token_id"], BATCH)
    return optimal_ordered_counts(exchangeable(table) if order == "random" else table, most)


def nearness(
    subject: Subject, steps: int, rows: Tensor, settings: dict[str, Any], seed: int
) -> Callable[[Order, list[int], Coefficients], Verdict]:
    """How near the samples of an order, counts and floats are to these rows of the data; always of the same random numbers."""
    drawn = torch.Generator().manual_seed(seed)
    numbers = torch.randint(2**40, (settings["search_samples"],), generator=drawn)
    data, theirs, own = subject.train[rows], None, None
    if subject.classes is not None:
        theirs, count = subject.classes[rows], int(subject.classes.max()) + 1
        own = torch.arange(len(numbers)) % count
        numbers = numbers // count * count + own
    target, entropy = subject.features(data, theirs), mean_entropy(data)

    def judge(order: Order, counts: list[int], floats: Coefficients) -> Verdict:
        scheduler = learned_scheduler(subject, {str(steps): blocks(counts, floats)}, 1.0, order=order)
        x = subject.draw(scheduler, steps, numbers.tolist())
        return Verdict(two_sample_statistic(subject.features(x, own), target), mean_entropy(x) / entropy)

    return judge


def blocks(counts: list[int], floats: Coefficients) -> dict[str, list[float]]:
    """The blocks of [`LearnedScheduler`]."""
    first, last = floats["temperature"].tolist()
    line = torch.linspace(first, last, len(counts), dtype=torch.float64)
    return {
        "counts": [float(count) for count in counts],
        "contrast": floats["contrast"].tolist() * len(counts),
        "inverse_temperature": line.exp().tolist(),
    }


def grid_shape(subject: Subject) -> tuple[int, int] | None:
    shape = subject.base.get("grid_shape")
    return None if shape is None else tuple(shape)


def learned_scheduler(
    subject: Subject, coefficients: dict[str, Any], temperature: float, grid: str = "learned", order: Order = "spread"
) -> ds.LearnedScheduler:
    """A scheduler with these floats."""
    settings: dict[str, Any] = {"grid": grid, "order": order, "temperature": temperature}
    return ds.LearnedScheduler(**subject.base, coefficients=coefficients, token_prior=subject.prior, **settings)


def tempered(scheduler: ds.LearnedScheduler, temperature: float) -> ds.LearnedScheduler:
    """The scheduler at another temperature, beside those it has learned."""
    return ds.LearnedScheduler.from_config(scheduler.config, temperature=temperature)


# The others


def samplers(subject: Subject, lsd_plus: dict[str, Any], steps: int) -> dict[str, tuple[Build, int]]:
    """How to build each, and how many steps are `steps` calls."""
    base, curve = subject.base, subject.curve
    without_shape = {name: value for name, value in base.items() if name != "grid_shape"}

    def plain(**arguments: Any) -> Build:
        return lambda t: ds.AncestralScheduler(**base, temperature=t, information_curve=curve, **arguments)

    def cross_entropy(share: float) -> float:
        return float(share_cross_entropy(torch.tensor(curve), torch.tensor([share])))

    times = {str(steps): {"times": jump_your_steps(partial(token_gain, cross_entropy), steps)}}
    learned: dict[str, Any] = {"grid": "learned"}
    contrast = {str(steps): {"contrast": [CONTRAST] * steps}}

    def contrasted(order: Order) -> Build:
        return lambda t: learned_scheduler(subject, contrast, t, grid="uniform", order=order)

    return {
        "uniform": (plain(), steps),
        "cosine": (plain(grid="cosine"), steps),
        "optimal": (plain(grid="optimal"), steps),
        "jys": (lambda t: ds.LearnedScheduler(**base, **learned, coefficients=times, temperature=t), steps),
        "lsd-plus": (
            lambda t: ds.LSDScheduler(**without_shape, **learned, coefficients=lsd_plus, temperature=t),
            steps,
        ),
        "trapezoidal": (lambda t: ds.ThetaTrapezoidalScheduler(**without_shape, temperature=t), steps // 2),
        "confidence": (
            lambda t: ds.ConfidenceScheduler(**without_shape, score="entropy", temperature=t),
            steps,
        ),
        "spread": (plain(order="spread"), steps),
        "spread-top-p": (plain(order="spread", top_p=TOP_P), steps),
        "spread-contrast": (contrasted("spread"), steps),
        "random-contrast": (contrasted("random"), steps),
    }


def entropy_bound(subject: Subject, calls: int) -> tuple[Build, float]:
    """The entropy bound whose mean number of calls for a sample is `calls`: bisection on the logarithm of the bound."""
    base = {name: value for name, value in subject.base.items() if name != "grid_shape"}
    numbers, length = list(range(BATCH)), subject.train.shape[1]
    low, high = math.log(1e-2), math.log(1e3)
    for _ in range(9):
        bound = math.exp((low + high) / 2)
        with counted(subject.network) as passed:
            subject.draw(ds.EntropyBoundScheduler(**base, entropy_bound=bound), length, numbers)
        low, high = ((low + high) / 2, high) if sum(passed) / len(numbers) > calls else (low, (low + high) / 2)
    return (lambda t: ds.EntropyBoundScheduler(**base, entropy_bound=bound, temperature=t)), bound


def run(subject: Subject, store: Store, lsd_plus: list[dict[str, Any]]) -> None:
    """Fill the store: coefficients for each seed, and a row for each sampler and budget.

    Args:
        subject (`Subject`): The model.
        store (`Store`): With the settings, see the parts.
        lsd_plus (`list[dict]`): Coefficients of LSD+ for each seed.
    """
    settings, part = store.get("settings"), store.get("part")
    seeds, length = settings["seeds"], subject.train.shape[1]

    def measure(name: str, steps: int, builds: list[tuple[Build, int]], also: dict[str, Any] | None = None) -> None:
        """A row: one temperature for each different sampler, metrics for each seed."""
        if store.get("rows", name, str(steps)) is not None:
            return
        print(f"{part}: {name}, {steps} calls", flush=True)
        found: dict[str, list[float]] = {}
        for seed, (build, number) in zip(seeds, builds, strict=True):
            if found and build is builds[0][0]:
                temperature = found["temperature"][0]
            else:
                temperature = calibrated(subject, build, number, settings["calibration_samples"])
            numbers = [10**9 * (seed + 1) + i for i in range(settings["samples"])]
            with counted(subject.network) as passed:
                x = subject.draw(build(temperature), number, numbers)
            metrics = {"temperature": temperature, "calls": sum(passed) / len(x), "entropy": mean_entropy(x)}
            for key, value in (metrics | subject.score(x, seed)).items():
                found.setdefault(key, []).append(value)
        store.put({key: summary(values) for key, values in found.items()} | (also or {}), "rows", name, str(steps))

    for seed in seeds:
        if store.get("learned", str(seed)) is None:
            store.put(learn(subject, settings, seed), "learned", str(seed))
    found = [store.get("learned", str(seed)) for seed in seeds]
    for steps in settings["budgets"]:
        orders = [one["orders"][str(steps)] for one in found]
        builds = [
            partial(learned_scheduler, subject, one["coefficients"], order=order)
            for one, order in zip(found, orders, strict=True)
        ]
        measure("learned", steps, [(build, steps) for build in builds])
        if subject.shipped is not None:
            measure("shipped", steps, [(partial(tempered, subject.shipped), steps)] * len(seeds))
        only_grid = {str(steps): {"counts": found[0]["coefficients"][str(steps)]["counts"]}}
        build = partial(learned_scheduler, subject, only_grid, order=orders[0])
        measure("spread-grid", steps, [(build, steps)] * len(seeds))
        table = [samplers(subject, one, steps) for one in lsd_plus]
        for name in table[0]:
            measure(name, steps, [(table[i] if name == "lsd-plus" else table[0])[name] for i in range(len(seeds))])
        if store.get("rows", "entropy-bound", str(steps)) is None:
            build, bound = entropy_bound(subject, steps)
            measure("entropy-bound", steps, [(build, length)] * len(seeds), {"bound": bound})
    for steps in settings["reference_budgets"]:
        measure("uniform", steps, [samplers(subject, {}, steps)["uniform"]] * len(seeds))
    store.finish()


# The table

LABELS = {
    "learned": "**learned: order, counts, contrast, temperatures**",
    "shipped": "the same by `distill.py --method search`, the bundled file",
    "spread-grid": "its order and counts only",
    "spread-contrast": f"spread order, equal counts, contrast {CONTRAST}",
    "spread-top-p": f"spread order, equal counts, top-p {TOP_P}",
    "spread": "spread order, equal counts",
    "random-contrast": f"random order, uniform grid, contrast {CONTRAST}",
    "uniform": "random order, uniform grid",
    "cosine": "random order, cosine grid",
    "optimal": "random order, optimal grid",
    "jys": "random order, JYS",
    "lsd-plus": "LSD+ (repaired)",
    "trapezoidal": "theta-trapezoidal",
    "confidence": "confidence order (entropy)",
    "entropy-bound": "entropy bound, tuned to the calls",
}


def distance(row: dict[str, Any], other: dict[str, Any], metric: str) -> float:
    """By how much `other` is worse (larger), in standard errors of the difference."""
    a, b = row[metric], other[metric]
    return (b["mean"] - a["mean"]) / math.hypot(a["standard_error"], b["standard_error"])


def table(content: dict[str, Any], metrics: dict[str, tuple[str, int]], cell: Callable[..., str]) -> str:
    """One table for each metric; of the first also how far the others are from the learned scheduler.

    Args:
        content (`dict`): Of the part's file.
        metrics (`dict`): Name of a metric to what it is and its decimals.
        cell (`Callable`): Mean and standard error as text.
    """
    settings, rows = content["settings"], content["rows"]
    budgets, references = ([str(n) for n in settings[key]] for key in ("budgets", "reference_budgets"))
    parts = []
    for number, (metric, (title, digits)) in enumerate(metrics.items()):
        lines = [["calls", *budgets], ["---", *["---:"] * len(budgets)]]
        for name, label in LABELS.items():
            if name not in rows:
                continue
            cells = []
            for steps in budgets:
                text, mine = cell(rows[name][steps][metric], digits), rows["learned"][steps]
                far = number == 0 and name != "learned" and len(settings["seeds"]) > 1
                cells.append(text + (f" ({distance(mine, rows[name][steps], metric):+.1f})" if far else ""))
            lines.append([label, *cells])
        for steps in references:
            text = cell(rows["uniform"][steps][metric], digits)
            lines.append([f"random order, {steps} calls", *[text] * len(budgets)])
        parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    learned = list(content["learned"].values())
    evaluations, seconds = (
        sum(sum(one[key].values()) for one in learned) / len(learned) for key in ("evaluations", "seconds")
    )
    parts.append(
        f"{settings['samples']} samples a seed, {len(settings['seeds'])} seeds, mean ± standard error; in brackets how many "
        "standard errors of the difference a sampler is above the learned one. Learning all budgets took "
        f"{evaluations:,.0f} sequences through the network and {seconds / 60:.0f} minutes on one core."
    )
    return "\n\n".join(parts)
