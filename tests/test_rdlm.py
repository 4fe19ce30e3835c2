"""RDLM: the sphere, the bridge and its law, the walk, the pipeline; held against closed forms and independent simulations."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from laws import chi_square_z, state_index, total_variation
from scipy.optimize import brentq
from scipy.special import hyp1f1
from scipy.stats import chi, ks_2samp, kstest
from tiny import seeded
from torch import Tensor
from torch.nn.functional import one_hot

from discrete_schedulers import LogarithmBridge, RDLMPipeline, RDLMScheduler, SphereTransformerModel
from discrete_schedulers.schedulers import AncestralScheduler
from discrete_schedulers.sphere import (
    bridge_moments,
    exp_map,
    log_map,
    mean_cosine,
    mean_log_map,
    spread_of_length,
    to_tangent,
)
from discrete_schedulers.training.rdlm import WINDOW, denoising_cross_entropy, draw_times


def points(count: int, width: int, seed: int = 0) -> Tensor:
    """Uniformly random points of the sphere, (count, width)."""
    return torch.nn.functional.normalize(torch.randn(count, width, generator=seeded(seed), dtype=torch.float64), dim=-1)


def angles(x: Tensor, k: int = 0) -> Tensor:
    """Angles to corner k."""
    return x[..., k].clamp(-1, 1).arccos()


# The sphere


def test_exp_and_log_are_inverse() -> None:
    a, b = points(200, 6), points(200, 6, seed=1)
    tangent = log_map(a, b)
    assert float((tangent * a).sum(-1).abs().max()) < 1e-13
    torch.testing.assert_close(tangent.norm(dim=-1), (a * b).sum(-1).arccos())
    torch.testing.assert_close(exp_map(a, tangent), b, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_map(a, a), torch.zeros_like(a), rtol=0, atol=1e-7)
    corner = torch.eye(6, dtype=torch.float64)[0]
    torch.testing.assert_close(mean_log_map(corner, corner), torch.zeros(6, dtype=torch.float64))


def test_the_drift_is_a_gradient() -> None:
    """sum_k p_k log_X(e_k) = -grad sum_k p_k theta_k^2 / 2 on the sphere, by autodiff."""
    x, p = points(50, 5).requires_grad_(), torch.rand(50, 5, generator=seeded(1), dtype=torch.float64).softmax(-1)
    energy = (p * x.arccos().square() / 2).sum()
    (gradient,) = torch.autograd.grad(energy, x)
    x = x.detach()
    torch.testing.assert_close(mean_log_map(x, p), -to_tangent(gradient, x), rtol=0, atol=1e-11)
    one_by_one = sum(p[:, k, None] * log_map(x, torch.eye(5, dtype=torch.float64)[k].expand(50, 5)) for k in range(5))
    torch.testing.assert_close(mean_log_map(x, p), one_by_one, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dimension", [1, 2, 3, 27, 400])
def test_mean_cosine_is_kummers_function(dimension: int) -> None:
    rho = torch.linspace(0.001, 2.5, 40, dtype=torch.float64) / math.sqrt(dimension)
    expected = hyp1f1(dimension / 2, 0.5, -rho.square().numpy() / 2)
    torch.testing.assert_close(mean_cosine(rho, dimension), torch.from_numpy(expected), rtol=0, atol=2e-6)
    torch.testing.assert_close(spread_of_length(mean_cosine(rho, dimension), dimension), rho, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("width", "scale"), [(4, 1.1547), (28, 1.0184)])
def test_what_rho_scale_mends(width: int, scale: float) -> None:
    """The published equation for rho has a factor too many; its solution is too small by sqrt((V - 1) / V)."""
    mean, n = float(hyp1f1((width - 1) / 2, 0.5, -(0.1**2) / 2)), width - 1
    published = brentq(lambda r: math.exp(-(r**2) / 2) * hyp1f1(n / 2, 0.5, -(r**2) / 2) - mean, 1e-6, 0.2)
    assert 0.1 / published == pytest.approx(scale, abs=0.002)
    assert scale == pytest.approx(math.sqrt(width / n), abs=1e-4)


# The bridge


@pytest.mark.parametrize("schedule", ["geometric", "linear", "cosine"])
def test_noise_left_is_the_integral(schedule: Any) -> None:
    bridge = LogarithmBridge(3, prior="uniform", beta_schedule=schedule)
    assert (float(bridge.beta(1.0)), float(bridge.beta(0.0))) == pytest.approx((1e-3, 0.2))
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(bridge.beta(t), t)
    torch.testing.assert_close(bridge.noise_left(t)[1:], integral, rtol=0, atol=1e-8)
    assert LogarithmBridge(3, None, "uniform", 0.1, 0.1, schedule).noise_left(0.25) == pytest.approx(0.025)


def test_geometric_noise_by_hand() -> None:
    """int_0^1 of 0.2 (1/200)^t dt = 0.199 / log 200."""
    assert LogarithmBridge(3, prior="uniform").total_noise == pytest.approx(0.199 / math.log(200))


def circle(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the angle on the circle, as a flat Brownian bridge from pi / 4 (to be added to the end's) to 0."""
    left = (1 - 200**-t) / (1 - 200**-1)  # geometric noise, by hand
    total = 0.199 / math.log(200)
    return math.pi / 4 * left, total * left * (1 - left)


def test_the_circle_has_a_closed_form() -> None:
    bridge, t = LogarithmBridge(2, prior="uniform"), torch.full((20000,), 0.4, dtype=torch.float64)
    mean, variance = circle(t[:1])
    x = bridge.add_noise(torch.zeros(20000, 1, dtype=torch.int64), t, seeded(1))[:, 0]
    turned = torch.atan2(x[:, 1], x[:, 0])  # from corner 0 towards corner 1
    assert kstest(((turned - mean) / variance.sqrt()).numpy(), "norm").pvalue > 1e-4
    density = bridge.log_density(x[:, None], t)[:, 0]
    for k, centre in ((0, mean), (1, math.pi / 2 - mean)):
        normal = torch.distributions.Normal(centre, variance.sqrt()).log_prob(turned)
        near = (turned - centre).abs() < 3  # the other way around is left out
        torch.testing.assert_close(density[near, k], normal[near], rtol=0, atol=1e-5)  # arccos near 1


@pytest.mark.parametrize("prior", ["mask", "uniform"])
def test_the_density_integrates_to_one_and_has_the_mean(prior: Any) -> None:
    """On S^2, over a fine grid of latitude and longitude."""
    bridge, t = LogarithmBridge(3, 2, prior), 0.45
    latitude = (torch.arange(400, dtype=torch.float64) + 0.5) * math.pi / 400
    turn = torch.arange(800, dtype=torch.float64) * 2 * math.pi / 800
    sine = latitude.sin()[:, None]
    x = torch.stack([sine * turn.cos(), sine * turn.sin(), latitude.cos()[:, None].expand(400, 800)], -1).view(1, -1, 3)
    area = (sine * (math.pi / 400) * (2 * math.pi / 800)).expand(400, 800).reshape(-1, 1)
    q = bridge.log_density(x, torch.tensor([t], dtype=torch.float64))[0, :, :2].exp() * area
    torch.testing.assert_close(q.sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)
    mean = q.T @ x[0]  # (2, 3)
    drawn = bridge.add_noise(torch.tensor([[0, 1]]).expand(20000, 2), torch.full((20000,), t), seeded(2))
    error = drawn.std(0) / math.sqrt(20000)
    assert float(((drawn.mean(0) - mean) / error).abs().max()) < 4.5
    assert bridge.log_density(x[:, :5], torch.tensor([t]))[..., 2].isneginf().all()


def walked(scheduler: RDLMScheduler, token: int, rows: int, until: int, seed: int = 3) -> Tensor:
    """The scheduler's walk to a token that the denoiser is sure of, (rows, V), after `until` steps."""
    x, generator = scheduler.sample_prior((rows, 1), dtype=torch.float64), seeded(seed)
    logits = torch.full((rows, 1, scheduler.config.vocab_size), -math.inf, dtype=torch.float64)
    logits[..., token] = 0.0
    for t in scheduler.timesteps[:until]:
        x = scheduler.step(logits, t, x, generator=generator).prev_sample
    return x[:, 0]


def shadow(width: int, start: float, rows: int, steps: int, until: int) -> Tensor:
    """d theta = (-(beta / tau) theta + (V - 2) / 2 beta cot theta) dt + sqrt(beta) dW, by Euler steps, geometric noise."""
    theta, generator = torch.full((rows,), math.acos(start), dtype=torch.float64), seeded(11)
    for i in range(until):
        t, dt = 1 - i / steps, 1 / steps
        beta, left = 0.2 * 200**-t, 0.2 * (1 - 200**-t) / math.log(200)
        drift = -beta / left * theta + (width - 2) / 2 * beta / theta.tan()
        theta = theta + drift * dt + math.sqrt(beta * dt) * torch.randn(rows, generator=generator, dtype=torch.float64)
        theta = theta.abs()
    return theta


@pytest.mark.parametrize(
    ("prior", "width", "rule"), [("mask", 5, "bridge"), ("uniform", 3, "euler"), ("mask", 28, "bridge")]
)
def test_the_angle_to_the_end_has_the_law_of_its_shadow(prior: Any, width: int, rule: Any) -> None:
    """The walk on the sphere against the one-dimensional equation, half way and late; and the mean that the table says."""
    scheduler = RDLMScheduler(width, width - 1, prior, step_rule=rule)
    scheduler.set_timesteps(200)
    start = 0.0 if prior == "mask" else width**-0.5
    for until in (110, 180):
        x = walked(scheduler, 0, 1500, until)
        assert float((x.norm(dim=-1) - 1).abs().max()) < 1e-12
        assert ks_2samp(angles(x).numpy(), shadow(width, start, 1500, 800, 4 * until).numpy()).pvalue > 1e-4
        t = torch.full((1500,), float(scheduler.times[until]), dtype=torch.float64)
        drawn = scheduler.bridge.add_noise(torch.zeros(1500, 1, dtype=torch.int64), t, seeded(5))[:, 0]
        error = ((x.var(0) + drawn.var(0)) / 1500).sqrt()
        assert float(((x.mean(0) - drawn.mean(0)).abs() / error).max()) < 4.5


def test_bridges_end_at_their_token() -> None:
    """Near the end the angle is sqrt(tau) times a chi with V - 1 degrees, wherever the bridge began; at the end it is 0."""
    scheduler = RDLMScheduler(4, 3, last_step="walk")
    late = torch.logspace(math.log10(0.01), math.log10(2e-5), 50, dtype=torch.float64)
    scheduler.times = torch.cat([torch.linspace(1, 0.02, 60, dtype=torch.float64), late, torch.zeros(1)])
    scheduler.timesteps = scheduler.times[:-1]
    x = walked(scheduler, 1, 2000, 109)
    left = float(scheduler.bridge.noise_left(2e-5))
    assert kstest((angles(x, 1) / math.sqrt(left)).numpy(), chi(3).cdf).pvalue > 1e-4
    end = walked(scheduler, 1, 20, 110)
    torch.testing.assert_close(end, one_hot(torch.full((20,), 1), 4).double(), rtol=0, atol=1e-7)


def test_the_table_is_exact_on_the_circle_and_smooth() -> None:
    flat = bridge_moments(2, 0.5**0.5, 0.04)
    assert flat.angle_ratio.tolist() == flat.variance_ratio.tolist() == [1.0, 1.0]
    table = bridge_moments(4, 0.0, 0.04)
    assert (table.share.diff() > 0).all()
    assert float(table.variance_ratio[-1]) == pytest.approx(1, abs=0.02)  # nothing is curved yet
    assert float(table.angle_ratio[-1]) == pytest.approx(1, abs=1e-3)
    late = bridge_moments(28, 0.0, LogarithmBridge(28, 27).total_noise).variance_ratio[0]
    assert float(late) == pytest.approx(1, abs=0.01)  # nor any more: rho is sqrt(tau)
    with pytest.raises(ValueError, match="covers the sphere"):
        bridge_moments(4, 0.0, 30.0)


# Exact denoisers


def exact_logits(x: Tensor, t: float, joint: Tensor) -> Tensor:
    """Bayes' rule on the circle by the closed form, for a joint (2, 2) of two bits; x (B, 2, 2)."""
    turned = torch.atan2(x[..., 1], x[..., 0])  # (B, 2)
    if t == 1:
        likelihood = torch.ones(*x.shape, dtype=torch.float64)
    else:
        mean, variance = circle(torch.tensor(t, dtype=torch.float64))
        centres = torch.stack([mean, math.pi / 2 - mean])
        likelihood = torch.exp(-(turned[..., None] - centres).square() / (2 * variance))  # (B, 2, 2)
    weight = joint * likelihood[:, 0, :, None] * likelihood[:, 1, None, :]
    p_0 = torch.stack([weight.sum(2), weight.sum(1)], dim=1)
    return (p_0 / p_0.sum(-1, keepdim=True)).log()


JOINT = torch.tensor([[0.4, 0.05], [0.1, 0.45]], dtype=torch.float64)


def samples(steps: int, rows: int, **config: Any) -> Tensor:
    """Counts (4,) of the pairs that the walk draws with the exact denoiser."""
    scheduler = RDLMScheduler(2, prior="uniform", **config)
    scheduler.set_timesteps(steps)
    x, generator = scheduler.sample_prior((rows, 2), dtype=torch.float64), seeded(9)
    for t in scheduler.timesteps:
        x = scheduler.step(exact_logits(x, float(t), JOINT), t, x, generator=generator).prev_sample
    return torch.bincount(state_index(scheduler.tokens(x), 2), minlength=4).double()


@pytest.mark.parametrize(("rule", "last"), [("bridge", "draw"), ("bridge", "walk"), ("euler", "walk")])
def test_exact_denoiser_gives_the_data(rule: Any, last: Any) -> None:
    law = JOINT.flatten()
    many = samples(128, 5000, step_rule=rule, last_step=last)
    assert chi_square_z(many, law) < 4.5
    few = samples(3, 5000, step_rule=rule, last_step=last)
    assert total_variation(few / 5000, law) > 0.02
    assert chi_square_z(few, law) > 4.5


def test_one_step_draws_the_marginals() -> None:
    counts = samples(1, 8000)
    independent = JOINT.sum(1)[:, None] * JOINT.sum(0)
    assert chi_square_z(counts, independent.flatten()) < 4.5


def test_the_mixture_is_two_bridges() -> None:
    bridge = LogarithmBridge(4, 3, "mixture", switch_time=0.6)
    early, late = torch.tensor([0.61], dtype=torch.float64), torch.tensor([0.59], dtype=torch.float64)
    x, x_0 = points(7, 4)[None], torch.tensor([[0, 1, 2]])
    for t, prior in ((early, "uniform"), (late, "mask")):
        same = LogarithmBridge(4, 3, prior)
        torch.testing.assert_close(bridge.log_density(x, t), same.log_density(x, t))
        torch.testing.assert_close(bridge.add_noise(x_0, t, seeded(1)), same.add_noise(x_0, t, seeded(1)))
    start = RDLMScheduler(4, 3, "mixture").sample_prior((1, 2))
    torch.testing.assert_close(start, torch.full((1, 2, 4), 0.5))


def test_euler_by_hand() -> None:
    """Two steps; the first goes 0.5 beta_1 / tau_1 of the way, with noise 0.5 beta_1."""
    scheduler = RDLMScheduler(3, 2, step_rule="euler")
    scheduler.set_timesteps(2)
    assert scheduler.walk(0) == pytest.approx((0.5 * 1e-3 / (0.199 / math.log(200)), 0.5e-3))
    bridge = RDLMScheduler(3, 2)
    bridge.set_timesteps(2)
    share, variance = bridge.walk(0)
    left = (1 - 200**-0.5) / (1 - 1 / 200)
    assert share == pytest.approx(1 - left)
    assert variance == pytest.approx(0.199 / math.log(200) * (1 - left) * left)
    assert bridge.walk(1) == pytest.approx((1, 0))


@pytest.mark.parametrize(("prior", "is_exact"), [("mask", True), ("uniform", True), ("mixture", False)])
def test_bayes_by_the_riemannian_normal(prior: Any, is_exact: bool) -> None:
    """One token of three, and a mask: the approximate law of X_t is near enough that samples have the data's law. Where two
    bridges take turns, they do not, whatever the number of steps."""
    scheduler = RDLMScheduler(4, 3, prior)
    scheduler.set_timesteps(64)
    law, x, generator = torch.tensor([0.6, 0.3, 0.1]), scheduler.sample_prior((8000, 1), dtype=torch.float64), seeded(2)
    prior_logits = torch.cat([law.double().log(), torch.zeros(1)])
    for t in scheduler.timesteps:
        told = 0 if t == 1 else scheduler.bridge.log_density(x, t.expand(8000))
        x = scheduler.step(prior_logits.expand(x.shape) + told, t, x, generator=generator).prev_sample
    counts = torch.bincount(scheduler.tokens(x).flatten(), minlength=4).double()
    assert int(counts[3]) == 0
    assert (chi_square_z(counts[:3], law.double()) < 4.5) == is_exact


# The scheduler and the pipeline


def test_step_reads_no_mask_and_names_steps_both_ways() -> None:
    scheduler = RDLMScheduler(4, 3, temperature=2.0)
    scheduler.set_timesteps(5)
    x, logits = points(6, 4).view(2, 3, 4), torch.randn(2, 3, 4, generator=seeded(4), dtype=torch.float64)
    by_time = scheduler.step(logits, scheduler.timesteps[2], x, generator=seeded(1))
    masked = logits.clone()
    masked[..., 3] = 50.0
    by_index = scheduler.step(masked, 2, x, generator=seeded(1), return_dict=False)
    torch.testing.assert_close(by_time.prev_sample, by_index[0], rtol=0, atol=0)
    assert torch.equal(by_time.pred_original_sample, logits[..., :3].argmax(-1))
    assert float((by_time.prev_sample.norm(dim=-1) - 1).abs().max()) < 1e-12
    rows = [seeded(5), seeded(6)]
    both = scheduler.step(logits, 1, x, generator=rows).prev_sample
    alone = scheduler.step(logits[1:], 1, x[1:], generator=[seeded(6)]).prev_sample
    assert torch.equal(both[1:], alone)
    last = scheduler.step(logits, 4, x.float(), generator=seeded(7)).prev_sample
    assert last.dtype == torch.float32
    assert torch.equal(last, one_hot(scheduler.tokens(last), 4).float())
    assert int(scheduler.tokens(torch.tensor([0.1, -0.2, 0.3, 0.9]))) == 2
    low, high = (
        scheduler.step(some, 1, x, generator=seeded(8)).prev_sample
        for some in (logits.float(), logits.float().double())
    )
    torch.testing.assert_close(low, high, rtol=0, atol=1e-14)  # logits of any precision, their law in float64
    assert scheduler.init_noise_sigma == 1  # the prior is drawn as it is


def test_temperature_is_that_of_the_law() -> None:
    x, logits = points(6, 4).view(2, 3, 4), torch.randn(2, 3, 4, generator=seeded(4), dtype=torch.float64)
    cold, plain = RDLMScheduler(4, 3, temperature=0.5), RDLMScheduler(4, 3)
    for scheduler in (cold, plain):
        scheduler.set_timesteps(3)
    a = cold.step(logits, 0, x, generator=seeded(1)).prev_sample
    b = plain.step(2 * logits, 0, x, generator=seeded(1)).prev_sample
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 1}, "`vocab_size` is 1"),
        ({"vocab_size": 4, "mask_token_id": 4}, "`mask_token_id` is 4; allowed are 0 to 3"),
        ({"vocab_size": 4}, "pass `mask_token_id`"),
        ({"vocab_size": 4, "prior": "centre"}, "`prior` is 'centre'; allowed: 'mask', 'uniform', 'mixture'"),
        ({"beta_schedule": "loglinear"}, "`beta_schedule` is 'loglinear'"),
        ({"beta_start": 0.0}, "`beta_start` is 0.0"),
        ({"beta_end": math.nan}, "`beta_end` is nan"),
        ({"switch_time": 1.0}, "`switch_time` is 1.0"),
        ({"step_rule": "heun"}, "`step_rule` is 'heun'; allowed: 'bridge', 'euler'"),
        ({"last_step": "argmax"}, "`last_step` is 'argmax'"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"temperature": "hot"}, "`temperature` is 'hot'; it must be a finite number"),
        ({"vocab_size": "4"}, "`vocab_size` is '4'; it must be an integer"),
    ],
)
def test_constructor_says_no(arguments: dict[str, Any], message: str) -> None:
    standard = {} if "vocab_size" in arguments else {"vocab_size": 4, "mask_token_id": 3}
    with pytest.raises(ValueError, match=message.replace("`", "[`]")):
        RDLMScheduler(**(standard | arguments))


def test_step_says_no() -> None:
    scheduler, x = RDLMScheduler(4, 3), torch.full((1, 2, 4), 0.5)
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`tempature` is no argument of RDLMScheduler"):
        RDLMScheduler.from_config(scheduler.config, tempature=0.5)
    for timestep in (4, -1, 0.3, math.nan, torch.ones(2), True):
        with pytest.raises(ValueError, match="timestep"):
            scheduler.step(x, timestep, x)
    with pytest.raises(ValueError, match="has shape"):
        scheduler.step(x[..., :3], 0, x)
    with pytest.raises(ValueError, match="see `sample_prior`"):
        scheduler.step(x, 0, torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="NaN"):
        scheduler.step(x * math.nan, 0, x)
    for times in (None, torch.tensor([1.5])):
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.add_noise(torch.zeros(1, 2, dtype=torch.int64), timesteps=times)
    noisy = scheduler.add_noise(torch.zeros(2, 2, dtype=torch.int64), None, torch.tensor([0.0]), generator=seeded())
    torch.testing.assert_close(noisy, one_hot(torch.zeros(2, 2, dtype=torch.int64), 4).double(), rtol=0, atol=1e-6)


def pipeline(**changes: Any) -> RDLMPipeline:
    torch.manual_seed(0)
    model = SphereTransformerModel(5, hidden_size=16, num_blocks=1, num_heads=2, cond_dim=8, max_length=6)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    pipe = RDLMPipeline(**({"model": model.eval(), "scheduler": RDLMScheduler(5, 4)} | changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline_saves_and_loads(tmp_path: Path) -> None:
    pipe = pipeline(scheduler=RDLMScheduler(5, 4, "mixture", beta_end=0.3, step_rule="euler", last_step="walk"))
    pipe.save_pretrained(tmp_path)
    again = RDLMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    known = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (pipe, again)]
    assert known[0] == known[1]
    runs = [p(num_samples=3, num_inference_steps=4, generator=seeded(1)).sequences for p in (pipe, again)]
    assert torch.equal(*runs)
    assert runs[0].shape == (3, 6)
    assert RDLMScheduler.from_config(pipe.scheduler.config).config.beta_end == 0.3


def test_pipeline_rows_are_singles() -> None:
    pipe = pipeline()
    batch = pipe(num_samples=3, num_inference_steps=3, generator=[seeded(i) for i in range(3)]).sequences
    for i in range(3):
        alone = pipe(num_samples=1, num_inference_steps=3, generator=[seeded(i)]).sequences
        assert torch.equal(batch[i : i + 1], alone)
    assert int(batch.max()) < 4  # no masks


def test_pipeline_outputs_and_callback() -> None:
    pipe, seen = pipeline(), []

    def freeze(pipe: RDLMPipeline, step: int, timestep: Tensor, kwargs: dict) -> dict:
        seen.append((step, float(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": one_hot(torch.full((2, 4), 2), 5).float()} if step == 2 else {}

    arguments = {"num_samples": 2, "length": 4, "num_inference_steps": 3}
    out = pipe(**arguments, generator=seeded(), callback_on_step_end=freeze)
    assert seen == [(0, 1.0, (2, 4, 5)), (1, pytest.approx(2 / 3), (2, 4, 5)), (2, pytest.approx(1 / 3), (2, 4, 5))]
    assert (out.sequences == 2).all()
    assert (out.texts, out.num_model_calls) == (None, 3)
    plain = pipe(**arguments, generator=seeded())
    sequences, _, calls = pipe(**arguments, generator=seeded(), return_dict=False)
    assert torch.equal(sequences, plain.sequences)
    assert calls == 3
    assert (pipe(**arguments, generator=seeded(), output_type="np").sequences == plain.sequences.numpy()).all()
    points_ = pipe(**arguments, generator=seeded(), output_type="latent").sequences
    assert torch.equal(points_.argmax(-1), plain.sequences)
    start = pipe.scheduler.sample_prior((2, 4))
    assert torch.equal(pipe(latents=start, num_inference_steps=3, generator=seeded()).sequences, plain.sequences)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"length": 7}, "`length` is 7; allowed are 1 to 6"),
        ({"generator": [torch.Generator()]}, "list of 1, but 2 samples"),
        ({"latents": torch.zeros(2, 3, 4)}, "latents"),
        ({"output_type": "pil"}, "output_type"),
        ({"callback_on_step_end_tensor_inputs": ["model"]}, "callback_on_step_end_tensor_inputs"),
        ({"callback_on_step_end": lambda *_: None}, "`callback_on_step_end` returned None; it must return a dict"),
        (
            {"callback_on_step_end": lambda *_: {"latents": torch.ones(2)}},
            r"returned latents of shape \(2,\); they must keep",
        ),
    ],
)
def test_pipeline_says_no(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline()(**({"num_samples": 2} | arguments))


def test_pipeline_wants_its_scheduler_and_sizes() -> None:
    with pytest.raises(ValueError, match="`scheduler` is a AncestralScheduler; this pipeline needs an RDLMScheduler"):
        pipeline(scheduler=AncestralScheduler(5, 4))
    with pytest.raises(ValueError, match="vocab_size 6, but the model has 5"):
        pipeline(scheduler=RDLMScheduler(6, 5))(num_samples=1)
    model = pipeline().model
    with pytest.raises(ValueError, match="must be \\(B, L, 5\\)"):
        model(torch.zeros(1, 7, 5), 0.5)
    with pytest.raises(ValueError, match="multiple"):
        SphereTransformerModel(5, hidden_size=10, num_heads=3)


# Training


def test_draw_times() -> None:
    t = draw_times(1000, seeded())
    inside = (t > WINDOW[0]) & (t < WINDOW[1])
    assert 900 <= int(inside.sum()) <= 900 + 100 * (WINDOW[1] - WINDOW[0]) + 2
    assert (float(t.min()), float(t.max())) == pytest.approx((0, 1), abs=0.02)
    with pytest.raises(ValueError, match="window"):
        draw_times(3, window=(0.5, 0.2))


def test_loss_is_the_cross_entropy() -> None:
    """A model that knows the marginals only, and the exact one: entropy of the data less what X_t tells."""

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    p = JOINT.sum(1)
    bridge, x_0 = LogarithmBridge(3, 2), (torch.rand(4000, 1, generator=seeded(), dtype=torch.float64) > p[0]).long()
    logits = torch.tensor([math.log(p[0]), math.log(p[1]), 7.0])
    t = torch.full((4000,), 0.5, dtype=torch.float64)
    found = denoising_cross_entropy(lambda x, _: Output(logits.expand(*x.shape)), bridge, x_0, t, seeded(1))
    expected = -float(p.log()[x_0].mean())
    assert float(found) == pytest.approx(expected, abs=1e-5)
    exact = denoising_cross_entropy(
        lambda x, t: Output(bridge.log_density(x, t.double()) + logits), bridge, x_0, t, seeded(1)
    )
    for factor, shift in itertools.product((0.8, 1.2), (-0.3, 0.3)):
        other = denoising_cross_entropy(
            lambda x, t, factor=factor, shift=shift: Output(
                factor * bridge.log_density(x, t.double()) + torch.tensor([shift, 0.0, 0.0])
            ),
            *(bridge, x_0, t, seeded(1)),
        )
        assert float(exact) < float(other)
    assert float(exact) < 0.7 * expected


def load_example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "train_rdlm.py"
    spec = importlib.util.spec_from_file_location("train_rdlm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_learns_a_law(tmp_path: Path) -> None:
    """Small: four spins. The samples are far nearer to the law than spins that know nothing of each other."""
    small = ["--length", "4", "--hidden_size", "32", "--num_blocks", "1", "--max_train_steps", "150", "--batch", "128"]
    small += ["--learning_rate", "0.005", "--num_inference_steps", "1", "24", "--num_eval_samples", "3000"]
    table = load_example().main([*small, "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "table.json").read_text()) == table
    one, many = table
    assert (one["steps"], many["steps"]) == (1, 24)
    assert one["TV, samples"] == pytest.approx(one["TV, independent spins"], abs=0.1)
    assert many["TV, draws of the law"] < 0.05
    assert many["TV, samples"] < many["TV, independent spins"] / 3
    pipe = RDLMPipeline.from_pretrained(tmp_path)
    assert pipe(num_samples=2, num_inference_steps=2).sequences.shape == (2, 4)


def test_the_example_on_text(tmp_path: Path) -> None:
    small = ["--data", "text", "--length", "12", "--hidden_size", "16", "--num_blocks", "1", "--max_train_steps", "2"]
    small += ["--batch", "4", "--num_inference_steps", "2", "--num_eval_samples", "3"]
    table = load_example().main([*small, "--output_dir", str(tmp_path)])
    assert table[0]["of held-out text"] > 0.8
    assert len(table[0]["first sample"]) == 12
    texts = RDLMPipeline.from_pretrained(tmp_path)(num_samples=2, num_inference_steps=2).texts
    assert [len(text) for text in texts] == [12, 12]
    with pytest.raises(SystemExit):
        load_example().main(["--length", "0"])
