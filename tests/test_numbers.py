"""Numbers that stay right: across the precision of logits, threads, batches, many steps over long sequences, and long runs."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import random_denoiser
from scheduler_cases import CASES, SchedulerCase
from tiny import LENGTH, MASK, WORDS, seeded, tiny_pipeline
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteScheduler,
    EulerScheduler,
    InformationCurve,
    LSDScheduler,
    RowLogits,
    SpreadScheduler,
    TauLeapingScheduler,
    UniformProcess,
    information_curve,
    optimal_counts,
)
from discrete_schedulers.sampling import weigh
from discrete_schedulers.schedulers.order_utils import OrderScheduler
from discrete_schedulers.schedulers.scheduling_utils import FactorisedScheduler
from discrete_schedulers.training.objectives import fit_phi

V = 7
UNIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
dtypes = pytest.mark.parametrize("dtype", UNIT, ids=str)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Where one is usual here."""
    number = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(number)


def rounded(dtype: torch.dtype) -> Any:
    """A network whose logits, in [-4, 4], are rounded to this precision."""
    denoiser = random_denoiser(V, seed=1)

    def network(x_t: Tensor, t: Tensor | float, positions: Tensor | None = None, **conditions: Any) -> Any:
        logits = denoiser(x_t, float(t)).to(dtype)
        return logits if positions is None else RowLogits(logits[positions], positions)

    return network


# Precision of the logits


SMOOTH = [
    case
    for case in CASES
    if issubclass(case.cls, FactorisedScheduler) and case.cls.order == 1 and case.kwargs.get("top_p", 1) == 1
]


@dtypes
def test_laws_of_rounded_logits(dtype: torch.dtype) -> None:
    """Logits in [-4, 4] are rounded by at most d = 4 u, u the unit of rounding, so log p_0 moves by at most 2 d, or 2 d b with
    inverse temperatures and powers of at most b. A mask's law is p_0 in proportion; with uniform noise the law is a product
    of factors that are linear in p_0, normalised: each of numerator and denominator moves by twice that, and the division
    of jumps that sum to more than 1 doubles it. All else is float64. (top-p is left out: it has steps.)"""
    d, worst = 4 * UNIT[dtype], 0.0
    for case in SMOOTH:
        scheduler = case.build(V)
        scheduler.set_timesteps(7)
        x = torch.randint(0, V, (4, 9), generator=seeded(3))
        knobs = [1 / case.kwargs.get("temperature", 1.0)]
        if case.kwargs.get("scale") == "log_score" or "inverse_temperature" in str(case.kwargs.get("coefficients")):
            knobs.append(1.6)
        most = 2 * d * math.prod(knobs) * (1 if case.is_absorbing else 4)
        if "gate_b" in str(case.kwargs.get("coefficients")):
            most += 2 * 2 * d * 1.2  # log-odds of the gate: b of at most 1.2 times those of the best token
        for index in (0, 3, 6):
            exact, law = (scheduler.transition(rounded(kind)(x, 0.5), index, x) for kind in (torch.float64, dtype))
            assert law.dtype == torch.float64
            torch.testing.assert_close(law.sum(-1), torch.ones(4, 9, dtype=torch.float64), rtol=0, atol=1e-12)
            distance = float(((law - exact).abs().sum(-1) / 2).max())
            assert distance <= math.expm1(most), (case.name, index)
            worst = max(worst, distance)
    assert worst > d / 100  # it is the rounding that is seen


@dtypes
def test_coefficients_of_rounded_logits(dtype: torch.dtype) -> None:
    """The information curve, the optimal grid, and LSD's factors, learned from a network of each precision. A curve is a mean
    of -log p_0: it moves by at most 2 d, d as above; what is worked out of it moves in proportion to it."""
    d = 4 * UNIT[dtype]
    data = torch.randint(0, V - 1, (12, 10), generator=seeded())
    exact, curve = (
        information_curve(rounded(kind), data, V - 1, generator=seeded(1)) for kind in (torch.float64, dtype)
    )
    assert float((curve.values - exact.values).abs().max()) <= 2 * d
    # counts are whole numbers, which a tie decides; what they cost by the exact curve is what may not move: sum n_k H(i_k)
    falling = 3 - 2 * torch.linspace(0, 1, 10, dtype=torch.float64) ** 2  # as the curves of learned networks do
    noisy = falling + (curve.values - exact.values)
    costs = []
    for values in (falling, noisy):
        counts = torch.tensor(optimal_counts(InformationCurve.from_config(values.tolist()), 4)[-1])
        revealed = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
        costs.append(float((counts * falling[revealed]).sum()))
    assert 0 <= costs[1] - costs[0] <= 2 * 10 * 2 * d
    process, t = AbsorbingProcess(V, V - 1), torch.tensor(0.6, dtype=torch.float64)
    x, teacher_x = (torch.where(torch.rand(12, 10, generator=seeded(s)) < 0.6, V - 1, data) for s in (2, 3))
    for objective in ("generalised_kl", "l2", "softmax_kl"):
        fits = [
            fit_phi(rounded(kind), process, x, teacher_x, t, objective, 5, lambda sums: sums)
            for kind in (torch.float64, dtype)
        ]
        assert fits[0] == pytest.approx(fits[1], abs=10 * d)


# Threads and batches

WIDE = 40_000  # a row alone is long enough for threads to share its sum
ONCE = list({case.cls: case for case in reversed(CASES)}.values())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_entropies_of_a_row_do_not_depend_on_threads_or_other_rows(dtype: torch.dtype) -> None:
    """For rows so long that threads would share one that is alone."""
    logits = (3 * torch.randn(10, 1, WIDE + 17, generator=seeded())).to(dtype)

    def of(some: Tensor) -> Tensor:
        weights = weigh(RowLogits.everywhere(some), with_entropy=True)
        return torch.stack([weights.total, weights.entropy()])

    together = of(logits)
    alone = torch.cat([of(row[None]) for row in logits], dim=1)
    torch.set_num_threads(1)
    assert torch.equal(together, of(logits))
    torch.set_num_threads(2)
    assert torch.equal(together, alone)
    exact = torch.distributions.Categorical(logits=logits.double()[:, 0]).entropy()
    torch.testing.assert_close(together[1], exact, rtol=1e-5, atol=1e-5)


def wide_sample(case: SchedulerCase) -> Tensor:
    """Rows with 5, 1, 0 and 3 masks of six."""
    x = torch.randint(0, WIDE - 1, (4, 6), generator=seeded(1))
    if case.is_absorbing:
        for row, number in enumerate((5, 1, 0, 3)):
            x[row, 6 - number :] = WIDE - 1
    return x


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", ONCE, ids=lambda case: case.name)
def test_rows_are_the_same_bits_in_any_batch_and_with_any_threads(case: SchedulerCase) -> None:
    scheduler = case.build(WIDE)
    x = wide_sample(case)
    logits = torch.randn(4, 6, WIDE, generator=seeded(2)).to(torch.bfloat16)

    def walk(rows: slice) -> Tensor:
        """Two calls of four."""
        scheduler.set_timesteps(4)
        generators, now = [seeded(row) for row in range(4)][rows], x[rows]
        for index in range(2):
            scheduler.model_inputs(index, now, None, generators)
            now = scheduler.step(logits[rows], index, now, generator=generators).prev_sample
        return now

    batch = walk(slice(0, 4))
    for row in range(4):
        assert torch.equal(walk(slice(row, row + 1))[0], batch[row])
    torch.set_num_threads(1)
    assert torch.equal(walk(slice(0, 4)), batch)


@pytest.mark.usefixtures("two_threads")
def test_measures_are_the_same_bits_in_any_batch() -> None:
    """Confidence, margin and entropy of a row that is alone in its chunk, and among others."""
    scheduler = ConfidenceScheduler(WIDE, WIDE - 1)
    assert isinstance(scheduler, OrderScheduler)
    logits = torch.randn(1, 9, WIDE, generator=seeded(2))
    names = ("token_probability", "max_probability", "margin", "entropy")

    def measures(chosen: list[int]) -> dict[str, Tensor]:
        positions = torch.zeros(1, 9, dtype=torch.bool)
        positions[0, chosen] = True
        return dict(scheduler.predict(RowLogits.chosen(logits, positions), names, seeded()).measures)

    together = measures(list(range(9)))
    for place in range(9):
        for name, value in measures([place]).items():
            assert torch.equal(value[0], together[name][place]), name


# Many steps over long sequences

LONG, MANY = 4096, 1024
EVEN = {str(MANY): {"scale": [1.0] * MANY, "times": [1 - k / MANY for k in range(MANY + 1)]}}
ABSORBING: dict[str, DiscreteScheduler] = {
    "counts": AncestralScheduler(V, V - 1),
    "bernoulli": AncestralScheduler(V, V - 1, unmasking="bernoulli"),
    "cosine": AncestralScheduler(V, V - 1, unmasking="bernoulli", noise_schedule="cosine"),
    "tau": TauLeapingScheduler(V, V - 1),
    "euler": EulerScheduler(V, V - 1),
    "learned": LSDScheduler(V, V - 1, coefficients=EVEN, grid="learned"),
    "confidence": ConfidenceScheduler(V, V - 1, score="entropy"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSORBING)
def test_a_thousand_steps_over_four_thousand_positions(name: str) -> None:
    """The share of masks follows 1 - alpha of the grid all the way: exactly for counts, within 4.5 standard deviations of a
    binomial law where each mask has its own draw; tokens follow the network's law to the end."""
    scheduler = ABSORBING[name]
    scheduler.set_timesteps(MANY)
    assert bool((scheduler.times.diff() < 0).all())
    law = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.07, 0.03, 0.0], dtype=torch.float64)
    logits, generator = law.log().float().expand(1, LONG, V), seeded(7)
    x = torch.full((1, LONG), V - 1)
    masks = [LONG]
    for index in range(MANY):
        where = scheduler.positions(index, x, generator)
        rows = logits if where is None else RowLogits(logits[where], where)
        x = scheduler.step(rows, index, x, generator=generator).prev_sample
        masks.append(int((x == V - 1).sum()))
    left = torch.tensor(masks, dtype=torch.float64)
    noise = torch.stack([1 - scheduler.noise_process.alpha(t) for t in scheduler.times])
    share = (noise / noise[0]).flatten()
    gap = (left - LONG * share).abs()
    if name in ("counts", "confidence"):
        assert gap.max() <= 16  # of 4,096: whole numbers of tokens in each step
    else:
        spread = (LONG * share * (1 - share)).sqrt()
        # leaping and Euler keep a little more: 1 - exp(-c) and c in the place of the exact probability, summed over the run
        bias = 0.01 * LONG * share if name == "tau" else 0.0
        assert bool((gap <= 4.5 * spread + 1e-9 + bias).all())
    assert masks[-1] == 0
    counts = torch.bincount(x[0], minlength=V).double()[: V - 1]
    z = (counts - LONG * law[: V - 1]) / (LONG * law[: V - 1] * (1 - law[: V - 1])).sqrt()
    assert float(z.abs().max()) < 4.5


@pytest.mark.slow
def test_a_thousand_steps_of_uniform_noise() -> None:
    """Independent tokens with one law, and the exact posterior of them: what comes out follows that law."""
    scheduler, generator = AncestralScheduler(V, process="uniform"), seeded(3)
    scheduler.set_timesteps(MANY)
    law = torch.tensor([0.35, 0.25, 0.2, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)
    x = scheduler.sample_prior((1, LONG), generator)
    process = scheduler.noise_process
    assert isinstance(process, UniformProcess)
    for index, t in enumerate(scheduler.timesteps):
        own = torch.where(torch.arange(V) == x[..., None], process.own_gain(t).log(), 0.0)
        x = scheduler.step((law.log() + own).float(), index, x, generator=generator).prev_sample
    counts = torch.bincount(x[0], minlength=V).double()
    z = (counts - LONG * law) / (LONG * law * (1 - law)).sqrt()
    assert float(z.abs().max()) < 4.5


# Long runs


@pytest.mark.slow
def test_ten_thousand_samples_leave_no_memory_behind() -> None:
    """40 calls of 250 samples, schedulers in turn: after the first 10 Python's own memory grows by less than 200 kB, 27 bytes
    for each sample, and the process by less than 32 MB."""
    facts = {"vocab_size": len(WORDS), "mask_token_id": MASK}
    pipe = tiny_pipeline()
    classes = [AncestralScheduler, EulerScheduler, ConfidenceScheduler, SpreadScheduler, LSDScheduler]
    drawn = 0

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096

    tracemalloc.start()
    try:
        for call in range(40):
            if call % 2 == 0:
                pipe.scheduler = classes[call // 2 % len(classes)](**facts)
            output = pipe(num_samples=250, length=LENGTH, num_inference_steps=3, generator=seeded(call))
            drawn += len(output.sequences)
            del output
            if call == 9:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0], resident()
        gc.collect()
        after = tracemalloc.get_traced_memory()[0], resident()
    finally:
        tracemalloc.stop()
    assert drawn == 10_000
    assert after[0] - before[0] < 200_000
    assert after[1] - before[1] < 32e6
