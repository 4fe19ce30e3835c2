"""First hitting, transition times, k-Gillespie, and uniformization."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from laws import (
    ExactDenoiser,
    Joint,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    forward_matrix,
    kl,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
    total_variation,
)
from scipy.special import betainc
from scipy.stats import beta
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DiscreteScheduler,
    FirstHittingScheduler,
    GillespieScheduler,
    TransitionTimeScheduler,
    UniformProcess,
    exact,
)
from discrete_schedulers.exact import ExactSamples, uniformization
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers.scheduling_transition_time import beta_cdf

SCHEDULES = ["loglinear", "linear", "cosine", "geometric"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def absorbing(cls: type[DiscreteScheduler], num_tokens: int = 3, **kwargs: Any) -> DiscreteScheduler:
    return cls(vocab_size=num_tokens + 1, mask_token_id=num_tokens, **kwargs)


def run(
    scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, x: Tensor, generator: Generators
) -> tuple[Tensor, list[Tensor]]:
    """The pipeline's loop; the samples, and after each call which rows had asked for logits."""
    scheduler.set_timesteps(num_steps)
    asked = []
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generator)
        asked.append(torch.ones(len(x), dtype=torch.bool) if chosen is None else chosen.any(1))
        x = scheduler.step(denoiser(x, t, chosen), t, x, generator=generator).prev_sample
    return x, asked


def all_orders_law(joint: Joint, sizes: list[int]) -> Tensor:
    """Law of rows that open in groups of these sizes, over all orders: the chain rule with independence inside a group."""
    length = joint.states.shape[1]
    total = torch.zeros(len(joint.p), dtype=torch.float64)
    orders = list(itertools.permutations(range(length)))
    for order in orders:
        law, known, place = torch.ones(len(joint.p), dtype=torch.float64), [], 0
        for size in sizes:
            group = list(order[place : place + size])
            for i in group:
                law = law * conditional(joint, known, i)
            known, place = known + group, place + size
        total += law / len(orders)
    return total


def conditional(joint: Joint, known: list[int], i: int) -> Tensor:
    """p(x_i | x_known) of each row of the joint, (S,)."""

    def mass(places: list[int]) -> Tensor:
        return torch.stack([joint.p[(joint.states[:, places] == row[places]).all(1)].sum() for row in joint.states])

    return mass([*known, i]) / mass(known)


# First hitting


@pytest.mark.parametrize(
    ("num_steps", "sizes"), [(1, [3]), (2, [2, 1]), (3, [1, 1, 1]), (4, [1, 1, 1]), (8, [1, 1, 1])]
)
def test_first_hitting_opens_even_groups(num_steps: int, sizes: list[int]) -> None:
    joint = random_joint(3, 3, seed=1)
    scheduler = absorbing(FirstHittingScheduler)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    law = clean_part(run_law(scheduler, denoiser, num_steps, 3), scheduler, joint)
    torch.testing.assert_close(law, all_orders_law(joint, sizes), rtol=0, atol=1e-12)
    assert (kl(joint.p, law) < 1e-12) == (num_steps >= 3)  # exact at one token for each call


@pytest.mark.parametrize(("masks", "num_steps"), [(10, 3), (10, 4), (10, 10), (10, 64), (1, 5), (0, 5), (7, 1)])
def test_first_hitting_takes_as_many_calls_as_it_needs(masks: int, num_steps: int) -> None:
    """min(N, masks) of them, whatever the other rows have; groups differ by one at most, and nothing is done after."""
    scheduler, denoiser = absorbing(FirstHittingScheduler, 6), random_denoiser(7)
    x = torch.zeros(3, 12, dtype=torch.int64)
    x[0, :masks] = 6
    x[1] = 6
    scheduler.set_timesteps(num_steps)
    opened = []
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generator := seeded(int(1e6 * t)))
        before, x = x, scheduler.step(denoiser(x, t, chosen), t, x, generator=generator).prev_sample
        opened.append([int(n) for n in (before == 6).sum(1) - (x == 6).sum(1)])
    first, full, known = zip(*opened, strict=True)
    assert [n for n in first if n] == first_counts(masks, num_steps)
    assert sum(n > 0 for n in full) == min(num_steps, 12)
    assert not any(known)


def first_counts(masks: int, num_steps: int) -> list[int]:
    """Group sizes that differ by one at most, the larger ones first."""
    groups = min(masks, num_steps)
    return [masks // groups + (k < masks % groups) for k in range(groups)]


def test_first_hitting_counts_by_hand() -> None:
    assert first_counts(10, 3) == [4, 3, 3]
    assert first_counts(3, 64) == [1, 1, 1]
    scheduler = absorbing(FirstHittingScheduler)
    scheduler.set_timesteps(4)
    left = torch.tensor([10, 3, 1, 0])
    assert scheduler.count(left, 0).tolist() == [3, 1, 1, 0]
    assert scheduler.count(left, 2).tolist() == [5, 2, 1, 0]
    assert scheduler.count(left, 3).tolist() == [10, 3, 1, 0]


def test_first_hitting_law_by_hand() -> None:
    """Three masks, two calls left: each opens with chance 2/3. A token stays."""
    scheduler = absorbing(FirstHittingScheduler, 2)
    scheduler.set_timesteps(2)
    logits = torch.tensor([0.25, 0.75, 9.0]).log().expand(1, 4, 3)
    law = scheduler.transition(logits, 0, torch.tensor([[2, 2, 0, 2]]))[0]
    expected = torch.tensor([[1 / 6, 1 / 2, 1 / 3]] * 2 + [[1, 0, 0]] + [[1 / 6, 1 / 2, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-7)


def test_first_hitting_knows_no_time() -> None:
    """Grid and noise schedule change the times that a network sees, and nothing else."""
    x, denoiser, samples = torch.full((4, 9), 6), random_denoiser(7), []
    for kwargs in ({}, {"grid": "cosine"}, {"noise_schedule": "geometric"}):
        samples.append(run(absorbing(FirstHittingScheduler, 6, **kwargs), denoiser, 5, x, seeded(3))[0])
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


# Transition times


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_transition_times_of_the_schedule_are_ancestral_sampling(noise_schedule: str, grid: str) -> None:
    """On masks: the same moves with the same seed, hence the same law."""
    kwargs = {"noise_schedule": noise_schedule, "grid": grid}
    x = torch.randint(0, 7, (5, 9), generator=seeded(1))
    ours, theirs = (
        run(absorbing(cls, 6, **kwargs, **more), random_denoiser(7), 6, x, seeded(2))[0]
        for cls, more in ((TransitionTimeScheduler, {}), (AncestralScheduler, {"unmasking": "bernoulli"}))
    )
    assert torch.equal(ours, theirs)
    scheduler, ancestral = absorbing(TransitionTimeScheduler, **kwargs), absorbing(AncestralScheduler, **kwargs)
    for num_steps in (1, 2, 4, 8):
        for one in (scheduler, ancestral):
            one.set_timesteps(num_steps)
        for index in range(num_steps):
            assert scheduler.move_probability(index) == pytest.approx(ancestral.open_probability(index), abs=1e-12)


def test_beta_times_are_another_grid() -> None:
    """Beta(a, b) on masks: ancestral sampling on the grid of its distribution function, by scipy."""
    scheduler = absorbing(TransitionTimeScheduler, 6, density="beta", beta_a=5.0, beta_b=3.0)
    left = [1.0, *(float(beta.cdf(1 - k / 6, 5, 3)) for k in range(1, 6)), 0.0]
    ancestral = absorbing(
        AncestralScheduler,
        6,
        unmasking="bernoulli",
        noise_schedule="linear",
        grid="learned",
        coefficients={"6": {"times": left}},
    )
    x = torch.full((5, 40), 6)
    ours, theirs = (run(one, random_denoiser(7), 6, x, seeded(2))[0] for one in (scheduler, ancestral))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("density", ["schedule", "beta"])
def test_moves_of_steps_are_draws_of_times(process: str, density: str) -> None:
    """The chance to stay until a step and move there is the mass of its interval."""
    mask = 3 if process == "absorbing" else None
    scheduler = TransitionTimeScheduler(
        vocab_size=4,
        mask_token_id=mask,
        process=process,
        density=density,
        noise_schedule="cosine",
        beta_a=2.5,
        beta_b=0.7,
    )
    scheduler.set_timesteps(7)
    stayed = 1.0
    for index in range(7):
        t, s = (float(t) for t in scheduler.times[index : index + 2])
        mass = beta.cdf(t, 2.5, 0.7) - beta.cdf(s, 2.5, 0.7)
        if density == "schedule":
            mass = math.sin(math.pi / 2 * t) - math.sin(math.pi / 2 * s)
        moves = scheduler.move_probability(index)
        assert stayed * moves == pytest.approx(mass, abs=1e-12)
        stayed *= 1 - moves
    assert stayed == 0


def test_incomplete_beta_function() -> None:
    """Against scipy, relative, in both tails."""
    for a, b in itertools.product((0.3, 1, 2.5, 17, 100, 1000), (0.2, 1, 4, 7, 300)):
        for x in (0.0, 1e-9, 1e-4, 0.01, 0.2, 0.5, a / (a + b), 0.8, 0.99, 1 - 1e-6, 1.0):
            assert beta_cdf(x, a, b) == pytest.approx(betainc(a, b, x), rel=1e-11, abs=1e-290)
    scheduler = absorbing(TransitionTimeScheduler, density="beta", beta_a=1000.0, beta_b=1.0)
    scheduler.set_timesteps(50)
    moves = [scheduler.move_probability(k) for k in range(50)]
    assert moves[0] == pytest.approx(1 - 0.98**1000)
    assert moves[-1] == 1
    assert not any(math.isnan(move) for move in moves)
    arcsine = absorbing(TransitionTimeScheduler, density="beta", beta_a=0.5, beta_b=0.5)
    arcsine.set_timesteps(2)
    assert arcsine.move_probability(0) == pytest.approx(0.5)


def uniform_times_law(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, length: int) -> Tensor:
    """Law of the samples with uniform noise, (S,): every set that can move in every step, over (tokens, who has moved)."""
    width = scheduler.config.vocab_size
    states = all_states(width, length)
    scheduler.set_timesteps(num_steps)
    law = {(False,) * length: torch.full((len(states),), 1 / len(states), dtype=torch.float64)}
    for index in range(num_steps):
        p_0 = denoiser(states, scheduler.timesteps[index]).softmax(-1)  # (S, L, V)
        moves = scheduler.move_probability(index)
        after: dict[tuple[bool, ...], Tensor] = defaultdict(lambda: torch.zeros(len(states), dtype=torch.float64))
        for moved, weight in law.items():
            waiting = [i for i in range(length) if not moved[i]]
            for size in range(len(waiting) + 1):
                for now in itertools.combinations(waiting, size):
                    chance = moves**size * (1 - moves) ** (len(waiting) - size)
                    factors = []
                    for i in range(length):
                        same = (states[:, i][:, None] == states[:, i]).double()  # (S now, S next)
                        factors.append(p_0[:, i][:, states[:, i]] if i in now else same)
                    matrix = torch.stack(factors).prod(0)
                    after[tuple(moved[i] or i in now for i in range(length))] += chance * (weight @ matrix)
        law = after
    everywhere = law.pop((True,) * length)
    assert not any(weight.any() for weight in law.values())  # nobody is left behind
    return everywhere


@pytest.mark.parametrize("density", ["schedule", "beta"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_transition_times_of_uniform_noise(density: str, num_steps: int) -> None:
    """Samples follow the law with each position moving once, and one step takes each from its own marginal."""
    joint = random_joint(2, 3, seed=3)
    scheduler = TransitionTimeScheduler(vocab_size=2, process="uniform", density=density)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    law = uniform_times_law(scheduler, denoiser, num_steps, 3)
    x = scheduler.sample_prior((4000, 3), seeded(4))
    samples, _ = run(scheduler, denoiser, num_steps, x, seeded(5))
    assert chi_square_z(torch.bincount(state_index(samples, 2), minlength=8), law) < 4.5
    if num_steps == 1:
        cube = joint.p.view(2, 2, 2)
        expected = torch.einsum("a,b,c->abc", cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))).flatten()
        # at t = 1 there is a share of 1e-3 of the data left
        torch.testing.assert_close(law, expected, rtol=0, atol=2e-3)


def test_transition_times_of_uniform_noise_are_not_exact() -> None:
    """The error does not fall with the number of steps; that of ancestral sampling does. The figures of the docstring."""
    joint = random_joint(2, 3, seed=3)
    scheduler = TransitionTimeScheduler(vocab_size=2, process="uniform")
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    error = [total_variation(joint.p, uniform_times_law(scheduler, denoiser, n, 3)) for n in (16, 256)]
    ancestral = AncestralScheduler(vocab_size=2, process="uniform")
    assert error == pytest.approx([0.18, 0.18], abs=5e-3)
    assert total_variation(joint.p, run_law(ancestral, denoiser, 16, 3)) == pytest.approx(0.03, abs=5e-3)


def test_a_position_moves_once_with_uniform_noise() -> None:
    """It keeps its first token, takes another in one step, and keeps that; a new run begins anew."""
    scheduler = TransitionTimeScheduler(vocab_size=50, process="uniform")
    generators = [seeded(row) for row in range(4)]
    scheduler.set_timesteps(9)
    x = scheduler.sample_prior((4, 30), generators)
    first, changes = x, torch.zeros_like(x)
    asked = torch.zeros(4, 30, dtype=torch.int64)
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generators)
        after = scheduler.step(random_denoiser(50)(x, t, chosen), t, x, generator=generators).prev_sample
        assert torch.equal(after[~chosen], x[~chosen])
        changes, asked, x = changes + (after != x), asked + chosen, after
    assert (asked == 1).all()
    assert (changes <= 1).all()
    assert ((x != first).double().mean() > 0.9).item()
    scheduler.set_timesteps(1)
    assert scheduler.positions(0, x).all()
    scheduler.step(random_denoiser(50)(x, 1.0), 0, x)
    with pytest.raises(ValueError, match=r"`sample` has shape \(2, 30\), but this run has \(4, 30\)"):
        scheduler.positions(0, x[:2])


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_steps_without_a_move_cost_no_call(process: str) -> None:
    scheduler = TransitionTimeScheduler(
        vocab_size=5, mask_token_id=4 if process == "absorbing" else None, process=process
    )
    x = scheduler.sample_prior((6, 3), seeded(1))
    _, asked = run(scheduler, random_denoiser(5), 100, x, seeded(2))
    calls = torch.stack(asked).sum(0)
    assert (calls <= 3).all()
    assert (calls >= 1).all()


# k-Gillespie


@pytest.mark.parametrize(("num_steps", "sizes"), [(1, [4]), (2, [2, 2]), (3, [1, 1, 2]), (4, [1] * 4), (8, [1] * 4)])
def test_gillespie_on_masks(num_steps: int, sizes: list[int]) -> None:
    """Laws of runs are those of random subsets of equal shares, exact at one token for each call; samples follow them."""
    joint = random_joint(2, 4, seed=6)
    scheduler = absorbing(GillespieScheduler, 2)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    law = run_law(scheduler, denoiser, num_steps, 4)
    expected = all_orders_law(joint, sizes)
    torch.testing.assert_close(clean_part(law, scheduler, joint), expected, rtol=0, atol=1e-12)
    assert (kl(joint.p, expected) < 1e-12) == (num_steps >= 4)
    x, asked = run(scheduler, denoiser, num_steps, scheduler.sample_prior((3000, 4)), seeded(7))
    assert chi_square_z(torch.bincount(state_index(x, 3), minlength=81), law.clamp(min=0)) < 4.5
    assert torch.stack(asked).sum(0).eq(len(sizes)).all()


def test_learned_counts() -> None:
    joint = random_joint(2, 4, seed=6)
    coefficients = {"3": {"counts": [1, 0, 3]}, "4": {"counts": [2, 2, 0, 0]}}
    scheduler = absorbing(GillespieScheduler, 2, coefficients=coefficients)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    for num_steps, sizes in ((3, [1, 3]), (4, [2, 2])):
        law = clean_part(run_law(scheduler, denoiser, num_steps, 4), scheduler, joint)
        torch.testing.assert_close(law, all_orders_law(joint, sizes), rtol=0, atol=1e-12)
        x, asked = run(scheduler, denoiser, num_steps, scheduler.sample_prior((2, 4)), seeded(7))
        assert (x != 2).all()
        assert sum(bool(rows.any()) for rows in asked) == 2
    scheduler.set_timesteps(3)
    for length in (3, 5):
        with pytest.raises(ValueError, match=f"'counts' for 3 steps sum to 4, but `sample` has {length} positions"):
            scheduler.positions(0, torch.full((1, length), 2))
    scheduler.set_timesteps(4)
    assert scheduler.positions(3, torch.full((1, 4), 2)).all()  # the last call opens what is left, whatever its count
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 2"):
        scheduler.positions(0, torch.full((1, 4), 2))
    for bad in ([1.5, 2.5], [-1.0, 5.0]):
        with pytest.raises(ValueError, match="'counts' are whole numbers, 0 or more"):
            absorbing(GillespieScheduler, 2, coefficients={"2": {"counts": bad}})


def test_gillespie_with_known_tokens_by_hand() -> None:
    """Of 6 masks in 12 positions, k = 3, 3, 6 of 12: 3 / 12, 3 / 9 and all of what is left: 2 (1.5), 1 (4 / 3), 3."""
    scheduler = absorbing(GillespieScheduler, 4, coefficients={"3": {"counts": [3, 3, 6]}})
    scheduler.set_timesteps(3)
    x, opened = torch.tensor([[4, 0] * 6, [4] * 12]), []
    for t in scheduler.timesteps:
        before, x = x, scheduler.step(random_denoiser(5)(x, t), t, x, generator=seeded(1)).prev_sample
        opened.append(((before == 4).sum(1) - (x == 4).sum(1)).tolist())
    assert opened == [[2, 3], [1, 3], [3, 6]]
    long = absorbing(GillespieScheduler, 4, coefficients={"2": {"counts": [3923, 1077]}})
    long.set_timesteps(2)
    x = torch.zeros(1, 5000, dtype=torch.int64)
    x[:, :4487] = 4
    assert int(long.positions(0, x, seeded()).sum()) == 3521  # 3520.5002, which float32 takes for one half


def gillespie_uniform_matrix(scheduler: GillespieScheduler, denoiser: ExactDenoiser, index: int, length: int) -> Tensor:
    """P(x_s | x_t), (S, S): the order in which clocks ring, one after the other, and a jump for each."""
    process = scheduler.noise_process
    states = all_states(process.vocab_size, length)
    t = scheduler.times[index]
    rates = process.reverse_rate(states, denoiser(states, t).softmax(-1), t)  # (S, L, V)
    count = length * (index + 1) // scheduler.num_inference_steps - length * index // scheduler.num_inference_steps
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    for row, x in enumerate(states):
        total = rates[row].sum(-1)
        for rings in itertools.permutations(range(length), count):
            chance, waiting = torch.ones((), dtype=torch.float64), list(range(length))
            for i in rings:
                chance = chance * total[i] / total[waiting].sum()
                waiting.remove(i)
            factors = [
                rates[row, i, states[:, i]] / total[i] if i in rings else states[:, i] == x[i] for i in range(length)
            ]
            matrix[row] += chance * torch.stack([factor.double() for factor in factors]).prod(0)
    return matrix


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_gillespie_on_uniform_noise(num_steps: int) -> None:
    """Samples follow the law of racing clocks, which is far from the data, at one jump for each call too."""
    joint = random_joint(3, 3, seed=8)
    scheduler = GillespieScheduler(vocab_size=3, process="uniform")
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    scheduler.set_timesteps(num_steps)
    law = torch.full((27,), 1 / 27, dtype=torch.float64)
    for index in range(num_steps):
        law = law @ gillespie_uniform_matrix(scheduler, denoiser, index, 3)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    x, asked = run(scheduler, denoiser, num_steps, scheduler.sample_prior((4000, 3), seeded(1)), seeded(2))
    assert chi_square_z(torch.bincount(state_index(x, 3), minlength=27), law) < 4.5
    assert torch.stack(asked).sum(0).eq(min(num_steps, 3)).all()
    assert total_variation(joint.p, law) > 0.05


# Uniformization


def denoiser_of_rows(joint: Joint, process: AbsorbingProcess | UniformProcess) -> Any:
    """As `exact_denoiser`, with a time for each row."""

    def log_p_0(x_t: Tensor, t: Tensor) -> Tensor:
        same = (x_t[:, None, :] == joint.states).double()  # (B, S, L)
        if isinstance(process, AbsorbingProcess):
            likelihood = torch.maximum(same, (x_t == process.mask_token_id)[:, None, :].double())
        else:
            alpha = process.alpha(t)  # (B, 1, 1)
            likelihood = alpha * same + (1 - alpha) / process.vocab_size
        weight = joint.p * likelihood.prod(-1)
        p_0 = torch.einsum(
            "bs,slv->blv", weight, torch.nn.functional.one_hot(joint.states, process.vocab_size).double()
        )
        return (p_0 / p_0.sum(-1, keepdim=True)).log()

    return log_p_0


PROCESSES = [AbsorbingProcess(4, 3), AbsorbingProcess(4, 3, "cosine"), UniformProcess(3)]
every_process = pytest.mark.parametrize(
    "process", PROCESSES, ids=lambda process: f"{type(process).__name__}-{process.noise_schedule}"
)


def noised(joint: Joint, process: AbsorbingProcess | UniformProcess, t: float) -> Tensor:
    """Law of the data noised to t over all states, (S,)."""
    clean = torch.zeros(process.vocab_size ** joint.states.shape[1], dtype=torch.float64)
    clean[state_index(joint.states, process.vocab_size)] = joint.p
    return clean @ forward_matrix(process, 0.0, t, joint.states.shape[1])


def surprise(out: ExactSamples, law: Tensor, width: int) -> float:
    return chi_square_z(torch.bincount(state_index(out.samples, width), minlength=len(law)), law)


@every_process
@pytest.mark.parametrize("delta", [0.3, 0.02])
def test_uniformization_draws_the_noised_data(
    process: AbsorbingProcess | UniformProcess, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the test sees a wrong time and too few candidates; too low a bound does not pass in silence."""
    joint, width = random_joint(3, 3, seed=3), process.vocab_size
    law = noised(joint, process, delta)
    denoiser = denoiser_of_rows(joint, process)
    out = uniformization(denoiser, process, (4000, 3), delta, seeded(1))
    assert surprise(out, law, width) < 4.5
    if delta < 0.1:
        return
    assert surprise(out, noised(joint, process, 0.6), width) > 4.5
    intervals = exact.halving_intervals

    def too_short(*arguments: Any) -> exact.Intervals:
        return intervals(*arguments)._replace(span=intervals(*arguments).span * 0.7)

    def too_low(*arguments: Any) -> exact.Intervals:
        return intervals(*arguments)._replace(bound=intervals(*arguments).bound * 0.4)

    monkeypatch.setattr(exact, "halving_intervals", too_short)
    assert surprise(uniformization(denoiser, process, (4000, 3), delta, seeded(1)), law, width) > 4.5
    monkeypatch.setattr(exact, "halving_intervals", too_low)
    with pytest.raises(AssertionError, match="the rate exceeds its bound"):
        uniformization(denoiser, process, (4000, 3), delta, seeded(1))


@pytest.mark.parametrize("noise_schedule", ["loglinear", "geometric"])
def test_the_bound_holds_for_every_network(noise_schedule: str) -> None:
    """Random logits, certain and uncertain ones, at the worst place of each interval."""
    process = UniformProcess(5, noise_schedule)
    start, _, bound = exact.halving_intervals(process, 1e-3)
    t = process.time_of_noise(torch.cat([start[1:], 1 - process.alpha(1e-3)[None]]) / (1 - process.alpha(1.0)))
    x = torch.randint(0, 5, (len(t), 6), generator=seeded(1))
    for sharpness in (0.1, 1.0, 50.0):
        p_0 = (sharpness * random_denoiser(5)(x, 1.0)).softmax(-1)
        rate = process.reverse_rate(x, p_0, t) / process.jump_speed(t)
        assert (rate.sum(-1) <= bound[:, None] * (1 + 1e-9)).all()
    assert (rate.sum(-1) > 0.9 * bound[:, None]).any()  # and is not a loose one


@pytest.mark.parametrize("process", [AbsorbingProcess(4, 3, "linear"), UniformProcess(4)], ids=["absorbing", "uniform"])
def test_laws_of_a_jump_are_those_of_float64(
    process: AbsorbingProcess | UniformProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of logits of any precision."""
    laws: list[Tensor] = []
    monkeypatch.setattr(
        exact, "categorical", lambda logits, u: laws.append(logits.softmax(-1)) or torch.zeros_like(u).long()
    )
    x, half, bound = torch.tensor([[3, 1, 3]] * 20), torch.full((20,), 0.5).double(), torch.full((20,), 1e3).double()
    logits = torch.randn(20, 3, 4, generator=seeded())
    for some in (logits, logits.double()):
        exact.jump(process, some, x, half, bound, half)
    torch.testing.assert_close(*laws, rtol=1e-13, atol=0)


def test_number_of_calls() -> None:
    """Poisson with mean L log((1 - alpha_1) / (1 - alpha_delta)) on masks."""
    process = AbsorbingProcess(4, 3, "linear")
    out = uniformization(denoiser_of_rows(random_joint(3, 3), process), process, (4000, 3), 0.1, seeded(2))
    calls, mean = out.num_model_calls.double(), 3 * math.log(10)
    assert float(calls.mean()) == pytest.approx(mean, abs=4.5 * math.sqrt(mean / 4000))
    assert float(calls.var()) == pytest.approx(mean, rel=0.15)


@pytest.mark.parametrize("process", [PROCESSES[0], PROCESSES[2]], ids=["absorbing", "uniform"])
def test_rows_do_not_depend_on_their_batch(process: AbsorbingProcess | UniformProcess) -> None:
    denoiser = denoiser_of_rows(random_joint(3, 3), process)
    batch = uniformization(denoiser, process, (4, 3), 0.1, [seeded(k) for k in range(4)])
    for k in range(4):
        alone = uniformization(denoiser, process, (1, 3), 0.1, [seeded(k)])
        assert torch.equal(alone.samples[0], batch.samples[k])
        assert alone.num_model_calls[0] == batch.num_model_calls[k]


def test_arguments_of_uniformization_that_are_refused() -> None:
    denoiser = random_denoiser(4)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"`delta` is .*; allowed are numbers in \(0, 1\)"):
            uniformization(denoiser, PROCESSES[0], (1, 2), delta)
    with pytest.raises(ValueError, match="`noise_schedule='linear'` has alpha_1 = 0"):
        uniformization(denoiser, UniformProcess(4, "linear"), (1, 2))
    with pytest.raises(ValueError, match="`model_output` has NaN"):
        uniformization(lambda x, t: torch.full((len(x), 2, 4), math.nan), PROCESSES[0], (3, 2))


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"density": "gamma"}, "`density` is 'gamma'; allowed: 'schedule', 'beta'"),
        ({"beta_a": 0.0}, "`beta_a` and `beta_b` are 0.0 and 3.0; both must be positive"),
        ({"beta_b": math.nan}, "`beta_b` is nan"),
    ],
)
def test_arguments_of_transition_times_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionTimeScheduler(vocab_size=5, mask_token_id=4, **kwargs)


def test_step_matrices_are_stochastic() -> None:
    """The ground truth of this file's own laws."""
    scheduler = absorbing(GillespieScheduler, 2)
    scheduler.set_timesteps(3)
    for index in range(3):
        matrix = step_matrix(scheduler, random_denoiser(3), index, 3)
        torch.testing.assert_close(matrix.sum(1), torch.ones(27, dtype=torch.float64), rtol=0, atol=1e-12)
