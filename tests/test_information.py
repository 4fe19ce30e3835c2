"""The information curve, its identity with the KL of random-order samplers, and the counts that minimise it."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from discrete_schedulers import information
from discrete_schedulers.information import (
    InformationCurve,
    expected_nll,
    information_curve,
    isotonic_fit,
    kl_bound,
    optimal_counts,
    optimal_times,
    schedule_gain,
)
from discrete_schedulers.sampling import RowLogits

MASK = 2


class EnumeratedJoint:
    """Binary joint over L positions with its exact conditionals, or, with `error` > 0, wrong versions of them."""

    def __init__(self, length: int, error: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.states = torch.tensor(list(itertools.product([0, 1], repeat=length)))  # (2^L, L)
        logits = 1.5 * torch.randn(2**length, generator=generator, dtype=torch.float64)
        self.p = logits.softmax(0)  # (2^L,)
        self.entropy = -float((self.p * self.p.log()).sum())
        self.code = 3 ** torch.arange(length)
        self.noise = error * torch.randn(3**length, length, 2, generator=generator, dtype=torch.float64)
        self.calls: list[tuple[Tensor, float, Tensor]] = []

    def log_p_0(self, x_t: Tensor) -> Tensor:
        """log p(x_0^j = v | x_t), (B, L, 2)."""
        agrees = (x_t[:, None, :] == self.states) | (x_t[:, None, :] == MASK)  # (B, 2^L, L)
        weight = agrees.all(-1) * self.p  # (B, 2^L)
        one = weight @ self.states.double()  # (B, L), unnormalised p(x^j = 1)
        p_0 = torch.stack([weight.sum(1, keepdim=True) - one, one], dim=-1)
        return (p_0.clamp(min=0).log() + self.noise[x_t @ self.code]).log_softmax(-1)

    def __call__(self, x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        self.calls.append((x_t, t, positions))
        log_p_0 = torch.nn.functional.pad(self.log_p_0(x_t), (0, 1), value=-math.inf)  # (B, L, 3): the mask has no mass
        return RowLogits(log_p_0[positions], positions)

    def sample(self, num_samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.states[torch.multinomial(self.p, num_samples, replacement=True, generator=generator)]

    def curve(self) -> InformationCurve:
        """The exact curve: all sets of revealed positions, all states."""
        values = []
        for size in range(self.length):
            terms = []
            for revealed in itertools.combinations(range(self.length), size):
                hidden = [j for j in range(self.length) if j not in revealed]
                x_t = self.states.clone()
                x_t[:, hidden] = MASK
                log_p = self.log_p_0(x_t).gather(-1, self.states[..., None]).squeeze(-1)  # (2^L, L)
                terms.append(-(self.p @ log_p[:, hidden]).mean())
            values.append(torch.stack(terms).mean())
        return curve_of(torch.stack(values))

    def mean_kl_over_orders(self, counts: list[int]) -> float:
        """KL(data || law of the sampler given the order), by enumeration of all orders and all states."""
        total = 0.0
        for order in itertools.permutations(range(self.length)):
            x_t = torch.full_like(self.states, MASK)
            log_q = torch.zeros_like(self.p)
            known = 0
            for count in counts:
                opened = list(order[known : known + count])
                log_p = self.log_p_0(x_t).gather(-1, self.states[..., None]).squeeze(-1)
                log_q += log_p[:, opened].sum(1)
                x_t[:, opened] = self.states[:, opened]
                known += count
            assert abs(float(log_q.exp().sum()) - 1) < 1e-12  # it is a law
            total += float((self.p * (self.p.log() - log_q)).sum())
        return total / math.factorial(self.length)


def curve_of(values: Tensor) -> InformationCurve:
    return InformationCurve(values, torch.zeros_like(values), 0)


def cubic_curve(length: int) -> InformationCurve:
    """c(t) = 1.5 + 6 t^3 at the masked shares t = (L - i) / L."""
    t = (length - torch.arange(length, dtype=torch.float64)) / length
    return curve_of(1.5 + 6 * t**3)


def compositions(length: int) -> list[list[int]]:
    """All ordered lists of positive counts with this sum: 2^(L - 1) of them."""
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, length), k) for k in range(length))
    return [[b - a for a, b in itertools.pairwise([0, *cut, length])] for cut in cuts]


class TableDenoiser:
    """Gives every token 0 the probability exp(-c(masked share)): the curve is c, without noise, on data of zeros."""

    def __init__(self, table: dict[float, float]) -> None:
        self.table = table

    def __call__(self, x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        p = math.exp(-self.table[t])
        row = torch.tensor([p, 1 - p], dtype=torch.float64).log()
        return RowLogits(row.repeat(int(positions.sum()), 1), positions)


# The identity


@pytest.mark.parametrize("error", [0.0, 0.7])
def test_bound_is_the_mean_kl_over_orders(error: float) -> None:
    joint = EnumeratedJoint(5, error)
    curve = joint.curve()
    for counts in ([5], [1, 4], [4, 1], [2, 1, 2], [1, 2, 2], [1, 1, 1, 2], [1, 1, 1, 1, 1]):
        assert kl_bound(curve, counts, joint.entropy) == pytest.approx(joint.mean_kl_over_orders(counts), abs=1e-9)


def test_exact_model_has_no_gap_one_token_at_a_time() -> None:
    joint = EnumeratedJoint(5)
    assert kl_bound(joint.curve(), [1] * 5, joint.entropy) == pytest.approx(0, abs=1e-12)
    assert kl_bound(EnumeratedJoint(5, 0.7).curve(), [1] * 5, joint.entropy) > 0.1


def test_expected_nll_by_hand() -> None:
    curve = curve_of(torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64))
    nll = {(3,): 12.0, (1, 2): 4 + 2 * 3.0, (2, 1): 2 * 4 + 1.0, (1, 1, 1): 8.0}
    assert {counts: expected_nll(curve, counts) for counts in nll} == nll
    assert kl_bound(curve, [2, 1], entropy=7.5) == 1.5


@pytest.mark.parametrize("counts", [[], [3], [2, 2, 1], [4, 0], [5, -1], [2.0, 2.0], [1.5, 2.5]])
def test_bad_counts(counts: list) -> None:
    curve = curve_of(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="`counts`"):
        expected_nll(curve, counts)
    with pytest.raises(ValueError, match="`counts`"):
        kl_bound(curve, counts, 1.0)


# The optimal counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["falling", "with flat pieces", "any"])
@pytest.mark.parametrize("short", [0, 512])
def test_optimal_counts_against_all_compositions(
    seed: int, kind: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by the search between neighbours and by all pairs."""
    monkeypatch.setattr(information, "_SHORT", short)
    values = 3 * torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind != "any":
        values = values.sort(descending=True).values
    if kind == "with flat pieces":
        values = (values * 1.5).round()
    curve = curve_of(values)
    table = optimal_counts(curve, 8)
    assert len(table) == 8
    for num_steps, counts in enumerate(table, start=1):
        rivals = [rival for rival in compositions(8) if len(rival) == num_steps]
        costs = [expected_nll(curve, rival) for rival in rivals]
        assert len(counts) == num_steps
        assert expected_nll(curve, counts) == pytest.approx(min(costs), abs=1e-12)
        # Among equals the most even counts win.
        equals = [rival for rival, cost in zip(rivals, costs, strict=True) if cost < min(costs) + 1e-12]
        assert sum(n * n for n in counts) == min(sum(n * n for n in rival) for rival in equals)
    assert optimal_counts(curve, 3) == table[:3]


def plain_totals(values: Tensor, max_steps: int) -> list[float]:
    """The smallest `expected_nll` for 1, 2, ... steps: dynamic programming as it is written down."""
    length, totals = len(values), []
    best = [0.0] + [math.inf] * length
    for _ in range(max_steps):
        best = [
            min([best[i] + (j - i) * values[i].item() for i in range(j)], default=math.inf) for j in range(length + 1)
        ]
        totals.append(best[length])
    return totals


@pytest.mark.parametrize("kind", ["falling", "steps", "steep", "linear", "any"])
def test_optimal_counts_against_plain_dynamic_programming(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(information, "_SHORT", 0)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 3, 5, 16, 33):
        values = 3 * torch.rand(length, generator=generator, dtype=torch.float64)
        falling = values.sort(descending=True).values
        curve = {
            "falling": falling,
            "steps": (falling * 2).round(),  # neighbours that are equal
            "steep": falling**30,
            "linear": torch.arange(length, 0, -1, dtype=torch.float64),
            "any": values,
        }[kind]
        found = optimal_counts(curve_of(curve), length)
        assert [len(counts) for counts in found] == list(range(1, length + 1))
        nll = [expected_nll(curve_of(curve), counts) for counts in found]
        assert nll == pytest.approx(plain_totals(curve, length), rel=1e-8, abs=1e-12)  # evenness: 1e-9 of the range


def test_optimal_counts_of_long_curves_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured curve is a staircase of pieces that are linear."""
    steps = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cumsum(0).flip(0)
    staircase = torch.nn.functional.interpolate(steps.round(decimals=1)[None, None], 600, mode="linear")[0, 0]
    for values in (cubic_curve(600).values, staircase.cummin(0).values):
        found = optimal_counts(curve_of(values), 24)
        with monkeypatch.context() as patch:
            patch.setattr(information, "_SHORT", 600)
            rivals = optimal_counts(curve_of(values), 24)
        assert [expected_nll(curve_of(values), counts) for counts in found] == pytest.approx(
            [expected_nll(curve_of(values), counts) for counts in rivals], rel=1e-12
        )


def test_optimal_counts_do_not_grow_with_the_square_of_the_length() -> None:
    """Numbers that are made in all operations: all pairs would take four times as many for twice the length."""

    class Numbers(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.made += sum(one.numel() for one in tree_leaves(result) if isinstance(one, Tensor))
            return result

    made = []
    for length in (1024, 2048, 4096):
        with Numbers() as numbers:
            optimal_counts(cubic_curve(length), 4)
        made.append(numbers.made)
    assert made[1] < 2.3 * made[0]
    assert made[2] < 2.3 * made[1]
    assert made[2] < 4 * 50 * 4096 * math.log2(4096)


def test_optimal_counts_ignore_offset_and_scale() -> None:
    values = cubic_curve(64).values
    expected = optimal_counts(curve_of(values), 8)
    assert optimal_counts(curve_of(1e-6 * values + 20), 8) == expected
    assert optimal_counts(curve_of(1e-12 * values), 8) == expected


def test_flat_and_linear_curves_have_even_counts() -> None:
    linear = torch.arange(12, 0, -1, dtype=torch.float64)
    for values in (linear, torch.zeros_like(linear), torch.full_like(linear, 3.7)):
        for num_steps, counts in enumerate(optimal_counts(curve_of(values), 12), start=1):
            assert max(counts) - min(counts) <= 1, (num_steps, counts)


def test_long_curve_of_the_continuous_example() -> None:
    # c = 1.5 + 6 t^3 with integral 3, 8 steps. Uniform by hand: 6 / 8^4 * (1^3 + ... + 8^3) - 1.5 = 0.3984.
    curve = cubic_curve(1024)
    counts = optimal_counts(curve, 64)
    assert expected_nll(curve, [128] * 8) / 1024 - 3 == pytest.approx(6 * 1296 / 4096 - 1.5, abs=1e-12)
    assert expected_nll(curve, counts[7]) / 1024 - 3 == pytest.approx(0.318, abs=5e-4)
    nll = [expected_nll(curve, c) for c in counts]
    assert all(later < earlier for earlier, later in itertools.pairwise(nll))


@pytest.mark.parametrize("max_steps", [0, -1, 9])
def test_bad_max_steps(max_steps: int) -> None:
    with pytest.raises(ValueError, match="`max_steps`"):
        optimal_counts(cubic_curve(8), max_steps)


def test_optimal_times_hold_the_counts() -> None:
    curve = cubic_curve(37)
    table = optimal_counts(curve, 37)
    for num_steps, counts in enumerate(table, start=1):
        times = optimal_times(curve, num_steps)
        assert times.dtype == torch.float64
        assert times.shape == (num_steps + 1,)
        assert float(times[0]) == 1
        assert float(times[-1]) == 0
        assert (times.diff() < 0).all()
        assert (-37 * times.diff()).round().long().tolist() == counts
        assert (-37 * times.diff() - torch.tensor(counts)).abs().max() < 1e-12


@pytest.mark.parametrize("num_steps", [4, 5, 8])
def test_optimal_times_are_uniform_with_many_steps(num_steps: int) -> None:
    expected = [1 - k / num_steps for k in range(num_steps + 1)]
    assert optimal_times(cubic_curve(4), num_steps).tolist() == pytest.approx(expected, abs=1e-15)


def test_optimal_times_of_no_step() -> None:
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        optimal_times(cubic_curve(4), 0)


# The gain of a schedule


def test_schedule_gain_by_hand() -> None:
    # Differences 4 and 1: (2 + 1)^2 / (2 * 5). Cubic curve: (int sqrt(18) t dt)^2 / 6 = 4.5 / 6.
    assert schedule_gain(curve_of(torch.tensor([6.0, 2.0, 1.0], dtype=torch.float64))) == pytest.approx(0.9, abs=1e-15)
    assert schedule_gain(cubic_curve(20_000)) == pytest.approx(0.75, abs=1e-4)
    assert schedule_gain(curve_of(torch.arange(9, 0, -1, dtype=torch.float64))) == pytest.approx(1, abs=1e-15)
    assert schedule_gain(curve_of(torch.full((5,), 2.0, dtype=torch.float64))) == 1
    assert schedule_gain(curve_of(torch.ones(1, dtype=torch.float64))) == 1


def test_schedule_gain_is_the_gain_of_the_optimal_counts() -> None:
    curve = cubic_curve(1024)
    limit = expected_nll(curve, [1] * 1024)
    for num_steps, tolerance in ((8, 0.06), (32, 0.015)):
        uniform = expected_nll(curve, [1024 // num_steps] * num_steps) - limit
        best = expected_nll(curve, optimal_counts(curve, num_steps)[-1]) - limit
        assert best / uniform == pytest.approx(schedule_gain(curve), abs=tolerance)


def test_schedule_gain_of_a_rising_curve() -> None:
    with pytest.raises(ValueError, match="increases after i = 2"):
        schedule_gain(curve_of(torch.tensor([3.0, 3.0, 1.0, 2.0], dtype=torch.float64)))


# The isotonic fit


@pytest.mark.parametrize("seed", range(10))
def test_isotonic_fit_against_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(40, generator=generator, dtype=torch.float64) - 0.05 * torch.arange(40)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) + 0.1
    expected = isotonic_regression(values.numpy(), weights=weights.numpy(), increasing=False).x
    fitted = isotonic_fit(values, weights)
    assert (fitted.diff() <= 0).all()
    assert torch.allclose(fitted, torch.from_numpy(expected.copy()), rtol=0, atol=1e-12)


def test_isotonic_fit_keeps_a_non_increasing_vector() -> None:
    values = torch.tensor([3.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    assert torch.equal(isotonic_fit(values, torch.arange(1.0, 5.0)), values)
    # By hand: 1 and 4 with weights 2 and 1 make 2.
    assert isotonic_fit(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])).tolist() == [2, 2]


# The measurement


@pytest.mark.parametrize("error", [0.0, 0.4])
def test_curve_of_an_enumerated_joint(error: float) -> None:
    joint = EnumeratedJoint(6, error, seed=3)
    exact = joint.curve()
    data = joint.sample(6000, seed=1)
    measured = information_curve(joint, data, MASK, generator=torch.Generator().manual_seed(2), batch_size=2000)
    z = (measured.values - isotonic_fit(exact.values, torch.arange(6, 0, -1))) / measured.standard_error
    assert z.abs().max() < 4.5
    assert measured.standard_error.max() < 0.02
    assert measured.num_evaluations == 6 * 6000


def test_standard_error_is_the_spread_over_data_sets() -> None:
    joint = EnumeratedJoint(5, seed=3)
    runs = [
        information_curve(joint, joint.sample(64, seed), MASK, generator=torch.Generator().manual_seed(seed))
        for seed in range(200)
    ]
    spread = torch.stack([run.values for run in runs]).std(0)
    claimed = torch.stack([run.standard_error for run in runs]).mean(0)
    # The first and last level are hardly touched by the fit; a standard deviation of 200 runs is known to 5 %.
    assert float(claimed[0] / spread[0]) == pytest.approx(1, abs=0.2)
    assert float(claimed[-1] / spread[-1]) == pytest.approx(1, abs=0.2)


def test_standard_error_by_hand() -> None:
    # One position: -log p is log 2 for token 0 and log 4 for token 1.
    row = torch.tensor([0.5, 0.25, 0.0, 0.25], dtype=torch.float64).log()

    def denoiser(x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        return RowLogits(row.repeat(len(x_t), 1), positions)

    curve = information_curve(denoiser, torch.tensor([[0], [1], [1], [0]]), mask_token_id=2)
    assert curve.values.tolist() == pytest.approx([1.5 * math.log(2)], abs=1e-15)
    assert curve.standard_error.tolist() == pytest.approx([math.log(2) / math.sqrt(12)], abs=1e-15)
    assert curve.num_evaluations == 4


def test_masks_are_nested_and_only_masked_rows_are_asked() -> None:
    joint = EnumeratedJoint(6)
    data = joint.sample(10, seed=0)
    information_curve(joint, data, MASK, generator=torch.Generator().manual_seed(0))
    assert len(joint.calls) == 6
    for level, (x_t, t, positions) in enumerate(joint.calls):
        assert t == (6 - level) / 6
        assert torch.equal(positions, x_t == MASK)
        assert torch.equal(x_t[~positions], data[~positions])
        assert (positions.sum(1) == 6 - level).all()
        if level > 0:
            assert not (positions & ~joint.calls[level - 1][2]).any()
    assert len({tuple(row) for row in joint.calls[3][2].int().tolist()}) > 3  # another order for each sequence


def test_nested_masks_lower_the_noise_of_differences() -> None:
    # -log p of a masked token is its own constant plus 8 t. Given the data, its mean over m random positions has
    # variance S (1/m - 1/L), a difference of nested means S (1/m' - 1/m), of independent means the sum of both.
    length = 64
    data = torch.randint(4, (32, length), generator=torch.Generator().manual_seed(0))

    def denoiser(x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        p = torch.tensor([0.7, 0.2, 0.09, 0.01, 0.0], dtype=torch.float64) * math.exp(-8 * t)
        p[-1] = 1 - p.sum()
        return RowLogits(p.log().repeat(int(positions.sum()), 1), positions)

    runs = [
        information_curve(denoiser, data, 5, num_levels=22, generator=torch.Generator().manual_seed(seed)).values
        for seed in range(150)
    ]
    values = torch.stack(runs)  # (runs, L); the levels are 0, 3, 6, ..., 63
    assert (values.diff()[:, 12:36] < 0).all()  # the fit does not touch what is compared
    for i in (15, 30):
        few, many = 1 / (length - i - 3), 1 / (length - i)
        expected = (few - many) / (few + many - 2 / length)  # 0.15 and 0.09
        nested = (values[:, i] - values[:, i + 3]).var()
        independent = (values[:, i] - values[:, i + 3].roll(1)).var()
        assert float(nested / independent) == pytest.approx(expected, rel=0.6)


def test_every_set_of_positions_is_equally_likely() -> None:
    joint = EnumeratedJoint(4)
    information_curve(
        joint, joint.sample(12_000, seed=0), MASK, generator=torch.Generator().manual_seed(0), batch_size=12_000
    )
    revealed = (~joint.calls[2][2]).long() @ torch.tensor([1, 2, 4, 8])
    counts = torch.bincount(revealed, minlength=16)[[3, 5, 6, 9, 10, 12]].double()
    assert counts.sum() == 12_000
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi-square with 5 degrees: p = 1.5e-5


def test_generator_and_batch_size() -> None:
    joint = EnumeratedJoint(5)
    data = joint.sample(50, seed=0)

    def measure(seed: int, batch_size: int) -> InformationCurve:
        generator = torch.Generator().manual_seed(seed)
        return information_curve(joint, data, MASK, generator=generator, batch_size=batch_size)

    assert torch.allclose(measure(0, 50).values, measure(0, 7).values, rtol=0, atol=1e-12)
    assert torch.equal(measure(0, 64).values, measure(0, 64).values)
    assert not torch.allclose(measure(0, 64).values, measure(1, 64).values, rtol=0, atol=1e-6)


def test_levels_and_interpolation() -> None:
    # Levels 0, 3, 6, 10 of 11: c falls on straight lines between them.
    table = {11 / 11: 3.0, 8 / 11: 2.4, 5 / 11: 1.5, 1 / 11: 0.7}
    curve = information_curve(TableDenoiser(table), torch.zeros(3, 11, dtype=torch.int64), 5, num_levels=4)
    expected = [3.0, 2.8, 2.6, 2.4, 2.1, 1.8, 1.5, 1.3, 1.1, 0.9, 0.7]
    assert curve.values.tolist() == pytest.approx(expected, abs=1e-12)
    assert curve.standard_error.abs().max() < 1e-12
    assert curve.num_evaluations == 12
    ends = information_curve(TableDenoiser(table), torch.zeros(3, 11, dtype=torch.int64), 5, num_levels=2)
    assert ends.values.tolist() == pytest.approx([3.0 - 0.23 * i for i in range(11)], abs=1e-12)


def test_all_levels_can_be_asked_for_by_number() -> None:
    joint = EnumeratedJoint(5)
    data = joint.sample(20, seed=0)
    some = information_curve(joint, data, MASK, num_levels=5, generator=torch.Generator().manual_seed(0))
    every = information_curve(joint, data, MASK, generator=torch.Generator().manual_seed(0))
    assert torch.equal(some.values, every.values)


def test_fit_is_weighted_by_the_number_of_masked_tokens() -> None:
    # Levels 1 and 2 of 4 are the wrong way round; their weights are 3 and 2.
    table = {4 / 4: 3.0, 3 / 4: 1.0, 2 / 4: 2.0, 1 / 4: 0.5}
    curve = information_curve(TableDenoiser(table), torch.zeros(2, 4, dtype=torch.int64), 5)
    assert curve.values.tolist() == pytest.approx([3.0, 1.4, 1.4, 0.5], abs=1e-12)


def test_low_precision_logits_are_normalised_in_float64() -> None:
    logits = torch.tensor([3.0, -1.0, 0.5]).bfloat16()

    def denoiser(x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        return RowLogits(logits.repeat(int(positions.sum()), 1), positions)

    curve = information_curve(denoiser, torch.zeros(400, 2, dtype=torch.int64), mask_token_id=7, batch_size=400)
    expected = math.log(math.exp(3) + math.exp(-1) + math.exp(0.5)) - 3
    assert curve.values.tolist() == pytest.approx([expected, expected], abs=1e-12)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(2, 3, 4, dtype=torch.int64),
        torch.zeros(4, 3),
        torch.zeros(4, 3, dtype=torch.int32),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(4, 0, dtype=torch.int64),
        torch.tensor([[0, 1, 0], [1, MASK, 1]]),
    ],
)
def test_bad_data(data: Tensor) -> None:
    with pytest.raises(ValueError, match="`data`"):
        information_curve(EnumeratedJoint(3), data, MASK)


@pytest.mark.parametrize("knob", [{"num_levels": 1}, {"num_levels": 4}, {"batch_size": 0}])
def test_bad_knobs(knob: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(knob))}`"):
        information_curve(EnumeratedJoint(3), torch.zeros(4, 3, dtype=torch.int64), MASK, **knob)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.0, math.nan], "NaN for 12 and probability 0 for 0 of 12"),
        ([0.0, math.inf], "NaN for 12 and"),
        ([-math.inf, 0.0], "NaN for 0 and probability 0 for 12 of 12"),
    ],
)
def test_bad_logits(row: list[float], message: str) -> None:
    def denoiser(x_t: Tensor, t: float, positions: Tensor) -> RowLogits:
        return RowLogits(torch.tensor(row).repeat(int(positions.sum()), 1), positions)

    with pytest.raises(ValueError, match=message):
        information_curve(denoiser, torch.zeros(4, 3, dtype=torch.int64), MASK)


# The curve as a value


def test_config_keeps_every_bit() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    config = json.loads(json.dumps(curve_of(values).to_config()))
    assert all(type(value) is float for value in config)
    curve = InformationCurve.from_config(config)
    assert torch.equal(curve.values, values)
    assert curve.standard_error.isnan().all()
    assert curve.num_evaluations == 0


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0], [[1.0], [2.0]]])
def test_bad_values(values: list) -> None:
    with pytest.raises(ValueError, match="`values`"):
        InformationCurve.from_config(values)


def test_bad_dtype_and_shape() -> None:
    with pytest.raises(ValueError, match="float32"):
        InformationCurve(torch.ones(3), torch.ones(3), 0)
    with pytest.raises(ValueError, match="`standard_error`"):
        InformationCurve(torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 0)
