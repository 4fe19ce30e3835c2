"""Laws and contract of every scheduler in the one list (scheduler_cases.py), and what is special to each."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import (
    SUBSET_LAWS,
    ExactDenoiser,
    Joint,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    kl,
    path_kl,
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
    total_variation,
)
from scheduler_cases import BUDGETS, CASES, INFORMATION_CURVE, SCALE, SCALE_AND_TIMES, TIMES, SchedulerCase
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DiscreteScheduler,
    DiscreteSchedulerOutput,
    EulerScheduler,
    InformationCurve,
    LSDScheduler,
    RowLogits,
    TauLeapingScheduler,
    optimal_times,
    sampling,
)
from discrete_schedulers.sampling import Generators
from discrete_schedulers.schedulers import order_utils, scheduling_utils
from discrete_schedulers.schedulers.scheduling_utils import FactorisedScheduler, jump_share

CLASSES = list(dict.fromkeys(case.cls for case in CASES))
ABSORBING = [cls for cls in CLASSES if "absorbing" in cls.processes]
NAMED = {case.name: case for case in CASES}
LENGTH, TOKENS = 3, 3  # of the joints


def every(cases: list[SchedulerCase]) -> Any:
    """One test for each case; beyond the first two of a class they count as slow, to keep the fast tests fast."""
    params, seen = [], Counter()
    for case in cases:
        seen[case.cls] += 1
        params.append(pytest.param(case, id=case.name, marks=[pytest.mark.slow] if seen[case.cls] > 2 else []))
    return pytest.mark.parametrize("case", params)


every_case = every(CASES)
every_law = every([case for case in CASES if case.has_law])
every_transition = every([case for case in CASES if issubclass(case.cls, FactorisedScheduler)])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def num_states(case: SchedulerCase) -> int:
    """V of the joint with 3 tokens: with the mask, where there is one."""
    return TOKENS + case.is_absorbing


def run(
    scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, x: Tensor, generator: Generators
) -> Tensor:
    """The pipeline's loop with all logits: the samples after N steps."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
    return x


def partly_known(case: SchedulerCase, batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Samples in which two thirds of the positions are noise still."""
    x = torch.randint(0, vocab_size - case.is_absorbing, (batch, length), generator=seeded(seed))
    if case.is_absorbing:
        x[torch.rand(batch, length, generator=seeded(seed + 1)) < 2 / 3] = vocab_size - 1
    return x


# Laws


@every_law
def test_rows_of_the_step_law_sum_to_1(case: SchedulerCase) -> None:
    scheduler = case.build(num_states(case))
    for num_steps in (1, 3, 7):
        scheduler.set_timesteps(num_steps)
        for index in range(num_steps):
            matrix = step_matrix(scheduler, random_denoiser(num_states(case)), index, LENGTH)
            assert (matrix >= 0).all()
            torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12)


@every_law
def test_draws_of_a_step_follow_its_law(case: SchedulerCase) -> None:
    """Random logits, from a sample with and without revealed tokens, in the first, a middle and the last step."""
    width, batch = num_states(case), 2500
    scheduler, denoiser = case.build(width), random_denoiser(width, seed=1)
    scheduler.set_timesteps(3)
    noise = width - 1
    starts = [(0, [noise] * 3), (1, [noise, 1, noise]), (1, [noise] * 3), (2, [0, noise, 1])]
    for index, start in starts:
        x = torch.tensor([start]).expand(batch, LENGTH)
        drawn = scheduler.step(denoiser(x, 1.0), index, x, generator=seeded(index)).prev_sample
        law = step_matrix(scheduler, denoiser, index, LENGTH)[state_index(x[:1], width)][0]
        counts = torch.bincount(state_index(drawn, width), minlength=len(law))
        assert chi_square_z(counts, law) < 4.5


SLOW = [pytest.param(num_steps, marks=pytest.mark.slow) for num_steps in (1, 2, 8)]


@every_law
@pytest.mark.parametrize("num_steps", [4, *SLOW])
def test_samples_of_a_run_follow_its_law(case: SchedulerCase, num_steps: int) -> None:
    width, batch = num_states(case), 2500
    scheduler = case.build(width)
    denoiser = exact_denoiser(random_joint(TOKENS, LENGTH, seed=4), scheduler.noise_process)
    x = scheduler.sample_prior((batch, LENGTH), seeded(5))
    samples = run(scheduler, denoiser, num_steps, x, seeded(6))
    law = run_law(scheduler, denoiser, num_steps, LENGTH)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12)
    assert chi_square_z(torch.bincount(state_index(samples, width), minlength=len(law)), law.clamp(min=0)) < 4.5


@pytest.mark.parametrize(("length", "grid_shape"), [(5, None), (6, [2, 3])])
def test_spread_order_follows_its_law(length: int, grid_shape: list[int] | None) -> None:
    """Long enough for distances to matter. Two tokens and the mask."""
    scheduler = NAMED["ancestral-spread"].build(3, grid_shape=grid_shape)
    denoiser = exact_denoiser(random_joint(2, length, seed=7), scheduler.noise_process)
    x = scheduler.sample_prior((4000, length))
    law = run_law(scheduler, denoiser, 3, length)
    counts = torch.bincount(state_index(run(scheduler, denoiser, 3, x, seeded(8)), 3), minlength=3**length)
    assert chi_square_z(counts, law) < 4.5
    other = run_law(NAMED["ancestral"].build(3), denoiser, 3, length)
    assert total_variation(law, other) > 0.01  # the random order has another law


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_absorbing and case.has_law], ids=lambda case: case.name
)
def test_one_step_draws_the_product_of_the_marginals(case: SchedulerCase) -> None:
    """N = 1: every position from its own marginal, sharpened where the case says so."""
    joint = random_joint(TOKENS, LENGTH, seed=9)
    scheduler = case.build(TOKENS + 1)
    law = run_law(scheduler, exact_denoiser(joint, scheduler.noise_process), 1, LENGTH)
    cube = joint.p.view(TOKENS, TOKENS, TOKENS)
    marginals = [cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))]
    if case.name == "ancestral-sharpened":
        marginals = [sharpen(p, case.kwargs["temperature"], case.kwargs["top_p"]) for p in marginals]
    expected = torch.einsum("a,b,c->abc", *marginals).flatten()
    torch.testing.assert_close(clean_part(law, scheduler, joint), expected, rtol=0, atol=1e-12)


def sharpen(p: Tensor, temperature: float, top_p: float) -> Tensor:
    """p^(1 / temperature), then the fewest most probable tokens with a mass of at least top_p."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    kept, mass = [], 0.0
    for v in sorted(range(len(p)), key=lambda v: -float(p[v])):
        if mass < top_p:
            kept.append(v)
            mass += float(p[v])
    sharp = torch.zeros_like(p)
    sharp[kept] = p[kept]
    return sharp / sharp.sum()


def test_temperature_and_top_p_by_hand() -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4, temperature=0.5, top_p=0.8)
    logits = torch.cat([p.log() + 7, torch.tensor([50.0], dtype=torch.float64)])  # the mask's own logit is not read
    law = scheduler.transition(logits.expand(1, 1, 5), 0, torch.tensor([[4]]))[0, 0]
    # squares .01 .16 .04 .09 of .30: the mass above token 2 is .25 / .30 > .8, so two tokens stay
    expected = torch.tensor([0, 0.16 / 0.25, 0, 0.09 / 0.25, 0], dtype=torch.float64)
    torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ancestral", "ancestral-linear", "ancestral-spread", "ancestral-spread-optimal"])
@pytest.mark.parametrize("num_steps", [LENGTH, 8])
def test_one_token_for_each_step_is_exact(name: str, num_steps: int) -> None:
    joint = random_joint(TOKENS, LENGTH, seed=10)
    scheduler = NAMED[name].build(TOKENS + 1)
    law = run_law(scheduler, exact_denoiser(joint, scheduler.noise_process), num_steps, LENGTH)
    assert kl(joint.p, clean_part(law, scheduler, joint)) < 1e-12


def test_counts_are_closer_than_bernoulli_with_the_same_steps() -> None:
    joint = random_joint(2, 4, seed=11)
    excess = []
    for name in ("ancestral", "ancestral-bernoulli"):
        scheduler = NAMED[name].build(3)
        law = run_law(scheduler, exact_denoiser(joint, scheduler.noise_process), 2, 4)
        excess.append(kl(joint.p, clean_part(law, scheduler, joint)))
    assert 0 < excess[0] < 0.8 * excess[1]


FIRST_ORDER = [
    case
    for case in CASES
    if case.has_law
    and not {"coefficients", "draw", "temperature"} & set(case.kwargs)
    and not (case.cls is AncestralScheduler and case.is_absorbing and "unmasking" not in case.kwargs)
    and case.cls.__name__ not in SUBSET_LAWS  # exact with as many steps as tokens
]


@pytest.mark.parametrize("case", FIRST_ORDER, ids=lambda case: case.name)
def test_order_of_convergence(case: SchedulerCase) -> None:
    """The law of the samples has an error of N^-order. Its KL is quadratic in the error, so it falls twice as fast."""
    joint = random_joint(TOKENS, LENGTH, seed=12)
    scheduler = case.build(num_states(case))
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    laws = [clean_part(run_law(scheduler, denoiser, n, LENGTH), scheduler, joint) for n in (32, 64, 128)]
    error = [total_variation(joint.p, law) for law in laws]
    assert error[0] > 1e-3  # there is something to fall
    for slope in np.diff(np.log2(error)):
        assert slope == pytest.approx(-scheduler.order, abs=0.15)
    assert -2.1 * scheduler.order < np.log2(kl(joint.p, laws[2]) / kl(joint.p, laws[1])) < -1.5 * scheduler.order


@pytest.mark.parametrize(
    "name",
    [
        "ancestral-bernoulli",
        "ancestral-bernoulli-cosine",
        "ancestral-uniform",
        "ancestral-uniform-cosine",
        "euler",
        "tau-leaping",
        "tau-leaping-reject",
    ],
)
def test_kl_of_the_path_falls_as_1_over_n(name: str) -> None:
    """The KL of whole paths, which theory bounds (O(T / N) for first order), and which bounds that of the samples. Needs
    alpha_1 = 0, and a step that can do all that the process can (not so: leaps of the uniform process at its infinite
    rate at t = 1, Euler steps of cosine noise at its zero hazard there)."""
    case = NAMED[name]
    joint = random_joint(TOKENS, LENGTH, seed=12)
    scheduler = case.build(num_states(case), **{"noise_schedule": "linear"} | case.kwargs)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    path = [path_kl(scheduler, denoiser, n, joint) for n in (16, 32, 64)]
    for slope in np.diff(np.log2(path)):
        assert slope == pytest.approx(-1, abs=0.2)
    law = clean_part(run_law(scheduler, denoiser, 64, LENGTH), scheduler, joint)
    assert kl(joint.p, law) < path[2]


# Invariants


@every_case
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_invariants_under_random_logits(case: SchedulerCase, num_steps: int) -> None:
    """Revealed tokens stay, no mask is left, ids are in range: whatever the network says about masks and known tokens."""
    vocab_size = 7
    scheduler, denoiser = case.build(vocab_size), random_denoiser(vocab_size, seed=2)
    x = partly_known(case, 8, 10, vocab_size)
    generator = seeded(3)
    scheduler.set_timesteps(num_steps)
    assert num_steps <= len(scheduler.timesteps) <= num_steps * scheduler.order
    for t in scheduler.timesteps:
        before = x
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
        assert x.dtype == torch.int64
        assert x.shape == before.shape
        assert ((x >= 0) & (x < vocab_size)).all()
        if case.keeps_tokens:
            known = before != vocab_size - 1
            assert torch.equal(x[known], before[known])
    if case.is_absorbing:
        assert (x != vocab_size - 1).all()


@every_case
def test_a_full_sample_passes_through(case: SchedulerCase) -> None:
    if not case.keeps_tokens:
        pytest.skip("every token can move")
    scheduler = case.build(7)
    x = torch.randint(0, 6, (4, 9), generator=seeded())
    assert torch.equal(run(scheduler, random_denoiser(7), 3, x, seeded(1)), x)


READ_ALL: set[str] = {
    "path-planning",
    "path-planning-blocks",
}  # absorbing, and need all logits by their nature


@every_case
def test_chosen_rows_and_all_logits_give_the_same_samples(case: SchedulerCase) -> None:
    """What `positions` names and what `step` chooses itself are one draw, from one stream of the generator."""
    vocab_size = 7
    scheduler, denoiser = case.build(vocab_size), random_denoiser(vocab_size, seed=4)
    scheduler.set_timesteps(7)
    dense = sparse = partly_known(case, 5, 12, vocab_size)
    dense_generator, sparse_generator = seeded(5), seeded(5)
    for index, t in enumerate(scheduler.timesteps):  # by index: a time may name several calls in turn
        dense = scheduler.step(denoiser(dense, t), index, dense, generator=dense_generator).prev_sample
        positions = scheduler.positions(index, sparse, sparse_generator)
        if positions is None:
            draws = case.kwargs.get("draw", "exact") != "exact" or case.kwargs.get("scale") == "log_score"
            assert draws or not case.is_absorbing or case.name in READ_ALL  # nothing else needs the logits
        elif case.keeps_tokens:
            assert not (positions & (sparse != vocab_size - 1)).any()
        sparse = scheduler.step(denoiser(sparse, t, positions), index, sparse, generator=sparse_generator).prev_sample
        assert torch.equal(dense, sparse)
    assert torch.equal(dense_generator.get_state(), sparse_generator.get_state())


@every_transition
def test_positions_open_as_often_as_the_transition_says(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    scheduler.set_timesteps(7)
    masks = torch.full((1, 2), 6)
    if scheduler.chooses_by_logits:
        pytest.skip("the logits decide which of the positions move")
    if case.cls.__name__ in SUBSET_LAWS:
        pytest.skip("how many open depends on how many masks there are")
    if not case.is_absorbing or scheduler.positions(0, masks, seeded()) is None:
        pytest.skip("the logits decide which positions move, or a position may draw the token that it has")
    logits = random_denoiser(7)(masks, 1.0)
    for index in range(7):
        law = scheduler.transition(logits, index, masks)
        assert scheduler.open_probability(index) == pytest.approx(1 - float(law[0, 0, 6]), abs=1e-12)


@every_case
def test_a_batch_is_its_rows_one_by_one(case: SchedulerCase) -> None:
    def generators(rows: range) -> list[torch.Generator]:
        return [seeded(50 + row) for row in rows]

    vocab_size = 7
    scheduler, denoiser = case.build(vocab_size), random_denoiser(vocab_size, seed=6)
    x = partly_known(case, 4, 9, vocab_size)
    x[1, 4:] = 0  # rows with different numbers of masks
    batch = run(scheduler, denoiser, 3, x, generators(range(4)))
    for row in range(4):
        alone = run(scheduler, denoiser, 3, x[row : row + 1], generators(range(row, row + 1)))
        assert torch.equal(alone[0], batch[row])


@every_case
def test_the_same_seed_gives_the_same_samples(case: SchedulerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where weights are summed in several blocks, as over a wide vocabulary, and rows come two at a time."""
    vocab_size = 9
    scheduler, denoiser = case.build(vocab_size), random_denoiser(vocab_size)
    x = partly_known(case, 4, 9, vocab_size)
    first, other = (run(scheduler, denoiser, 3, x, seeded(seed)) for seed in (1, 2))
    assert not torch.equal(first, other)
    for module in (sampling, order_utils):
        monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(sampling, "CPU_CHUNK", 2 * vocab_size)
    assert torch.equal(first, run(scheduler, denoiser, 3, x, seeded(1)))


@every_case
def test_transition_and_step_change_nothing(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    scheduler.set_timesteps(3)
    x = partly_known(case, 4, 9, 7)
    logits, config, times = random_denoiser(7)(x, 1.0), dict(scheduler.config), scheduler.times.clone()
    kept_x, kept_logits = x.clone(), logits.clone()
    if isinstance(scheduler, FactorisedScheduler):
        scheduler.transition(logits, 1, x)
    scheduler.step(logits, scheduler.order, x, generator=seeded())  # the first call of a step
    assert torch.equal(x, kept_x)
    assert torch.equal(logits, kept_logits)
    assert torch.equal(scheduler.times, times)
    assert dict(scheduler.config) == config


@every_transition
def test_the_law_is_differentiable_in_the_logits(case: SchedulerCase) -> None:
    """The gradient of one entry of the law against its difference quotient."""
    width = num_states(case)
    scheduler = case.build(width)
    scheduler.set_timesteps(3)
    x = torch.tensor([[width - 1]])
    logits = random_denoiser(width, seed=8)(x, 1.0).requires_grad_()

    def entry(logits: Tensor) -> Tensor:
        return scheduler.transition(logits, 1, x)[0, 0, 0]

    (slope,) = torch.autograd.grad(entry(logits), logits)
    assert slope.isfinite().all()
    h = 1e-6
    bump = torch.zeros_like(logits)
    bump[0, 0, 1] = h
    with torch.no_grad():
        quotient = float(entry(logits + bump) - entry(logits - bump)) / (2 * h)
    assert float(slope[0, 0, 1]) == pytest.approx(quotient, abs=1e-8)


# Time


@every_case
@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_grids_fall_strictly_from_1_to_0_in_float64(case: SchedulerCase, num_steps: int) -> None:
    scheduler = case.build(7)
    scheduler.set_timesteps(np.int64(num_steps), device="cpu")
    assert scheduler.num_inference_steps == num_steps
    assert scheduler.times.dtype == scheduler.timesteps.dtype == torch.float64
    assert scheduler.times.shape == (num_steps + 1,)
    if scheduler.order == 1:
        assert torch.equal(scheduler.timesteps, scheduler.times[:-1])
    assert scheduler.timesteps[0] == 1
    assert (scheduler.timesteps.diff() <= 0).all()
    assert scheduler.timesteps[-1] > 0
    assert scheduler.times[0] == 1
    assert scheduler.times[-1] == 0
    assert (scheduler.times.diff() < 0).all()


def test_chances_are_worked_out_before_the_first_call() -> None:
    """So that a compiled step only reads them."""
    scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4, noise_schedule="linear")
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.openings.tolist(), [1 / 4, 1 / 3, 1 / 2, 1.0], rtol=1e-14, atol=0)


def test_share_of_jumps_by_hand() -> None:
    """(1 - e^-x) / x is 1 at 0, and its slope is a number there."""
    total = torch.tensor([0.0, math.log(2), 50.0], dtype=torch.float64, requires_grad=True)
    share = jump_share(total)
    torch.testing.assert_close(share.tolist(), [1.0, 0.5 / math.log(2), 0.02], rtol=1e-14, atol=0)
    assert torch.autograd.grad(share.sum(), total)[0].isfinite().all()


def test_grids_by_hand() -> None:
    def times(**kwargs: Any) -> list[float]:
        scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4, **kwargs)
        scheduler.set_timesteps(4)
        return scheduler.times.tolist()

    assert times() == [1, 0.75, 0.5, 0.25, 0]
    assert times(grid="cosine") == pytest.approx([math.cos(math.pi / 8 * k) for k in range(4)] + [0], abs=1e-15)
    curve = InformationCurve.from_config(INFORMATION_CURVE)
    share = optimal_times(curve, 4)
    assert share[1] > 0.75  # it goes slowly where the curve is steep
    for noise_schedule in ("loglinear", "linear", "cosine"):
        optimal = torch.tensor(
            times(grid="optimal", information_curve=INFORMATION_CURVE, noise_schedule=noise_schedule),
            dtype=torch.float64,
        )
        process = AbsorbingProcess(5, 4, noise_schedule)
        reached = torch.stack([(1 - process.alpha(t)) / (1 - process.alpha(1.0)) for t in optimal])  # share of masks
        torch.testing.assert_close(reached, share, rtol=0, atol=1e-12)
    assert times(grid="learned", coefficients=TIMES) == TIMES["4"]["times"]


@every_case
def test_an_index_and_a_time_name_the_same_step(case: SchedulerCase) -> None:
    scheduler, denoiser = case.build(7), random_denoiser(7)
    scheduler.set_timesteps(7)
    x = partly_known(case, 3, 6, 7)
    logits = denoiser(x, 1.0)
    if scheduler.order > 1:
        pytest.skip("its steps have halves: a call depends on the one before")
    for index, t in enumerate(scheduler.timesteps):
        names = [index, np.int32(index), torch.tensor(index), t, float(t), float(t.float())]
        assert [scheduler.step_index(name) for name in names] == [index] * len(names)
        drawn = [scheduler.step(logits, name, x, generator=seeded(index)).prev_sample for name in names]
        assert all(torch.equal(sample, drawn[0]) for sample in drawn)
    assert scheduler.step_index(1) == 1  # the index, while 1.0 is the first time
    assert scheduler.step_index(1.0) == 0


def test_a_scheduler_is_ready_for_one_step() -> None:
    scheduler = EulerScheduler(vocab_size=5, mask_token_id=4)
    assert scheduler.num_inference_steps is None
    assert scheduler.timesteps.tolist() == [1.0]
    assert scheduler.step_index(1.0) == 0


# Output and precision


@every_case
def test_step_returns_the_output_or_a_tuple(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    x = partly_known(case, 2, 5, 7)
    logits = random_denoiser(7)(x, 1.0)
    output = scheduler.step(logits, 0, x, generator=seeded())
    as_tuple = scheduler.step(logits, 0, x, generator=seeded(), return_dict=False)
    assert isinstance(output, DiscreteSchedulerOutput)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.prev_sample)
    assert output.pred_logits is not None
    assert output.pred_logits.shape == logits.shape
    if output.pred_original_sample is not None:
        assert torch.equal(output.pred_original_sample, scheduler.clean_law(logits).argmax(-1))
        assert torch.equal(output.pred_original_sample, as_tuple[1])
    assert list(inspect.signature(scheduler.step).parameters) == [
        "model_output",
        "timestep",
        "sample",
        "generator",
        "return_dict",
    ]


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_precision(case: SchedulerCase, dtype: torch.dtype) -> None:
    """Their law is that of the same numbers in float64, and the grid stays float64."""
    scheduler = case.build(7)
    scheduler.set_timesteps(7)
    x = partly_known(case, 3, 8, 7)
    logits = (5 * random_denoiser(7)(x, 1.0)).to(dtype)
    if isinstance(scheduler, FactorisedScheduler) and scheduler.order == 1:
        law = scheduler.transition(logits, 3, x)
        assert law.dtype == torch.float64
        torch.testing.assert_close(law, scheduler.transition(logits.double(), 3, x), rtol=1e-5, atol=1e-7)
    low, high = (
        scheduler.step(y, 3 * scheduler.order, x, generator=seeded()).prev_sample for y in (logits, logits.double())
    )
    assert torch.equal(low, high)
    assert scheduler.times.dtype == torch.float64


def test_diffusers_interface() -> None:
    scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4)
    x = torch.tensor([[0, 4]])
    assert scheduler.scale_model_input(x, 1.0) is x
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.sample_prior((2, 3)).tolist() == [[4] * 3] * 2
    uniform = AncestralScheduler(vocab_size=5, process="uniform")
    assert uniform.sample_prior((50, 3), seeded()).unique().tolist() == list(range(5))


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_add_noise_draws_the_marginal(process: str) -> None:
    case = SchedulerCase("any", AncestralScheduler, {"process": process})
    scheduler = case.build(3)
    scheduler.set_timesteps(4)
    x_0 = torch.tensor([[0, 1]]).expand(4000, 2)
    noise = scheduler.sample_prior((4000, 2), seeded(1))
    for timesteps in (torch.tensor([0.75]), torch.tensor([1]), torch.full((4000,), 0.75)):  # the index 1 is time 0.75
        for given in (None, noise, torch.randn(4000, 2)):  # diffusers passes Gaussian noise, which says nothing here
            x_t = scheduler.add_noise(x_0, given, timesteps, generator=seeded(2))
            law = scheduler.noise_process.marginal(x_0[:1], 0.75)[0]
            for i in range(2):
                assert chi_square_z(torch.bincount(x_t[:, i], minlength=3), law[i]) < 4.5
    with pytest.raises(ValueError, match="`timesteps` is required"):
        scheduler.add_noise(x_0)
    with pytest.raises(ValueError, match="time is"):
        scheduler.add_noise(x_0, None, torch.tensor([1.5]))


# Config


def own_config(scheduler: DiscreteScheduler) -> dict[str, Any]:
    """The config without diffusers' bookkeeping."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


ODD_FLOATS = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 1 - 2**-53, 2**-1074 * 3]


@every_case
def test_save_and_load_bit_for_bit(case: SchedulerCase, tmp_path: Path) -> None:
    learned_for = {"base_model": "a/b", "revision": "main", "vocab_size": 7, "metrics": {"nll": 1 / 3}}
    scheduler = case.build(7, learned_for=learned_for)
    scheduler.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path)
    assert own_config(loaded) == own_config(scheduler)
    assert set(own_config(loaded)) == set(inspect.signature(case.cls.__init__).parameters) - {"self"}
    scheduler.set_timesteps(7)
    loaded.set_timesteps(7)
    assert torch.equal(loaded.times, scheduler.times)
    x, denoiser = partly_known(case, 3, 6, 7), random_denoiser(7)
    assert torch.equal(run(loaded, denoiser, 7, x, seeded()), run(scheduler, denoiser, 7, x, seeded()))


def test_odd_floats_survive(tmp_path: Path) -> None:
    n = len(ODD_FLOATS)
    times = [1.0, *sorted([0.1, 1 / 3, 2**-50, 1 - 2**-53, 0.7], reverse=True), 0.0]
    coefficients = {str(n): {"scale": ODD_FLOATS, "times": times}}
    scheduler = LSDScheduler(
        vocab_size=5, mask_token_id=4, grid="learned", coefficients=coefficients, information_curve=ODD_FLOATS
    )
    scheduler.save_pretrained(tmp_path)
    for other in (LSDScheduler.from_pretrained(tmp_path), AncestralScheduler.from_pretrained(tmp_path)):
        assert other.config.coefficients == coefficients
        assert other.config.information_curve == ODD_FLOATS
        bits = [value.hex() for value in other.config.coefficients[str(n)]["scale"]]
        assert bits == [value.hex() for value in ODD_FLOATS]
        other.set_timesteps(n)
        assert other.times.tolist() == times


@every_case
def test_from_config_goes_through_every_class_and_back(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    for other_class in CLASSES:
        if scheduler.config.process not in other_class.processes:
            with pytest.raises(ValueError, match=f"`process` is '{scheduler.config.process}'; {other_class.__name__}"):
                other_class.from_config(scheduler.config)
            continue
        other = other_class.from_config(scheduler.config)
        for name in set(inspect.signature(other_class.__init__).parameters) & set(own_config(scheduler)):
            stays_behind = name == "grid" and case.name == "learned-counts" and other_class is not case.cls
            assert other.config[name] == ("uniform" if stays_behind else scheduler.config[name]), name
        assert own_config(case.cls.from_config(other.config)) == own_config(scheduler)


@pytest.mark.parametrize("other_class", ABSORBING)
def test_values_registered_after_init_survive_from_config(other_class: type[DiscreteScheduler], tmp_path: Path) -> None:
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4)
    scheduler.register_to_config(coefficients=SCALE_AND_TIMES, learned_for={"vocab_size": 5}, grid="learned")
    for copied in (other_class.from_config(scheduler.config), other_class.from_config(dict(scheduler.config))):
        assert copied.config.coefficients == SCALE_AND_TIMES
        assert copied.config.learned_for == {"vocab_size": 5}
        copied.set_timesteps(7)
        assert copied.times.tolist() == TIMES["7"]["times"]
    scheduler.save_pretrained(tmp_path)
    assert other_class.from_pretrained(tmp_path).config.coefficients == SCALE_AND_TIMES
    assert LSDScheduler.from_config(copied.config).phi(0) == SCALE["1"]["scale"][0]


def test_outputs_have_values_as_a_dict_too() -> None:
    """Also what is worked out only when it is asked for."""
    scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4, temperature=0.5)
    scheduler.set_timesteps(2)
    x = torch.full((1, 3), 4)
    for read in (lambda output: [value for _, value in output.items()], lambda output: list(output.values())):
        output = scheduler.step(random_denoiser(5)(x, 1.0), 0, x, generator=seeded())
        assert [type(value) for value in read(output)] == [
            Tensor
        ] * 2  # the sample and the logits that it was drawn with


LEAPING = (EulerScheduler, TauLeapingScheduler, LSDScheduler)


@pytest.mark.parametrize("cls", LEAPING)
def test_tables_are_there_before_the_first_step(cls: type[DiscreteScheduler]) -> None:
    """A compiled step reads them, and has no time to make them."""
    masked, uniform = cls(vocab_size=5, mask_token_id=4), cls(vocab_size=5, process="uniform")
    for scheduler in (masked, uniform):
        scheduler.set_timesteps(3)
    assert masked.openings.shape == (3,)
    assert uniform.jumps.shape == (3, 3)


def test_no_mask_opens_with_more_than_certainty() -> None:
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4, coefficients={"2": {"scale": [3.0, 1.0]}})
    scheduler.set_timesteps(2)
    assert scheduler.open_probability(0) == 1  # 3 (1 - 1/2) at the hazard 1


def test_a_coin_on_the_border_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform number in [0, 1) is below a chance with that chance, and 0 is not below 0."""
    scheduler, due = AncestralScheduler(vocab_size=5, mask_token_id=4), torch.tensor([0.25, 0.25, 0.0, 1.5]).double()
    monkeypatch.setattr(scheduling_utils, "uniforms", lambda *_: torch.tensor([[0.25], [0.2], [0.0], [0.9]]).double())
    assert scheduler.whole_counts(due, seeded()).tolist() == [0, 1, 0, 2]


def test_infinite_rates_are_1e9() -> None:
    """Linear noise has alpha_1 = 0; and a high power of the score has no other end."""
    p_0, start = torch.tensor([[[0.25, 0.75, 0.0]]], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    masked = LSDScheduler(vocab_size=3, mask_token_id=2, noise_schedule="linear")
    rate = masked.power_rate(torch.tensor([[2]]), p_0, start, 0.5)
    assert rate.flatten().tolist() == pytest.approx([0.5e9, math.sqrt(0.75) * 1e9, 0.0], rel=1e-12)
    uniform = LSDScheduler(vocab_size=3, process="uniform", noise_schedule="linear")
    rate = uniform.power_rate(torch.tensor([[2]]), p_0, 1e-9 * start, 40.0)
    assert rate.flatten().tolist() == [1e9, 1e9, 0.0]
    assert float(uniform.noise_process.jump_speed(1.0)) == 1e9


def test_the_config_is_detached_from_the_callers_lists() -> None:
    coefficients, curve = copy.deepcopy(SCALE), list(INFORMATION_CURVE)
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4, coefficients=coefficients, information_curve=curve)
    coefficients["2"]["scale"][0] = 99.0
    curve[0] = 99.0
    assert scheduler.config.coefficients == SCALE
    assert scheduler.config.information_curve == INFORMATION_CURVE


def test_integer_budgets_become_strings() -> None:
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4, coefficients={2: {"scale": [1, 2]}})
    assert scheduler.config.coefficients == {"2": {"scale": [1.0, 2.0]}}
    json.dumps(scheduler.config.coefficients)


def test_equal_names_have_equal_defaults() -> None:
    defaults: dict[str, Any] = {}
    for cls in CLASSES:
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name in ("process", "mask_token_id") and cls not in ABSORBING:
                continue
            assert defaults.setdefault(name, parameter.default) == parameter.default, (cls.__name__, name)


DEFAULT = re.compile(r"^ +(\w+) \(`[^`]*`, (?:defaults to `?([^`]+?)`?|\*optional\*)\):", re.MULTILINE)
MODULES = "processes sampling information exact scud training.objectives training.marginal training.temperatures"


def test_defaults_are_those_of_the_docstrings() -> None:
    """Of all schedulers, and of the functions and classes beside them."""
    things: list[Any] = list(CLASSES)
    for name in [*MODULES.split(), "training.jump_steps"]:
        module = importlib.import_module(f"discrete_schedulers.{name}")
        things += [t for t in vars(module).values() if getattr(t, "__module__", "") == module.__name__ and callable(t)]
    number = 0
    for thing in things:
        parameters = inspect.signature(thing).parameters
        for name, value in DEFAULT.findall(thing.__doc__ or ""):
            default = parameters[name].default
            said = eval(
                value or "None", {"torch": torch, "inf": math.inf} | vars(sys.modules[thing.__module__])
            )  # names of constants too
            assert (default, type(default)) == (said, type(said)), (thing, name)
            number += 1
    assert number > 250


def test_a_hub_out_of_reach_is_named(tmp_path: Path) -> None:
    """The tests are offline; a folder without a config is another matter."""
    with pytest.raises(OSError, match="the Hub cannot be reached, and the scheduler 'nobody/nothing'"):
        AncestralScheduler.from_pretrained("nobody/nothing", cache_dir=tmp_path)
    with pytest.raises(OSError, match="no file named scheduler_config"):
        AncestralScheduler.from_pretrained(tmp_path)


def test_compatibles_are_all_classes_of_the_process() -> None:
    for case in CASES:
        scheduler = case.build(5)
        assert set(scheduler.compatibles) == {cls for cls in CLASSES if scheduler.config.process in cls.processes}
    assert len({case.name for case in CASES}) == len(CASES)


@every_case
def test_a_config_comes_back_from_every_compatible_class(case: SchedulerCase) -> None:
    """Whole, with diffusers' list of what was not given, in the same order."""
    scheduler = case.build(5)
    for cls in scheduler.compatibles:
        back = type(scheduler).from_config(cls.from_config(scheduler.config).config)
        assert {name: back.config[name] for name in scheduler.config} == dict(scheduler.config)


def test_rest_of_the_base_keeps_its_signatures() -> None:
    """No scheduler adds a parameter to the contract."""
    for cls, name in itertools.product(CLASSES, ["step", "set_timesteps", "positions", "add_noise"]):
        ours, contract = (inspect.signature(getattr(c, name)) for c in (cls, DiscreteScheduler))
        assert ours.parameters == contract.parameters
        if issubclass(cls, FactorisedScheduler):
            assert inspect.signature(cls.transition) == inspect.signature(FactorisedScheduler.transition)


# Errors


@every_case
def test_steps_that_are_no_number_are_refused(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    for bad in (0, -3, 2.0, "8", None, True):
        with pytest.raises(ValueError, match=r"`num_inference_steps` is .*integer of at least 1"):
            scheduler.set_timesteps(bad)


@every_case
def test_times_that_are_no_step_are_refused(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    scheduler.set_timesteps(3)
    x = partly_known(case, 2, 4, 7)
    logits = random_denoiser(7)(x, 1.0)
    for bad in (0.123, 0.0, math.nan, -1.0):
        with pytest.raises(ValueError, match=r"`timestep` is .*not in `timesteps`: \d+ times from 1.0 to"):
            scheduler.step(logits, bad, x)
    calls = len(scheduler.timesteps)
    for bad in (calls, -1, 1000):
        with pytest.raises(ValueError, match=rf"`timestep` is step index .*allowed are 0 to {calls - 1}"):
            scheduler.step(logits, bad, x)


@every_case
def test_shapes_and_ids_that_do_not_fit_are_refused(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    x = partly_known(case, 2, 4, 7)
    logits = random_denoiser(7)(x, 1.0)
    for bad in (logits[..., :-1], logits[:, :-1], logits[:1], logits[0]):
        with pytest.raises(ValueError, match=r"`model_output` has shape .* is needed"):
            scheduler.step(bad, 0, x)
    for bad in (x.int(), x[0], x.double()):
        with pytest.raises(ValueError, match=r"`sample` is .* must be int64"):
            scheduler.step(logits, 0, bad)
    for bad_id in (-1, 7):
        with pytest.raises(ValueError, match=r"`sample` has ids from .* allowed are 0 to 6"):
            scheduler.step(logits, 0, torch.full_like(x, bad_id))
    chosen = torch.ones_like(x, dtype=torch.bool)
    with pytest.raises(ValueError, match="`model_output` has shape"):
        scheduler.step(RowLogits(logits[chosen][:-1], chosen), 0, x)
    with pytest.raises(ValueError, match=r"`model_output.positions` has shape \(1, 4\), but `sample` has \(2, 4\)"):
        scheduler.step(RowLogits(logits[0], chosen[:1]), 0, x)


@every_case
def test_logits_that_are_no_law_are_refused(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    x = partly_known(case, 2, 4, 7)
    for bad in (math.nan, math.inf):
        logits = random_denoiser(7)(x, 1.0)
        logits[..., 2] = bad
        with pytest.raises(ValueError, match=r"`model_output` has NaN, \+inf or no finite entry in \d+ of \d+ rows"):
            scheduler.step(logits, 0, x, generator=seeded())


@every_case
def test_one_generator_for_each_row(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    x = partly_known(case, 3, 4, 7)
    with pytest.raises(ValueError, match="`generator` is a list of 2, but the batch has 3 rows"):
        scheduler.step(random_denoiser(7)(x, 1.0), 0, x, generator=[seeded(), seeded()])


@pytest.mark.parametrize("cls", ABSORBING)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"process": "gaussian"}, "`process` is 'gaussian'; allowed: 'absorbing', 'uniform'"),
        ({"noise_schedule": "sqrt"}, "`noise_schedule` is 'sqrt'; allowed: 'loglinear'"),
        ({"grid": "random"}, "`grid` is 'random'; allowed: 'uniform', 'cosine', 'optimal', 'learned'"),
        ({"draw": "gumbel"}, "`draw` is 'gumbel'; allowed: 'exact'"),
        ({"temperature": -0.5}, "`temperature` is -0.5; it must be positive"),
        ({"temperature": math.nan}, "`temperature` is nan; it must be a finite number"),
        ({"top_p": 0.0}, r"`top_p` is 0.0; allowed are numbers in \(0, 1\]"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"vocab_size": 1}, "`vocab_size` is 1"),
        ({"mask_token_id": None}, "`mask_token_id` is None; an absorbing process needs one"),
        ({"mask_token_id": 5}, r"`mask_token_id` is 5; an absorbing process needs one in \[0, 5\)"),
        ({"process": "uniform"}, "`mask_token_id` must be None for the uniform process"),
        ({"grid": "optimal"}, "`grid='optimal'` needs `information_curve`"),
        (
            {"grid": "optimal", "process": "uniform", "mask_token_id": None},
            "`grid='optimal'` is for the absorbing process",
        ),
        ({"grid": "learned"}, "`grid='learned'` needs `coefficients`"),
        ({"coefficients": {"2": {"scale": [1.0]}}}, "`coefficients` for 2 steps: 'scale' has 1 values, needs 2"),
        ({"coefficients": {"2": {"times": [1.0, 0.0]}}}, "'times' has 2 values, needs 3"),
        ({"coefficients": {"2": {"scale": [1.0, math.nan]}}}, "'scale' has a value that is not finite"),
        ({"coefficients": {"2": {"scale": [1.0, math.inf]}}}, "'scale' has a value that is not finite"),
        ({"coefficients": {"zwei": {"scale": []}}}, "`coefficients` has budget 'zwei'; keys must be step budgets"),
        ({"coefficients": {"0": {"scale": []}}}, "`coefficients` has budget '0'"),
        ({"coefficients": {"2": {"times": [1.0, 0.5, 0.1]}}}, "'times' must fall strictly from 1 to 0"),
        ({"coefficients": {"2": {"times": [0.9, 0.5, 0.0]}}}, "'times' must fall strictly from 1 to 0"),
        ({"coefficients": {"3": {"times": [1.0, 0.5, 0.5, 0.0]}}}, "'times' must fall strictly from 1 to 0"),
        (
            {"coefficients": SCALE, "learned_for": {"vocab_size": 50258}},
            "`coefficients` were learned for `vocab_size` 50258, but this scheduler has 5",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_refused(cls: type[DiscreteScheduler], kwargs: dict[str, Any], message: str) -> None:
    if not set(kwargs) <= set(inspect.signature(cls.__init__).parameters):
        pytest.skip("this class has no such argument")
    if kwargs.get("process") == "uniform" and "uniform" not in cls.processes:
        message = f"`process` is 'uniform'; {cls.__name__} is for 'absorbing'"
    with pytest.raises(ValueError, match=message):
        cls(**({"vocab_size": 5, "mask_token_id": 4} | kwargs))


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (AncestralScheduler, {"unmasking": "threshold"}, "`unmasking` is 'threshold'; allowed: 'counts', 'bernoulli'"),
        (AncestralScheduler, {"order": "left"}, "`order` is 'left'; allowed: 'random', 'spread'"),
        (AncestralScheduler, {"draw": "one_stage_1e-6"}, "needs `unmasking='bernoulli'`"),
        (TauLeapingScheduler, {"jumps": "all"}, "`jumps` is 'all'; allowed: 'first', 'reject'"),
        (LSDScheduler, {"scale": "logits"}, "`scale` is 'logits'; allowed: 'score', 'log_score'"),
        (LSDScheduler, {"coefficients": {"2": {"scale": [1.0, -0.1]}}}, "'scale' .* cannot be negative"),
    ],
)
def test_arguments_of_one_class_that_are_refused(
    cls: type[DiscreteScheduler], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(vocab_size=5, mask_token_id=4, **kwargs)


@pytest.mark.parametrize("name", ["ancestral-grid-learned", "lsd", "lsd-plus", "lsd-log-score", "lsd-uniform"])
def test_a_missing_budget_lists_those_there_are(name: str) -> None:
    known = ", ".join(str(budget) for budget in BUDGETS)
    scheduler = NAMED[name].build(5)
    with pytest.raises(ValueError, match=f"no coefficients for `num_inference_steps` 5; learned budgets: {known}"):
        scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps is None  # and nothing has changed
    with pytest.raises(ValueError, match=r"learned budgets: none$"):
        AncestralScheduler(vocab_size=5, mask_token_id=4).budget(5)


KNOBS = {
    "Confidence": "score_temperature",
    "ConfidenceRemasking": "remask_mass",
    "DiscreteDDIM": "sigma_share",
    "FlowMatching": "divergence_free",
    "GibbsCorrector": "selection_temperature",
    "InformedCorrector": "selection_temperature",
    "Learn2PD": "threshold",
    "MaskGIT": "choice_temperature",
    "PredictorCorrector": "corrector_step",
    "Psi": "kappa",
    "ThetaRK2": "theta",
    "ThetaTrapezoidal": "theta",
    "WINO": "accept_threshold",
}


@pytest.mark.parametrize("name", KNOBS)
def test_a_learned_knob_is_read_and_missed_at_once(name: str) -> None:
    """The number of its step; for a budget without one an error, before anything changes."""
    case, knob = next(case for case in CASES if case.cls.__name__ == name + "Scheduler"), KNOBS[name]
    scheduler = case.build(5, coefficients={"2": {knob: [0.5, 0.25]}})
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3; learned budgets: 2"):
        scheduler.set_timesteps(3)
    assert scheduler.num_inference_steps is None
    assert len(scheduler.times) == 2
    scheduler.set_timesteps(2)
    assert [scheduler.per_step(knob, step) for step in range(2)] == [0.5, 0.25]


def test_a_missing_block_lists_those_there_are() -> None:
    scheduler = LSDScheduler(vocab_size=5, mask_token_id=4, coefficients=TIMES, grid="learned")
    with pytest.raises(ValueError, match=r"coefficients for 4 steps have no 'scale'; they have: \['times'\]"):
        scheduler.set_timesteps(4)
    scheduler = AncestralScheduler(vocab_size=5, mask_token_id=4, coefficients=SCALE, grid="learned")
    with pytest.raises(ValueError, match=r"coefficients for 4 steps have no 'times'; they have: \['scale'\]"):
        scheduler.set_timesteps(4)


# Ancestral and Euler


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear"])
@pytest.mark.parametrize("seed", range(8))
def test_euler_is_ancestral_for_absorbing_loglinear_noise(noise_schedule: str, seed: int) -> None:
    """For every network and every grid, since (t - s) sigma'(t) = exp(sigma(t) - sigma(s)) - 1."""
    generator, num_steps, vocab_size = seeded(seed), 9, 7
    inner = torch.rand(num_steps - 1, generator=generator, dtype=torch.float64).sort(descending=True).values.tolist()
    kwargs = {"grid": "learned", "coefficients": {str(num_steps): {"times": [1.0, *inner, 0.0]}}}
    kwargs |= {"vocab_size": vocab_size, "mask_token_id": vocab_size - 1, "noise_schedule": noise_schedule}
    euler, ancestral = EulerScheduler(**kwargs), AncestralScheduler(unmasking="bernoulli", **kwargs)
    x = torch.randint(0, vocab_size, (3, 8), generator=generator)
    logits = 4 * torch.randn(3, 8, vocab_size, generator=generator, dtype=torch.float64)
    euler.set_timesteps(num_steps)
    ancestral.set_timesteps(num_steps)
    for index in range(num_steps):
        laws = [scheduler.transition(logits, index, x) for scheduler in (euler, ancestral)]
        torch.testing.assert_close(laws[0], laws[1], rtol=0, atol=1e-10)
        drawn = [one.step(logits, index, x, generator=seeded(index)).prev_sample for one in (euler, ancestral)]
        assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("name", ["euler-cosine", "euler-uniform"])
def test_euler_is_not_ancestral_elsewhere(name: str) -> None:
    case = NAMED[name]
    euler = case.build(7)
    ancestral = AncestralScheduler.from_config(euler.config, unmasking="bernoulli")
    euler.set_timesteps(7)
    ancestral.set_timesteps(7)
    x = partly_known(case, 3, 8, 7)
    logits = random_denoiser(7)(x, 1.0)
    assert (euler.transition(logits, 3, x) - ancestral.transition(logits, 3, x)).abs().max() > 1e-3


def clean(logits: Tensor, mask_token_id: int | None) -> Tensor:
    """softmax without the mask."""
    logits = logits.clone()
    if mask_token_id is not None:
        logits[..., mask_token_id] = -math.inf
    return logits.softmax(-1)


def expected_jumps(
    scheduler: DiscreteScheduler, x: Tensor, logits: Tensor, index: int, score_power: float = 1.0
) -> Tensor:
    """(t - s) Q_t(v, x) s(v)^power, from the score itself, (B, L, V), 0 at x."""
    process, V = scheduler.noise_process, scheduler.config.vocab_size
    t, s = scheduler.times[index], scheduler.times[index + 1]
    alpha, speed = process.alpha(t), -process.alpha_slope(t) / process.alpha(t)  # speed is sigma'(t)
    p_0 = clean(logits, scheduler.config.mask_token_id)
    own = torch.nn.functional.one_hot(x, V).double()
    if scheduler.config.process == "absorbing":
        jumps = (t - s) * speed * (alpha / (1 - alpha) * p_0) ** score_power
        return jumps * (x == V - 1)[..., None] * (1 - own)
    one_out = p_0 / (1 + own * V * alpha / (1 - alpha))
    one_out = one_out / one_out.sum(-1, keepdim=True)
    noisy = alpha * one_out + (1 - alpha) / V
    score = noisy / (noisy * own).sum(-1, keepdim=True)
    return (t - s) * speed / V * score**score_power * (1 - own)


def completed(jumps: Tensor, x: Tensor) -> Tensor:
    """Jumps, scaled down to a total of 1 where they have more, and the rest to stay."""
    total = jumps.sum(-1, keepdim=True)
    own = torch.nn.functional.one_hot(x, jumps.shape[-1])
    return jumps / total.clamp(min=1) + own * (1 - total).clamp(min=0)


LEAPS = [case for case in CASES if case.cls in LEAPING and case.kwargs.get("noise_schedule") != "cosine"]


@pytest.mark.parametrize("case", LEAPS, ids=lambda case: case.name)
def test_laws_are_the_equations_of_the_docstrings(case: SchedulerCase) -> None:
    scheduler = case.build(7)
    scheduler.set_timesteps(7)
    x = partly_known(case, 3, 8, 7)
    logits = random_denoiser(7, seed=9)(x, 1.0)
    for index in range(1, 6):
        jumps = expected_jumps(scheduler, x, logits, index)
        if case.cls is LSDScheduler:
            phi = case.kwargs["coefficients"]["7"]["scale"][index] if "coefficients" in case.kwargs else 1.0
            log_score = case.kwargs.get("scale") == "log_score"
            jumps = expected_jumps(scheduler, x, logits, index, phi) if log_score else phi * jumps
        if case.cls is TauLeapingScheduler:
            total = jumps.sum(-1, keepdim=True)
            share = torch.exp(-total) if "jumps" in case.kwargs else -torch.expm1(-total) / total.clamp(min=1e-12)
            jumps = jumps * share
        torch.testing.assert_close(scheduler.transition(logits, index, x), completed(jumps, x), rtol=0, atol=1e-12)
    # the last step is the denoising call: p_0 at every position that can move
    p_0 = clean(logits, scheduler.config.mask_token_id)
    kept = torch.nn.functional.one_hot(x, 7).double()
    expected = torch.where((x == 6)[..., None], p_0, kept) if case.is_absorbing else p_0
    torch.testing.assert_close(scheduler.transition(logits, 6, x), expected, rtol=0, atol=1e-12)


# Tau-leaping


@pytest.mark.parametrize(
    ("jumps", "num_steps", "after_all", "before_last"),
    [
        ("first", 4, 0.125, None),
        ("first", 8, 0.066, 0.179),
        ("first", 16, 0.034, None),
        ("first", 64, 0.0087, None),
        ("reject", 4, 0.27, None),
        ("reject", 8, 0.151, 0.239),
        ("reject", 16, 0.080, None),
        ("reject", 64, 0.0210, None),
    ],
)
def test_tau_leaping_leaves_masks(jumps: str, num_steps: int, after_all: float, before_last: float | None) -> None:
    """Log-linear noise, uniform grid, lambda = 1 / (N - k): e^-H_N left, or prod 1 - lambda e^-lambda; as published if the last
    step were a leap too. Here it opens all, so what counts is the share before it."""
    scheduler = TauLeapingScheduler(vocab_size=5, mask_token_id=4, jumps=jumps)
    scheduler.set_timesteps(num_steps)
    masks = torch.tensor([[4]])
    logits = torch.zeros(1, 1, 5)
    stays = [float(scheduler.transition(logits, index, masks)[0, 0, 4]) for index in range(num_steps)]
    left = math.prod(stays[:-1])
    assert stays[-1] == 0
    if before_last is not None:
        assert left == pytest.approx(before_last, abs=0.0006)
    last_leap = math.exp(-1) if jumps == "first" else 1 - math.exp(-1)
    assert left * last_leap == pytest.approx(after_all, rel=0.01)
    if jumps == "first":
        harmonic = sum(1 / m for m in range(1, num_steps + 1))
        assert left == pytest.approx(math.exp(1 - harmonic), rel=1e-12)
    ancestral = AncestralScheduler(vocab_size=5, mask_token_id=4, unmasking="bernoulli")
    ancestral.set_timesteps(num_steps)
    kept = [float(ancestral.transition(logits, index, masks)[0, 0, 4]) for index in range(num_steps - 1)]
    assert math.prod(kept) == pytest.approx(1 / num_steps, rel=1e-12)


# LSD


@pytest.mark.parametrize("noise_schedule", ["loglinear", "cosine"])
@pytest.mark.parametrize("scale", [[0.5, 1.4, 0.9, 2.0], [1.0, 1.0, 1.0, 1.0], [0.3, 0.2, 1.7, 0.0]])
def test_a_scaled_score_is_another_grid_for_a_network_without_time(noise_schedule: str, scale: list[float]) -> None:
    """lsd.md 2.2: r_k = min(1, Phi_k (t_k - t_{k+1}) hazard), and masks follow m_{k+1} = m_k (1 - r_k)."""
    joint = random_joint(TOKENS, LENGTH, seed=13)
    grid = {"grid": "cosine"} if noise_schedule == "cosine" else {}
    lsd = LSDScheduler(
        vocab_size=4, mask_token_id=3, noise_schedule=noise_schedule, coefficients={"4": {"scale": scale}}, **grid
    )
    denoiser = exact_denoiser(joint, lsd.noise_process)
    lsd.set_timesteps(4)
    left = [1.0]
    for index in range(3):
        t, s = lsd.times[index], lsd.times[index + 1]
        opens = min(1.0, scale[index] * float((t - s) * lsd.noise_process.hazard(t)))
        assert lsd.open_probability(index) == pytest.approx(opens, abs=1e-15)
        left.append(left[-1] * (1 - opens))
    if len(set(left)) < 4:  # a step that opens nothing: such a grid has fewer steps
        assert noise_schedule == "cosine"
        left = list(dict.fromkeys(left))
    retimed = AncestralScheduler(
        vocab_size=4,
        mask_token_id=3,
        noise_schedule="linear",  # times are the shares of masks
        unmasking="bernoulli",
        grid="learned",
        coefficients={str(len(left)): {"times": [*left, 0.0]}},
    )
    laws = run_law(lsd, denoiser, 4, LENGTH), run_law(retimed, denoiser, len(left), LENGTH)
    torch.testing.assert_close(laws[0], laws[1], rtol=0, atol=1e-12)


def test_a_scaled_score_leaves_the_tokens_law_alone() -> None:
    plain, scaled = NAMED["lsd-untrained"].build(7), NAMED["lsd"].build(7)
    masks = torch.full((2, 5), 6)
    logits = random_denoiser(7)(masks, 1.0)
    for scheduler in (plain, scaled):
        scheduler.set_timesteps(7)
    for index in range(7):
        laws = [scheduler.transition(logits, index, masks)[..., :6] for scheduler in (scaled, plain)]
        tokens = [law / law.sum(-1, keepdim=True) for law in laws]
        torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.85, 1.0, 1.15, 2.0])
def test_a_scaled_log_score_is_a_temperature_and_a_rate(phi: float) -> None:
    """lsd.md 2.3: r_Phi / r_1 = (e^sigma - 1)^(1 - Phi) sum_v p_v^Phi, and the token's law is p^Phi."""
    num_steps, masks = 64, torch.full((1, 3), 6)
    logits = random_denoiser(7, seed=10)(masks, 1.0)
    p = clean(logits, 6)[..., :6]
    power = p**phi

    def law(value: float, index: int) -> Tensor:
        coefficients = {str(num_steps): {"scale": [value] * num_steps}}
        scheduler = LSDScheduler(vocab_size=7, mask_token_id=6, scale="log_score", coefficients=coefficients)
        scheduler.set_timesteps(num_steps)
        assert scheduler.positions(index, masks) is None
        return scheduler.transition(logits, index, masks)

    for index in (1, 20, 40, 55):
        t = 1 - index / num_steps
        sigma = -math.log(1 - 0.999 * t)
        scaled, plain = law(phi, index), law(1.0, index)
        torch.testing.assert_close(scaled.sum(-1), torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=1e-13)
        opens = 1 - plain[..., 6]
        expected = opens * math.expm1(sigma) ** (1 - phi) * power.sum(-1)
        torch.testing.assert_close(1 - scaled[..., 6], expected.clamp(max=1), rtol=1e-10, atol=0)
        tokens = scaled[..., :6] / scaled[..., :6].sum(-1, keepdim=True)
        torch.testing.assert_close(tokens, power / power.sum(-1, keepdim=True), rtol=0, atol=1e-12)


def test_published_size_of_the_log_score_effect() -> None:
    """lsd.md 2.3, for the released factor 1.15: (e^sigma - 1)^-0.15, and sum p^1.15 for Zipf 1.2 over 50,257 tokens."""
    for t, expected in [(1.0, 0.355), (0.9, 0.72), (0.5, 1.00), (0.1, 1.39), (0.01, 1.99)]:
        sigma = -math.log(1 - 0.999 * t)
        assert math.expm1(sigma) ** -0.15 == pytest.approx(expected, abs=0.005)
    p = torch.arange(1, 50258, dtype=torch.float64) ** -1.2
    assert float(((p / p.sum()) ** 1.15).sum()) == pytest.approx(0.50, abs=0.005)


def test_lsd_without_coefficients_is_euler() -> None:
    for process in ("absorbing", "uniform"):
        case = SchedulerCase("any", EulerScheduler, {"process": process})
        x = partly_known(case, 3, 6, 7)
        logits = random_denoiser(7)(x, 1.0)
        euler = case.build(7)
        euler.set_timesteps(5)
        for scale in ("score", "log_score"):
            lsd = LSDScheduler.from_config(euler.config, scale=scale)
            lsd.set_timesteps(5)
            for index in range(5):
                laws = (scheduler.transition(logits, index, x) for scheduler in (lsd, euler))
                torch.testing.assert_close(*laws, rtol=0, atol=1e-12)


def test_prior_law_of_the_runs() -> None:
    """The ground truth's own start: all masks, or all states alike."""
    absorbing = prior_law(NAMED["euler"].build(4), 2)
    assert absorbing[state_index(torch.tensor([[3, 3]]), 4)] == 1
    assert absorbing.sum() == 1
    uniform = prior_law(NAMED["euler-uniform"].build(3), 2)
    torch.testing.assert_close(uniform, torch.full((9,), 1 / 9, dtype=torch.float64))
    assert torch.equal(state_index(all_states(3, 2), 3), torch.arange(9))


UNIFORM = [case for case in CASES if not case.is_absorbing and case.has_law and "temperature" not in case.kwargs]


@pytest.mark.parametrize(
    "case", [case for case in UNIFORM if "tempered" not in case.kwargs], ids=lambda case: case.name
)
def test_temperature_sharpens_what_the_others_say(case: SchedulerCase) -> None:
    """With uniform noise a sharper law is one of x_0 given the other positions: near t = 0 that of x_0 given all is nearly
    certain of x_t, and a temperature on it would keep every token. With one position the others say what the data say, so
    every sharpened step is the step for the sharpened data, and that law is where the samples go."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    joint = Joint(torch.arange(3)[:, None], p)
    sharp = Joint(joint.states, sharpen(p, 0.5, 1.0))
    process = case.build(3).noise_process
    tempered = case.build(3, temperature=0.5)
    for num_steps in (1, 4):
        law = run_law(tempered, exact_denoiser(joint, process), num_steps, 1)
        expected = run_law(case.build(3), exact_denoiser(sharp, process), num_steps, 1)
        torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


ONE_OF_EACH = list({case.cls: case for case in reversed(CASES) if "coefficients" not in case.kwargs}.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
def test_a_thousand_steps(case: SchedulerCase) -> None:
    """Far more steps than positions: nothing is left open, nothing is lost, whatever the class."""
    scheduler, denoiser = case.build(7), random_denoiser(7, seed=3)
    x = partly_known(case, 2, 6, 7)
    known = x != 6
    samples = run(scheduler, denoiser, 1024, x, seeded(4))
    if case.is_absorbing:
        assert (samples != 6).all()
    if case.keeps_tokens:
        assert torch.equal(samples[known], x[known])
