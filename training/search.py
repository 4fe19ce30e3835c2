r"""Search for a few sampler coefficients without gradients: CMA-ES on any loss.

For fewer than about 20 floats it is the most robust choice: it needs no path probabilities, so it also serves samplers whose
step law is not known (orders, thresholds, corrections), and it does not mind the noise of a two-sample statistic. For the
marginal objective, all candidates with the same random numbers, and a second judge with fresh data and numbers:

    candidates = [start, *evolve(judged(judge), start, spread, bounds, evaluations, seed)]
    best = keep_best(candidates, heldout_judge)                              # marginal.two_sample_judge, judge_of_draws

Source: Hansen, Ostermeier 2001; the package `cma` (`pip install discrete_schedulers[search]`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from discrete_schedulers.training.marginal import Bounds, Coefficients, Verdict

ENTROPY_PENALTY = 10.0  # nats for all of the entropy: a lack of one per cent costs as much as a KL of 0.1


def judged(
    judge: Callable[[Coefficients], Verdict], entropy_range: tuple[float, float] = (0.99, math.inf)
) -> Callable[[Coefficients], float]:
    """The marginal objective as a loss for `evolve`: the two-sample statistic, and a price on entropy outside the range, so
    that the search is led back into it. `marginal.keep_best` is strict.

    Args:
        judge (`Callable`): On samples with the same random numbers for all candidates.
        entropy_range (`tuple[float, float]`, defaults to `(0.99, inf)`): Of `entropy_ratio`, as in `marginal.keep_best`.
    """
    low, high = entropy_range

    def loss(coefficients: Coefficients) -> float:
        verdict = judge(coefficients)
        outside = max(low - verdict.entropy_ratio, verdict.entropy_ratio - high, 0.0)
        return verdict.statistic + ENTROPY_PENALTY * outside

    return loss


def evolve(
    loss: Callable[[Coefficients], float],
    start: Coefficients,
    spread: float,
    bounds: Bounds,
    evaluations: int,
    seed: int,
) -> Iterator[Coefficients]:
    """CMA-ES from one start; yields the centre of the search after each generation.

    Args:
        loss (`Callable`): What is minimised; not NaN.
        start (`dict`): Where the search begins: at least two floats, and at most a few tens to be practical.
        spread (`float`): First standard deviation of every float, about a third of where the optimum may lie.
        bounds (`dict`): Interval of each named block; a block that is not named has none.
        evaluations (`int`): Calls of the loss, rounded up to whole generations of 4 + 3 log n.
        seed (`int`): Of the search. No global random state is touched.

    Yields:
        `dict`: A candidate, within the bounds.

    Raises:
        ValueError: If there are fewer than two floats.
    """
    import cma

    sizes = [block.numel() for block in start.values()]
    if sum(sizes) < 2:
        raise ValueError(f"`start` has {sum(sizes)} floats; CMA-ES needs at least 2: use `jump_steps.golden_section`")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> object:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()

    def named(values: object) -> Coefficients:
        parts = torch.as_tensor(values, dtype=torch.float64).clone().split(sizes)
        return {name: part.view(start[name].shape) for name, part in zip(start, parts, strict=True)}

    low, high = (
        [
            bounds.get(name, (-math.inf, math.inf))[end]
            for name, size in zip(start, sizes, strict=True)
            for _ in range(size)
        ]
        for end in (0, 1)
    )
    first: Tensor = torch.cat([block.flatten().double() for block in start.values()])
    options = {"bounds": [low, high], "randn": normal, "seed": math.nan, "verbose": -9, "maxfevals": evaluations}
    strategy = cma.CMAEvolutionStrategy(first.tolist(), spread, options)
    while not strategy.stop():
        tried = strategy.ask()
        strategy.tell(tried, [loss(named(values)) for values in tried])
        yield named(strategy.result.xfavorite)
