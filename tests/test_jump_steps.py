"""Grids without gradients: Jump Your Steps against enumeration, its exact optimum against brute force, the Beta schedule
against scipy, and CMA-ES on the toys."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from laws import Joint, all_states, exact_denoiser, path_kl, random_joint
from scipy.special import betainc
from torch import Tensor
from toys import Toy, start_of

from discrete_schedulers import AbsorbingProcess, AncestralScheduler, UniformProcess
from discrete_schedulers.training.jump_steps import (
    beta_cdf,
    beta_shares,
    golden_section,
    jump_your_steps,
    klub,
    nested_states,
    optimal_shares,
    rate_divergence,
    share_bound,
    share_cross_entropy,
    token_gain,
)
from discrete_schedulers.training.search import evolve

MASK = 2
PROCESS = AbsorbingProcess(3, MASK, "linear")


def information_curve(joint: Joint) -> Tensor:
    """f(i) by the entropies of all subsets of positions."""
    length = joint.states.shape[1]
    mean = []
    for size in range(length + 1):
        entropies = []
        for kept in itertools.combinations(range(length), size):
            code = joint.states[:, list(kept)] @ 2 ** torch.arange(size) if size else torch.zeros(len(joint.p)).long()
            marginal = torch.zeros(2**size, dtype=torch.float64).index_add_(0, code, joint.p)
            entropies.append(float(torch.special.entr(marginal).sum()))
        mean.append(math.fsum(entropies) / len(entropies))
    return torch.tensor(mean, dtype=torch.float64).diff()


def exact_klub(joint: Joint, t1: float, t2: float, t3: float) -> float:
    """Over all x_0 and all nested pairs of masks: each position is known, masked at t1 only, or masked at both times."""
    length, denoiser = joint.states.shape[1], exact_denoiser(joint, PROCESS)
    alpha1, alpha2 = 1 - t1, 1 - t2
    chance = torch.tensor([alpha1, alpha2 - alpha1, 1 - alpha2], dtype=torch.float64)
    total = 0.0
    for kinds in all_states(3, length):
        x_1 = joint.states.masked_fill(kinds >= 1, MASK)
        x_2 = joint.states.masked_fill(kinds == 2, MASK)
        r_2 = PROCESS.reverse_rate(x_2, denoiser(x_2, t2).softmax(-1), t2)
        r_1 = PROCESS.reverse_rate(x_1, denoiser(x_1, t1).softmax(-1), t1)
        total += float(chance[kinds].prod() * (joint.p @ rate_divergence(r_2, r_1).mean(1)))
    return (t2 - t3) * total


def test_nested_states() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 4, (200, 50), generator=generator)
    thresholds = torch.rand(200, 50, generator=generator, dtype=torch.float64)
    process = UniformProcess(4, "linear")
    noise = process.prior((200, 50), generator)
    early, late = (nested_states(process, x_0, thresholds, noise, t) for t in (0.3, 0.8))
    assert torch.equal(nested_states(process, x_0, thresholds, noise, 0.0), x_0)
    assert bool((late == noise)[early != x_0].all())  # what has moved stays moved
    assert float((early != x_0).double().mean()) == pytest.approx(0.3 * 3 / 4, abs=0.02)


def test_klub_is_its_mean_over_all_masks() -> None:
    joint, generator = random_joint(2, 3), torch.Generator().manual_seed(0)
    rows = 20_000
    x_0 = joint.states[torch.multinomial(joint.p, rows, replacement=True, generator=generator)]
    thresholds = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    given = (exact_denoiser(joint, PROCESS), PROCESS)
    parts = [
        klub(*given, x, u, torch.full_like(x, MASK), (0.9, 0.5, 0.2))
        for x, u in zip(x_0.split(500), thresholds.split(500), strict=True)
    ]
    mean, error = np.mean(parts), np.std(parts) / math.sqrt(len(parts))
    assert abs(mean - exact_klub(joint, 0.9, 0.5, 0.2)) < 4.5 * error
    assert error < 0.01 * mean
    few = x_0[:1]  # without a mask there is nothing to lose
    assert klub(*given, few, torch.full((1, 3), 0.05, dtype=torch.float64), few, (0.9, 0.5, 0.2)) == 0
    for times in ((0.5, 0.5, 0.2), (0.5, 0.2, 0.2), (1.5, 0.5, 0.2), (0.5, 0.2, -0.1)):
        with pytest.raises(ValueError, match="`times` is"):
            klub(*given, x_0, thresholds, x_0, times)


@pytest.mark.parametrize("times", [(1.0, 0.5, 0.0), (0.9, 0.4, 0.3), (0.6, 0.1, 0.05)])
def test_klub_is_the_gain_of_the_bound_and_a_bias(times: tuple[float, float, float]) -> None:
    joint = random_joint(2, 3)
    curve = information_curve(joint)
    t1, t2, t3 = times

    def c(share: float) -> float:
        return float(share_cross_entropy(curve, torch.tensor([share], dtype=torch.float64)))

    gain = token_gain(c, t1, t2, t3)
    assert gain == pytest.approx(share_bound([t1, t3], c) - share_bound([t1, t2, t3], c), abs=1e-14)
    bias = (t2 - t3) * math.log(t1 / t2)
    assert exact_klub(joint, *times) == pytest.approx(gain + bias, abs=1e-6)  # the floor of 1e-8 in the logarithms


def test_bias_alone_jumps_to_one_over_e() -> None:
    """Independent positions: any grid is exact, and JYS still prefers one."""
    coin = torch.tensor([0.3, 0.7], dtype=torch.float64)
    joint = Joint(all_states(2, 2), torch.outer(coin, coin).flatten())
    t2, gain = golden_section(lambda t: exact_klub(joint, 1.0, t, 0.0), 0.001, 0.999, 1e-4)
    assert t2 == pytest.approx(1 / math.e, abs=1e-3)
    assert gain == pytest.approx(1 / math.e, abs=1e-6)


@pytest.mark.parametrize("shares", [(1.0, 0.5, 0.0), (1.0, 0.8, 0.35, 0.1, 0.0), (1.0, 0.0)])
def test_bound_is_the_path_kl_of_ancestral_sampling(shares: tuple[float, ...]) -> None:
    joint = random_joint(2, 3, seed=1)
    curve = information_curve(joint)
    times = list(shares)
    scheduler = AncestralScheduler(
        3,
        MASK,
        noise_schedule="linear",
        unmasking="bernoulli",
        grid="learned",
        coefficients={str(len(times) - 1): {"times": times}},
    )
    found = path_kl(scheduler, exact_denoiser(joint, PROCESS), len(times) - 1, joint)
    bound = share_bound(times, lambda m: float(share_cross_entropy(curve, torch.tensor([m], dtype=torch.float64))))
    assert 3 * bound - joint.entropy == pytest.approx(found, abs=1e-9)


def test_cross_entropy_of_a_share() -> None:
    curve = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    c = share_cross_entropy(curve, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert c.tolist() == pytest.approx([3.0, (3 + 3 * 2 + 3 * 1 + 0.5) / 8, 0.5], abs=1e-14)
    assert torch.equal(share_cross_entropy(curve.float(), torch.tensor([1.0, 0.5, 0.0])), c)  # whatever their precision


@pytest.mark.parametrize("top", [0.05, 0.31, 0.64, 0.97])
def test_golden_section(top: float) -> None:
    calls = []

    def peak(x: float) -> float:
        calls.append(x)
        return -((x - top) ** 2)

    x, value = golden_section(peak, 0.0, 1.0, 1e-6)
    assert (x, value) == (pytest.approx(top, abs=1e-6), pytest.approx(0, abs=1e-12))
    assert 20 < len(calls) == len(set(calls)) <= 32  # no point twice
    assert x == min(calls, key=lambda y: abs(y - top))
    calls.clear()
    golden_section(peak, 0.0, 1.0, 0.0, max_calls=7)
    assert len(calls) == 7
    with pytest.raises(ValueError, match="low < high"):
        golden_section(peak, 1.0, 1.0, 0.1)


def test_search_inserts_where_a_grid_search_does() -> None:
    """Every insertion is the best of all grid points, and the path KL falls after each level."""
    curve = information_curve(random_joint(2, 4))
    grid = torch.arange(65, dtype=torch.float64) / 64
    values = dict(zip(grid.tolist(), share_cross_entropy(curve, grid).tolist(), strict=True))

    def c(share: float) -> float:
        return float(share_cross_entropy(curve, torch.tensor([share], dtype=torch.float64)))

    found = {n: jump_your_steps(lambda a, b, d: token_gain(c, a, b, d), n, resolution=64) for n in (1, 2, 4, 8)}
    assert found[1] == [1.0, 0.0]
    best = max(grid[1:-1].tolist(), key=lambda m: token_gain(values.__getitem__, 1.0, m, 0.0))
    assert abs(found[2][1] - best) <= 1 / 64
    bounds = [share_bound(found[n], c) for n in found]
    assert bounds == sorted(bounds, reverse=True)
    for n, times in found.items():
        assert len(times) == n + 1
        assert all(a > b for a, b in itertools.pairwise(times))
        optimal = optimal_shares(grid.flip(0), share_cross_entropy(curve, grid.flip(0)), n)
        assert share_bound(optimal, c) <= share_bound(times, c) + 1e-15
        assert share_bound(times, c) <= 1.03 * share_bound(optimal, c)  # greedy bisection loses little here
    asked: list[tuple[float, float, float]] = []
    jump_your_steps(lambda *times: asked.append(times) or times[1], 4, margin=0.02, resolution=64)
    jump_your_steps(lambda *times: asked.append(times) or -times[1], 4, margin=0.02, resolution=64)
    assert all(t3 + 0.02 <= t2 <= t1 - 0.02 or t1 - t3 < 0.08 for t1, t2, t3 in asked)
    narrow: list[tuple[float, float, float]] = []
    jump_your_steps(lambda *times: narrow.append(times) or times[1], 4, margin=0.2)
    assert all(min(t2 - t3, t1 - t2) > (t1 - t3) / 4 - 1e-12 for t1, t2, t3 in narrow if t1 - t3 < 0.8)
    crowded = jump_your_steps(lambda a, b, d: b, 64, resolution=64)
    assert crowded == grid.flip(0).tolist()
    for wrong in (0, 3, 128):
        with pytest.raises(ValueError, match=f"`num_steps` is {wrong}; allowed are powers of two"):
            jump_your_steps(lambda a, b, d: b, wrong, resolution=64)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_optimal_shares_by_brute_force(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(num_steps)
    shares = torch.cat([torch.ones(1), torch.rand(7, generator=generator).sort(descending=True)[0], torch.zeros(1)])
    shares = shares.double()
    price = torch.rand(9, generator=generator, dtype=torch.float64)
    c = dict(zip(shares.tolist(), price.tolist(), strict=True))
    brute = min(
        share_bound([1.0, *inner, 0.0], c.__getitem__)
        for inner in itertools.combinations(shares[1:-1].tolist(), num_steps - 1)
    )
    found = optimal_shares(shares, price, num_steps)
    assert share_bound(found, c.__getitem__) == pytest.approx(brute, abs=1e-15)
    assert (found[0], found[-1], len(found)) == (1.0, 0.0, num_steps + 1)


def test_optimal_shares_says_no() -> None:
    shares = torch.tensor([1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="`num_steps` is 3; allowed is 1 to 2"):
        optimal_shares(shares, shares, 3)
    with pytest.raises(ValueError, match="do not fall"):
        optimal_shares(shares.flip(0), shares, 1)


def test_beta_schedule() -> None:
    for a, b, x in itertools.product(
        (0.1, 0.5, 1.0, 2.5, 30.0), (0.2, 1.0, 3.0, 40.0), (1e-6, 0.01, 0.3, 0.5, 0.77, 0.999)
    ):
        assert beta_cdf(x, a, b) == pytest.approx(betainc(a, b, x), rel=1e-11, abs=1e-13)
    steps = np.arange(9) / 8
    assert beta_shares(0.5, 0.5, 8) == pytest.approx(1 - steps, abs=1e-12)
    assert beta_shares(1.0, 1.0, 8) == pytest.approx(1 - np.sin(np.pi / 2 * steps) ** 2, abs=1e-12)
    assert beta_shares(2.0, 3.0, 1) == [1.0, 0.0]
    assert (beta_cdf(0.0, 2.0, 3.0), beta_cdf(1.0, 2.0, 3.0)) == (0.0, 1.0)
    for x, a, b in ((0.5, 0.0, 1.0), (0.5, 1.0, 0.0), (-0.1, 1.0, 1.0), (1.1, 1.0, 1.0)):
        with pytest.raises(ValueError, match="allowed are x in"):
            beta_cdf(x, a, b)


def test_evolution_finds_the_optimum() -> None:
    toy, first = Toy("random", 4), start_of("grid+temp", 2, 4)
    bounds = {"log_tau": (-2.5, 2.5)}
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    runs = [list(evolve(lambda c: float(toy.kl(c, 2)), first, 0.5, bounds, 400, seed)) for seed in (0, 0, 1)]
    assert torch.equal(before[1], torch.random.get_rng_state())
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert float(toy.kl(runs[0][-1], 2)) < 1.02 * 0.0214
    assert [c["log_tau"].tolist() for c in runs[0]] == [c["log_tau"].tolist() for c in runs[1]]
    assert runs[0][-1]["log_tau"].tolist() != runs[2][-1]["log_tau"].tolist()
    *_, low = evolve(lambda c: float(c["log_tau"].sum()), first, 0.5, {"log_tau": (-0.2, 0.1)}, 200, 0)
    assert low["log_tau"].tolist() == pytest.approx([-0.2, -0.2], abs=1e-3)
    assert min(low["log_tau"].tolist()) >= -0.2
    with pytest.raises(ValueError, match="has 1 floats"):
        next(evolve(lambda c: 0.0, {"open": torch.zeros(1)}, 0.5, {}, 10, 0))
