"""Remasking: one family under three names, the rules for its strength, and the rule that remembers confidences."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from laws import (
    ExactDenoiser,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    forward_matrix,
    kl,
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
    total_variation,
)
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    ConfidenceRemaskingScheduler,
    DiscreteScheduler,
    RemaskingScheduler,
)
from discrete_schedulers.sampling import Generators

LEARNED = {"strength": "learned", "coefficients": {"4": {"remask": [0.1, 0.2, 0.3, 0.4]}}}
LOOP = {"strength": "loop", "eta": 0.2, "t_on": 0.5, "t_off": 0.25, "alpha_on": 0.8}
RULES: dict[str, dict[str, Any]] = {
    "cap": {"strength": "cap", "eta": 0.3},
    "rescale": {"strength": "rescale", "eta": 0.3},
    "psi": {"strength": "psi", "eta": 0.3},
    "forward_backward": {"strength": "forward_backward"},
    "loop": LOOP,
    "learned": LEARNED,
    "switch": {"strength": "cap", "eta": 0.9, "t_on": 0.6, "t_off": 0.2},
}
every_rule = pytest.mark.parametrize("rule", RULES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(rule: str, num_tokens: int = 3, **overrides: Any) -> RemaskingScheduler:
    return RemaskingScheduler(vocab_size=num_tokens + 1, mask_token_id=num_tokens, **(RULES[rule] | overrides))


def run(
    scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, x: Tensor, generator: Generators
) -> Tensor:
    """The pipeline's loop, by times, with chosen rows."""
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t, scheduler.positions(t, x, generator)), t, x, generator=generator).prev_sample
    return x


# One family


def kernel(x_t: int, x_0: int, mask: int, name: str, value: float, alpha_t: float, alpha_s: float) -> Tensor:
    """q(x_s | x_t, x_0) on masks, (V,), as each paper writes it."""
    law = torch.zeros(mask + 1, dtype=torch.float64)
    if name == "ddim":  # Song et al., with pi all on the mask
        law[x_t] += value
        law[x_0] += alpha_s - value * alpha_t
        law[mask] += (1 - alpha_s) - (1 - alpha_t) * value
    elif name == "psi":  # kappa q(x_s | x_t, x_0) + (1 - kappa) q(x_s | x_0)
        stays = 1.0 if x_t == x_0 else (1 - alpha_s) / (1 - alpha_t)
        law[x_t] += value * stays
        law[x_0] += value * (1 - stays) + (1 - value) * alpha_s
        law[mask] += (1 - value) * (1 - alpha_s)
    else:  # ReMDM
        law[x_0] += 1 - value if x_t != mask else (alpha_s - (1 - value) * alpha_t) / (1 - alpha_t)
        law[mask] += value if x_t != mask else (1 - alpha_s - value * alpha_t) / (1 - alpha_t)
    return law


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_remdm_psi_and_ddim_are_one(noise_schedule: str, eta: float) -> None:
    """rho = (1 - kappa) (1 - alpha_s) = 1 - alpha_s - (1 - alpha_t) sigma, as matrices, and they are the scheduler's."""
    scheduler = build("psi", 3, eta=eta, noise_schedule=noise_schedule)
    scheduler.set_timesteps(5)
    states = torch.arange(4)[:, None]  # one position: three tokens and the mask
    logits = random_denoiser(4, seed=1)(states, 1.0)
    p_0 = logits[..., :3].softmax(-1)
    for index in range(5):
        alpha_t, alpha_s = (float(scheduler.noise_process.alpha(scheduler.times[index + k])) for k in (0, 1))
        names = {"psi": 1 - eta, "ddim": (1 - eta) * (1 - alpha_s) / (1 - alpha_t), "remdm": eta * (1 - alpha_s)}
        law = scheduler.transition(logits, index, states)[:, 0]
        for name, value in names.items():
            matrix = torch.zeros(4, 4, dtype=torch.float64)
            for x_t in range(4):
                clean = enumerate(p_0[3, 0]) if x_t == 3 else [(x_t, 1.0)]
                for x_0, p in clean:
                    matrix[x_t] += p * kernel(x_t, x_0, 3, name, value, alpha_t, alpha_s)
            torch.testing.assert_close(law, matrix, rtol=0, atol=1e-12)


def test_the_largest_strength_is_more_than_psi_can_have() -> None:
    """rho_max = min(1, (1 - alpha_s) / alpha_t): there a token at t is a mask at s as often as all masks at s allow."""
    scheduler = build("rescale", eta=1.0, noise_schedule="linear")
    scheduler.set_timesteps(4)
    assert [scheduler.remask_probability(k) for k in range(4)] == pytest.approx([1, 1, 0.5, 0])
    assert [scheduler.open_probability(k) for k in range(4)] == pytest.approx([0.25, 2 / 3, 1, 1])
    for noise_schedule, rule in itertools.product(
        ("linear", "loglinear", "cosine", "geometric"), ("psi", "cap", "rescale")
    ):
        assert build(rule, eta=1.0, noise_schedule=noise_schedule).remask_probability(0) == 0  # the one step opens all


@every_rule
@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine", "geometric"])
def test_the_marginals_are_those_of_the_forward_process(rule: str, noise_schedule: str) -> None:
    """One position and its exact law: at each time of the grid."""
    joint = random_joint(3, 1, seed=2)
    scheduler = build(rule, noise_schedule=noise_schedule)
    scheduler.set_timesteps(4)
    process, denoiser = scheduler.noise_process, exact_denoiser(joint, scheduler.noise_process)
    clean = torch.cat([joint.p, torch.zeros(1, dtype=torch.float64)])
    law = clean @ forward_matrix(process, 0.0, 1.0, 1)
    for index in range(4):
        law = law @ step_matrix(scheduler, denoiser, index, 1)
        expected = clean @ forward_matrix(process, 0.0, float(scheduler.times[index + 1]), 1)
        torch.testing.assert_close(law, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strength", ["cap", "rescale", "psi", "learned"])
def test_without_remasking_it_is_ancestral_sampling(strength: str) -> None:
    """The same laws, and with the same seed the same samples."""
    zeros = {"coefficients": {"5": {"remask": [0.0] * 5}}} if strength == "learned" else {"eta": 0.0}
    remasking = RemaskingScheduler(vocab_size=7, mask_token_id=6, strength=strength, **zeros)
    ancestral = AncestralScheduler(vocab_size=7, mask_token_id=6, unmasking="bernoulli")
    x = torch.randint(0, 7, (4, 9), generator=seeded(1))
    denoiser = random_denoiser(7, seed=3)
    for scheduler in (remasking, ancestral):
        scheduler.set_timesteps(5)
    for index in range(5):
        laws = [scheduler.transition(denoiser(x, 1.0), index, x) for scheduler in (remasking, ancestral)]
        torch.testing.assert_close(*laws, rtol=0, atol=1e-15)
    samples = [run(scheduler, denoiser, 5, x, seeded(2)) for scheduler in (remasking, ancestral)]
    assert torch.equal(*samples)


# Laws


def run_by_hand(steps: list[tuple[float, float, float]], denoiser: ExactDenoiser, length: int, mask: int) -> Tensor:
    """The law after steps with (rho, alpha_t, alpha_s), by adding up every way that they can go."""
    states = all_states(mask + 1, length)
    law = {(mask,) * length: 1.0}
    for rho, alpha_t, alpha_s in steps:
        after: dict[tuple[int, ...], float] = defaultdict(float)
        for x, weight in law.items():
            p_0 = denoiser(torch.tensor([x]), 1.0)[0].softmax(-1).tolist()
            opens = (alpha_s - (1 - rho) * alpha_t) / (1 - alpha_t)
            ways = []
            for i in range(length):
                if x[i] == mask:
                    ways.append([(v, opens * p_0[i][v]) for v in range(mask)] + [(mask, 1 - opens)])
                else:
                    ways.append([(x[i], 1 - rho), (mask, rho)])
            for way in itertools.product(*ways):
                after[tuple(v for v, _ in way)] += weight * math.prod(p for _, p in way)
        law = after
    return torch.tensor([law.get(tuple(state), 0.0) for state in states.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("rule", ["cap", "psi", "loop"])
def test_exact_laws_of_runs(rule: str, num_steps: int) -> None:
    joint = random_joint(2, 2, seed=4)
    scheduler = build(rule, 2, noise_schedule="linear")
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    clock = [1 - k / num_steps for k in range(num_steps + 1)]
    alpha = [1 - t for t in clock]
    if rule == "loop":
        alpha = [1.6 * (1 - t) if t > 0.5 else 0.8 if t > 0.25 else 1 - 0.8 * t for t in clock]
    steps = []
    for k in range(num_steps):
        limit = min(1.0, (1 - alpha[k + 1]) / alpha[k]) if alpha[k] > 0 else 1.0
        rho = {
            "cap": min(0.3, limit),
            "psi": 0.3 * (1 - alpha[k + 1]),
            "loop": min(0.2, limit) if 0.25 < clock[k] <= 0.5 else 0.0,
        }[rule]
        steps.append((rho, alpha[k], alpha[k + 1]))
    law = run_law(scheduler, denoiser, num_steps, 2)
    torch.testing.assert_close(law, run_by_hand(steps, denoiser, 2, 2), rtol=0, atol=1e-12)
    assert clean_part(law, scheduler, joint).sum() == pytest.approx(1, abs=1e-12)  # no mask is left
    if num_steps == 8:
        samples = run(scheduler, denoiser, 8, scheduler.sample_prior((4000, 2)), seeded(5))
        assert chi_square_z(torch.bincount(state_index(samples, 3), minlength=9), law.clamp(min=0)) < 4.5


def slope(law_of: Any, joint: Any, coarse: int, fine: int) -> float:
    """d log(total variation) / d log N."""
    errors = [total_variation(joint.p, law_of(n)) for n in (coarse, fine)]
    return math.log(errors[1] / errors[0]) / math.log(fine / coarse)


@pytest.mark.parametrize(
    ("rule", "overrides", "expected"),
    [
        ("forward_backward", {}, -1.0),
        ("psi", {"eta": 0.0}, -1.0),
        ("rescale", {}, -0.5),
        ("cap", {"eta": 0.1}, -0.5),
        ("psi", {}, -0.5),
        ("loop", {"eta": 0.1}, 0.0),
    ],
)
def test_how_fast_the_error_falls(rule: str, overrides: dict[str, Any], expected: float) -> None:
    """As 1 / N where rho is of the order of 1 / N. With a fixed eta positions open together in every step, and only the
    last steps, where rho_max is small, mend that; the loop has stopped by then."""
    joint = random_joint(2, 2, seed=12)
    scheduler = build(rule, 2, **overrides)
    denoiser = exact_denoiser(joint, scheduler.noise_process)

    def law_of(num_steps: int) -> Tensor:
        return clean_part(run_law(scheduler, denoiser, num_steps, 2), scheduler, joint)

    assert slope(law_of, joint, 128, 512) == pytest.approx(expected, abs=0.1)


def test_draws_of_a_step_follow_its_law() -> None:
    """Tokens fall and masks open at once: what has opened does not fall in the same step."""
    scheduler = build("cap", eta=0.8)
    scheduler.set_timesteps(4)
    denoiser, x = random_denoiser(4, seed=8), torch.tensor([[3, 1, 3]]).expand(3000, 3)
    law = step_matrix(scheduler, denoiser, 1, 3)[state_index(x[:1], 4)][0]
    drawn = scheduler.step(denoiser(x, 1.0), 1, x, generator=seeded(9)).prev_sample
    assert chi_square_z(torch.bincount(state_index(drawn, 4), minlength=64), law) < 4.5


# Rules


def test_rules_by_hand() -> None:
    """Linear noise, four even steps: alpha = 0, 1/4, 1/2, 3/4, 1, hence rho_max = 1, min(1, 2), 1/2, 0."""

    def strengths(rule: str, **overrides: Any) -> list[float]:
        scheduler = build(rule, noise_schedule="linear", **overrides)
        scheduler.set_timesteps(4)
        return [scheduler.remask_probability(k) for k in range(4)]

    assert strengths("cap") == pytest.approx([0.3, 0.3, 0.3, 0])
    assert strengths("cap", eta=0.7) == pytest.approx([0.7, 0.7, 0.5, 0])
    assert strengths("rescale") == pytest.approx([0.3, 0.3, 0.15, 0])  # eta once: not eta^2
    assert strengths("psi") == pytest.approx([0.225, 0.15, 0.075, 0])
    assert strengths("forward_backward") == pytest.approx([1, 1, 0.5, 0])
    assert strengths("learned") == pytest.approx([0.1, 0.2, 0.15, 0])
    assert strengths("cap", t_on=0.5) == pytest.approx([0, 0, 0.3, 0])  # switch: from 1/2 on
    assert strengths("cap", t_off=0.5) == pytest.approx([0.3, 0.3, 0, 0])
    assert strengths("cap", t_on=0.75, t_off=0.5) == pytest.approx([0, 0.3, 0, 0])
    scheduler = build("cap", noise_schedule="linear")
    scheduler.set_timesteps(4)
    # (3/4 - 0.7 / 2) / (1/2) = 0.8 from the third to the fourth time
    assert [scheduler.open_probability(k) for k in range(4)] == pytest.approx([0.25, 13 / 30, 0.8, 1])


@pytest.mark.parametrize("noise_schedule", ["linear", "loglinear", "cosine"])
def test_loop_by_hand(noise_schedule: str) -> None:
    """alpha rises to 0.8 until 1/2, stands still until 1/4, and rises to 1."""
    scheduler = build("loop", noise_schedule=noise_schedule)
    scheduler.set_timesteps(8)
    expected = [0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.9, 1.0]
    alpha = [float(scheduler.noise_process.alpha(t)) for t in scheduler.times]
    assert alpha[1:] == pytest.approx(expected[1:], abs=1e-12)
    assert scheduler.times[0] == 1
    assert scheduler.times[-1] == 0
    assert (scheduler.times.diff() <= 0).all()
    assert torch.equal(scheduler.timesteps, scheduler.times[:-1])  # the network sees the noise that there is
    assert torch.equal(scheduler.timesteps[4:7], scheduler.timesteps[4].expand(3))
    assert [scheduler.remask_probability(k) for k in range(8)] == pytest.approx([0] * 4 + [0.2, 0.2] + [0] * 2)
    # while alpha stands still as many masks open as tokens fall: 0.2 * 0.8 / 0.2
    opens = [scheduler.open_probability(k) for k in range(8)]
    first = (0.2 - 1e-3) / (1 - 1e-3) if noise_schedule == "loglinear" else 0.2
    assert opens == pytest.approx([first, 0.25, 1 / 3, 0.5, 0.8, 0.8, 0.5, 1], abs=1e-9)


def test_loop_bounds_its_strength_and_names_its_calls_in_turn() -> None:
    scheduler = build("loop", eta=1.0, noise_schedule="linear")
    scheduler.set_timesteps(16)
    assert max(scheduler.remask_probability(k) for k in range(16)) == pytest.approx(0.2 / 0.8)
    denoiser, x, seen = random_denoiser(4), torch.full((2, 30), 3), []
    for t in scheduler.timesteps:
        seen.append(scheduler.step_index(t))
        x = scheduler.step(denoiser(x, t), t, x, generator=seeded(1)).prev_sample
    assert seen == list(range(16))
    assert (x != 3).all()


def test_the_published_loop() -> None:
    """t_on 0.55, t_off 0.05, alpha_on 0.9: half of the calls are in the loop."""
    scheduler = RemaskingScheduler(vocab_size=4, mask_token_id=3, strength="loop", eta=0.02, t_on=0.55, t_off=0.05)
    scheduler.set_timesteps(100)
    strengths = [scheduler.remask_probability(k) for k in range(100)]
    assert strengths == pytest.approx([0.0] * 45 + [0.02] * 50 + [0.0] * 5)
    for k in (0, 1, 99):
        assert scheduler.open_probability(k) > 0


@every_rule
@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear"])
@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_no_mask_is_left(rule: str, noise_schedule: str, num_steps: int) -> None:
    """Random logits, rows partly known; tokens do fall in between where the rule says so."""
    if rule == "learned" and num_steps != 4:
        pytest.skip("coefficients for 4 steps only")
    scheduler, denoiser = build(rule, 6, noise_schedule=noise_schedule), random_denoiser(7)
    x = torch.randint(0, 7, (6, 20), generator=seeded(3))
    scheduler.set_timesteps(num_steps)
    generator, fallen = seeded(4), 0
    for t in scheduler.timesteps:
        before, x = x, scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
        kept = (before != 6) & (x != 6)
        assert torch.equal(x[kept], before[kept])  # a token becomes a mask first
        fallen += int(((before != 6) & (x == 6)).sum())
    assert (x != 6).all()
    assert (fallen > 0) == any(scheduler.remask_probability(k) > 0 for k in range(num_steps))


def test_rows_are_chosen_and_dense_alike_in_the_loop() -> None:
    scheduler, denoiser = build("loop", 6), random_denoiser(7)
    x = torch.randint(0, 7, (3, 20), generator=seeded(3))
    generators = [[seeded(k) for k in range(3)] for _ in range(2)]
    sparse = run(scheduler, denoiser, 9, x, generators[0])
    scheduler.set_timesteps(9)
    dense = x
    for t in scheduler.timesteps:
        dense = scheduler.step(denoiser(dense, t), t, dense, generator=generators[1]).prev_sample
    assert torch.equal(sparse, dense)
    alone = run(scheduler, denoiser, 9, x[1:2], [seeded(1)])
    assert torch.equal(alone[0], sparse[1])


def test_the_chance_to_open_is_at_most_1_despite_rounding() -> None:
    """With all the remasking that there can be it is 1 in every step that has tokens to remask."""
    for noise_schedule, num_steps in itertools.product(("loglinear", "cosine"), (14, 20, 22, 24)):
        scheduler = build("cap", eta=1.0, noise_schedule=noise_schedule)
        scheduler.set_timesteps(num_steps)
        assert all(scheduler.open_probability(k) <= 1 for k in range(num_steps))


# Confidence


def confident(**overrides: Any) -> ConfidenceRemaskingScheduler:
    return ConfidenceRemaskingScheduler(
        **({"vocab_size": 4, "mask_token_id": 3, "noise_schedule": "linear"} | overrides)
    )


def test_confidence_by_hand() -> None:
    """Two tokens drawn at 0.9 and 0.2, one known from the start, one mask: e^-0.9 : e^-0.2 : 0 : 0."""
    psi = torch.tensor([[0.9, 0.2, math.inf, 0.5]], dtype=torch.float64)
    is_token = torch.tensor([[True, True, True, False]])
    total = math.exp(-0.9) + math.exp(-0.2)
    expected = [math.exp(-0.9) / total, math.exp(-0.2) / total, 0, 0]
    assert confident().fall_probability(psi, is_token, 1.0)[0].tolist() == pytest.approx(expected)
    assert confident().fall_probability(psi, is_token, 0.5)[0].tolist() == pytest.approx([p / 2 for p in expected])
    cold = confident(remask_temperature=0.1)  # e^-9 : e^-2
    assert float(cold.fall_probability(psi, is_token, 1.0)[0, 1]) == pytest.approx(1 / (1 + math.exp(-7)))
    assert confident().fall_probability(psi, is_token, 9.0)[0].tolist() == [1, 1, 0, 0]
    assert confident().fall_probability(psi, ~is_token, 1.0)[0].tolist() == [0, 0, 0, 1]
    nothing = confident().fall_probability(psi, torch.zeros_like(is_token), 1.0)
    assert nothing.tolist() == [[0] * 4]  # not NaN


def test_mass_of_confidence_by_hand() -> None:
    """rho_max = 1, 1, 1/2, 0 with linear noise in four steps."""
    scheduler = confident(remask_mass=3.0)
    scheduler.set_timesteps(4)
    assert [scheduler.fall_mass(k) for k in range(4)] == pytest.approx([3, 3, 1.5, 0])
    window = confident(t_on=0.75, t_off=0.5)
    window.set_timesteps(4)
    assert [window.fall_mass(k) for k in range(4)] == pytest.approx([0, 1, 0, 0])
    learned = confident(coefficients={"4": {"remask_mass": [0.5, 1.0, 2.0, 1.0]}})
    learned.set_timesteps(4)
    assert [learned.fall_mass(k) for k in range(4)] == pytest.approx([0.5, 1, 1, 0])
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3"):
        learned.set_timesteps(3)


def test_without_mass_it_is_ancestral_sampling_draw_by_draw() -> None:
    denoiser, x = random_denoiser(4), torch.full((5, 12), 3)
    ancestral = AncestralScheduler(vocab_size=4, mask_token_id=3, noise_schedule="linear", unmasking="bernoulli")
    samples = [run(scheduler, denoiser, 6, x, seeded(1)) for scheduler in (confident(remask_mass=0.0), ancestral)]
    assert torch.equal(*samples)


def test_confidence_is_that_of_the_law_drawn_from() -> None:
    """After temperature and top-p, of the token that was drawn; kept for each row until the position is drawn again."""
    scheduler = confident(top_p=0.8)
    scheduler.set_timesteps(4)
    p = torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64)
    logits = torch.cat([p.log(), torch.tensor([9.0], dtype=torch.float64)]).expand(200, 2, 4)
    x = torch.tensor([[3, 1]]).expand(200, 2)  # a mask and a known token
    after = scheduler.step(logits, 0, x, generator=seeded(1)).prev_sample
    kept = torch.tensor([5 / 9, 4 / 9, 0, 0], dtype=torch.float64)
    opened = after[:, 0] != 3
    assert 0 < opened.sum() < 200
    torch.testing.assert_close(scheduler.psi[opened, 0], kept[after[opened, 0]], rtol=0, atol=1e-12)
    assert scheduler.psi[~opened, 0].isinf().all()
    assert scheduler.psi[:, 1].isinf().all()
    assert torch.equal(after[:, 1], x[:, 1])  # what was known from the start never falls
    scheduler.set_timesteps(4)
    assert scheduler.psi is None
    scheduler.step(logits, 0, x)
    with pytest.raises(ValueError, match=r"`sample` has shape \(3, 2\), but this run has \(200, 2\)"):
        scheduler.step(logits[:3], 1, x[:3])


def test_law_of_a_confident_run() -> None:
    """Three steps on two positions, every history added up, and samples that follow it."""
    joint = random_joint(2, 2, seed=6)
    scheduler = confident(vocab_size=3, mask_token_id=2, remask_mass=1.5, remask_temperature=0.5)
    denoiser, mask = exact_denoiser(joint, scheduler.noise_process), 2
    alpha = [0, 1 / 3, 2 / 3, 1]
    law: dict[tuple[tuple[int, float], ...], float] = {((mask, math.inf),) * 2: 1.0}
    for k in range(3):
        limit = min(1.0, (1 - alpha[k + 1]) / alpha[k]) if k else 1.0
        after: dict[tuple[tuple[int, float], ...], float] = defaultdict(float)
        for row, weight in law.items():
            p_0 = denoiser(torch.tensor([[v for v, _ in row]]), 1.0)[0].softmax(-1).tolist()
            opens = (alpha[k + 1] - alpha[k]) / (1 - alpha[k])
            worth = [0.0 if v == mask else math.exp(-psi / 0.5) for v, psi in row]
            ways = []
            for i, (v, psi) in enumerate(row):
                if v == mask:
                    ways.append(
                        [((w, p_0[i][w]), opens * p_0[i][w]) for w in range(mask)] + [((mask, math.inf), 1 - opens)]
                    )
                else:
                    falls = min(1.0, 1.5 * limit * worth[i] / sum(worth))
                    ways.append([((v, psi), 1 - falls), ((mask, math.inf), falls)])
            for way in itertools.product(*ways):
                after[tuple(state for state, _ in way)] += weight * math.prod(p for _, p in way)
        law = after
    expected = torch.zeros(9, dtype=torch.float64)
    for row, weight in law.items():
        expected[3 * row[0][0] + row[1][0]] += weight
    assert clean_part(expected, scheduler, joint).sum() == pytest.approx(1, abs=1e-12)
    samples = run(scheduler, denoiser, 3, scheduler.sample_prior((20000, 2)), seeded(7))
    counts = torch.bincount(state_index(samples, 3), minlength=9)
    assert chi_square_z(counts, expected) < 4.5
    plain = run_law(AncestralScheduler(vocab_size=3, mask_token_id=2, unmasking="bernoulli"), denoiser, 3, 2)
    assert chi_square_z(counts, plain) > 4.5  # it remasks, and the test sees that
    assert kl(joint.p, clean_part(expected, scheduler, joint)) > 1e-3  # a heuristic


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"strength": "all"},
            "`strength` is 'all'; allowed: 'cap', 'rescale', 'psi', 'forward_backward', 'loop', 'learned'",
        ),
        ({"eta": 1.5}, r"`eta` is 1.5; allowed are numbers in \[0, 1\]"),
        ({"eta": math.nan}, "`eta` is nan"),
        ({"t_on": 0.2, "t_off": 0.2}, "`t_off` and `t_on` are 0.2 and 0.2; they must be 0 <= t_off < t_on <= 1"),
        ({"t_on": 1.2}, "`t_off` and `t_on` are 0.0 and 1.2"),
        ({"alpha_on": 1.0}, r"`alpha_on` is 1.0; allowed are numbers in \(0, 1\)"),
        ({"strength": "loop"}, r"`strength='loop'` needs 0 < t_off and t_on < 1, not 0.0 and 1.0"),
        ({"strength": "loop", "t_on": 0.5}, r"`strength='loop'` needs 0 < t_off and t_on < 1, not 0.0 and 0.5"),
        ({"strength": "learned"}, "`strength='learned'` needs `coefficients` with a block 'remask'"),
        ({"coefficients": {"2": {"remask": [0.5, 1.1]}}}, r"'remask' has fractions of the maximum, in \[0, 1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemaskingScheduler(vocab_size=5, mask_token_id=4, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"remask_mass": -1.0}, "`remask_mass` is -1.0; allowed are numbers of at least 0"),
        ({"remask_temperature": 0.0}, "`remask_temperature` is 0.0; it must be positive"),
        ({"t_off": 1.0}, "`t_off` and `t_on` are 1.0 and 1.0"),
        (
            {"coefficients": {"1": {"remask_mass": [-0.1]}}},
            r"`remask_mass` for 1 steps is \[-0.1\]; allowed are numbers of at least 0",
        ),
    ],
)
def test_arguments_of_confidence_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConfidenceRemaskingScheduler(vocab_size=5, mask_token_id=4, **kwargs)


def test_a_missing_budget_is_refused_early() -> None:
    scheduler = build("learned")
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 5; learned budgets: 4"):
        scheduler.set_timesteps(5)
    assert prior_law(scheduler, 1)[3] == 1
