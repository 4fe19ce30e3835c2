"""`order` of `distill.py`: which positions open in which step. See `order_search.py`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from discrete_schedulers import DiscreteScheduler
from discrete_schedulers.schedulers.position_orders import Pattern, pattern_ranks
from discrete_schedulers.training.data import generators
from discrete_schedulers.training.order_search import (
    Groups,
    best_order,
    group_nll,
    groups_of,
    order_blocks,
    search_order,
)
from discrete_schedulers.training.run import PROPOSED, Run

START_ORDERS: tuple[Pattern, ...] = ("dilated", "van_der_corput")  # of the search for an order


def order(run: Run) -> DiscreteScheduler:
    """Which positions open in which step, by the exact likelihood of half of the data; the other half chooses among the results
    and the starts, which are spread orders. See `order_search.py`."""
    args, data = run.args, run.data[: run.args.num_samples]
    halves = data[::2], data[1::2]

    def learn(steps: int) -> dict[str, list[float]]:
        fit, heldout = (
            order_score(run, f"order {steps} {name}", half) for name, half in zip("ab", halves, strict=True)
        )
        counts = [run.length // steps + (k < run.length % steps) for k in range(steps)]
        candidates = []
        for number, pattern in enumerate(START_ORDERS):
            ranks = pattern_ranks(pattern, 1, run.length).flatten()
            groups = groups_of((-ranks.double()).tolist(), counts)
            candidates.append(groups)
            if steps > 1:
                (generator,) = generators(args.seed, PROPOSED, range(number, number + 1))
                *_, (best, _) = search_order(fit, groups, args.num_epochs // len(START_ORDERS), generator)
                candidates.append(best)
        return order_blocks(best_order(candidates, heldout)[0])

    return run.each_budget(learn, run.learned(grid="learned", unmasking="counts", order="random"))


def order_score(run: Run, key: str, data: Tensor) -> Callable[[Groups], float]:
    """The mean of `order_nll` over the data, in nats. Each process has its share; a group behind known positions is measured
    once."""
    share, measured = run.share(len(data)), run.numbers(key)
    own, batch_size = data[share.start :: share.step], run.args.train_batch_size
    memory: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def score(groups: Groups) -> float:
        total = 0.0
        known: tuple[int, ...] = ()
        for group in groups:
            place = (known, tuple(group))
            if place not in memory:

                def work(known: tuple[int, ...] = known, group: list[int] = group) -> list[float]:
                    nats = group_nll(run.denoiser, own, known, group, run.mask_token_id, batch_size)
                    return [float(run.reduce(nats.sum())) / len(data)]

                memory[place] = measured(work)[0]
            total += memory[place]
            known = tuple(sorted((*known, *group)))
        return total

    return score
