"""The learned scheduler: each special case is the scheduler that it claims to be, and what is its own follows its equations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import (
    Joint,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    kl,
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
)
from scheduler_cases import INFORMATION_CURVE, learned_scale, learned_times
from scipy.stats import beta
from torch import Tensor

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    ConfidenceScheduler,
    DiscreteScheduler,
    LearnedScheduler,
    LSDScheduler,
    RemaskingScheduler,
    SpreadScheduler,
    UniformProcess,
)
from discrete_schedulers.evaluation import sampler_nll_bound
from discrete_schedulers.processes import Process
from discrete_schedulers.schedulers import scheduling_utils
from discrete_schedulers.schedulers.learned_utils import learned_law, times_from_counts
from discrete_schedulers.schedulers.scheduling_learned import BLOCKS

V, LENGTH, STEPS = 6, 8, 5  # the mask is 5
FACTS: dict[str, Any] = {"vocab_size": V, "mask_token_id": V - 1}
ODDS = [0.0, 0.3, -0.5, 1.0, 0.2]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learned(num_steps: int = STEPS, **blocks: list[float]) -> dict[str, Any]:
    return {"coefficients": {str(num_steps): blocks}}


def assert_equal(
    ours: LearnedScheduler,
    other: DiscreteScheduler,
    num_steps: int = STEPS,
    change: Callable[[int], DiscreteScheduler] | None = None,
) -> None:
    """Equal grids, equal laws to 1e-12 and equal samples from equal generators, in each step from the same states. `change`
    gives the other scheduler of a step, where it differs between them."""
    absorbing = ours.config.process == "absorbing"
    x = torch.randint(0, V - 1, (6, LENGTH), generator=seeded(1))
    x[torch.rand(6, LENGTH, generator=seeded(2)) < 0.7] = V - 1
    x[0] = V - 1
    logits = random_denoiser(V, seed=3)(x, 1.0)
    ours.set_timesteps(num_steps)
    other.set_timesteps(num_steps)
    torch.testing.assert_close(ours.times, other.times, rtol=0, atol=1e-14)
    for index in range(num_steps):
        if change is not None:
            other = change(index)
            other.set_timesteps(num_steps)
        torch.testing.assert_close(
            ours.transition(logits, index, x), other.transition(logits, index, x), rtol=0, atol=1e-12
        )
        steps = [one.step(logits, index, x, generator=seeded(index)) for one in (ours, other)]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
        shaped = [one.pred_logits[..., : V - absorbing] for one in steps]  # nobody reads the mask's
        torch.testing.assert_close(shaped[0], shaped[1], rtol=0, atol=1e-12)
        if absorbing and index == num_steps - 1:
            assert (steps[0].prev_sample != V - 1).all()


# Special cases


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"unmasking": "bernoulli", "noise_schedule": "cosine"},
        {"order": "spread", "temperature": 0.7, "top_p": 0.8},
        {"order": "spread", "grid_shape": [2, 4], "grid": "optimal", "information_curve": INFORMATION_CURVE},
        {"process": "uniform", "mask_token_id": None, "grid": "cosine"},
        {"process": "uniform", "mask_token_id": None, "temperature": 0.6, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_steps", [1, STEPS, 20])
def test_without_coefficients_it_is_ancestral(kwargs: dict[str, Any], num_steps: int) -> None:
    assert_equal(LearnedScheduler(**FACTS | kwargs), AncestralScheduler(**FACTS | kwargs), num_steps)


@pytest.mark.parametrize(
    "blocks",
    [{"rate": [1.0] * 5}, {"inverse_temperature": [1.0] * 5}, {"remask": [0.0] * 5}, {"order": [2.0] * 8}]
    + [{"gate_a": [0.0] * 5}, {"gate_b": [0.0] * 5}, {"gate_a": [0.0] * 5, "gate_b": [0.0] * 5, "order": [0.0] * 8}],
    ids=str,
)
@pytest.mark.parametrize("how", [{"unmasking": "counts"}, {"unmasking": "bernoulli"}, {"order": "spread"}], ids=str)
def test_neutral_values_are_ancestral(blocks: dict[str, list[float]], how: dict[str, str]) -> None:
    if "order" in blocks and how != {"unmasking": "counts"}:
        pytest.skip("an order is for random counts")
    kwargs = FACTS | how
    assert_equal(LearnedScheduler(**kwargs, **learned(**blocks)), AncestralScheduler(**kwargs))


def test_spread_order_is_the_spread_scheduler() -> None:
    """Where whole numbers are due, and as laws: it draws no coin."""
    joint = random_joint(2, 4, seed=5)
    ours, spread = (
        cls(vocab_size=3, mask_token_id=2, **kwargs)
        for cls, kwargs in ((LearnedScheduler, {"order": "spread"}), (SpreadScheduler, {}))
    )
    denoiser = exact_denoiser(joint, ours.noise_process)
    laws = [run_law(scheduler, denoiser, 2, 4) for scheduler in (ours, spread)]
    torch.testing.assert_close(laws[0], laws[1], rtol=0, atol=1e-12)
    x = ours.sample_prior((3000, 4))
    for t in ours.timesteps:
        x = ours.step(denoiser(x, t), t, x, generator=seeded(6)).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, 3), minlength=81), laws[1].clamp(min=0)) < 4.5


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear"])
@pytest.mark.parametrize("with_times", [False, True])
def test_rate_is_lsd_and_with_times_lsd_plus(noise_schedule: str, with_times: bool) -> None:
    kwargs = FACTS | {"noise_schedule": noise_schedule, "grid": "learned" if with_times else "uniform"}
    times = {"times": learned_times(STEPS)} if with_times else {}
    scale = [0.7, 1.0, 1.4, 6.0, 0.3]  # one of them opens everything
    ours = LearnedScheduler(**kwargs, unmasking="bernoulli", **learned(rate=scale, **times))
    assert_equal(ours, LSDScheduler(**kwargs, **learned(scale=scale, **times)))


def test_lsd_with_other_noise_has_another_rate() -> None:
    kwargs = FACTS | {"noise_schedule": "cosine"}
    scale = learned_scale(STEPS)
    lsd = LSDScheduler(**kwargs, **learned(scale=scale))
    lsd.set_timesteps(STEPS)
    process, times = lsd.absorbing_process, lsd.times
    rate = [
        phi * float((t - s) * process.hazard(t) / process.unmask_probability(t, s))
        for phi, t, s in zip(scale, times[:-1], times[1:], strict=True)
    ]
    assert_equal(LearnedScheduler(**kwargs, unmasking="bernoulli", **learned(rate=rate)), lsd)


def test_the_log_score_of_lsd_is_an_inverse_temperature_of_the_token() -> None:
    scale = learned_scale(STEPS)
    ours = LearnedScheduler(**FACTS, **learned(inverse_temperature=scale))
    lsd = LSDScheduler(**FACTS, scale="log_score", **learned(scale=scale))
    masks = torch.full((2, LENGTH), V - 1)
    logits = random_denoiser(V)(masks, 1.0)
    for scheduler in (ours, lsd):
        scheduler.set_timesteps(STEPS)
    for index in range(STEPS - 1):
        tokens = [scheduler.transition(logits, index, masks)[..., :-1] for scheduler in (ours, lsd)]
        torch.testing.assert_close(*[law / law.sum(-1, keepdim=True) for law in tokens], rtol=0, atol=1e-12)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_times_are_a_learned_grid(process: str) -> None:
    kwargs = {"process": process, "grid": "learned", "noise_schedule": "cosine", **learned(times=learned_times(STEPS))}
    kwargs |= {"vocab_size": V, "mask_token_id": V - 1 if process == "absorbing" else None}
    assert_equal(LearnedScheduler(**kwargs), AncestralScheduler(**kwargs))


def test_times_are_the_optimal_grid() -> None:
    optimal = AncestralScheduler(**FACTS, grid="optimal", information_curve=INFORMATION_CURVE)
    optimal.set_timesteps(STEPS)
    assert_equal(LearnedScheduler(**FACTS, grid="learned", **learned(times=optimal.times.tolist())), optimal)


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine", "geometric"])
def test_times_are_a_beta_schedule(noise_schedule: str) -> None:
    """alpha = sin^2(pi / 2 BetaCDF(k / N; a, b)): (1/2, 1/2) is the straight line, (1, 1) the squared sine."""
    process = AbsorbingProcess(V, V - 1, noise_schedule)
    share = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    for a, b, opened in [(0.5, 0.5, share), (1.0, 1.0, torch.sin(math.pi / 2 * share) ** 2), (2.0, 0.7, None)]:
        curve = torch.from_numpy(beta.cdf(share.numpy(), a, b))
        alpha = torch.sin(math.pi / 2 * curve) ** 2
        if opened is not None:
            torch.testing.assert_close(alpha, opened, rtol=0, atol=1e-12)
        times = process.time_of_noise(1 - alpha)
        times[-1] = 0.0
        kwargs = FACTS | {"noise_schedule": noise_schedule, "grid": "learned", "unmasking": "bernoulli"}
        ours = LearnedScheduler(**kwargs, **learned(times=times.tolist()))
        assert_equal(ours, AncestralScheduler(**kwargs, **learned(times=times.tolist())))
        for k in range(STEPS):
            due = float((alpha[k + 1] - alpha[k]) / (1 - alpha[k]))
            assert ours.open_probability(k) == pytest.approx(due, abs=1e-12)


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine", "geometric"])
def test_counts_say_how_many_open(noise_schedule: str) -> None:
    counts = [1.0, 2.0, 4.0, 1.0]
    scheduler = LearnedScheduler(**FACTS, noise_schedule=noise_schedule, grid="learned", **learned(4, counts=counts))
    scheduler.set_timesteps(4)
    x, left = torch.full((3, LENGTH), V - 1), []
    for t in scheduler.timesteps:
        x = scheduler.step(random_denoiser(V)(x, t), t, x, generator=seeded()).prev_sample
        left.append((x == V - 1).sum(1).tolist())
    assert left == [[7] * 3, [5] * 3, [1] * 3, [0] * 3]
    scaled = times_from_counts(scheduler.noise_process, torch.tensor(counts, dtype=torch.float64) / 3)
    torch.testing.assert_close(scaled, scheduler.times, rtol=0, atol=1e-14)
    process = scheduler.absorbing_process
    masked = torch.stack([(1 - process.alpha(t)) / (1 - process.alpha(1.0)) for t in scheduler.times])
    torch.testing.assert_close(
        masked, torch.tensor([1, 7 / 8, 5 / 8, 1 / 8, 0], dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
@pytest.mark.parametrize("shaped", [{}, {"temperature": 0.8, "top_p": 0.9}])
def test_inverse_temperature_is_a_temperature_for_each_step(process: str, shaped: dict[str, float]) -> None:
    factors = [0.3, 0.8, 1.0, 1.7, 4.0]
    kwargs = {"process": process, "vocab_size": V, "mask_token_id": V - 1 if process == "absorbing" else None} | shaped
    ours = LearnedScheduler(**kwargs, **learned(inverse_temperature=factors))

    def of_step(index: int) -> DiscreteScheduler:
        return AncestralScheduler(**kwargs | {"temperature": shaped.get("temperature", 1.0) / factors[index]})

    assert_equal(ours, of_step(0), change=of_step)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_top_p_is_one_for_each_step(process: str) -> None:
    kept = [0.3, 0.8, 1.0, 0.95, 0.6]
    kwargs = {"process": process, "vocab_size": V, "mask_token_id": V - 1 if process == "absorbing" else None}
    ours = LearnedScheduler(**kwargs, top_p=0.5, **learned(top_p=kept))  # the block takes the place of the 0.5
    of_step = [AncestralScheduler(**kwargs, top_p=value) for value in kept]
    assert_equal(ours, of_step[0], change=of_step.__getitem__)
    assert_equal(LearnedScheduler(**kwargs, **learned(top_p=kept)), of_step[0], change=of_step.__getitem__)


def test_a_latent_for_networks_that_read_one() -> None:
    x = torch.full((3, 4), V - 1)
    assert LearnedScheduler(**FACTS).model_inputs(0, x, None, seeded()) == {}
    told = LearnedScheduler(**FACTS, network_latent=True).model_inputs(0, x, None, seeded())
    assert list(told) == ["latent"]
    assert torch.equal(told["latent"], torch.rand(3, generator=seeded(), dtype=torch.float64))


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine"])
def test_remask_is_the_remasking_scheduler(noise_schedule: str) -> None:
    kwargs = FACTS | {"noise_schedule": noise_schedule, **learned(remask=[0.0, 0.2, 0.7, 1.0, 0.4])}
    ours = LearnedScheduler(unmasking="bernoulli", **kwargs)
    assert_equal(ours, RemaskingScheduler(strength="learned", **kwargs))
    assert ours.revises_tokens
    assert not LearnedScheduler(**FACTS).revises_tokens


@pytest.mark.parametrize("permutation", [[2, 0, 3, 1], [3, 2, 1, 0]])
def test_an_order_opens_one_after_the_other(permutation: list[int]) -> None:
    """permutation[r] opens in step r, also when some are known; with a token for each step the law is the model's."""
    priority = [0.0] * 4
    for rank, place in enumerate(permutation):
        priority[place] = 1e9 - rank  # all one number in float32
    joint = random_joint(2, 4, seed=7)
    scheduler = LearnedScheduler(vocab_size=3, mask_token_id=2, **learned(4, order=priority))
    scheduler.set_timesteps(4)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    x = scheduler.sample_prior((4000, 4))
    for index, t in enumerate(scheduler.timesteps):
        chosen = scheduler.positions(t, x, seeded())
        assert chosen.nonzero()[:, 1].tolist() == [permutation[index]] * len(x)
        x = scheduler.step(denoiser(x, t), t, x, generator=seeded(index)).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, 2), minlength=16), joint.p) < 4.5
    known = torch.tensor([[2, 2, 2, 2]])
    known[0, permutation[0]] = 1
    assert scheduler.positions(2, known, seeded())[0].nonzero().flatten().tolist() == sorted(permutation[1:3])


def test_equal_priorities_open_in_random_order() -> None:
    scheduler = LearnedScheduler(vocab_size=3, mask_token_id=2, **learned(2, order=[5.0, 1.0, 1.0, -3.0]))
    scheduler.set_timesteps(2)
    chosen = scheduler.positions(0, torch.full((3000, 4), 2), seeded())
    assert chosen[:, 0].all()
    assert not chosen[:, 3].any()
    assert chi_square_z(torch.stack([chosen[:, 1].sum(), chosen[:, 2].sum()]), torch.tensor([0.5, 0.5]).double()) < 4.5


# The gate


def confidence_logit(logits: Tensor) -> Tensor:
    """logit max p, by its definition."""
    best = logits[..., :-1].softmax(-1).amax(-1)
    return (best / (1 - best)).log()


def test_a_gate_is_its_equation() -> None:
    rate, remask, b = [0.9, 1.1, 0.8, 1.3, 1.0], [0.1, 0.0, 0.3, 0.2, 0.5], [1.0, -0.7, 0.0, 2.0, 3.0]
    blocks = {"rate": rate, "remask": remask, "gate_a": ODDS, "gate_b": b}
    gate, plain = (
        LearnedScheduler(**FACTS, unmasking="bernoulli", **learned(**kept))
        for kept in (blocks, {"rate": rate, "remask": remask})
    )
    masks = torch.full((1, LENGTH), V - 1)
    logits = random_denoiser(V, seed=8)(masks, 1.0)
    for scheduler in (gate, plain):
        scheduler.set_timesteps(STEPS)
    for index in range(STEPS - 1):
        u = plain.open_probability(index)
        assert gate.open_probability(index) == u
        expected = torch.sigmoid(math.log(u / (1 - u)) + ODDS[index] + b[index] * confidence_logit(logits))
        law = gate.transition(logits, index, masks)
        torch.testing.assert_close(1 - law[..., -1], expected, rtol=0, atol=1e-12)
        tokens = law[..., :-1] / law[..., :-1].sum(-1, keepdim=True)
        torch.testing.assert_close(tokens, logits[..., :-1].softmax(-1), rtol=0, atol=1e-12)
        assert torch.equal(gate.positions(index, masks), masks == V - 1)
    assert (gate.transition(logits, STEPS - 1, masks)[..., -1] == 0).all()


def test_a_gate_without_the_grid() -> None:
    """u_i = sigmoid(a + b logit max p) is gate_a = a - logit r."""
    a, b = [-1.0, 0.4, 0.0, 2.0, 0.0], [0.5, 1.0, -1.0, 0.0, 0.0]
    plain = LearnedScheduler(**FACTS)
    plain.set_timesteps(STEPS)
    r = [plain.open_probability(index) for index in range(STEPS - 1)]
    gate_a = [a_k - math.log(r_k / (1 - r_k)) for a_k, r_k in zip(a[:-1], r, strict=True)] + [0.0]
    gate = LearnedScheduler(**FACTS, unmasking="bernoulli", **learned(gate_a=gate_a, gate_b=b))
    gate.set_timesteps(STEPS)
    masks = torch.full((2, LENGTH), V - 1)
    logits = random_denoiser(V, seed=9)(masks, 1.0)
    for index in range(STEPS - 1):
        expected = torch.sigmoid(a[index] + b[index] * confidence_logit(logits))
        torch.testing.assert_close(1 - gate.transition(logits, index, masks)[..., -1], expected, rtol=0, atol=1e-12)


def test_a_gate_with_counts() -> None:
    """How many: the nearest integer to the sum of u_i. Which: drawn one after another by the odds; the most confident when b is
    large."""
    x = torch.full((4000, 4), V - 1)
    logits = 2 * random_denoiser(V, seed=10)(x[:1], 1.0)
    gate = LearnedScheduler(**FACTS, **learned(4, gate_a=[-0.5] * 4, gate_b=[0.9] * 4))
    gate.set_timesteps(4)
    u = 1 - gate.transition(logits, 1, x[:1])[0, :, -1]
    assert 1.6 < float(u.sum()) < 2.4
    chosen = gate.step(logits.expand(4000, -1, -1), 1, x, generator=seeded(3)).prev_sample != V - 1
    weight = u / (1 - u)
    law = torch.zeros(16, dtype=torch.float64)
    for first, second in itertools.permutations(range(4), 2):
        pair = weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
        law[2**first + 2**second] += pair
    assert chi_square_z(torch.bincount((chosen * 2 ** torch.arange(4)).sum(1), minlength=16), law) < 4.5
    middle = float(confidence_logit(logits)[0].sort().values[1:3].mean())
    sure = LearnedScheduler(**FACTS, **learned(2, gate_a=[-100 * middle] * 2, gate_b=[100.0] * 2))
    sure.set_timesteps(2)
    opened = sure.step(logits, 0, x[:1], generator=seeded()).prev_sample[0] != V - 1
    assert opened.nonzero().flatten().tolist() == sorted(confidence_logit(logits)[0].topk(2).indices.tolist())


def test_one_token_for_each_step_is_exact_with_a_gate() -> None:
    """The sure position opens first more often, and the law is the model's."""
    joint = Joint(
        all_states(2, 2), torch.tensor([0.55, 0.3, 0.05, 0.1], dtype=torch.float64)
    )  # the first is nearly known
    gate = LearnedScheduler(vocab_size=3, mask_token_id=2, **learned(2, gate_a=[-1.2, 0.0], gate_b=[1.0, 0.0]))
    gate.set_timesteps(2)
    denoiser = exact_denoiser(joint, gate.noise_process)
    masks = torch.full((6000, 2), 2)
    half = gate.step(denoiser(masks, 1.0), 0, masks, generator=seeded(14)).prev_sample
    assert ((half != 2).sum(1) == 1).all()
    assert 0.6 < float((half[:, 0] != 2).double().mean()) < 0.9
    x = gate.step(denoiser(half, 0.5), 1, half, generator=seeded(15)).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, 2), minlength=4), joint.p) < 4.5


# gate_a, gate_b, and the chance to open: of one half, with 40 for the log-odds of what is certain
EVEN = (0.0, -0.05, 1 / (1 + math.exp(2)))


def test_a_certain_network_opens_at_once_and_extremes_are_finite() -> None:
    logits = torch.full((1, 2, V), -math.inf, dtype=torch.float64)
    logits[..., 0] = 0.0
    masks = torch.full((1, 2), V - 1)
    for a, b, opens in [
        (0.0, 100.0, 1.0),
        (0.0, -100.0, 0.0),
        (1e6, 0.0, 1.0),
        (-1e6, 0.0, 0.0),
        (1e300, 1e300, 1.0),
        EVEN,
    ]:
        gate = LearnedScheduler(**FACTS, unmasking="bernoulli", **learned(2, gate_a=[a, a], gate_b=[b, b]))
        gate.set_timesteps(2)
        assert 1 - float(gate.transition(logits, 0, masks)[0, 0, -1]) == pytest.approx(opens, abs=1e-12)
        assert (gate.step(logits, 1, masks, generator=seeded()).prev_sample == 0).all()


def test_a_gate_reads_all_masks() -> None:
    gate = LearnedScheduler(**FACTS, **learned(2, gate_b=[1.0, 1.0]))
    gate.set_timesteps(2)
    masks = torch.full((1, 4), V - 1)
    some = masks == V - 1
    some[0, 0] = False
    rows = random_denoiser(V)(masks, 1.0, some)
    with pytest.raises(ValueError, match="must be all masks: there is a gate"):
        gate.step(rows, 0, masks, generator=seeded())
    with pytest.raises(ValueError, match="chooses positions by their logits"):
        sampler_nll_bound(random_denoiser(V), gate, torch.zeros(2, 4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="chooses positions by their logits"):
        sampler_nll_bound(random_denoiser(V), ConfidenceScheduler(**FACTS), torch.zeros(2, 4, dtype=torch.int64), 2)


def test_a_bound_is_for_tokens_drawn_once() -> None:
    remasking = LearnedScheduler(**FACTS, **learned(2, remask=[0.5, 0.5]))
    with pytest.raises(ValueError, match="can revise tokens"):
        sampler_nll_bound(random_denoiser(V), remasking, torch.zeros(2, 4, dtype=torch.int64), 2)


def test_the_bound_counts_the_inverse_temperature() -> None:
    """Independent tokens: the bound is the cross-entropy with the sharpened law, whatever opens when."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    joint = Joint(all_states(3, 2), torch.outer(p, p).flatten())
    scheduler = LearnedScheduler(vocab_size=4, mask_token_id=3, **learned(1, inverse_temperature=[2.0]))
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    nats = sampler_nll_bound(denoiser, scheduler, joint.states, 1)
    sharp = p**2 / (p**2).sum()
    torch.testing.assert_close(nats, -sharp.log()[joint.states].mean(1), rtol=0, atol=1e-12)


# Learning: the law as a function of tensors


def steps_of(coefficients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in coefficients.items() if name not in ("t", "s")}


ALL = {"t": 0.7, "s": 0.4, "rate": 1.2, "inverse_temperature": 0.8, "gate_a": 0.3, "gate_b": -0.6, "remask": 0.4}
ALL |= {"contrast": 0.5}
PRIOR = torch.tensor(
    [0.1, 0.3, 0.15, 0.25, 0.2, 1.0], dtype=torch.float64
).log()  # of five tokens and, unread, the mask


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("noise_schedule", ["loglinear", "cosine"])
@pytest.mark.filterwarnings("error::UserWarning")  # torch warns where a tensor with a gradient becomes a number
def test_gradients_are_difference_quotients(name: str, noise_schedule: str) -> None:
    process = AbsorbingProcess(V, V - 1, noise_schedule)
    x = torch.tensor([[0, V - 1, V - 1, 3]])
    logits = random_denoiser(V, seed=11)(x, 1.0)
    weight = torch.rand(1, 4, V, generator=seeded(12), dtype=torch.float64)

    def value(moved: Tensor) -> Tensor:
        now = {key: torch.tensor(number, dtype=torch.float64) for key, number in ALL.items()} | {name: moved}
        return (weight * learned_law(process, logits, x, now["t"], now["s"], steps_of(now), 0.9, prior=PRIOR)).sum()

    at = torch.tensor(ALL[name], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(at), at)
    h = 1e-5
    with torch.no_grad():
        quotient = float(value(at + h) - value(at - h)) / (2 * h)
    assert abs(quotient) > 1e-4
    assert float(slope) == pytest.approx(quotient, rel=1e-6)


def test_gradients_with_uniform_noise_and_of_counts() -> None:
    process = UniformProcess(V)
    x = torch.tensor([[0, 2, 3]])
    logits = random_denoiser(V, seed=13)(x, 1.0)

    def law(beta: Tensor) -> Tensor:
        t, s = torch.tensor([0.7, 0.4], dtype=torch.float64)
        return learned_law(process, logits, x, t, s, {"inverse_temperature": beta})[0, 0, :2]

    assert torch.autograd.gradcheck(law, torch.tensor(0.8, dtype=torch.float64, requires_grad=True))
    counts = torch.tensor([1.0, 2.0, 3.5], dtype=torch.float64, requires_grad=True)
    for noise_schedule in ("loglinear", "cosine"):
        other = AbsorbingProcess(V, V - 1, noise_schedule)
        assert torch.autograd.gradcheck(lambda c, p=other: times_from_counts(p, c), counts)


def test_a_contrast_strengthens_what_the_context_says() -> None:
    """Its law by hand; what is p_0 stays p_0; with all tokens equally likely it is a temperature."""
    contrast = {"token_prior": PRIOR.tolist(), **learned(1, contrast=[0.5], inverse_temperature=[2.0])}
    scheduler = LearnedScheduler(**FACTS, **contrast)
    scheduler.set_timesteps(1)
    p = torch.tensor([0.5, 0.2, 0.0, 0.1, 0.2, 0.0], dtype=torch.float64)
    x, p_0 = torch.tensor([[V - 1, V - 1]]), PRIOR.exp()
    law = scheduler.transition(torch.stack([p.log() + 3.0, p_0.log()])[None], 0, x)[0]  # logits are up to a constant
    wanted = (p * (p / p_0) ** 0.5) ** 2
    torch.testing.assert_close(law[0], wanted / wanted.sum(), rtol=0, atol=1e-14)
    squared = p_0[:-1] ** 2
    torch.testing.assert_close(law[1, :-1], squared / squared.sum(), rtol=0, atol=1e-14)
    even = LearnedScheduler(**FACTS, token_prior=[0.0] * V, **learned(contrast=[0.25] * STEPS))
    assert_equal(even, AncestralScheduler(**FACTS, temperature=0.8))
    assert_equal(
        LearnedScheduler(**FACTS, token_prior=PRIOR.tolist(), **learned(contrast=[0.0] * STEPS)),
        AncestralScheduler(**FACTS),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_prior": None}, "'contrast' needs `token_prior`"),
        (
            {"token_prior": [0.0] * (V - 1)},
            f"`token_prior` has 5 log-probabilities, 5 of them finite; .* each of the {V} tokens",
        ),
        ({"token_prior": [-math.inf] + [0.0] * (V - 1)}, "`token_prior` has 6 log-probabilities, 5 of them finite"),
        ({"token_prior": ["a"] * V}, "`token_prior` is .* must be a list of numbers"),
        (learned(1, contrast=[-0.1]), "'contrast' strengthens, it cannot be negative"),
        ({"process": "uniform", "mask_token_id": None}, "'contrast' is for masks"),
    ],
)
def test_contrasts_that_are_not_allowed(changes: dict[str, Any], message: str) -> None:
    allowed = FACTS | {"token_prior": PRIOR.tolist(), **learned(1, contrast=[0.5])}
    LearnedScheduler(**allowed)
    with pytest.raises(ValueError, match=message):
        LearnedScheduler(**allowed | changes)


def ising(length: int) -> Joint:
    """A ring of two states: neighbours like to be equal, and the first one to be 0."""
    states = all_states(2, length)
    return Joint(states, (1.5 * (states == states.roll(-1, 1)).sum(1) + 0.3 * (states[:, 0] == 0)).double().softmax(0))


def test_one_contrast_does_more_than_a_temperature_for_each_step() -> None:
    """A ring of four where neighbours like to be equal and all like to be 0, two steps, exact gradients: the marginal KL is
    0.0298 with a grid alone, 0.0092 with two inverse temperatures as well, which make 1 too rare, 0.0012 with one contrast."""
    states = all_states(2, 4)
    weight = 1.5 * (states == states.roll(-1, 1)).sum(1) + (states == 0).sum(1)
    joint = Joint(states, weight.double().softmax(0))
    share = (joint.p[:, None] * (states == 0)).sum(0).mean()
    prior = torch.stack([share, 1 - share, torch.ones_like(share)]).log()
    plain = LearnedScheduler(vocab_size=3, mask_token_id=2, noise_schedule="linear", unmasking="bernoulli")
    process, noisy = plain.noise_process, all_states(3, 4)
    denoiser = exact_denoiser(joint, process)
    logits = denoiser(noisy, 1.0).clamp(min=-60)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def least(blocks: Callable[[Tensor], list[dict[str, Tensor]]], number: int) -> tuple[float, Tensor]:
        floats = torch.zeros(1 + number, dtype=torch.float64, requires_grad=True)

        def marginal_kl() -> Tensor:
            middle, steps = torch.sigmoid(floats[0]), blocks(floats[1:])
            law = prior_law(plain, 4)
            for t, s, step in ((one, middle, steps[0]), (middle, zero, steps[1])):
                each = learned_law(process, logits, noisy, t, s, step, prior=prior)
                law = law @ torch.stack([each[:, i, noisy[:, i]] for i in range(4)]).prod(0)
            return (joint.p * (joint.p / law[state_index(states, 3)]).log()).sum()

        optimizer = torch.optim.LBFGS([floats], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = marginal_kl()
            loss.backward()
            return loss

        optimizer.step(closure)
        return float(marginal_kl()), floats.detach()

    assert least(lambda c: [{}, {}], 0)[0] == pytest.approx(0.0298, abs=1e-4)
    temperatures = least(lambda c: [{"inverse_temperature": c[k].exp()} for k in (0, 1)], 2)[0]
    assert temperatures == pytest.approx(0.0092, abs=1e-4)
    best, floats = least(lambda c: [{"contrast": c[0]}] * 2, 1)
    assert best == pytest.approx(0.00125, abs=1e-5)
    blocks = {"times": [1.0, float(torch.sigmoid(floats[0])), 0.0], "contrast": [float(floats[1])] * 2}
    config = {"grid": "learned", "token_prior": prior.tolist(), **learned(2, **blocks)}
    ours = LearnedScheduler.from_config(plain.config, **config)
    assert kl(joint.p, clean_part(run_law(ours, denoiser, 2, 4), ours, joint)) == pytest.approx(best, rel=1e-9)


def test_floats_learned_through_the_law_reach_the_known_optimum() -> None:
    """Two steps on a ring of four: marginal KL 0.2821 on the uniform grid, 0.0468 with a grid and two inverse temperatures and
    0.0444 with a gate as well (exact gradients, four floats). The config with these floats has the same law."""
    joint = ising(4)
    plain = LearnedScheduler(vocab_size=3, mask_token_id=2, noise_schedule="linear", unmasking="bernoulli")
    process, states = plain.noise_process, all_states(3, 4)
    denoiser = exact_denoiser(joint, process)
    assert kl(joint.p, clean_part(run_law(plain, denoiser, 2, 4), plain, joint)) == pytest.approx(0.2821, abs=1e-4)
    logits = denoiser(states, 1.0).clamp(min=-60)
    clean = state_index(joint.states, 3)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    floats = torch.tensor([0.0, -1.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)

    def blocks(floats: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        steps = [{"inverse_temperature": floats[1 + k].exp(), "gate_b": floats[3] if k == 0 else zero} for k in (0, 1)]
        return torch.sigmoid(floats[0]), steps

    def marginal_kl(floats: Tensor) -> Tensor:
        middle, steps = blocks(floats)
        law = prior_law(plain, 4)
        for t, s, step in ((one, middle, steps[0]), (middle, zero, steps[1])):
            each = learned_law(process, logits, states, t, s, step)  # (S, L, V)
            law = law @ torch.stack([each[:, i, states[:, i]] for i in range(4)]).prod(0)
        return (joint.p * (joint.p / law[clean]).log()).sum()

    optimizer = torch.optim.LBFGS([floats], max_iter=120, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = marginal_kl(floats)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(marginal_kl(floats.detach()))
    assert best < 0.0446
    middle, steps = blocks(floats.detach())
    learned_blocks = {name: [float(step[name]) for step in steps] for name in steps[0]}
    config = {"grid": "learned", **learned(2, times=[1.0, float(middle), 0.0], **learned_blocks)}
    ours = LearnedScheduler.from_config(plain.config, **config)
    assert kl(joint.p, clean_part(run_law(ours, denoiser, 2, 4), ours, joint)) == pytest.approx(best, rel=1e-9)


# Config


def test_only_the_blocks_of_a_budget_are_read(tmp_path: Path) -> None:
    coefficients = {
        "2": {"rate": [0.5, 2.0]},
        "3": {"gate_b": [1 / 3] * 3, "order": [0.1] * 7},
        "4": {"scale": [1.0] * 4},
    }
    scheduler = LearnedScheduler(**FACTS, coefficients=coefficients, learned_for={"vocab_size": V})
    scheduler.save_pretrained(tmp_path)
    scheduler = LearnedScheduler.from_pretrained(tmp_path)
    assert scheduler.config.coefficients == coefficients
    masks = torch.full((2, 7), V - 1)
    scheduler.set_timesteps(2)
    assert not scheduler.chooses_by_logits
    assert scheduler.positions(0, masks, seeded()).sum(1).tolist() == [2, 2]  # 7 / 2 / 2, to the even neighbour
    scheduler.set_timesteps(3)
    assert scheduler.positions(0, masks).all()
    with pytest.raises(ValueError, match=r"coefficients for 4 steps have no block .* they have: \['scale'\]"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 5; learned budgets: 2, 3, 4"):
        scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps == 3
    with pytest.raises(ValueError, match="'order' has 7 priorities, but `sample` has 6 positions"):
        scheduler.step(random_denoiser(V)(masks[:, :6], 1.0), 0, masks[:, :6], generator=seeded())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (learned(2, rate=[1.0, -0.1]), "'rate' multiplies a probability"),
        (learned(2, remask=[0.0, 1.1]), "'remask' must have fractions"),
        (learned(2, inverse_temperature=[0.0, 1.0]), "'inverse_temperature' must be positive"),
        (learned(2, top_p=[0.0, 1.0]), r"'top_p' has masses of most probable tokens, in \(0, 1\], not \[0.0, 1.0\]"),
        (learned(2, top_p=[0.5, 1.1]), r"'top_p' has masses of most probable tokens, in \(0, 1\], not \[0.5, 1.1\]"),
        (learned(2, counts=[0.0, 1.0]), "'counts' must be positive"),
        ({"network_latent": "yes"}, "`network_latent` is 'yes'; it must be True or False"),
        (learned(2, gate_a=[1.0]), "'gate_a' has 1 values, needs 2"),
        (learned(2, order=[]), "'order' has 0 values, needs 1"),
        (learned(2, order=[1.0, math.nan]), "'order' has a value that is not finite"),
        ({"order": "spread", **learned(2, order=[1.0])}, r"'order' needs .*`order='random'`"),
        ({"unmasking": "bernoulli", **learned(2, order=[1.0])}, "'order' needs `unmasking='counts'`"),
        ({"process": "uniform", "mask_token_id": None, **learned(2, rate=[1.0, 1.0])}, "'rate' is for masks"),
        ({"process": "uniform", "mask_token_id": None, **learned(2, counts=[1.0, 1.0])}, "'counts' is for masks"),
        (
            {"vocab_size": 9, "learned_for": {"vocab_size": V}, **learned(2, rate=[1.0, 1.0])},
            "were learned for `vocab_size` 6",
        ),
    ],
)
def test_blocks_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedScheduler(**FACTS | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (learned(2, times=[1.0, 0.5, 0.0]), "have 'times', which `grid='learned'` reads, but `grid` is 'uniform'"),
        ({"grid": "cosine", **learned(2, counts=[1.0, 2.0])}, "have 'counts', which `grid='learned'` reads"),
        ({"grid": "learned", **learned(2, times=[1.0, 0.5, 0.0], counts=[1.0, 1.0])}, "have 'times' and 'counts'"),
        ({"grid": "learned", **learned(2, rate=[1.0, 1.0])}, r"have no 'times'; they have: \['rate'\]"),
        ({"grid": "learned", **learned(2, counts=[1.0, 1e-30])}, "which must fall strictly"),
    ],
)
def test_grids_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    scheduler = LearnedScheduler(**FACTS | kwargs)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(2)


@pytest.mark.parametrize("process", [AbsorbingProcess(5, 4), UniformProcess(5)])
def test_states_that_are_never_drawn_leave_the_gradient_finite(process: Process) -> None:
    """Denoisers give -inf to the mask and to suppressed ids; an inverse temperature multiplies them."""
    logits = torch.tensor([[[0.3, -torch.inf, 1.0, -0.5, 0.2]]], dtype=torch.float64)
    power = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    times = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)

    def entry(power: torch.Tensor) -> Tensor:
        law = learned_law(process, logits, torch.tensor([[4]]), *times, {"inverse_temperature": power})
        return law[0, 0, 2]

    (slope,) = torch.autograd.grad(entry(power), power)
    with torch.no_grad():
        quotient = float(entry(power + 1e-6) - entry(power - 1e-6)) / 2e-6
    assert float(slope) == pytest.approx(quotient, rel=1e-6)


def test_no_block_is_taken_for_one_of_a_newer_version() -> None:
    assert set(BLOCKS) <= set(scheduling_utils.BLOCKS)
