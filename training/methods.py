r"""The methods of `distill.py`, one function each: from a frozen model to a scheduler with learned numbers.

A method gets a `Run` and returns a scheduler. What costs calls of the network is shared out over the processes by the index
of the sample, and every random number is a function of (seed, purpose, sample index): so all processes learn the same numbers,
and as many as there are do not matter. `run.each_budget` learns the step budgets one after another, with a checkpoint after
each; `run.numbers` keeps what a search has measured, so that a run which was killed does not measure it again.

Each stands in a file `method_*.py` and calls the modules that have the mathematics and say where it comes from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from discrete_schedulers import DiscreteScheduler
from discrete_schedulers.training.frozen import JUDGED_FEATURES
from discrete_schedulers.training.method_filter import learn2pd
from discrete_schedulers.training.method_grids import beta, jys, optimal_grid
from discrete_schedulers.training.method_lsd import lsd
from discrete_schedulers.training.method_marginal import marginal, search
from discrete_schedulers.training.method_order import order
from discrete_schedulers.training.run import Run

METHODS: dict[str, Callable[[Run], DiscreteScheduler]] = {
    "lsd": lsd,
    "lsd_plus": lsd,
    "optimal_grid": optimal_grid,
    "jys": jys,
    "beta": beta,
    "marginal": marginal,
    "search": search,
    "order": order,
    "learn2pd": learn2pd,
}
FITS_ON_DATA = ("optimal_grid", "jys", "beta", "marginal", "search", "order", "learn2pd")


def check_length(args: argparse.Namespace, length: int) -> None:
    """Raises `ValueError` if the method is not for sequences of this length."""
    opens_one = args.method == "order" or (args.method == "search" and args.plan == "best")
    if (opens_one or (args.method == "optimal_grid" and args.order == "spread")) and max(
        args.num_inference_steps
    ) > length:
        raise ValueError(
            f"`--num_inference_steps` has {max(args.num_inference_steps)}; `--method {args.method}` opens at least one of the "
            f"{length} positions in each step here"
        )
    if args.method == "learn2pd" and length % (args.block_length or length):
        raise ValueError(f"`--block_length` is {args.block_length}, which does not divide the {length} positions")


def check_data(args: argparse.Namespace, count: int, processes: int) -> None:
    """Raises `ValueError` if so many sequences are too few for the method."""
    where = "(`--max_data_samples`, or `--num_samples` where there is no data)"
    if args.method == "order":
        count, where = min(count, args.num_samples), "(`--num_samples`, `--max_data_samples`)"
    if (args.method in ("optimal_grid", "beta") or args.unbiased) and count < 2:
        raise ValueError(f"a curve needs 2 sequences or more; there is {count} (`--max_data_samples`, `--num_samples`)")
    if args.method in ("marginal", "search") and count // 2 <= JUDGED_FEATURES:
        raise ValueError(
            f"`--method {args.method}` judges on half of {count} sequences; it needs more than {JUDGED_FEATURES} there {where}"
        )
    if args.method in FITS_ON_DATA and count < 2 * processes:  # an empty share, also of a half, has nothing to gather
        raise ValueError(
            f"`--method {args.method}` has {count} sequences; {processes} processes need at least {2 * processes} {where}"
        )
