"""Schedule-conditioned diffusion: the counted process against paths and matrices, and the sampler's exact law."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from laws import Joint, all_states, chi_square_z, exact_denoiser, random_joint, state_index, total_variation
from scipy.stats import poisson
from torch import Tensor, nn
from torch.nn.functional import one_hot

from discrete_schedulers import (
    AbsorbingProcess,
    AncestralScheduler,
    DiscreteDiffusionPipeline,
    RowLogits,
    ScheduleConditionedProcess,
    SCUDScheduler,
    UniformProcess,
    scud,
)
from discrete_schedulers.scud import EventOrder, JumpKernel, MatrixKernel, inverse_cdf, poisson_cdf

V, L, MASK = 3, 3, 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(vocab_size: int, reach: int = 1) -> Tensor:
    """An event moves an ordinal token by at most `reach`, a little more often up than down; at the ends it stays. So the prior
    is not uniform, and K is not symmetric."""
    kernel = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    for v, step in itertools.product(range(vocab_size), range(-reach, reach + 1)):
        kernel[v, min(max(v + step, 0), vocab_size - 1)] += 1.3 if step > 0 else 1.0
    return kernel / kernel.sum(1, keepdim=True)


def ordinal(event_rate: float = 4.0, vocab_size: int = V) -> ScheduleConditionedProcess:
    return ScheduleConditionedProcess(MatrixKernel(neighbours(vocab_size)), event_rate=event_rate)


def masking() -> JumpKernel:
    return JumpKernel(one_hot(torch.tensor(MASK), V + 1).double())


def counted_denoiser(process: ScheduleConditionedProcess, joint: Joint) -> Any:
    """log p(x_0^i = v | x_t, S), (B, L, V), by Bayes over all clean rows."""
    powers = torch.stack([torch.linalg.matrix_power(dense(process), s) for s in range(process.most_events + 2)])

    def log_p_0(x_t: Tensor, counts: Tensor) -> Tensor:
        likelihood = powers[counts[:, None], joint.states[None], x_t[:, None]]  # (B, S, L)
        weight = joint.p * likelihood.prod(-1)
        p_0 = torch.einsum("bs,slv->blv", weight, one_hot(joint.states, process.vocab_size).double())
        return (p_0 / p_0.sum(-1, keepdim=True)).log()

    return log_p_0


def dense(process: ScheduleConditionedProcess) -> Tensor:
    """The kernel as a matrix."""
    if isinstance(process.kernel, MatrixKernel):
        return process.kernel.squares[0]
    return process.kernel.prior_law.expand(process.vocab_size, process.vocab_size)


# The process


@pytest.mark.parametrize("kernel", [MatrixKernel(neighbours(4)), JumpKernel(torch.tensor([0.5, 0.125, 0.375, 0.0]))])
def test_powers_of_a_kernel(kernel: Any) -> None:
    """Against products one by one, for many counts at once; a count of a million is no overflow."""
    matrix = dense(ScheduleConditionedProcess(kernel, event_rate=9.0))
    counts = torch.tensor([[0, 1, 2, 3, 7], [8, 21, 64, 5, 0]])
    values = torch.rand(2, 5, 4, generator=seeded(), dtype=torch.float64)
    for index in itertools.product(range(2), range(5)):
        after = before = values[index]
        for _ in range(int(counts[index])):
            after, before = after @ matrix, matrix @ before
        torch.testing.assert_close(kernel.after(values, counts)[index], after, rtol=1e-13, atol=0)
        torch.testing.assert_close(kernel.before(values, counts)[index], before, rtol=1e-13, atol=0)
    law = kernel.after(torch.eye(4, dtype=torch.float64), torch.full((4,), 10**6))
    torch.testing.assert_close(law, kernel.prior_law.expand(4, 4), rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel.prior_law @ matrix, kernel.prior_law, rtol=1e-12, atol=0)


def test_the_posterior_is_bayes_over_all_paths() -> None:
    """Every path of S events, by its probability; the one that undoes k of them stops k places before its end."""
    process, x_t = ordinal(), 2
    matrix = dense(process)
    clean = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)  # p(x_0 | the other positions)
    for counts, removed in [(0, 0), (1, 1), (3, 0), (3, 1), (4, 3), (3, 3)]:
        law, p_0 = torch.zeros(2, V, dtype=torch.float64)
        for path in itertools.product(range(V), repeat=counts + 1):
            if path[-1] == x_t:
                p = clean[path[0]] * math.prod(float(matrix[a, b]) for a, b in itertools.pairwise(path))
                law[path[counts - removed]] += p
                p_0[path[0]] += p
        law, p_0 = law / law.sum(), p_0 / p_0.sum()
        now, k, x = torch.tensor(counts), torch.tensor(removed), torch.tensor(x_t)
        torch.testing.assert_close(process.counted_posterior(x, clean, now, k), law, rtol=0, atol=1e-14)
        likelihood = process.kernel.reach(x, now)
        torch.testing.assert_close(p_0, clean * likelihood / (clean @ likelihood), rtol=0, atol=1e-14)
    # p_0 where l belongs is another law: the published code's network is l by its loss
    plugged_in = process.counted_posterior(x, p_0, now, torch.tensor(1))
    assert total_variation(plugged_in, process.counted_posterior(x, clean, now, torch.tensor(1))) > 0.02


@pytest.mark.parametrize("noise_schedule", ["loglinear", "linear", "cosine", "geometric"])
@pytest.mark.parametrize("name", ["uniform", "masking", "ordinal"])
def test_the_average_over_the_counts_is_the_classical_process(name: str, noise_schedule: str) -> None:
    rate, alpha_s, alpha_t = 1.0, 0.0, 0.0
    if name == "uniform":
        classical: Any = UniformProcess(V, noise_schedule)
        kernel: Any = JumpKernel(classical.prior_law())
    elif name == "masking":
        classical, kernel = AbsorbingProcess(V + 1, MASK, noise_schedule), masking()
    else:
        kernel, rate = MatrixKernel(neighbours(V)), 3.0
    process = ScheduleConditionedProcess(kernel, noise_schedule, rate)
    s, t, width = 0.3, 0.8, process.vocab_size
    alpha_s, alpha_t = (float(process.alpha(u)) for u in (s, t))
    states = torch.arange(width)[None]
    p_0 = torch.rand(1, width, width, generator=seeded(), dtype=torch.float64)
    if name == "masking":
        p_0[..., MASK] = 0
        p_0[0, :MASK] = torch.eye(width, dtype=torch.float64)[:MASK]
    p_0 = p_0 / p_0.sum(-1, keepdim=True)
    if name == "ordinal":
        generator = dense(process) - torch.eye(V, dtype=torch.float64)
        to_s = torch.matrix_exp(-rate * math.log(alpha_s) * generator)
        to_t = torch.matrix_exp(-rate * math.log(alpha_t / alpha_s) * generator)
        marginal = (to_s @ to_t)[None]
        paths = p_0[0][:, :, None] * to_s[None] * to_t.T[:, None, :] / (to_s @ to_t).T[:, :, None]  # (x_t, x_0, x_s)
        posterior = paths.sum(1)[None]
        h = 1e-7
        step = process.posterior(states, p_0, t, t - h)[0]
        rate_matrix = (step / h).fill_diagonal_(0)[None]
    else:
        marginal, posterior = classical.marginal(states, t), classical.posterior(states, p_0, t, s)
        rate_matrix = classical.reverse_rate(states, p_0, t)
    torch.testing.assert_close(process.marginal(states, t), marginal, rtol=0, atol=1e-12)
    torch.testing.assert_close(process.posterior(states, p_0, t, s), posterior, rtol=0, atol=1e-12)
    atol = 1e-4 if name == "ordinal" else 0
    rates = process.reverse_rate(states, p_0, t)
    torch.testing.assert_close(rates, rate_matrix, rtol=1e-11, atol=atol)
    some = [0, 0, 2]  # whoever stands beside a position says nothing about it
    torch.testing.assert_close(process.reverse_rate(states[:, some], p_0[:, some], t), rates[:, some])
    torch.testing.assert_close(process.posterior(states[:, some], p_0[:, some], t, s), posterior[:, some])
    both = process.marginal(states.expand(2, width), torch.tensor([s, t], dtype=torch.float64))
    torch.testing.assert_close(both[1:], marginal, rtol=0, atol=1e-12)
    assert (both[0] - both[1]).abs().max() > 0.1
    tau = process.expected_events(torch.tensor([0.0, s, t, 1.0]))[:, 0, 0]
    assert float(tau[0]) == 0
    torch.testing.assert_close(process.time_of_events(tau[:3]), torch.tensor([0.0, s, t], dtype=torch.float64))


def test_events_that_mostly_do_nothing_are_the_classical_process() -> None:
    """gamma to 1: the kernel gamma 1 + (1 - gamma) K at the rate 1 / (1 - gamma), whose counts are near their means."""
    base, x_t = neighbours(V), torch.arange(V)[None]
    clean = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    errors = []
    for gamma in (0.9, 0.95, 0.975):
        eye = torch.eye(V, dtype=torch.float64)
        process = ScheduleConditionedProcess(MatrixKernel(gamma * eye + (1 - gamma) * base), event_rate=4 / (1 - gamma))
        to_s, to_t = (torch.matrix_exp(mean * (base - eye)) for mean in (1.2, 0.8))
        classical = (clean @ to_s) * to_t.T[None]
        now, removed = (torch.full((1, V), round(mean / (1 - gamma))) for mean in (2.0, 0.8))
        counted = process.counted_posterior(x_t, clean.expand(1, V, V), now, removed)
        errors.append(float((counted - classical / classical.sum(-1, keepdim=True)).abs().max()))
    assert errors[0] > 1e-3
    assert all(0.4 < b / a < 0.6 for a, b in itertools.pairwise(errors))


def test_draws_of_the_process() -> None:
    process, batch = ordinal(), 4000
    x_0 = torch.tensor([[0, 2]]).expand(batch, 2)
    t = 0.4
    x_t, counts = process.add_events(x_0, torch.full((batch,), t), seeded(1))
    mean = float(process.expected_events(t))
    poisson = torch.tensor([math.exp(-mean) * mean**k / math.factorial(k) for k in range(30)], dtype=torch.float64)
    assert chi_square_z(torch.bincount(counts.flatten(), minlength=30), poisson) < 4.5
    assert (
        chi_square_z(
            torch.bincount(counts[:, 0] * 3 + counts[:, 1].clamp(max=2), minlength=90).view(30, 3).sum(1), poisson
        )
        < 4.5
    )
    for s in range(4):
        for i, clean in enumerate([0, 2]):
            law = torch.linalg.matrix_power(dense(process), s)[clean]
            assert chi_square_z(torch.bincount(x_t[counts[:, i] == s, i], minlength=V), law) < 4.5
    some = process.draw_counts((batch, 2), t, seeded(2), "cpu", least=1)
    poisson[0] = 0
    assert chi_square_z(torch.bincount(some.flatten(), minlength=30), poisson / poisson.sum()) < 4.5
    assert process.add_events(x_0, 0.0)[1].max() == 0
    assert torch.equal(process.add_noise(x_0, 0.0), x_0)
    x_t = process.add_noise(x_0, torch.full((batch,), t), seeded(3))
    for i in range(2):
        assert chi_square_z(torch.bincount(x_t[:, i], minlength=V), process.marginal(x_0[:1], t)[0, i]) < 4.5
    assert (
        chi_square_z(torch.bincount(process.prior((batch, 2), seeded(4)).flatten(), minlength=V), process.prior_law())
        < 4.5
    )


def test_every_order_of_the_events_is_equally_likely() -> None:
    """Counts 2, 0, 1: the one event left is at the first position in 2 of 3 cases; of two left none, or one, is at the last."""
    process = ordinal()
    counts = torch.tensor([[2, 0, 1]]).expand(3000, 3)
    order = process.draw_order(counts, seeded())
    for share, left in [(1.0, 3), (0.7, 2), (0.3, 1), (0.0, 0)]:
        assert (order.counts(share).sum(1) == left).all()
    assert torch.equal(order.counts(1.0), counts)
    assert chi_square_z(order.counts(1 / 3).sum(0), torch.tensor([2 / 3, 0, 1 / 3], dtype=torch.float64)) < 4.5
    two = torch.bincount(order.counts(2 / 3)[:, 2], minlength=2)
    assert chi_square_z(two, torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)) < 4.5
    assert (order.counts(1 / 3) <= order.counts(2 / 3)).all()
    crowded = torch.tensor([[process.most_events + 3, 0]])  # more events than are ever drawn
    assert torch.equal(process.draw_order(crowded, seeded()).counts(1.0), crowded)


# The sampler


def step_law(scheduler: SCUDScheduler, logits: Tensor, index: int, states: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """P(x_s | x_t) for all pairs of states, (S, S), given the counts (L,), from the sum over x_0 as the docstring has it."""
    matrix, length = dense(scheduler.event_process), states.shape[1]
    p_0 = logits.softmax(-1)
    law = torch.ones(len(states), len(states), dtype=torch.float64)
    for i in range(length):
        to_then, back, to_now = (torch.linalg.matrix_power(matrix, int(k)) for k in (then[i], now[i] - then[i], now[i]))
        x_t = states[:, i]
        weight = torch.where(to_now[:, x_t].T > 0, p_0[:, i] / to_now[:, x_t].T, 0.0)  # (S, V)
        token = (weight @ to_then) * back[:, x_t].T
        law *= (token / token.sum(-1, keepdim=True).clamp(min=1e-300))[:, states[:, i]]
    return law


def run_law(scheduler: SCUDScheduler, joint: Joint, num_steps: int, seed: int) -> tuple[Tensor, int, int]:
    """The law of the samples, given one draw of the events, with the exact denoiser; the number of events, and the largest
    number of positions that move in one call."""
    process, length = scheduler.event_process, joint.states.shape[1]
    scheduler.set_timesteps(num_steps)
    x = process.prior((1, length))
    scheduler.begin(0, x, generator=seeded(seed))
    states, denoiser = all_states(process.vocab_size, length), counted_denoiser(process, joint)
    law, together = process.prior_law()[states].prod(-1), 0
    for index in range(num_steps):
        now, then = (counts[0] for counts in scheduler.counts(index, x))
        together = max(together, int((now > then).sum()))
        step = step_law(scheduler, denoiser(states, now.expand(len(states), length)), index, states, now, then)
        law = law @ torch.where(law[:, None] > 0, step, 0.0)
    return law, int(scheduler.events.total[0]), together


def test_one_event_for_each_call_is_exact() -> None:
    """Whatever the counts and the order are, and with more calls than events too; fewer calls come near in order."""
    joint = random_joint(V, L, seed=3)
    scheduler = SCUDScheduler(vocab_size=V, process="uniform", event_share="equal")
    for seed in range(4):
        events = run_law(scheduler, joint, 1, seed)[1]
        for num_steps in (events, events + 7):
            law, _, together = run_law(scheduler, joint, num_steps, seed)
            assert together == 1
            torch.testing.assert_close(law, joint.p, rtol=0, atol=1e-12)
    scheduler = SCUDScheduler(vocab_size=V, process="uniform")
    error = [
        total_variation(torch.stack([run_law(scheduler, joint, n, seed)[0] for seed in range(20)]).mean(0), joint.p)
        for n in (1, 2, 4, 8, 16)
    ]
    assert error[0] > 0.3  # the product of the marginals
    assert all(b < 0.6 * a + 1e-12 for a, b in itertools.pairwise(error))
    assert error[-1] < 1e-12  # three tokens: their last events are in calls of their own
    product = torch.stack([joint.p.view(V, V, V).sum(d).flatten() for d in ((1, 2), (0, 2), (0, 1))])
    torch.testing.assert_close(run_law(scheduler, joint, 1, 0)[0], product[torch.arange(L), joint.states].prod(-1))


def test_an_ordinal_kernel_is_exact_up_to_its_prior() -> None:
    joint = random_joint(V, 2, seed=5)
    errors = []
    for rate in (2.0, 4.0):
        scheduler = SCUDScheduler(
            vocab_size=V, process="uniform", event_kernel=neighbours(V), event_rate=rate, event_share="equal"
        )
        assert torch.equal(scheduler.noise_process.prior_law(), scheduler.event_process.kernel.prior_law)
        laws = [run_law(scheduler, joint, 120, seed)[0] for seed in range(2)]
        errors.append(max(total_variation(law, joint.p) for law in laws))
    assert errors[0] < 0.02  # REMEMBERED, for each of two positions
    assert errors[1] < 1e-3


@pytest.mark.parametrize("kernel", [None, neighbours(V)])
def test_draws_of_a_step_follow_its_law(kernel: Tensor | None) -> None:
    """Through `step`, with dense logits and with rows, at the first call and later; random logits."""
    rate = 1.0 if kernel is None else 4.0
    scheduler = SCUDScheduler(vocab_size=V, process="uniform", event_kernel=kernel, event_rate=rate)
    scheduler.set_timesteps(4)
    states, batch = all_states(V, L), 3000
    logits = 2 * torch.randn(1, L, V, generator=seeded(1), dtype=torch.float64)
    for index, counts in [(0, [5, 1, 2]), (2, [1, 2, 0]), (3, [2, 1, 1])]:
        x = torch.tensor([[2, 0, 1]]).expand(batch, L)
        scheduler.begin(index, x[:1], torch.tensor([counts]), generator=seeded(2))
        order = scheduler.events
        scheduler.events = EventOrder(
            order.rank.expand(batch, -1, -1), order.total.expand(batch)
        )  # the same in all rows
        now, then = (c[0] for c in scheduler.counts(index, x))
        assert now.tolist() == counts
        assert (now > then).any()
        law = step_law(scheduler, logits, index, x[:1], now, then)  # only for its shape: (1, 1)
        assert law.shape == (1, 1)
        law = step_law(scheduler, logits.expand(len(states), L, V), index, states, now, then)[state_index(x[:1], V)][0]
        chosen = scheduler.positions(index, x)
        rows = RowLogits(logits.expand(batch, L, V)[chosen], chosen)
        sparse = scheduler.step(rows, index, x, generator=seeded(3)).prev_sample
        assert chi_square_z(torch.bincount(state_index(sparse, V), minlength=len(law)), law) < 4.5


def test_samples_of_a_run_follow_the_joint() -> None:
    """Through `model_inputs`, `positions` and `step`, with an exact denoiser that is told the counts."""
    joint, batch = random_joint(V, L, seed=6), 2000
    scheduler = SCUDScheduler(vocab_size=V, process="uniform", event_kernel=neighbours(V), event_rate=3.0)
    denoiser = counted_denoiser(scheduler.event_process, joint)
    scheduler.set_timesteps(40)
    generator = seeded(7)
    x = scheduler.sample_prior((batch, L), generator)
    before = None
    for t in scheduler.timesteps:
        counts = scheduler.model_inputs(t, x, generator=generator)["event_counts"]
        assert before is None or torch.equal(counts, before)
        before = scheduler.counts(scheduler.step_index(t), x)[1]
        chosen = scheduler.positions(t, x, generator)
        logits = denoiser(x, counts)
        x = scheduler.step(RowLogits(logits[chosen], chosen), t, x, generator=generator).prev_sample
    assert (before == 0).all()
    assert chi_square_z(torch.bincount(state_index(x, V), minlength=V**L), joint.p) < 4.5


def test_temperature_and_top_p_sharpen_the_leave_one_out_law() -> None:
    process = ordinal()
    clean = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    x, now = torch.tensor([[1]]), torch.tensor([[3]])
    reach = process.kernel.reach(x, now)[0, 0]
    logits = (clean * reach).log()[None, None]  # p_0
    by_hand = {
        (0.5, 1.0): clean**2,
        (1.0, 0.6): torch.tensor([0.5, 0, 0.3], dtype=torch.float64),
        (0.0, 1.0): torch.tensor([1.0, 0, 0], dtype=torch.float64),
    }
    for (temperature, top_p), sharp in by_hand.items():
        scheduler = SCUDScheduler(
            vocab_size=V,
            process="uniform",
            event_kernel=neighbours(V),
            event_rate=4.0,
            temperature=temperature,
            top_p=top_p,
        )
        expected = sharp * reach / (sharp @ reach)
        many = x.expand(2000, 1)
        scheduler.begin(0, many, now.expand(2000, 1))
        output = scheduler.step(logits.expand(2000, 1, V), 0, many, generator=seeded())  # N = 1: all events at once
        torch.testing.assert_close(output.pred_logits[0, 0].softmax(-1), expected)
        assert chi_square_z(torch.bincount(output.prev_sample[:, 0], minlength=V), expected) < 4.5


def test_shares_of_events_by_hand() -> None:
    x = torch.zeros(1, 2, dtype=torch.int64)

    def left(num_steps: int, **kwargs: Any) -> list[int]:
        scheduler = SCUDScheduler(vocab_size=V, process="uniform", **kwargs)
        scheduler.set_timesteps(num_steps)
        assert (scheduler.times.diff() < 0).all()
        scheduler.begin(0, x, torch.tensor([[9, 3]]))
        return [int(scheduler.counts(index, x)[1].sum()) for index in range(num_steps)]

    assert left(4, event_share="equal") == [9, 6, 3, 0]
    assert left(1, event_share="equal") == [0]
    coefficients = {"3": {"events": [1.0, 2.0, 3.0]}}
    assert left(3, event_share="learned", coefficients=coefficients) == [10, 6, 0]
    assert left(3, event_share="learned", coefficients=coefficients, noise_schedule="cosine") == [10, 6, 0]
    # by time: 12 log alpha_s / log alpha_1 with alpha = 1 - .999 t
    expected = [round(12 * math.log(1 - 0.999 * t) / math.log(0.001)) for t in (0.75, 0.5, 0.25, 0)]
    assert left(4) == expected == [2, 1, 0, 0]


# Masks


def test_a_position_is_masked_if_it_has_had_an_event() -> None:
    process = ScheduleConditionedProcess(masking())
    x_0 = torch.randint(0, MASK, (50, 20), generator=seeded())
    x_t, counts = process.add_events(x_0, 0.5, seeded(1))
    assert torch.equal(counts > 0, x_t == MASK)
    assert torch.equal(x_t[counts == 0], x_0[counts == 0])
    assert 0.4 < float((counts > 0).double().mean()) < 0.6


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_a_step_with_masks_is_that_of_masked_diffusion(process: str) -> None:
    """Positions whose last event goes take a token of p_0, as those that ancestral sampling opens; the others stay masked. For
    the uniform process the others are noise, whatever the network says."""
    width = V + (process == "absorbing")
    kernel = masking() if process == "absorbing" else JumpKernel(UniformProcess(V).prior_law())
    counted = ScheduleConditionedProcess(kernel)
    p_0 = torch.rand(1, 4, width, generator=seeded(), dtype=torch.float64)
    x_t, now, removed = torch.full((1, 4), width - 1), torch.tensor([[1, 4, 2, 4]]), torch.tensor([[1, 4, 1, 3]])
    if process == "absorbing":
        p_0[..., MASK] = 0
    p_0 /= p_0.sum(-1, keepdim=True)
    law = counted.counted_posterior(x_t, p_0 / counted.kernel.reach(x_t, now), now, removed)
    torch.testing.assert_close(law[0, :2], p_0[0, :2], rtol=0, atol=1e-15)
    torch.testing.assert_close(law[0, 2:], kernel.prior_law.expand(2, width), rtol=0, atol=1e-15)
    if process == "absorbing":
        ancestral = AbsorbingProcess(V + 1, MASK).posterior(x_t, p_0, 0.7, 0.0)  # all open
        torch.testing.assert_close(law[0, :2], ancestral[0, :2], rtol=0, atol=1e-15)


def test_masks_open_as_in_masked_diffusion() -> None:
    """The same share at each time; tokens from the same law; only rows that open are read; no counts are passed."""
    scheduler, ancestral = (
        SCUDScheduler(vocab_size=5, mask_token_id=4),
        AncestralScheduler(vocab_size=5, mask_token_id=4),
    )
    scheduler.set_timesteps(6)
    batch, length = 4, 3000
    x = scheduler.sample_prior((batch, length))
    p_0 = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    ancestral.set_timesteps(6)
    for index in range(6):
        assert scheduler.model_inputs(index, x) == {}
        chosen = scheduler.positions(index, x, seeded(index))
        probability = ancestral.open_probability(index)
        is_masked = x == 4
        assert not (chosen & ~is_masked).any()
        share, spread = (
            float(chosen[is_masked].double().mean()),
            (probability * (1 - probability) / is_masked.sum()) ** 0.5,
        )
        assert abs(share - probability) <= 4.5 * spread
        after = scheduler.step(
            RowLogits(p_0.log().expand(int(chosen.sum()), 5), chosen), index, x, generator=seeded(index)
        )
        assert torch.equal(after.prev_sample[~chosen], x[~chosen])
        assert chi_square_z(torch.bincount(after.prev_sample[chosen], minlength=5), p_0) < 4.5
        x = after.prev_sample
    assert (x != 4).all()


def test_masked_diffusion_one_event_at_a_time_is_exact() -> None:
    joint, batch = random_joint(V, L, seed=8), 2000
    scheduler = SCUDScheduler(vocab_size=V + 1, mask_token_id=MASK, event_share="equal")
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    scheduler.set_timesteps(60)  # more than the events of a row
    x = scheduler.sample_prior((batch, L))
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, seeded(9))
        assert (chosen.sum(1) <= 1).all()
        x = scheduler.step(denoiser(x, t, chosen), t, x, generator=seeded(int(1e6 * t))).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, V), minlength=V**L), joint.p) < 4.5


# A network


class CountedNetwork(ModelMixin, ConfigMixin):
    """Logits of p(x_0 | x_t, S) of a short row of ordinal tokens."""

    @register_to_config
    def __init__(self, vocab_size: int, length: int, hidden: int = 96) -> None:
        super().__init__()
        self.calls: list[Tensor] = []
        self.layers = nn.Sequential(
            nn.Linear(length * (vocab_size + 3), hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, length * vocab_size),
        )

    def forward(self, x_t: Tensor, event_counts: Tensor) -> Tensor:
        self.calls.append(event_counts)
        counts = event_counts[..., None].float()
        told = torch.cat([counts.log1p(), (counts == 0).float(), 1 / (1 + counts)], -1)
        features = torch.cat([one_hot(x_t, self.config.vocab_size).float(), told], -1).flatten(1)
        return self.layers(features).view(*x_t.shape, self.config.vocab_size)


def ordinal_source(vocab_size: int) -> Joint:
    """Two tokens near each other, or both far from the middle: two hills on a square."""
    states = all_states(vocab_size, 2)
    a, b = states[:, 0].double(), states[:, 1].double()
    p = torch.exp(-((a - b) ** 2) / 2 - (a - 1.5) ** 2 / 3) + torch.exp(-((a + b - 8) ** 2) / 3 - (a - 6) ** 2 / 2)
    return Joint(states, p / p.sum())


def test_a_small_network_learns_the_source() -> None:
    torch.manual_seed(0)
    width, joint = 8, ordinal_source(8)
    scheduler = SCUDScheduler(vocab_size=width, process="uniform", event_kernel=neighbours(width, 3), event_rate=3.0)
    network = CountedNetwork(width, 2)
    pipe = DiscreteDiffusionPipeline(model=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def error(seed: int) -> float:
        samples = pipe(num_samples=6000, length=2, num_inference_steps=12, generator=seeded(seed)).sequences
        return total_variation(torch.bincount(state_index(samples, width), minlength=width**2) / 6000, joint.p)

    untrained = error(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    generator, steps = seeded(2), 400
    for step in range(steps):
        x_0 = joint.states[torch.multinomial(joint.p, 384, replacement=True, generator=generator)]
        t = torch.rand(384, generator=generator, dtype=torch.float64)
        x_t, counts = scheduler.event_process.add_events(x_0, t, generator)
        loss = nn.functional.cross_entropy(network(x_t, counts).flatten(0, 1), x_0.flatten())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        optimizer.step()
    trained = error(1)
    assert untrained > 0.4
    assert trained < 0.08  # 6000 exact samples have about 0.04


def test_the_pipeline_tells_the_network_the_counts() -> None:
    scheduler = SCUDScheduler(vocab_size=4, process="uniform", event_kernel=neighbours(4), event_rate=6.0)
    network = CountedNetwork(4, 5)
    pipe = DiscreteDiffusionPipeline(model=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    template = torch.tensor([[2, -1, -1, 0, -1]])
    run = {"template": template, "num_samples": 3, "num_inference_steps": 6}
    samples = pipe(**run, generator=[seeded(i) for i in range(3)]).sequences
    assert torch.equal(samples[:, [0, 3]], torch.tensor([[2, 0]] * 3))
    assert (torch.stack(network.calls)[..., [0, 3]] == 0).all()  # what is known has had no events
    assert (network.calls[0][:, [1, 2, 4]] > 0).all()
    assert all((b <= a).all() for a, b in itertools.pairwise(network.calls))
    for i in range(3):
        alone = pipe(**run | {"num_samples": 1}, generator=seeded(i)).sequences
        assert torch.equal(alone[0], samples[i])
    ancestral = AncestralScheduler(vocab_size=4, process="uniform")
    assert ancestral.model_inputs(0, samples) == {}


# The contract, with a kernel


def kernel_scheduler(**kwargs: Any) -> SCUDScheduler:
    standard = {"vocab_size": 4, "process": "uniform", "event_kernel": neighbours(4).tolist(), "event_rate": 6.0}
    return SCUDScheduler(**standard | kwargs)


def sampled(scheduler: SCUDScheduler, x: Tensor, generator: Any, num_steps: int = 5) -> Tensor:
    scheduler.set_timesteps(num_steps)
    logits = torch.linspace(-1, 1, 4).expand(*x.shape, 4) * torch.arange(x.shape[1])[:, None]
    for t in scheduler.timesteps:
        x = scheduler.step(logits, t, x, generator=generator).prev_sample
    return x


def test_a_batch_is_its_rows() -> None:
    scheduler = kernel_scheduler()
    x = torch.randint(0, 4, (4, 7), generator=seeded())
    batch = sampled(scheduler, x, [seeded(i) for i in range(4)])
    for i in range(4):
        assert torch.equal(sampled(scheduler, x[i : i + 1], [seeded(i)])[0], batch[i])
    assert not torch.equal(sampled(scheduler, x, seeded(8)), sampled(scheduler, x, seeded(9)))


def test_config_survives(tmp_path: Path) -> None:
    """Bit for bit, as a list, also when it was a tensor that has changed since, and through another class."""
    kernel = neighbours(4)
    scheduler = kernel_scheduler(event_kernel=kernel)
    expected = kernel.tolist()
    kernel.zero_()
    scheduler.save_pretrained(tmp_path)
    x = torch.randint(0, 4, (3, 6), generator=seeded())
    for other in (
        SCUDScheduler.from_pretrained(tmp_path),
        SCUDScheduler.from_config(scheduler.config),
        SCUDScheduler.from_config(AncestralScheduler.from_config(scheduler.config).config),
    ):
        assert other.config.event_kernel == scheduler.config.event_kernel == expected
        assert other.config.event_rate == 6.0
        assert torch.equal(sampled(other, x, seeded(1)), sampled(scheduler, x, seeded(1)))


def test_add_noise_of_a_kernel() -> None:
    scheduler = kernel_scheduler()
    scheduler.set_timesteps(4)
    x_0 = torch.full((3000, 1), 3)
    x_t = scheduler.add_noise(x_0, timesteps=torch.tensor([3]), generator=seeded())
    law = scheduler.event_process.marginal(x_0[:1], 0.25)[0, 0]
    assert chi_square_z(torch.bincount(x_t.flatten(), minlength=4), law) < 4.5
    assert total_variation(law, UniformProcess(4).marginal(x_0[:1], 0.25)[0, 0]) > 0.1


def test_runs_begin_anew() -> None:
    """At their first call, whether or not the one before was finished; a call within a run keeps its events."""
    scheduler = kernel_scheduler()
    scheduler.set_timesteps(4)
    x = torch.randint(0, 4, (2, 6), generator=seeded())
    logits = torch.zeros(2, 6, 4)
    first = scheduler.model_inputs(0, x, generator=seeded(1))["event_counts"]
    assert torch.equal(scheduler.model_inputs(0, x, generator=seeded(2))["event_counts"], first)
    scheduler.positions(0, x, seeded(3))
    scheduler.step(logits, 0, x, generator=seeded(4))
    assert torch.equal(scheduler.counts(0, x)[0], first)
    with pytest.raises(ValueError, match=r"`sample` has shape \(1, 6\), but this run began with \(2, 6\)"):
        scheduler.step(logits[:1], 1, x[:1])
    assert not torch.equal(scheduler.model_inputs(0, x, generator=seeded(2))["event_counts"], first)
    assert scheduler.model_inputs(0, x[:1], generator=seeded(2))["event_counts"].shape == (1, 6)
    # a run may begin in the middle: with counts of that time, at least one for each position, or those that are known
    scheduler.set_timesteps(4)
    many = torch.zeros(200, 6, dtype=torch.int64)
    drawn = scheduler.model_inputs(3, many, generator=seeded(1))["event_counts"]
    mean = float(scheduler.event_process.expected_events(0.25))
    assert drawn.min() == 1
    assert float(drawn.double().mean()) == pytest.approx(mean / -math.expm1(-mean), abs=4.5 * (mean / 1200) ** 0.5)
    scheduler.set_timesteps(4)
    x_0 = torch.full((2, 6), 2)
    x_t, counts = scheduler.event_process.add_events(x_0, 0.5, seeded(5))
    scheduler.begin(0.5, x_t, counts, generator=seeded(6))
    assert torch.equal(scheduler.model_inputs(0.5, x_t)["event_counts"], counts)
    for index in (2, 3):
        step = scheduler.step(torch.zeros(2, 6, 4), index, x_t, generator=seeded(index)).prev_sample
        assert torch.equal(step[counts == 0], x_t[counts == 0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"event_kernel": [[0.5, 0.5], [0.5, 0.5]]}, r"`event_kernel` has shape \(2, 2\).*here \(4, 4\)"),
        ({"event_kernel": [0.5, 0.5]}, r"`event_kernel` has shape \(2,\)"),
        ({"event_kernel": (neighbours(4) * 1.01).tolist()}, "`event_kernel` is not stochastic.*1.01"),
        (
            {"event_kernel": (2 * neighbours(4) - torch.eye(4)).tolist()},
            "`event_kernel` is not stochastic.*smallest entry is -",
        ),
        ({"event_kernel": torch.full((4, 4), math.nan)}, "`event_kernel` is not stochastic"),
        ({"event_kernel": torch.eye(4)}, "`event_kernel` never forgets its start"),
        ({"event_kernel": torch.eye(4).roll(1, 0)}, "`event_kernel` never forgets its start"),
        ({"event_kernel": None}, "`event_rate` is 6.0; without `event_kernel` it must be 1"),
        ({"event_rate": 1.0}, r"`event_rate` 1.0 is too low for this kernel: after 6.91 events"),
        ({"event_rate": -1.0}, "`event_rate` is -1.0; it must be a positive number"),
        ({"event_rate": math.nan}, "`event_rate` is nan"),
        ({"process": "absorbing", "mask_token_id": 3}, "`event_kernel` .*`process` is 'absorbing'"),
        ({"event_share": "most"}, "`event_share` is 'most'; allowed: 'grid', 'equal', 'learned'"),
        (
            {"event_share": "equal", "grid": "cosine"},
            "`event_share='equal'` sets the times, so `grid` must be 'uniform'",
        ),
        ({"event_share": "learned"}, "`event_share='learned'` needs `coefficients`"),
        ({"coefficients": {"2": {"events": [1.0, 0.0]}}}, "'events' are shares, they must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel_scheduler(**kwargs)


def test_what_a_kernel_may_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound itself is allowed."""
    found = ordinal().remembered()
    monkeypatch.setattr(scud, "REMEMBERED", found)
    assert ordinal().remembered() == found
    monkeypatch.setattr(scud, "REMEMBERED", 0.99 * found)
    with pytest.raises(ValueError, match=r"`event_rate` 4\.0 is too low"):
        ordinal()


def test_what_a_kernel_remembers() -> None:
    """Of x_0 after the events of t = 1, at least one: by the sum over their number."""
    process = ordinal()
    matrix, furthest = dense(process), []
    for mean in (4.0 * math.log(1000), 0.5 * math.log(1000)):
        law = torch.zeros(V, V, dtype=torch.float64)
        for count in range(1, 120):
            law += poisson.pmf(count, mean) / -math.expm1(-mean) * torch.linalg.matrix_power(matrix, count)
        furthest.append(max(total_variation(row, process.kernel.prior_law) for row in law))
    assert process.remembered() == pytest.approx(furthest[0], rel=1e-6)
    with pytest.raises(ValueError, match=f"total variation to the prior {furthest[1]:.2g};"):  # also after few events
        ordinal(0.5)


def test_kernels_and_cumulative_laws() -> None:
    with pytest.raises(ValueError, match=r"`event_kernel` has shape \(2, 3\); it must be square"):
        MatrixKernel(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    assert MatrixKernel(neighbours(4).float()).squares[0].dtype == torch.float64
    assert inverse_cdf(torch.tensor([1.0, 2.0]), torch.tensor([0.4, 0.6])).tolist() == [0, 1]  # whatever its sum


def test_cumulative_law_of_counts() -> None:
    found = poisson_cdf(torch.tensor([[2.5], [0.0]], dtype=torch.float64), 3)
    np.testing.assert_allclose(found, poisson.cdf(range(4), [[2.5], [0.0]]), rtol=1e-13)


@pytest.mark.parametrize("law", [[0.5, 0.6], [1.5, -0.5], [[0.5, 0.5]]])
def test_priors_that_are_refused(law: list) -> None:
    with pytest.raises(ValueError, match="`prior_law` must be a vector of probabilities"):
        JumpKernel(torch.tensor(law))


def test_calls_that_are_refused() -> None:
    scheduler = kernel_scheduler(event_share="learned", coefficients={"2": {"events": [1.0, 1.0]}})
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3; learned budgets: 2"):
        scheduler.set_timesteps(3)
    scheduler.set_timesteps(2)
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="`sample` has ids from 4 to 4"):
        scheduler.begin(0, torch.full((2, 3), 4))
    for bad in (torch.full((2, 3), -1), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"`event_counts` are .*int64 of shape \(2, 3\) and not negative"):
            scheduler.begin(0, x, bad)
    process = scheduler.event_process
    for counts, removed in [(1, 2), (-1, -1), (2, -1)]:
        with pytest.raises(ValueError, match="each position must have 0 <= removed <= counts"):
            process.counted_posterior(x, torch.ones(2, 3, 4), torch.full_like(x, counts), torch.full_like(x, removed))
    wrong = torch.zeros(2, 3, dtype=torch.bool)
    scheduler.begin(0, x, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="are not those that `positions` named"):
        scheduler.step(RowLogits(torch.zeros(0, 4), wrong), 0, x)
