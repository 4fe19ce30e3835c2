"""Moves that are to leave every marginal as it is: the corrector of tau-leaping, the divergence-free part of flow matching."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
    total_variation,
)
from torch import Tensor

from discrete_schedulers import EulerScheduler, FlowMatchingScheduler, PredictorCorrectorScheduler, TauLeapingScheduler
from discrete_schedulers.processes import Process
from discrete_schedulers.schedulers import DiscreteScheduler

MASKED: dict[str, Any] = {"vocab_size": 4, "mask_token_id": 3}
UNIFORM: dict[str, Any] = {"vocab_size": 3, "process": "uniform"}
JOINT = random_joint(3, 3, seed=12, spread=1.0)
both_processes = pytest.mark.parametrize("kwargs", [MASKED, UNIFORM], ids=["absorbing", "uniform"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marginal(process: Process, joint: Joint, t: float) -> Tensor:
    """p_t over all states, (S,)."""
    clean = torch.zeros(process.vocab_size ** joint.states.shape[1], dtype=torch.float64)
    clean[state_index(joint.states, process.vocab_size)] = joint.p
    return clean @ forward_matrix(process, 0.0, t, joint.states.shape[1])


def calls_law(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int) -> Tensor:
    """Law of the last sample of a run, all its calls in turn, (S,)."""
    scheduler.set_timesteps(num_steps)
    law = prior_law(scheduler, 3)
    for index in range(len(scheduler.timesteps)):
        law = law @ step_matrix(scheduler, denoiser, index, 3)
    return law


def error(scheduler: DiscreteScheduler, num_steps: int, joint: Joint = JOINT) -> float:
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    return total_variation(joint.p, clean_part(calls_law(scheduler, denoiser, num_steps), scheduler, joint))


def run(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, x: Tensor, seed: int) -> Tensor:
    """The pipeline's loop, with rows where they are named, and times that stand there several times."""
    generator = seeded(seed)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        positions = scheduler.positions(t, x, generator)
        x = scheduler.step(denoiser(x, t, positions), t, x, generator=generator).prev_sample
    return x


# Predictor-corrector


def test_call_times_of_corrections() -> None:
    scheduler = PredictorCorrectorScheduler(**MASKED, num_corrector_steps=2, corrector_entry_time=0.5)
    assert scheduler.order == 3
    assert PredictorCorrectorScheduler(**MASKED).order == PredictorCorrectorScheduler.order == 2
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [1]
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    places = [scheduler.place(index) for index in range(8)]
    assert places == [(0, False), (1, False), (2, True), (2, True), (2, False), (3, True), (3, True), (3, False)]
    for entry, calls in [(1.0, 10), (0.1, 4), (0.0, 4)]:
        scheduler = PredictorCorrectorScheduler(**MASKED, num_corrector_steps=2, corrector_entry_time=entry)
        scheduler.set_timesteps(4)
        assert len(scheduler.timesteps) == calls  # t = 1 and the end are never corrected
    published = PredictorCorrectorScheduler(**MASKED)
    for num_steps, calls in [(9, 9), (10, 11), (20, 22)]:
        published.set_timesteps(num_steps)
        assert len(published.timesteps) == calls


def test_laws_of_the_calls_by_hand() -> None:
    """Log-linear noise, 4 steps: at t = 0.5 the hazard is 2, the forward rate .999 / .5005; a correction is 1.5 / 4 long."""
    scheduler = PredictorCorrectorScheduler(**MASKED, corrector_entry_time=1.0)
    scheduler.set_timesteps(4)  # calls at 1, .75 .75, .5 .5, .25 .25
    x = torch.tensor([[3, 1]])
    p = torch.tensor([0.5, 0.3, 0.2, 0.9], dtype=torch.float64)  # the mask's entry is not read
    logits = p.log().expand(1, 2, 4)
    stays = math.exp(-0.375 * 2)
    masked, token = scheduler.transition(logits, 3, x)[0].tolist()
    assert masked == pytest.approx([0.5 * (1 - stays), 0.3 * (1 - stays), 0.2 * (1 - stays), stays], abs=1e-12)
    falls = 1 - math.exp(-0.375 * 0.999 / 0.5005)
    assert token == pytest.approx([0, 1 - falls, 0, falls], abs=1e-12)
    assert scheduler.open_probability(3) == pytest.approx(1 - stays, abs=1e-12)
    assert scheduler.remask_probability(3) == pytest.approx(falls, abs=1e-12)
    leap = TauLeapingScheduler(**MASKED)
    leap.set_timesteps(4)
    for index, step in [(0, 0), (2, 1), (4, 2), (6, 3)]:
        laws = scheduler.transition(logits, index, x), leap.transition(logits, step, x)
        torch.testing.assert_close(*laws, rtol=0, atol=1e-15)
        assert scheduler.remask_probability(index) == 0


def test_a_correction_of_uniform_noise_by_hand() -> None:
    """Linear noise, t = 0.5: every other state at the rate 2 / 3 (1 + score)."""
    scheduler = PredictorCorrectorScheduler(
        **UNIFORM, noise_schedule="linear", corrector_entry_time=1.0, corrector_step=0.4
    )
    scheduler.set_timesteps(2)
    x = torch.tensor([[0]])
    p = [0.6, 0.3, 0.1]  # leave-one-out in proportion to .6 / (1 + 3), .3, .1, hence p_t to half of that and 1 / 6
    noisy = [0.5 * v / 0.55 + 1 / 6 for v in (0.15, 0.3, 0.1)]
    rates = [0.0, *(0.4 * 0.5 * 2 / 3 * (1 + v / noisy[0]) for v in noisy[1:])]
    stays = math.exp(-sum(rates))
    expected = [stays, *((1 - stays) * rate / sum(rates) for rate in rates[1:])]
    law = scheduler.transition(torch.tensor([[p]], dtype=torch.float64).log(), 1, x)[0, 0].tolist()
    assert law == pytest.approx(expected, abs=1e-12)


@both_processes
def test_draws_follow_the_law(kwargs: dict[str, Any]) -> None:
    scheduler = PredictorCorrectorScheduler(**kwargs, corrector_entry_time=0.7, num_corrector_steps=2)
    denoiser = random_denoiser(kwargs["vocab_size"])
    x = scheduler.sample_prior((6000, 3), seeded(1))
    law = calls_law(scheduler, denoiser, 4)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    counts = torch.bincount(state_index(run(scheduler, denoiser, 4, x, 2), kwargs["vocab_size"]), minlength=len(law))
    assert chi_square_z(counts, law) < 4.5


@both_processes
def test_draws_of_one_call_follow_its_law(kwargs: dict[str, Any]) -> None:
    """A correction, and a flow step with a divergence-free part, from tokens and noise."""
    corrector = PredictorCorrectorScheduler(**kwargs, corrector_entry_time=1.0)
    flow = FlowMatchingScheduler(**kwargs, divergence_free=2.0)
    width = kwargs["vocab_size"]
    x = torch.tensor([[width - 1, 1, 0]]).expand(8000, 3)
    denoiser = random_denoiser(width, seed=3)
    for scheduler, index in [(corrector, 3), (flow, 2)]:
        scheduler.set_timesteps(4)
        drawn = scheduler.step(denoiser(x, 0.5), index, x, generator=seeded(4)).prev_sample
        law = step_matrix(scheduler, denoiser, index, 3)[state_index(x[:1], width)][0]
        counts = torch.bincount(state_index(drawn, width), minlength=len(law))
        assert chi_square_z(counts, law) < 4.5


@both_processes
@pytest.mark.parametrize("noise_schedule", ["loglinear", "cosine"])
def test_a_correction_keeps_the_marginal(kwargs: dict[str, Any], noise_schedule: str) -> None:
    """p_s after one correction differs by the square of its length; repeated short ones lead to p_s from another law."""
    total = []
    for length in (0.04, 0.02, 0.01):
        scheduler = PredictorCorrectorScheduler(
            **kwargs, noise_schedule=noise_schedule, corrector_entry_time=0.5, corrector_step=length
        )
        scheduler.set_timesteps(4)
        assert scheduler.place(2) == (2, True)
        process = scheduler.noise_process
        matrix = step_matrix(scheduler, exact_denoiser(JOINT, process), 2, 3)
        p_s = marginal(process, JOINT, 0.5)
        total.append(total_variation(p_s, p_s @ matrix))
        assert total[-1] < 0.03 * float(1 - (p_s * matrix.diagonal()).sum())  # of what moves, nearly nothing is lost
    assert np.diff(np.log2(total)) == pytest.approx([-2, -2], abs=0.05)
    long_run = torch.linalg.matrix_power(matrix, 4096)
    start = prior_law(scheduler, 3) if process.prior_law().max() == 1 else torch.eye(len(p_s), dtype=torch.float64)[0]
    assert total_variation(p_s, start) > 0.5
    assert total_variation(p_s, start @ long_run) < 2e-3


def test_what_released_code_adds_does_not_keep_the_marginal() -> None:
    """The transposed forward rate (JYS, LSD) opens masks to every token alike and masks none."""
    scheduler = PredictorCorrectorScheduler(**MASKED, corrector_entry_time=0.5, corrector_step=0.01)
    scheduler.set_timesteps(4)
    process, states = scheduler.noise_process, all_states(4, 3)
    p_s = marginal(process, JOINT, 0.5)
    valid = step_matrix(scheduler, exact_denoiser(JOINT, process), 2, 3)
    forward = 0.0025 * float(-process.alpha_slope(0.5) / process.alpha(0.5))
    one = torch.eye(4, dtype=torch.float64)
    one[3] = torch.tensor([forward, forward, forward, 1 - 3 * forward])  # a mask to any token
    transposed = torch.stack([one[states[:, i]][:, states[:, i]] for i in range(3)]).prod(0)
    lost = total_variation(p_s, p_s @ transposed)
    assert lost > 50 * total_variation(p_s, p_s @ valid)


@both_processes
def test_laws_of_short_runs(kwargs: dict[str, Any]) -> None:
    """Exact laws at 1, 2, 4, 8 steps: one step is one call, without a correction; then corrections help, step for step."""
    plain = PredictorCorrectorScheduler(**kwargs, num_corrector_steps=0)
    corrected = PredictorCorrectorScheduler(**kwargs, corrector_entry_time=1.0, corrector_step=0.5)
    denoiser = exact_denoiser(JOINT, plain.noise_process)
    for num_steps in (1, 2, 4, 8):
        laws = [calls_law(scheduler, denoiser, num_steps) for scheduler in (plain, corrected)]
        leap = run_law(TauLeapingScheduler(**kwargs), denoiser, num_steps, 3)
        torch.testing.assert_close(laws[0], leap, rtol=0, atol=1e-13)
        assert float(clean_part(laws[1], corrected, JOINT).sum()) == pytest.approx(1, abs=1e-12)
        if num_steps == 1:
            torch.testing.assert_close(*laws, rtol=0, atol=1e-15)
        else:
            assert error(corrected, num_steps) < error(plain, num_steps)


@both_processes
def test_order_of_predictor_and_corrector(kwargs: dict[str, Any]) -> None:
    scheduler = PredictorCorrectorScheduler(**kwargs, corrector_entry_time=1.0)
    slopes = np.diff(np.log2([error(scheduler, n) for n in (16, 32)]))
    assert slopes == pytest.approx([-1], abs=0.15)


@pytest.mark.parametrize(("corrector_step", "loses"), [(0.5, 1.2), (1.5, 1.5)])
def test_corrections_cost_more_than_they_mend(corrector_step: float, loses: float) -> None:
    """With an exact network, a call is better spent on a step: error over that of tau-leaping with as many calls."""
    scheduler = PredictorCorrectorScheduler(**MASKED, corrector_entry_time=1.0, corrector_step=corrector_step)
    leap = TauLeapingScheduler(**MASKED)
    assert error(scheduler, 8) > loses * error(leap, 15)
    assert error(scheduler, 16) > loses * error(leap, 31)


def test_learned_corrections() -> None:
    """The number of the step that a correction follows; its length goes by that step."""
    learned = {"3": {"times": [1.0, 0.6, 0.1, 0.0], "corrector_step": [0.5, 2.0, 7.0]}}
    scheduler = PredictorCorrectorScheduler(**MASKED, corrector_entry_time=1.0, grid="learned", coefficients=learned)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [1, 0.6, 0.6, 0.1, 0.1]
    assert scheduler.correction_length(1) == pytest.approx(0.5 * 0.4, abs=1e-15)
    assert scheduler.correction_length(2) == pytest.approx(2.0 * 0.5, abs=1e-15)
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 4"):
        scheduler.set_timesteps(4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_corrector_steps": -1}, "`num_corrector_steps` is -1; it must be at least 0"),
        ({"corrector_entry_time": 1.5}, r"`corrector_entry_time` is 1.5; allowed are times in \[0, 1\]"),
        ({"corrector_step": -0.5}, "`corrector_step` is -0.5; allowed are numbers of at least 0"),
        ({"coefficients": {"2": {"corrector_step": [1, -1]}}}, "`corrector_step` for 2 steps is .* of at least 0"),
    ],
)
def test_corrections_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictorCorrectorScheduler(**MASKED, **kwargs)


# Flow matching


def test_masked_flow_matching_is_tau_leaping() -> None:
    """With c = 0, for every noise, also in its draws."""
    x = torch.tensor([[3, 0, 3, 3], [2, 3, 3, 1]])
    logits = random_denoiser(4)(x, 1.0)
    for noise_schedule in ("loglinear", "cosine"):
        flow, leap = (
            cls(**MASKED, noise_schedule=noise_schedule) for cls in (FlowMatchingScheduler, TauLeapingScheduler)
        )
        for scheduler in (flow, leap):
            scheduler.set_timesteps(5)
        for index in range(5):
            laws = [scheduler.transition(logits, index, x) for scheduler in (flow, leap)]
            torch.testing.assert_close(*laws, rtol=0, atol=1e-14)
            drawn = [one.step(logits, index, x, generator=seeded(index)).prev_sample for one in (flow, leap)]
            assert torch.equal(*drawn)


def flow_law(p: list[float], x: int, kappa: float, slope: float, h: float, c: float, prior: list[float]) -> list[float]:
    """The rule of the docstring, one clean token after the other."""
    law = [0.0] * len(p)
    for clean, chance in enumerate(p):
        u = [0.0] * len(p)
        for v in range(len(p)):
            if v != x:
                u[v] = slope / (1 - kappa) * (v == clean)
                u[v] += c * slope / (kappa * (1 - kappa)) * ((1 - kappa) * prior[v] + kappa * (v == clean))
        total = sum(u)
        jumps = 1 - math.exp(-h * total)
        law[x] += chance * (1 - jumps)
        for v in range(len(p)):
            law[v] += chance * jumps * u[v] / total if total else 0.0
    return law


@pytest.mark.parametrize("c", [0.0, 0.4, 3.0])
def test_flow_laws_by_the_rule(c: float) -> None:
    """Log-linear noise, 4 steps, t = 0.5: kappa = 0.5005, kappa' = 0.999."""
    p = [0.5, 0.2, 0.3, 0.0]
    logits = torch.tensor(p, dtype=torch.float64).log().expand(1, 2, 4)
    masked = FlowMatchingScheduler(**MASKED, divergence_free=c)
    uniform = FlowMatchingScheduler(**UNIFORM, divergence_free=c)
    for scheduler in (masked, uniform):
        scheduler.set_timesteps(4)
    law = masked.transition(logits, 2, torch.tensor([[3, 1]]))[0].tolist()
    prior = [0.0, 0.0, 0.0, 1.0]
    assert law[0] == pytest.approx(flow_law(p, 3, 0.5005, 0.999, 0.25, c, prior), abs=1e-12)
    assert law[1] == pytest.approx(flow_law([0, 1, 0, 0], 1, 0.5005, 0.999, 0.25, c, prior), abs=1e-12)
    for x in range(3):
        law = uniform.transition(logits[..., :3], 2, torch.tensor([[x, x]]))[0, 0].tolist()
        assert law == pytest.approx(flow_law(p[:3], x, 0.5005, 0.999, 0.25, c, [1 / 3] * 3), abs=1e-12)


@both_processes
@pytest.mark.parametrize("c", [0.0, 0.5, 3.0])
def test_flow_steps_keep_to_the_marginals(kwargs: dict[str, Any], c: float) -> None:
    """p_t leads to p_s up to the square of the step, for every c."""
    total = []
    for h in (0.005, 0.0025, 0.00125):
        coefficients = {"3": {"times": [1.0, 0.6, 0.6 - h, 0.0]}}
        scheduler = FlowMatchingScheduler(**kwargs, divergence_free=c, grid="learned", coefficients=coefficients)
        scheduler.set_timesteps(3)
        process = scheduler.noise_process
        matrix = step_matrix(scheduler, exact_denoiser(JOINT, process), 1, 3)
        p_t, p_s = marginal(process, JOINT, 0.6), marginal(process, JOINT, 0.6 - h)
        total.append(total_variation(p_s, p_t @ matrix))
    assert total[-1] < 0.1 * total_variation(p_s, p_t)
    assert np.diff(np.log2(total)) == pytest.approx([-2, -2], abs=0.05)


@both_processes
def test_laws_of_short_flows(kwargs: dict[str, Any]) -> None:
    scheduler = FlowMatchingScheduler(**kwargs, divergence_free=0.5)
    denoiser = exact_denoiser(JOINT, scheduler.noise_process)
    previous = math.inf
    for num_steps in (1, 2, 4, 8):
        law = run_law(scheduler, denoiser, num_steps, 3)
        assert float(clean_part(law, scheduler, JOINT).sum()) == pytest.approx(1, abs=1e-12)
        now = total_variation(JOINT.p, clean_part(law, scheduler, JOINT))
        if num_steps == 1:
            cube = JOINT.p.view(3, 3, 3)
            product = torch.einsum("a,b,c->abc", cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))).flatten()
            torch.testing.assert_close(clean_part(law, scheduler, JOINT), product, rtol=0, atol=1e-6)
        assert now < previous
        previous = now


def test_uniform_flows_converge_with_a_logarithm() -> None:
    """Rates at 1 / t, of which a position may take one a step: N times the error grows by as much with each doubling of N."""
    scheduler = FlowMatchingScheduler(**UNIFORM)
    joint = random_joint(3, 3, seed=12, spread=0.3)
    scaled = [n * error(scheduler, n, joint) for n in (32, 64, 128, 256)]
    growth = np.diff(scaled)
    assert (growth > 0.15 * scaled[0]).all()
    assert growth[1:] == pytest.approx(growth[:-1], rel=0.1)
    euler = EulerScheduler(**UNIFORM)
    assert error(scheduler, 4, joint) < error(euler, 4, joint)
    assert all(error(scheduler, n, joint) > error(euler, n, joint) for n in (8, 16, 32))


def test_divergence_free_refusals_and_lists() -> None:
    with pytest.raises(ValueError, match=r"`divergence_free` is -0\.1; allowed are numbers of at least 0"):
        FlowMatchingScheduler(**MASKED, divergence_free=-0.1)
    with pytest.raises(ValueError, match=r"`divergence_free` for 2 steps is .* of at least 0"):
        FlowMatchingScheduler(**MASKED, coefficients={"2": {"divergence_free": [0.0, -1.0]}})
    learned = FlowMatchingScheduler(**MASKED, coefficients={"4": {"divergence_free": [0.0, 0.4, 3.0, 9.0]}})
    learned.set_timesteps(4)
    tokens = torch.ones(1, 4000, dtype=torch.int64)
    one = FlowMatchingScheduler(**MASKED, divergence_free=1.0)
    one.set_timesteps(4)
    fallen = one.step(torch.zeros(1, 4000, 4), 2, tokens, generator=torch.Generator().manual_seed(0)).prev_sample == 3
    share = float(one.transition(torch.zeros(1, 1, 4), 2, tokens[:, :1])[0, 0, 3])
    assert float(fallen.double().mean()) == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / 4000))
    assert share > 0.1
    for index, c in enumerate([0.0, 0.4, 3.0]):
        constant = FlowMatchingScheduler(**MASKED, divergence_free=c)
        constant.set_timesteps(4)
        assert learned.intensities(index) == constant.intensities(index)
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3"):
        learned.set_timesteps(3)


def test_a_flow_from_infinite_rates() -> None:
    """Linear noise has kappa = 0 at t = 1: all that can fall back to the prior does, and masks open as they should."""
    masked = FlowMatchingScheduler(**MASKED, noise_schedule="linear", divergence_free=1.0)
    masked.set_timesteps(4)
    law = masked.transition(torch.zeros(1, 2, 4), 0, torch.tensor([[3, 1]]))[0]
    opens = 1 - math.exp(-2 * 0.25)
    assert law[0].tolist() == pytest.approx([opens / 3] * 3 + [1 - opens], abs=1e-12)
    assert law[1].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-12)
    uniform = FlowMatchingScheduler(**UNIFORM, noise_schedule="linear", divergence_free=1.0)
    uniform.set_timesteps(4)
    law = uniform.transition(torch.zeros(1, 1, 3), 0, torch.tensor([[1]]))[0, 0]
    assert law.tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-8)
