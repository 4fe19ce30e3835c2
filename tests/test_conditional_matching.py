"""The identities of exact conditional matching by enumeration, and where its objective leads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from laws import all_states, exact_denoiser, forward_matrix, random_joint, state_index
from torch import Tensor
from toys import MASK, VOCAB, Toy

from discrete_schedulers.processes import AbsorbingProcess, UniformProcess
from discrete_schedulers.training.conditional_matching import (
    chain_log_prob,
    compose,
    mask_ratios,
    matching_loss,
    recover,
    recover_marginals,
    teacher_draws,
    uniform_inverse,
)
from discrete_schedulers.training.di4c import clean_log_p, mixture_log_prob

SIZE, LENGTH = 3, 3  # states, positions: uniform noise
JOINT = random_joint(SIZE, LENGTH, seed=2)
UNIFORM = UniformProcess(SIZE, "linear")
ABSORBING = AbsorbingProcess(VOCAB, MASK, "linear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bayes(kernel: Tensor, p: Tensor) -> Tensor:
    """P(x_s | x_t), (S_t, S_s), from the forward kernel and the law of x_s."""
    together = p[:, None] * kernel
    return (together / together.sum(0)).T


@pytest.mark.parametrize("s", [0.2, 0.5])
def test_1_markov_decomposition(s: float) -> None:
    t = 0.7
    to_s, s_to_t, to_t = (forward_matrix(UNIFORM, a, b, LENGTH) for a, b in ((0.0, s), (s, t), (0.0, t)))
    at_s = JOINT.p @ to_s
    found = compose(bayes(s_to_t, at_s), bayes(to_s, JOINT.p))
    torch.testing.assert_close(found, bayes(to_t, JOINT.p), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.9, 1e-13), (0.3, 1e-12), (0.02, 1e-9)])
def test_2_and_3_recovery_from_ratios(alpha: float, tolerance: float) -> None:
    """From the start, and from an intermediate time: of the joint, for every x_t."""
    t = 1 - alpha
    s = t / 2
    for start, law in ((0.0, JOINT.p), (s, JOINT.p @ forward_matrix(UNIFORM, 0.0, s, LENGTH))):
        kernel = forward_matrix(UNIFORM, start, t, LENGTH)
        at_t, exact = law @ kernel, bayes(kernel, law)
        for state in range(len(law)):
            found = recover(kernel, at_t / at_t[state], state)
            torch.testing.assert_close(found, exact[state], rtol=0, atol=tolerance)


@pytest.mark.parametrize("alpha", [0.9, 0.3])
def test_4_ratios_of_neighbours_give_marginals_only(alpha: float) -> None:
    states = all_states(SIZE, LENGTH)
    at_t = JOINT.p @ forward_matrix(UNIFORM, 0.0, 1 - alpha, LENGTH)
    neighbours = states[:, None, None].repeat(1, LENGTH, SIZE, 1)
    for d, v in itertools.product(range(LENGTH), range(SIZE)):
        neighbours[:, d, v, d] = v
    ratios = at_t[state_index(neighbours.view(-1, LENGTH), SIZE)].view(-1, LENGTH, SIZE) / at_t[:, None, None]
    one = alpha * torch.eye(SIZE, dtype=torch.float64) + (1 - alpha) / SIZE
    found = recover_marginals(one, ratios, states)
    exact = exact_denoiser(JOINT, UNIFORM)(states, 1 - alpha).exp()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)
    p_0 = bayes(forward_matrix(UNIFORM, 0.0, 1 - alpha, LENGTH), JOINT.p)
    product = torch.stack([found[:, i, states[:, i]] for i in range(LENGTH)]).prod(0)
    assert float((product - p_0).abs().max()) > 0.01


def test_5_masks_multiply_and_the_chain_is_the_joint() -> None:
    toy, alpha = Toy("random", 4), 0.35
    law = torch.zeros(len(toy.states), dtype=torch.float64)
    law[toy.clean] = toy.joint.p
    at_t = law @ forward_matrix(ABSORBING, 0.0, 1 - alpha, 4)
    log_ratio = mask_ratios(toy.log_p_0, alpha)
    for row, d, v in itertools.product(range(len(toy.states)), range(4), range(MASK)):
        if toy.states[row, d] == MASK:
            opened = toy.states[row].clone()
            opened[d] = v
            expected = at_t[state_index(opened[None], VOCAB)] / at_t[row]
            assert float(log_ratio[row, d, v].exp()) == pytest.approx(float(expected), rel=1e-12)
    x_t = torch.tensor([[MASK, 1, MASK, MASK]]).expand(16, -1)
    agrees = toy.joint.states[:, 1] == 1
    expected = toy.joint.p * agrees / toy.joint.p[agrees].sum()
    for order in ([0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]):
        found = chain_log_prob(lambda x: toy.denoiser(x, 0.5), x_t, toy.joint.states, torch.tensor(order), MASK)
        torch.testing.assert_close(found.exp()[agrees], expected[agrees], rtol=0, atol=1e-14)


def test_6_the_inverse_of_the_uniform_kernel_and_its_condition() -> None:
    for alpha, condition in ((0.5, 8.0), (0.1, 1e3), (0.02, 1.25e5)):
        one = alpha * torch.eye(SIZE, dtype=torch.float64) + (1 - alpha) / SIZE
        torch.testing.assert_close(one @ uniform_inverse(alpha, SIZE), torch.eye(SIZE).double(), rtol=0, atol=1e-12)
        kernel = forward_matrix(UNIFORM, 0.0, 1 - alpha, LENGTH)
        assert float(torch.linalg.cond(kernel)) == pytest.approx(condition, rel=1e-6)  # alpha^-D
    with pytest.raises(ValueError, match="`alpha` is 0"):
        uniform_inverse(0.0, 3)


def test_recovery_magnifies_errors_where_little_survives() -> None:
    """Ratios off by one per cent: the recovered law is off by 0.01 where half survives, and is no law where a tenth does."""
    worst = {}
    for alpha in (0.5, 0.1):
        kernel = forward_matrix(UNIFORM, 0.0, 1 - alpha, LENGTH)
        at_t, exact, generator = JOINT.p @ kernel, bayes(kernel, JOINT.p), seeded(4)
        errors = []
        for state in range(len(JOINT.p)):
            noise = 1 + 0.01 * torch.randn(len(JOINT.p), generator=generator, dtype=torch.float64)
            found = recover(kernel, at_t / at_t[state] * noise, state)
            errors.append(((found - exact[state]).abs().max(), found.min()))
        worst[alpha] = [float(torch.stack([error for error, _ in errors]).max()), float(min(low for _, low in errors))]
    assert worst[0.5][0] < 0.05
    assert worst[0.1][0] > 0.1
    assert worst[0.1][1] < 0


# The objective


def teacher_of(toy: Toy) -> Tensor:
    return clean_log_p(torch.where((toy.states == MASK)[..., None], toy.log_p_0, 0.0), MASK)


def eight_steps(toy: Toy) -> Tensor:
    """Law of the teacher's samples after 8 steps from all masks, (X,)."""
    table = teacher_of(toy).exp()
    law = torch.zeros(len(toy.states), dtype=torch.float64)
    law[-1] = 1.0
    for k in range(8, 0, -1):
        each = ABSORBING.posterior(toy.states, table, k / 8, (k - 1) / 8)
        law = law @ torch.stack([each[:, i, toy.states[:, i]] for i in range(4)]).prod(0)
    return law[toy.clean]


def test_a_mixture_matches_eight_teacher_steps_in_one() -> None:
    """Exact expectations, 8 components: KL to the data 0.032, where 8 steps of the teacher have 0.0232 and one 1.0976."""
    toy = Toy("ising", 4)
    target, masked = eight_steps(toy), torch.ones(1, 4, dtype=torch.bool)
    table = torch.randn(8, 1, 4, VOCAB, generator=seeded(1), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=600, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_p = mixture_log_prob(clean_log_p(table, MASK), toy.joint.states[:, None], masked)[:, 0]
        loss = -(target * log_p).sum()
        loss.backward()
        return loss

    entropy = float(torch.special.entr(target).sum())
    optimizer.step(closure)
    law = mixture_log_prob(clean_log_p(table.detach(), MASK), toy.joint.states[:, None], masked)[:, 0].exp()
    p = toy.joint.p
    assert 0 < float(closure().detach()) - entropy < 2e-3
    assert float((p * (p / target).log()).sum()) == pytest.approx(0.0232, abs=5e-5)
    assert float((p * (p / law).log()).sum()) < 0.035


def test_draws_and_loss_have_the_exact_mean() -> None:
    """Without a latent the mean loss over draws of 8 teacher steps is the cross-entropy of that law and the product."""
    toy, rows = Toy("ising", 4), 6000
    table = teacher_of(toy)
    x_t = torch.full((rows, 4), MASK)
    times = torch.linspace(1, 0, 9, dtype=torch.float64)[:, None].expand(9, rows)
    x_s = teacher_draws(lambda x, t: table[state_index(x, VOCAB)], ABSORBING, x_t, times, seeded(2))
    tilted = (table[-1:] + torch.tensor([0.5, 0.0, 0.0])).log_softmax(-1)

    def student(x: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        return tilted.expand(len(x), -1, -1)

    loss = matching_loss(student, x_t, x_s, times[0], 3, MASK, seeded(5))
    clean = toy.joint.states
    exact = -(eight_steps(toy) * torch.stack([tilted[0, i, clean[:, i]] for i in range(4)]).sum(0)).sum()
    assert abs(float(loss.mean() - exact)) < 4.5 * float(loss.std()) / math.sqrt(rows)
    half = teacher_draws(lambda x, t: table[state_index(x, VOCAB)], ABSORBING, x_t, times[:5], seeded(3))
    partial = matching_loss(student, x_t, half, times[0], 2, MASK, seeded(5))
    opened = half != MASK
    assert 0.4 < float(opened.double().mean()) < 0.6
    by_hand = -torch.where(opened, tilted.expand(rows, -1, -1).gather(-1, half[..., None])[..., 0], 0.0).sum(1)
    torch.testing.assert_close(partial, by_hand)
    with pytest.raises(ValueError, match="it needs at least 2 rows"):
        teacher_draws(lambda x, t: table, ABSORBING, x_t, times[:1], None)
