"""`optimal_grid`, `jys` and `beta` of `distill.py`: time grids by bounds on the path. See `information.py`, `jump_steps.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from discrete_schedulers import AncestralScheduler, DiscreteScheduler, InformationCurve
from discrete_schedulers.information import curve_of, curve_plan, level_nats, schedule_gain
from discrete_schedulers.schedulers.scheduling_utils import Order
from discrete_schedulers.training.jump_steps import (
    beta_shares,
    jump_your_steps,
    klub,
    optimal_shares,
    share_cross_entropy,
)
from discrete_schedulers.training.objectives import draw_noise
from discrete_schedulers.training.ordered_grid import (
    exchangeable,
    optimal_ordered_counts,
    ordered_information,
    spread_ranks,
)
from discrete_schedulers.training.run import BETA_RANGE, Run, absorbing

RESOLUTION = 1024  # points of a grid that JYS, the exact optimum and the Beta schedule are sought on
LEVELS = 64  # of the information curve that are measured


def optimal_grid(run: Run) -> DiscreteScheduler:
    """The grid of the smallest bound for any number of steps, from the curve: see `information.optimal_counts`. In the spread
    order that of each budget, see `ordered_grid.py`."""
    if run.args.order == "spread":
        return spread_grid(run)
    curve = model_curve(run)
    gain = run.state["schedule_gain"]
    run.accelerator.print(f"R = {gain:.3f}: the most a time grid can win is a factor of {1 / gain:.2f} in excess KL")
    settings = {"grid": "optimal", "information_curve": curve.to_config(), "learned_for": run.learned_for}
    return AncestralScheduler.from_config(run.base, **settings)


def spread_grid(run: Run) -> DiscreteScheduler:
    """The counts of the smallest bound in the spread order, for each budget."""
    args, found = run.args, run.state.setdefault("counts", {})
    if not found:
        counts = ordered_counts(run, run.data[: args.num_samples], "spread")
        run.add_evaluations()
        found |= {str(steps): [float(count) for count in counts[steps]] for steps in args.num_inference_steps}
        run.save(None)
    return run.each_budget(
        lambda steps: {"counts": found[str(steps)]}, run.learned(grid="learned", order="spread", unmasking="counts")
    )


def ordered_counts(run: Run, data: Tensor, order: Order) -> dict[int, list[int]]:
    """The counts of the smallest bound in an order of positions, for each budget, on data (n, L), n of which every process
    measures its share."""
    generator = torch.Generator().manual_seed(run.args.seed)
    if order == "spread":
        ranks = spread_ranks((len(data), run.length), generator, run.base.get("grid_shape"))
    else:
        ranks = torch.rand(len(data), run.length, generator=generator).argsort(1)
    share, most = run.share(len(data)), max(run.args.num_inference_steps)
    asked = data[share.start :: share.step], ranks[share.start :: share.step], run.mask_token_id
    own = ordered_information(run.denoiser, *asked, run.args.train_batch_size, measured_starts(run.length, most))
    table = run.reduce(len(share) * own) / len(data)
    counts = optimal_ordered_counts(exchangeable(table) if order == "random" else table, most)
    return {steps: counts[steps - 1] for steps in run.args.num_inference_steps}


def measured_starts(length: int, max_steps: int) -> list[int]:
    """Numbers of known tokens at which a call of a plan along an order may begin: all of few positions, else the first 16, and
    `LEVELS` or four times the calls, whichever are more, evenly spread."""
    count = max(LEVELS, 4 * max_steps)
    if length <= count:
        return list(range(length))
    return sorted({*range(16), *(length * k // count for k in range(count))})


def model_curve(run: Run) -> InformationCurve:
    """The information curve of the model on the data, measured once; the state has it and its `schedule_gain`."""
    state, length = run.state, run.length
    if "curve" not in state:
        curve = shared_curve(run, None)
        # R on few levels: the stairs of a fit on all of them would make it too small
        coarse = shared_curve(run, min(length, 16) if length > 1 else None)
        state |= {"curve": curve.to_config(), "schedule_gain": schedule_gain(coarse)}
        state["evaluations"] += curve.num_evaluations + coarse.num_evaluations
        run.passed.clear()
        run.save(None)
    return InformationCurve.from_config(state["curve"])


def measured_levels(length: int) -> list[int]:
    """Numbers of known tokens at which the curve of L positions is measured: all where there are few, else `LEVELS` or a little
    fewer, dense where little is known and the curve is steep. On power laws with L = 1024, straight lines between them cost a
    grid less than 3e-4 nats per token, evenly spread ones up to 7e-3."""
    if length <= LEVELS:
        return list(range(length))
    return sorted({round((length - 1) * (k / (LEVELS - 1)) ** 2) for k in range(LEVELS)})


def shared_curve(run: Run, num_levels: int | None) -> InformationCurve:
    """`information_curve` of the data, of which every process measures its share; `None`: at `measured_levels`."""
    data, generator = run.data, torch.Generator().manual_seed(run.args.seed)
    batch_size, share = run.args.train_batch_size, run.share(len(run.data))
    levels, rank = curve_plan(data, run.mask_token_id, num_levels, generator, batch_size)
    if num_levels is None:
        levels = measured_levels(run.length)
    rows = slice(share.start, None, share.step)
    own = level_nats(run.denoiser, data[rows], rank[rows], levels, run.mask_token_id, batch_size)
    return curve_of(run.gather(own.to(data.device), len(data)), levels, run.length)


def jys(run: Run) -> DiscreteScheduler:
    """The grid of Jump Your Steps; with `--unbiased` the exact optimum of the part of its bound that ancestral steps pay."""
    args, process = run.args, absorbing(AncestralScheduler.from_config(run.base))
    settings = {"grid": "learned", "unmasking": args.unmasking, "order": args.order}
    if args.unbiased:
        curve = model_curve(run)
        shares = torch.linspace(1, 0, RESOLUTION + 1, dtype=torch.float64)
        price = share_cross_entropy(curve.values, shares)

        def solve(steps: int) -> dict[str, list[float]]:
            best = torch.tensor(optimal_shares(shares, price, steps), dtype=torch.float64)
            return {"times": process.time_of_noise(best).tolist()}

        return run.each_budget(solve, run.learned(**settings))

    data = run.data[: args.num_samples]
    share = run.share(len(data))
    x_0 = data[share.start :: share.step]
    thresholds = draw_noise(share, run.length, args.seed, data.device).thresholds
    masks = torch.full_like(x_0, run.mask_token_id)

    def learn(steps: int) -> dict[str, list[float]]:
        measured = run.numbers(f"jys {steps}")

        def gain(t1: float, t2: float, t3: float) -> float:
            def work() -> list[float]:
                total = torch.zeros((), dtype=torch.float64)
                for rows in torch.arange(len(x_0)).split(args.train_batch_size):
                    parts = (x_0[rows], thresholds[rows], masks[rows])
                    total += len(rows) * klub(run.denoiser, process, *parts, (t1, t2, t3))
                return [float(run.reduce(total)) / len(data)]

            return measured(work)[0]

        return {"times": jump_your_steps(gain, steps, resolution=RESOLUTION)}

    return run.each_budget(learn, run.learned(**settings))


def beta(run: Run) -> DiscreteScheduler:
    """The Beta schedule with the smallest `share_bound` on the model's curve; the config has a and b beside its times."""
    args, process = run.args, absorbing(AncestralScheduler.from_config(run.base))
    curve = model_curve(run)
    run.learned_for["beta"] = run.state.setdefault("beta", {})

    def learn(steps: int) -> dict[str, list[float]]:
        def schedule(log_a: float, log_b: float) -> Tensor:
            return torch.tensor(beta_shares(math.exp(log_a), math.exp(log_b), steps), dtype=torch.float64)

        def bound(log_a: float, log_b: float) -> float:
            shares = schedule(log_a, log_b)
            if not (shares.diff() < 0).all():
                return math.inf
            return -float(shares.diff() @ share_cross_entropy(curve.values, shares[:-1]))

        best = smallest_on_grids(bound, BETA_RANGE)
        run.state["beta"][str(steps)] = [math.exp(value) for value in best]
        return {"times": process.time_of_noise(schedule(*best)).tolist()}

    return run.each_budget(learn, run.learned(grid="learned", unmasking=args.unmasking, order=args.order))


def smallest_on_grids(
    loss: Callable[[float, float], float], bounds: tuple[float, float], points: int = 17, rounds: int = 6
) -> tuple[float, float]:
    """Where a function of two numbers is smallest: on a grid, then on ever finer ones around the best point."""
    low, high = bounds
    best, width = ((low + high) / 2, (low + high) / 2), (high - low) / 2
    for _ in range(rounds):
        rows, columns = (
            [min(max(centre + width * (2 * i / (points - 1) - 1), low), high) for i in range(points)] for centre in best
        )
        best = min(itertools.product(rows, columns), key=lambda pair: loss(*pair))
        width /= 4
    return best
