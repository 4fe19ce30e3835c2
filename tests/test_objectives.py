"""What `distill` minimises, against brute force on small networks, and the coupled rolls, against their exact laws."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from laws import (
    ExactDenoiser,
    as_denoiser,
    chi_square_z,
    exact_denoiser,
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
)
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from discrete_schedulers import AbsorbingProcess, LSDScheduler, RowLogits
from discrete_schedulers.training import objectives
from discrete_schedulers.training.method_lsd import learn_times
from discrete_schedulers.training.objectives import (
    SCALE_OF,
    CoupledRoll,
    draw_noise,
    fit_phi,
    literal_kappa_gradient,
    perturbed_start,
    phi_gradient,
    repaired_step_sizes,
    times_from_step_sizes,
    token_nats,
)

V, MASK, LENGTH = 6, 5, 7
PROCESS = AbsorbingProcess(V, MASK)
PREFERENCES = 1.5 * torch.randn(LENGTH, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def without_mask(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([MASK]), -math.inf)


# What a position prefers, and a part that depends on all tokens
NETWORK = as_denoiser(lambda x, t: without_mask(PREFERENCES[: x.shape[1]] + 0.4 * random_denoiser(V, seed=3)(x, t)))
FLAT = as_denoiser(lambda x, t: without_mask(torch.zeros(*x.shape, V)))


def time_of(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def alone(sums: Tensor) -> Tensor:
    return sums


def two_states(t: float, seed: int = 0, batch: int = 9) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's states at t: different tokens, different masks."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.where(
            torch.rand(batch, LENGTH, generator=generator) < t,
            MASK,
            torch.randint(MASK, (batch, LENGTH), generator=generator),
        )
        for _ in range(2)
    )


def explicit_d(objective: str, x: Tensor, teacher_x: Tensor, t: float, network: ExactDenoiser = NETWORK) -> Callable:
    """Phi -> mean over the rows masked in both states of d, from the definition and row by row."""
    alpha = 1 - (1 - 1e-3) * t  # log-linear
    scores = []
    for state in (x, teacher_x):
        p = network(state, t)[..., :MASK].double().softmax(-1).numpy()
        scores.append(alpha / (1 - alpha) * p)
    places = ((x == MASK) & (teacher_x == MASK)).nonzero().tolist()
    rows = [(scores[0][b, i], scores[1][b, i]) for b, i in places]

    def d(phi: float) -> float:
        total = 0.0
        for s, star in rows:
            if objective == "generalised_kl":
                total += np.sum(phi * s - star + star * np.log(star / (phi * s)))
            elif objective == "l2":
                total += np.sum((star - phi * s) ** 2)
            else:
                p, q = star / star.sum(), s**phi / np.sum(s**phi)
                total += np.sum(p * np.log(p / q))
        return total / len(rows)

    return d


# Phi


def test_nats_of_wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision as it is in the memory, a few rows at a time in float64; the mask takes no part."""
    generator, seen, plain = torch.Generator().manual_seed(0), [], objectives.cross_entropy
    rows, width, mask = 30, 60_000, 7
    logits = (3 * torch.randn(rows, width, generator=generator)).to(torch.bfloat16)
    tokens = torch.randint(8, width, (rows,), generator=generator)

    def noted(some: Tensor, *arguments: Tensor, **more: str) -> Tensor:
        seen.append(len(some))
        return plain(some, *arguments, **more)

    monkeypatch.setattr(objectives, "cross_entropy", noted)
    found = token_nats(RowLogits(logits, torch.ones(1, rows, dtype=torch.bool)), tokens, mask)
    wide = logits.double()
    wide[:, mask] = -math.inf
    expected = wide.logsumexp(-1) - wide[torch.arange(rows), tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert sum(seen) == rows
    assert max(seen) < rows / 3
    assert token_nats(RowLogits(logits[:0], torch.zeros(1, rows, dtype=torch.bool)), tokens[:0], mask).shape == (0,)


def test_objectives_are_for_the_scales_of_the_scheduler() -> None:
    for scale in SCALE_OF.values():
        assert LSDScheduler(vocab_size=V, mask_token_id=MASK, scale=scale).config.scale == scale


@pytest.mark.parametrize("t", [0.9, 0.5, 0.15])
@pytest.mark.parametrize("objective", SCALE_OF)
def test_fit_phi_is_the_minimiser(objective: str, t: float) -> None:
    x, teacher_x = two_states(t, batch=9 if t > 0.3 else 60)
    phi = fit_phi(NETWORK, PROCESS, x, teacher_x, time_of(t), objective, 4, alone)
    d = explicit_d(objective, x, teacher_x, t)
    brute = minimize_scalar(d, bounds=(0.01, 4), method="bounded", options={"xatol": 1e-10})
    assert phi == pytest.approx(brute.x, abs=1e-6)  # where d is flat to rounding
    assert all(d(phi) < d(phi + step) for step in (-1e-3, 1e-3))
    if objective != "generalised_kl":
        assert abs(phi - 1) > 0.02  # the states differ


def test_a_power_takes_a_few_passes() -> None:
    """Newton's method, also for few rows of a flat network; halving the range would take some thirty."""
    passes = []

    def gentle(x: Tensor, t: Tensor | float) -> Tensor:
        passes.append(len(x))
        return 0.2 * NETWORK(x, t)

    x, teacher_x = two_states(0.5, batch=1)
    phi = fit_phi(as_denoiser(gentle), PROCESS, x, teacher_x, time_of(0.5), "softmax_kl", 4, alone)
    d = explicit_d("softmax_kl", x, teacher_x, 0.5, gentle)
    assert d(phi) <= min(d(0.999 * phi), d(1.001 * phi))
    assert len(passes) <= 2 * 5  # two states each; the last is that of the check above


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine", "geometric"])
@pytest.mark.parametrize("t", [1.0, 0.6, 1 / 1024])
def test_generalised_kl_has_nothing_to_learn(noise_schedule: str, t: float) -> None:
    process = AbsorbingProcess(V, MASK, noise_schedule)
    x, teacher_x = two_states(max(t, 0.5))
    phi = fit_phi(NETWORK, process, x, teacher_x, torch.tensor(t, dtype=torch.float64), "generalised_kl", 16, alone)
    assert phi == pytest.approx(1, abs=1e-14)  # sum of p_0 over sum of p_0


@pytest.mark.parametrize("objective", SCALE_OF)
def test_equal_states_ask_for_nothing(objective: str) -> None:
    """At t = 1 teacher and student are the same; linear noise has score 0 there."""
    x = torch.full((3, LENGTH), MASK)
    for process in (PROCESS, AbsorbingProcess(V, MASK, "linear")):
        one = torch.tensor(1.0, dtype=torch.float64)
        assert fit_phi(NETWORK, process, x, x, one, objective, 2, alone) == pytest.approx(1, abs=1e-12)
        assert phi_gradient(NETWORK, process, x, x, one, 1.0, objective, 2, alone) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("objective", SCALE_OF)
def test_no_common_rows_and_flat_laws(objective: str) -> None:
    t = time_of(0.5)
    open_rows, masked = torch.zeros(2, LENGTH, dtype=torch.int64), torch.full((2, LENGTH), MASK)
    assert fit_phi(NETWORK, PROCESS, open_rows, masked, t, objective, 2, alone) == 1
    assert phi_gradient(NETWORK, PROCESS, open_rows, masked, t, 1.0, objective, 2, alone) == 0
    # Every power of a uniform law is the same law: Phi stays where it is.
    assert fit_phi(FLAT, PROCESS, masked, masked, t, objective, 2, alone) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("own", "star"), [(0.2, 4.0), (4.0, 0.05), (30.0, 20.0), (0.1, 6.0), (20.0, 1.0)])
def test_power_far_from_one(own: float, star: float) -> None:
    """Two tokens with log-odds `own` and `star`: the law of p^Phi has log-odds Phi own, so Phi = star / own. Plain Newton
    jumps to and fro where the curvature changes on a scale of 1 / own."""
    logits = {0: own, 1: star}  # told apart by the first token

    def two_tokens(x: Tensor, t: float) -> Tensor:
        out = torch.full((*x.shape, V), -math.inf, dtype=torch.float64)
        out[..., 0] = torch.tensor([logits[int(row[0])] for row in x])[:, None]
        out[..., 1] = 0.0
        return out

    x, teacher_x = torch.tensor([[0, MASK]]), torch.tensor([[1, MASK]])
    phi = fit_phi(as_denoiser(two_tokens), PROCESS, x, teacher_x, time_of(0.5), "softmax_kl", 1, alone)
    assert phi == pytest.approx(star / own, rel=1e-6)


@pytest.mark.parametrize("objective", SCALE_OF)
@pytest.mark.parametrize("phi", [0.6, 1.0, 1.7])
def test_phi_gradient_is_the_derivative(objective: str, phi: float) -> None:
    x, teacher_x = two_states(0.6)
    one = teacher_x[:1].clone()
    one[:, (x[0] == MASK).nonzero()[0]] = MASK  # and no other mask in common
    one = torch.where((torch.cumsum(x[:1] == MASK, 1) > 1) & (one == MASK), 0, one)
    for own, star in ((x, teacher_x), (x[:1], one)):
        d, step = explicit_d(objective, own, star, 0.6), 1e-5
        gradient = phi_gradient(NETWORK, PROCESS, own, star, time_of(0.6), phi, objective, 4, alone)
        assert gradient == pytest.approx((d(phi + step) - d(phi - step)) / (2 * step), abs=1e-8)
    assert ((x[0] == MASK) & (one[0] == MASK)).sum() == 1


@pytest.mark.parametrize("objective", SCALE_OF)
def test_gradient_steps_end_at_the_closed_form(objective: str) -> None:
    x, teacher_x = two_states(0.6)
    shared = (NETWORK, PROCESS, x, teacher_x, time_of(0.6))
    phi = 1.4
    for _ in range(150):
        phi -= 0.3 * phi_gradient(*shared, phi, objective, 16, alone)
    assert phi == pytest.approx(fit_phi(*shared, objective, 16, alone), abs=1e-7)


@pytest.mark.parametrize("objective", SCALE_OF)
def test_batches_and_processes_only_split_the_sums(objective: str) -> None:
    x, teacher_x = two_states(0.7, batch=10)
    t = time_of(0.7)
    whole = fit_phi(NETWORK, PROCESS, x, teacher_x, t, objective, 10, alone)
    assert fit_phi(NETWORK, PROCESS, x, teacher_x, t, objective, 3, alone) == pytest.approx(whole, abs=1e-10)
    gradient = phi_gradient(NETWORK, PROCESS, x, teacher_x, t, 1.2, objective, 10, alone)
    other: list[Tensor] = []
    phi_gradient(
        NETWORK, PROCESS, x[1::2], teacher_x[1::2], t, 1.2, objective, 10, lambda sums: other.append(sums) or sums
    )
    both = phi_gradient(NETWORK, PROCESS, x[::2], teacher_x[::2], t, 1.2, objective, 10, lambda sums: sums + other[0])
    assert both == pytest.approx(gradient, abs=1e-10)


# Step sizes


def test_literal_gradient_is_the_derivative() -> None:
    """d of eq. 8 on the rows of a network: (1 / N) s*(x*, t) against kappa s(x, tau), generalised KL, mean over rows."""
    kappa, tau, t, steps = 0.07, 0.8, 0.5, 64
    x, teacher_x = two_states(0.8)

    def score(state: Tensor, time: float) -> np.ndarray:
        alpha = 1 - (1 - 1e-3) * time
        p = NETWORK(state, time)[..., :MASK].double().softmax(-1)
        return (alpha / (1 - alpha) * p[(x == MASK) & (teacher_x == MASK)]).numpy()

    own, star = score(x, tau), score(teacher_x, t) / steps

    def d(k: float) -> float:
        return float(np.sum(k * own - star + star * np.log(star / (k * own))) / len(own))

    gradient = literal_kappa_gradient(PROCESS, time_of(tau), time_of(t), kappa, steps)
    assert gradient == pytest.approx((d(kappa + 1e-6) - d(kappa - 1e-6)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("t", [0.875, 0.5, 0.125])
def test_literal_optimum_is_one_teacher_step(t: float) -> None:
    """S* / S / N: at equal times exactly 1 / N, where a sampler of M steps would need 1 / M."""
    at, steps = torch.tensor(t, dtype=torch.float64), 1024
    optimum = brentq(lambda kappa: literal_kappa_gradient(PROCESS, at, at, kappa, steps), 1e-6, 1.0, xtol=1e-14)
    assert optimum == pytest.approx(1 / steps, rel=1e-9)
    tau, odds = 0.75, lambda time: (1 - 0.999 * time) / (0.999 * time)
    later = torch.tensor(tau, dtype=torch.float64)
    optimum = brentq(lambda kappa: literal_kappa_gradient(PROCESS, later, at, kappa, steps), 1e-6, 1.0, xtol=1e-14)
    assert optimum == pytest.approx(odds(t) / odds(tau) / steps, rel=1e-6)


def untrained(steps: int, noise_schedule: str = "loglinear") -> LSDScheduler:
    scheduler = LSDScheduler(vocab_size=V, mask_token_id=MASK, noise_schedule=noise_schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def literal_times(steps: int, epochs: int, learning_rate: float) -> list[float]:
    args = Namespace(repaired=False, num_epochs=epochs, learning_rate=learning_rate, teacher_steps=1024)
    return learn_times(untrained(steps), torch.empty(0), args)


def test_literal_step_sizes_drift() -> None:
    """20 epochs at 1e-3, by hand for M = 2: kappa_1 falls by odds(1 - kappa_1) - odds(1/2) / (1024 kappa_1) each time."""
    kappa = 0.5
    for _ in range(20):
        tau = 1 - kappa
        gradient = (1 - 0.999 * tau) / (0.999 * tau) - (1 - 0.999 * 0.5) / (0.999 * 0.5) / 1024 / kappa
        kappa -= 1e-3 * gradient
    assert literal_times(2, 20, 1e-3) == pytest.approx([1, 1 - kappa, 0], abs=1e-12)
    # Where the score is large the same 20 epochs go far: the last step has more than all others together.
    times = literal_times(16, 20, 1e-3)
    assert times[1] == pytest.approx(1 - 1 / 16, abs=0.003)
    assert times[-2] > 0.3


@pytest.mark.parametrize("steps", [4, 8, 16])
def test_literal_step_sizes_stop_short(steps: int) -> None:
    """Until convergence: M - 1 steps do next to nothing, and the last one has to open nearly everything."""
    assert literal_times(steps, 100, 3e-2)[-2] > 0.75
    assert literal_times(steps, 1, 1e-9)[-2] == pytest.approx(1 / steps, abs=1e-6)


def exact_openings(process: AbsorbingProcess, times: Tensor, teacher_steps: int) -> tuple[Tensor, Tensor]:
    """Expected openings per sequence position in each interval of `times`, and masks at its start, of a teacher that opens
    with (1 / N) hazard(t_j), step by step."""
    opened, weights = torch.zeros(len(times) - 1, dtype=torch.float64), torch.zeros(len(times) - 1, dtype=torch.float64)
    masked = 1.0
    for j in range(teacher_steps):
        t = 1 - j / teacher_steps
        k = int((times[:-1] >= t - 1e-12).sum()) - 1
        if weights[k] == 0:
            weights[k] = masked
        now = masked * float(process.hazard(t)) / teacher_steps
        opened[k] += now
        masked -= now
    return opened, weights


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear"])
@pytest.mark.parametrize(("steps", "teacher_steps"), [(1, 8), (2, 8), (4, 64), (16, 1024)])
def test_repaired_step_sizes_of_a_uniform_teacher(noise_schedule: str, steps: int, teacher_steps: int) -> None:
    process = AbsorbingProcess(V, MASK, noise_schedule)
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    kappa = repaired_step_sizes(process, *exact_openings(process, uniform, teacher_steps))
    assert kappa.tolist() == pytest.approx([1 / steps] * steps, abs=1e-9)
    assert float(kappa.sum()) == pytest.approx(1, abs=1e-12)
    assert (kappa > 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_repaired_step_sizes_open_as_the_teacher(seed: int) -> None:
    """Any grid is found again from its own openings, whatever the weights; and noise in them moves it a little only."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    wanted /= wanted.sum()
    tau = 1 - wanted.cumsum(0) + wanted
    weights = 100 * torch.rand(8, generator=generator, dtype=torch.float64) + 1
    opened = weights * wanted / tau
    assert repaired_step_sizes(PROCESS, opened, weights).tolist() == pytest.approx(wanted.tolist(), abs=1e-8)

    noisy = opened * (1 + 0.05 * torch.randn(8, generator=generator, dtype=torch.float64))
    kappa = repaired_step_sizes(PROCESS, noisy, weights)
    assert (kappa > 0).all()
    assert float(kappa.sum()) == pytest.approx(1, abs=1e-12)
    opening, target = kappa / (1 - kappa.cumsum(0) + kappa), noisy / weights
    assert opening[:-1].tolist() == pytest.approx(target[:-1].tolist(), abs=1e-6)  # the last step opens the rest


def test_repaired_times_of_a_rolled_teacher() -> None:
    """From counts of masks, as `distill` has them: near the uniform grid, and fine where a count is 0."""
    noise, teacher = draw_noise(range(64), LENGTH, seed=0), untrained(64)
    roll = CoupledRoll(NETWORK, teacher, noise, torch.full((64, LENGTH), MASK), 64)
    masked = torch.zeros(64, dtype=torch.float64)
    for index in range(64):
        masked[index] = (roll.state == MASK).sum()
        roll.step(index)
    args = Namespace(repaired=True, teacher_steps=64)
    assert learn_times(untrained(8), masked, args) == pytest.approx(np.linspace(1, 0, 9).tolist(), abs=0.03)
    few = torch.where(torch.arange(64) < 50, 3.0, 0.0).double()
    times = learn_times(untrained(8), few, args)
    assert all(a > b for a, b in pairwise(times))
    with pytest.raises(ValueError, match=r"--repaired.*'cosine'"):
        learn_times(untrained(8, "cosine"), masked, args)


def test_times_from_step_sizes() -> None:
    assert times_from_step_sizes(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)) == [1.0, 0.5, 0.25, 0.0]
    assert times_from_step_sizes(torch.tensor([1.0])) == [1.0, 0.0]
    assert times_from_step_sizes(torch.tensor([0.25, 0.25], dtype=torch.float64)) == [
        1.0,
        0.75,
        0.0,
    ]  # the rest at once
    for wrong in ([0.5, -0.1, 0.6], [0.5, 0.0, 0.5], [0.7, 0.3, 0.1], [0.9, 0.9, 0.1]):
        with pytest.raises(ValueError, match="strictly from 1 to 0"):
            times_from_step_sizes(torch.tensor(wrong))


# Shared noise


def test_noise_is_a_function_of_seed_and_index() -> None:
    whole = draw_noise(range(6), 5, seed=1)
    for indices in ([4], [5, 0, 3], range(1, 6, 2)):
        part = draw_noise(indices, 5, seed=1)
        for name in ("thresholds", "tokens", "junk", "junk_tokens"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[list(indices)])
    sheets = torch.stack([whole.thresholds, whole.tokens, whole.junk, whole.junk_tokens])
    assert sheets.dtype == torch.float64
    assert len(sheets.unique()) == sheets.numel()  # nothing is used twice
    assert ((sheets >= 0) & (sheets < 1)).all()
    assert not torch.equal(draw_noise(range(6), 5, seed=2).thresholds, whole.thresholds)


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.05, 1), (0.29, 29 * 20 // 100), (0.5, 10), (0.15, 3), (0.99, 19)]
)
def test_perturbed_start_has_floor_of_share_junk(share: float, count: int) -> None:
    unigram = torch.tensor([3.0, 0.0, 1.0, 0.0, 6.0, 0.0])
    start = perturbed_start(draw_noise(range(300), 20, seed=0), MASK, share, unigram)
    is_junk = start != MASK
    assert (is_junk.sum(1) == count).all()
    if count:
        tokens = torch.bincount(start[is_junk], minlength=V)
        assert chi_square_z(tokens, unigram.double()) < 4.5  # infinite for a token of probability 0, and for the mask
        assert chi_square_z(is_junk.sum(0), torch.ones(20, dtype=torch.float64)) < 4.5


def test_perturbed_start_counts_despite_rounding() -> None:
    assert 0.29 * 100 < 29
    start = perturbed_start(
        draw_noise(range(2), 100, seed=0), MASK, 0.29, torch.ones(V).index_fill(0, torch.tensor([MASK]), 0)
    )
    assert (start != MASK).sum(1).tolist() == [29, 29]


# Rolls


def rolled(
    scheduler: LSDScheduler, start: Tensor, denoiser: ExactDenoiser = NETWORK, batch_size: int = 100_000, seed: int = 0
) -> list[Tensor]:
    """The states before each step and after the last."""
    noise = draw_noise(range(len(start)), start.shape[1], seed)
    roll = CoupledRoll(denoiser, scheduler, noise, start, batch_size)
    states = [roll.state.clone()]
    for index in range(len(scheduler.timesteps)):
        roll.step(index)
        states.append(roll.state.clone())
    return states


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear"])
@pytest.mark.parametrize("scale", ["score", "log_score"])
def test_teacher_and_student_have_the_same_masks(noise_schedule: str, scale: str) -> None:
    """With Phi = 1, at every shared time, for every divisor: Euler steps of this noise multiply to the exact survival."""
    start = torch.full((40, LENGTH), MASK)
    teacher = rolled(untrained(64, noise_schedule), start)
    for steps in (1, 2, 4, 16, 32):
        student = LSDScheduler(vocab_size=V, mask_token_id=MASK, noise_schedule=noise_schedule, scale=scale)
        student.set_timesteps(steps)
        states = rolled(student, start)
        for k, state in enumerate(states):
            assert torch.equal(state == MASK, teacher[k * 64 // steps] == MASK), (steps, k)
        assert not torch.equal(states[-1], teacher[-1])  # other contexts, other tokens
    shares = [float((state == MASK).double().mean()) for state in teacher[::16]]
    assert shares == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=0.12)


def test_junk_is_the_only_difference_of_a_perturbed_start() -> None:
    plain = torch.full((40, LENGTH), MASK)
    junk = perturbed_start(
        draw_noise(range(40), LENGTH, 0), MASK, 0.3, torch.ones(V).index_fill(0, torch.tensor([MASK]), 0)
    )
    teacher, student = rolled(untrained(64), plain), rolled(untrained(8), junk)
    for k, state in enumerate(student):
        assert torch.equal(state == MASK, (teacher[8 * k] == MASK) & (junk == MASK))
        assert torch.equal(state[junk != MASK], junk[junk != MASK])


@pytest.mark.parametrize("scale", ["score", "log_score"])
def test_rolls_do_not_depend_on_batches(scale: str) -> None:
    scheduler = LSDScheduler(
        vocab_size=V, mask_token_id=MASK, scale=scale, coefficients={"4": {"scale": [1.2, 0.8, 1.1, 1]}}
    )
    scheduler.set_timesteps(4)
    start = torch.full((12, LENGTH), MASK)
    whole = rolled(scheduler, start)
    for batch_size in (1, 5):
        assert all(
            torch.equal(a, b) for a, b in zip(rolled(scheduler, start, batch_size=batch_size), whole, strict=True)
        )


def test_network_sees_only_sequences_that_change() -> None:
    seen: list[int] = []

    def watched(x: Tensor, t: float) -> Tensor:
        seen.append(len(x))
        return NETWORK(x, t)

    rolled(untrained(64), torch.full((10, 3), MASK), as_denoiser(watched))
    assert sum(seen) <= 30  # each of 30 masks opens once
    assert sum(seen) >= 10


SETTINGS = {
    "score": {"coefficients": {"3": {"scale": [1.3, 0.6, 1.0]}}},
    "score, large": {"coefficients": {"3": {"scale": [5.0, 1.4, 1.0]}}},
    "log-score": {"scale": "log_score", "coefficients": {"3": {"scale": [1.2, 0.7, 1.0]}}},
    "log-score, sharp": {"scale": "log_score", "coefficients": {"3": {"scale": [0.9, 1.6, 1.0]}}},
    "times": {"grid": "learned", "coefficients": {"3": {"scale": [1.0, 1.1, 1.0], "times": [1.0, 0.8, 0.3, 0.0]}}},
    "temperature": {"temperature": 0.6, "top_p": 0.9, "coefficients": {"3": {"scale": [1.0] * 3}}},
    "log-score, temperature": {"scale": "log_score", "temperature": 0.6, "coefficients": {"3": {"scale": [1.1] * 3}}},
    "cosine": {"noise_schedule": "cosine", "coefficients": {"3": {"scale": [1.0, 1.2, 1.0]}}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_roll_has_the_law_of_the_scheduler(name: str) -> None:
    joint = random_joint(3, 3, seed=1)
    scheduler = LSDScheduler(vocab_size=4, mask_token_id=3, **SETTINGS[name])
    scheduler.set_timesteps(3)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    states = rolled(scheduler, torch.full((20_000, 3), 3), denoiser, seed=5)
    law = prior_law(scheduler, 3)
    for index in range(3):
        law = law @ step_matrix(scheduler, denoiser, index, 3)
        counts = torch.bincount(state_index(states[index + 1], 4), minlength=64)
        assert chi_square_z(counts, law) < 4.5, index
    assert torch.allclose(law, run_law(scheduler, denoiser, 3, 3))
