"""`marginal` and `search` of `distill.py`: floats by the law of the last samples. See `temperatures.py` and `search.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import tqdm
from torch import Tensor

from discrete_schedulers import AncestralScheduler, DiscreteScheduler, LearnedScheduler
from discrete_schedulers.evaluation import unigram_entropy
from discrete_schedulers.processes import Process
from discrete_schedulers.schedulers.scheduling_utils import Order
from discrete_schedulers.training.data import batches, generators
from discrete_schedulers.training.features import Features, token_prior
from discrete_schedulers.training.frozen import BUCKETS
from discrete_schedulers.training.jump_steps import beta_shares
from discrete_schedulers.training.marginal import (
    Coefficients,
    LogisticRatio,
    Verdict,
    divergence_weights,
    keep_best,
    two_sample_statistic,
)
from discrete_schedulers.training.method_grids import ordered_counts
from discrete_schedulers.training.ordered_grid import doubling_counts, equal_counts
from discrete_schedulers.training.run import BETA_RANGE, CHOSEN, PATHS, SEARCHED, Run, sample
from discrete_schedulers.training.search import evolve, judged
from discrete_schedulers.training.temperatures import Rolled, descend_temperatures, roll

CANDIDATES = 10  # how many iterates, or centres of the search, are judged, evenly, beside the start
SEARCH_SPREAD = 0.3
CURVE_SEQUENCES = 32  # on which the best counts for an order are found
STANDS_STILL = 1e3  # the statistic of a grid with two equal times: worse than any other


def marginal(run: Run) -> DiscreteScheduler:
    """An inverse temperature for each step by score-function gradients, see `temperatures.py`."""
    student = LearnedScheduler.from_config(run.base, order=run.args.order, learned_for=run.learned_for)
    prior = prior_of(run)

    def learn(steps: int) -> dict[str, list[float]]:
        return {"inverse_temperature": learn_temperatures(run, student, prior, steps)}

    return run.each_budget(learn, run.learned(order=run.args.order))


def prior_of(run: Run) -> list[float]:
    """The model's `token_prior`, asked once in a run: by each process, which counts as one call."""
    if "token_prior" not in run.state:
        prior = token_prior(run.denoiser, run.length, run.accelerator.device)
        if not run.accelerator.is_main_process:
            run.passed.clear()
        run.add_evaluations()  # where processes meet a run may end: what goes together changes behind it
        run.state["token_prior"] = prior
    return run.state["token_prior"]


def learn_temperatures(run: Run, scheduler: LearnedScheduler, prior: list[float], steps: int) -> list[float]:
    """Inverse temperatures of a step budget: score-function descent on half of the data. Of its iterates, and temperature 1,
    the one is kept whose samples are nearest to the other half by `two_sample_statistic`."""
    args, accelerator = run.args, run.accelerator
    fit, heldout = run.data[::2], run.data[1::2]
    judges = shared_features(run, prior)
    ratio = LogisticRatio(fit, shared_features(run, prior, args.buckets))
    share = run.share(args.num_samples)

    def rolled(log_beta: Tensor, iteration: int) -> Rolled:
        """Every process draws its share; all get all."""
        parts = []
        for part in batches(len(share), args.train_batch_size):
            rows = [(iteration + 1) * args.num_samples + share[i] for i in part]
            drawn = [one for row in rows for one in generators(args.seed, PATHS, range(row, row + 1))]
            parts.append(roll(run.denoiser, scheduler, log_beta, (len(rows), run.length), drawn, accelerator.device))
        x_0, slopes = (torch.cat(found) for found in zip(*parts, strict=True))
        return Rolled(
            run.gather(x_0, args.num_samples).to(accelerator.device),
            run.gather(slopes, args.num_samples).to(accelerator.device),
        )

    def weights(x: Tensor) -> Tensor:
        return divergence_weights(ratio({}, x), "reverse_kl")

    target, target_entropy = judges(heldout), unigram_entropy(heldout).mean().item()

    def verdict(candidate: Coefficients) -> Verdict:
        x = rolled(candidate["log_beta"], -1).x_0  # the same random numbers for all
        return Verdict(two_sample_statistic(judges(x), target), unigram_entropy(x).mean().item() / target_entropy)

    descent = descend_temperatures(rolled, weights, steps, args.num_epochs, args.learning_rate)
    every = -(-args.num_epochs // CANDIDATES)
    show = tqdm(descent, desc=f"{steps} steps", total=args.num_epochs, disable=not accelerator.is_main_process)
    candidates = [torch.zeros(steps, dtype=torch.float64)]
    candidates += [log_beta for n, log_beta in enumerate(show, start=1) if n % every == 0 or n == args.num_epochs]
    return kept_floats(run, steps, ({"log_beta": one} for one in candidates), verdict)["log_beta"].exp().tolist()


def kept_floats(
    run: Run, steps: int, candidates: Iterable[Coefficients], judge: Callable[[Coefficients], Verdict]
) -> Coefficients:
    """Those of `keep_best`; says so where no candidate has the entropy that samples should have."""
    kept = keep_best(candidates, judge)
    if not kept.admissible:
        run.accelerator.print(
            f"{steps} steps: no candidate's samples have 0.99 of the entropy of the data; the nearest, "
            f"{kept.verdict.entropy_ratio:.3f}, is kept: do not ship it without a look at its samples"
        )
    return kept.coefficients


def shared_features(run: Run, prior: list[float], buckets: int = BUCKETS) -> Features:
    """What a statistic sees, of which every process works out its share."""
    own = run.frozen.features(prior, run.args.train_batch_size, buckets)

    def features(x: Tensor, classes: Tensor | None = None) -> Tensor:
        share = run.share(len(x))
        rows = slice(share.start, None, share.step)
        return run.gather(own(x[rows], None if classes is None else classes[rows]), len(x)).to(x.device)

    return features


def search(run: Run) -> DiscreteScheduler:
    """An order and a plan of counts, and any of `FLOATS` by CMA-ES, on the law of the last samples: on half of the data, and of
    the centres of the search, and the start, the one is kept that the other half says is nearest. See `search.py`,
    `ordered_grid.py`."""
    args, prior = run.args, prior_of(run)
    settings = search_settings(run, prior)
    process = AncestralScheduler.from_config(run.base).noise_process
    judges = [sample_judge(run, prior, purpose, half) for half, purpose in enumerate((SEARCHED, CHOSEN))]
    count_once(run, "judged")

    def verdicts(steps: int, key: str, which: int, settings: dict[str, Any]) -> Callable[[Coefficients], Verdict]:
        """What the judge of half of the data says of floats in these steps, remembered under a key."""
        measured = run.numbers(f"{key} {steps}")

        def verdict(candidate: Coefficients) -> Verdict:
            blocks = blocks_of(process, candidate, steps)
            if any(s >= t for t, s in itertools.pairwise(blocks.get("times", []))):
                return Verdict(STANDS_STILL, 0.0)
            scheduler = run.learned(**settings)({str(steps): blocks})
            return Verdict(*measured(lambda: list(judges[which](scheduler, steps))))

        return verdict

    def start(steps: int) -> Coefficients:
        return {
            name: torch.full((FLOATS[name].count(steps),), FLOATS[name].start, dtype=torch.float64)
            for name in args.blocks
        }

    if args.plan == "best":

        def loss_of_plan(order: Order, steps: int, number: int, counts: list[int]) -> float:
            verdict = verdicts(steps, f"plan {order} {number}", 0, settings | {"order": order})
            return judged(verdict)(start(steps) | {"counts": torch.tensor(counts)})

        settings["order"] = best_plans(run, loss_of_plan)

    def learn(steps: int) -> dict[str, list[float]]:
        plan: Coefficients = {}
        if args.plan == "best":
            plan = {"counts": torch.tensor(run.state["plans"]["counts"][str(steps)])}
        searched, chosen = (verdicts(steps, key, which, settings) for which, key in enumerate(("search", "choice")))
        bounds = {name: FLOATS[name].bounds for name in args.blocks}
        tried = evolve(
            judged(lambda candidate: searched(candidate | plan)),
            start(steps),
            SEARCH_SPREAD,
            bounds,
            args.num_epochs,
            args.seed,
        )
        centres = list(tqdm(tried, desc=f"{steps} steps, generations", disable=not run.accelerator.is_main_process))
        every = -(-len(centres) // CANDIDATES)
        kept = [start(steps), *centres[every - 1 :: every]]
        if len(centres) % every:
            kept.append(centres[-1])
        return blocks_of(process, kept_floats(run, steps, [one | plan for one in kept], chosen), steps)

    return run.each_budget(learn, run.learned(**settings))


def search_settings(run: Run, prior: list[float]) -> dict[str, Any]:
    """The arguments of the scheduler that is searched for, beside its floats."""
    args = run.args
    grid = "learned" if "grid" in args.blocks or args.plan == "best" else "uniform"
    settings: dict[str, Any] = {"grid": grid}
    if run.base["process"] == "absorbing":
        settings |= {"unmasking": "counts", "order": "spread" if args.order == "best" else args.order}
    if "contrast" in args.blocks:
        settings["token_prior"] = prior
    return settings


def best_plans(run: Run, loss: Callable[[Order, int, int, list[int]], float]) -> Order:
    """The order whose samples are nearest to the data in the mean of the budgets, each with the best of three plans: even,
    doubling, and those of the smallest bound. The counts are left in the state.

    Args:
        run (`Run`): The run.
        loss (`Callable`): Order, steps, number of the plan and its counts to how far samples are.
    """
    args = run.args
    if "plans" not in run.state:
        orders: list[Order] = ["spread", "random"] if args.order == "best" else [args.order]
        found: dict[Order, tuple[float, dict[str, list[int]]]] = {}
        for order in orders:
            optimal = ordered_counts(run, run.data[::2][:CURVE_SEQUENCES], order)
            count_once(run, f"counts {order}")
            total, counts = 0.0, {}
            for steps in args.num_inference_steps:
                plans = [*(make(run.length, steps) for make in PLANS), optimal[steps]]
                losses = [loss(order, steps, number, plan) for number, plan in enumerate(plans)]
                total += min(losses)
                counts[str(steps)] = plans[losses.index(min(losses))]
            found[order] = total, counts
        best = min(found, key=lambda order: found[order][0])
        run.state["plans"] = {"order": best, "counts": found[best][1]}
        run.accelerator.print(f"order: {best}, " + ", ".join(f"{k} {total:.3f}" for k, (total, _) in found.items()))
        run.save(None)
    return run.state["plans"]["order"]


def count_once(run: Run, key: str) -> None:
    """Count the calls of the network since the last time as evaluations, but for those that the same run, before it was killed,
    has made and counted."""
    counted = run.state.setdefault("counted", [])
    if key in counted:
        run.passed.clear()
    else:
        run.add_evaluations()
        counted.append(key)


def sample_judge(run: Run, prior: list[float], purpose: int, half: int) -> Callable[[DiscreteScheduler, int], Verdict]:
    """How near a scheduler's samples in so many steps, always of the same random numbers, are to half of the data: its even
    rows (0) or its odd ones (1). Each process draws its share."""
    args, features = run.args, shared_features(run, prior)
    data = run.data[half::2]
    classes = None if run.classes is None else run.classes[half::2]
    own_classes = None if classes is None else run.frozen.classes_of(range(args.num_samples))
    target, target_entropy = features(data, classes), unigram_entropy(data).mean().item()

    def judge(scheduler: DiscreteScheduler, steps: int) -> Verdict:
        run.pipe.scheduler = scheduler
        own = sample(run.frozen, purpose, run.share(args.num_samples), steps, args)
        x = run.gather(own, args.num_samples).to(data.device)
        statistic = two_sample_statistic(features(x, own_classes), target)
        return Verdict(statistic, unigram_entropy(x).mean().item() / target_entropy)

    return judge


class Floats(NamedTuple):
    """Floats that `search` can be over.

    Args:
        per_step (`bool`): Whether there is one for each step; else there are `number` for a budget.
        number (`int`): How many.
        start (`float`): Where the search begins; they change nothing there, but for contrast and top-p.
        bounds (`tuple[float, float]`): Where they may lie.
        uniform (`bool`): Whether they exist for uniform noise.
    """

    per_step: bool
    number: int
    start: float
    bounds: tuple[float, float]
    uniform: bool = False

    def count(self, steps: int) -> int:
        return steps if self.per_step else self.number


FLOATS = {
    "contrast": Floats(False, 1, 0.2, (0.0, 1.0)),  # the same in every step
    "inverse_temperature": Floats(True, 1, 0.0, (math.log(0.2), math.log(5.0)), True),  # their logarithms
    "temperature_line": Floats(
        False, 2, 0.0, (-0.5, 1.0), True
    ),  # those of the first and of the last step, on a line between them
    "top_p": Floats(
        False, 1, math.log(0.1), (math.log(1e-3), math.log(0.5)), True
    ),  # logarithm of the mass that is cut off
    "grid": Floats(False, 2, math.log(0.5), BETA_RANGE, True),  # logarithms of a and b of the Beta schedule
    "gate": Floats(False, 2, 0.0, (-4.0, 4.0)),  # a and b, the same in every step
    "remask": Floats(False, 1, 0.0, (0.0, 1.0)),  # the same in every step
}


PLANS = (equal_counts, doubling_counts)  # how many positions open in each step


def number_of_floats(blocks: Sequence[str], steps: int) -> int:
    """How many floats a search has for a budget."""
    return sum(FLOATS[name].count(steps) for name in blocks)


def blocks_of(process: Process, floats: Coefficients, steps: int) -> dict[str, list[float]]:
    """What `search` is over, and its counts, as blocks of [`LearnedScheduler`]."""
    blocks: dict[str, list[float]] = {}
    if "inverse_temperature" in floats:
        blocks["inverse_temperature"] = floats["inverse_temperature"].exp().tolist()
    if "temperature_line" in floats:
        first, last = floats["temperature_line"].tolist()
        blocks["inverse_temperature"] = torch.linspace(first, last, steps, dtype=torch.float64).exp().tolist()
    if "contrast" in floats:
        blocks["contrast"] = floats["contrast"].tolist() * steps
    if "top_p" in floats:
        blocks["top_p"] = (1 - floats["top_p"].exp()).tolist() * steps
    if "counts" in floats:
        blocks["counts"] = floats["counts"].double().tolist()
    if "grid" in floats:
        a, b = floats["grid"].exp().tolist()
        blocks["times"] = process.time_of_noise(torch.tensor(beta_shares(a, b, steps), dtype=torch.float64)).tolist()
    if "gate" in floats:
        a, b = floats["gate"].tolist()
        blocks |= {"gate_a": [a] * steps, "gate_b": [b] * steps}
    if "remask" in floats:
        blocks["remask"] = floats["remask"].tolist() * steps
    return blocks
