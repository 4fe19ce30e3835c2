"""Inverse temperatures learned on the law of the last samples: slopes against differences of exact laws, what is learned
against the exact optimum, features by hand."""

from __future__ import annotations

import math

import pytest
import torch
from laws import Joint, as_denoiser, exact_denoiser, kl, run_law
from scipy.optimize import minimize
from torch import Tensor
from toys import toy_joint

from discrete_schedulers import AbsorbingProcess, LearnedScheduler
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training.features import fluency, rarity, text_features, token_prior
from discrete_schedulers.training.marginal import centred, divergence_weights
from discrete_schedulers.training.temperatures import (
    BETA_RANGE,
    Rolled,
    descend_temperatures,
    roll,
    token_slopes,
    with_temperatures,
)

L, S, MASK, V = 4, 2, 2, 3
JOINT = toy_joint("ising", L)
EXACT = exact_denoiser(JOINT, AbsorbingProcess(V, MASK))


def final_law(scheduler: LearnedScheduler, log_beta: Tensor) -> Tensor:
    """Law of the last sample over the rows of the joint: of the scheduler without temperatures, on tempered logits."""
    scheduler.set_timesteps(len(log_beta))
    beta = {float(t): float(b) for t, b in zip(scheduler.timesteps, log_beta.exp(), strict=True)}
    law = run_law(scheduler, as_denoiser(lambda x, t: beta[t] * EXACT(x, t)), len(log_beta), L)
    return law[JOINT.states @ V ** torch.arange(L - 1, -1, -1)]


def reverse_kl(scheduler: LearnedScheduler, log_beta: Tensor) -> float:
    return kl(final_law(scheduler, log_beta), JOINT.p)


def row_of(x: Tensor) -> Tensor:
    return x @ S ** torch.arange(L - 1, -1, -1)


SCHEDULERS = [
    LearnedScheduler(V, MASK, unmasking="bernoulli"),
    LearnedScheduler(V, MASK),
    LearnedScheduler(V, MASK, order="spread"),
    LearnedScheduler(V, MASK, grid="learned", coefficients={"2": {"counts": [1.0, 3.0]}}),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["bernoulli", "counts", "spread", "learned counts"])
def test_gradient_is_the_slope_of_the_exact_divergence(scheduler: LearnedScheduler) -> None:
    log_beta, rows = torch.tensor([-0.4, 0.6], dtype=torch.float64), 40_000
    x, slopes = roll(EXACT, scheduler, log_beta, (rows, L), torch.Generator().manual_seed(0))
    log_ratio = (final_law(scheduler, log_beta) / JOINT.p).log()[row_of(x)]
    terms = centred(divergence_weights(log_ratio, "reverse_kl"))[:, None] * slopes
    error = terms.std(0) / math.sqrt(rows)
    for k, h in enumerate(torch.eye(2, dtype=torch.float64) * 1e-5):
        exact = (reverse_kl(scheduler, log_beta + h) - reverse_kl(scheduler, log_beta - h)) / 2e-5
        assert abs(float(terms[:, k].mean()) - exact) < 4.5 * float(error[k])
        assert abs(float(slopes[:, k].mean())) < 4.5 * float(slopes[:, k].std()) / math.sqrt(rows)
        assert abs(exact) > 4.5 * float(error[k]) or abs(exact) < 0.02  # the test sees a gradient where there is one


def test_slopes_of_tokens() -> None:
    logits = torch.tensor([[0.3, -1.0, -torch.inf, 2.0]], dtype=torch.float64)
    for token in (0, 1, 3):
        log_q = [(beta * logits).log_softmax(-1)[0, token] for beta in (1.5 * math.exp(1e-6), 1.5 * math.exp(-1e-6))]
        slope = float(token_slopes(logits, torch.tensor([token]), 1.5))
        assert slope == pytest.approx(float(log_q[0] - log_q[1]) / 2e-6, abs=1e-8)


def test_a_path_is_that_of_the_scheduler() -> None:
    """The samples are those that the learned config draws from the same generators, whatever the batch."""
    log_beta = torch.tensor([-0.4, 0.6], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    x, slopes = roll(EXACT, SCHEDULERS[2], log_beta, (6, L), generators)
    alone = [roll(EXACT, SCHEDULERS[2], log_beta, (1, L), [torch.Generator().manual_seed(i)]) for i in range(6)]
    assert torch.equal(x, torch.cat([one.x_0 for one in alone]))
    torch.testing.assert_close(slopes, torch.cat([one.slopes for one in alone]), rtol=0, atol=1e-12)
    learned = with_temperatures(SCHEDULERS[2], log_beta)
    assert learned.config.coefficients == {"2": {"inverse_temperature": log_beta.exp().tolist()}}


@pytest.mark.slow
def test_descent_reaches_the_optimum() -> None:
    """With the exact ratio: at least 85 % of what the exact law allows to gain over temperature 1."""
    scheduler = SCHEDULERS[1]

    def exact(values: list[float]) -> float:
        return reverse_kl(scheduler, torch.tensor(values, dtype=torch.float64))

    limits = [tuple(math.log(b) for b in BETA_RANGE)] * 2
    best = minimize(exact, [0.0, 0.1], method="Nelder-Mead", bounds=limits, options={"maxfev": 60}).fun
    state: dict[str, Tensor] = {}

    def rolled(log_beta: Tensor, iteration: int) -> Rolled:
        state["now"] = log_beta.clone()
        return roll(EXACT, scheduler, log_beta, (512, L), torch.Generator().manual_seed(iteration))

    def weights(x: Tensor) -> Tensor:
        ratio = (final_law(scheduler, state["now"]) / JOINT.p).log()
        return divergence_weights(ratio[row_of(x)], "reverse_kl")

    *_, last = descend_temperatures(rolled, weights, 2, 60)
    start = exact([0.0, 0.0])
    assert best < 0.8 * start
    assert exact(last.tolist()) < best + 0.15 * (start - best)


def test_a_row_pulls_as_far_as_its_slope() -> None:
    """Two rows that pull in two ways: the steeper one wins. The first step of Adam is the learning rate, whatever the slope."""
    x_0, pulls, slopes = torch.zeros(2, 1), torch.tensor([1.0, -1.0]), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    first, second = descend_temperatures(lambda *_: (x_0, slopes), lambda _: pulls.double(), 1, 2, 0.05)
    assert first.tolist() == pytest.approx([0.05])
    assert second.tolist() == pytest.approx([0.05 + 0.5 * 0.0275])  # the mean; halfway down to a tenth of the rate
    cold = next(descend_temperatures(lambda *_: (x_0, slopes), lambda _: -pulls.double(), 1, 2, 0.05))
    assert cold.tolist() == pytest.approx([-0.05])


def test_fluency_by_hand() -> None:
    """A joint of two pairs of equal tokens: each half says the other."""
    joint = Joint(
        torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]), torch.full((4,), 0.25).double()
    )
    exact = exact_denoiser(joint, AbsorbingProcess(V, MASK))

    def smoothed(x: Tensor, t: float, positions: Tensor) -> RowLogits:
        rows = exact(x, t, positions)
        assert isinstance(rows, RowLogits)
        return RowLogits((0.9 * rows.logits.exp() + 0.05 * torch.tensor([1.0, 1.0, 0.0])).log(), positions)

    smoothed.mask_token_id = MASK  # type: ignore[attr-defined]
    x = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(fluency(smoothed, x), torch.full((2, 2), math.log(0.95)).double())
    certain = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])  # of token 0, whatever stands elsewhere

    def apart(x: Tensor, t: float, positions: Tensor) -> RowLogits:
        assert t == 0.5  # half of the tokens are masked
        return RowLogits(
            torch.stack([certain, 1 - certain, 0 * certain], 1).log().expand(*x.shape, 3)[positions], positions
        )

    apart.mask_token_id = MASK  # type: ignore[attr-defined]
    expected = torch.tensor([[0.9 * 0.7 * 0.5, 0.8 * 0.6]]).log() / torch.tensor([3, 2])
    torch.testing.assert_close(fluency(apart, torch.zeros(1, 5, dtype=torch.int64)), expected.double())
    features = text_features(smoothed, [math.log(0.75), math.log(0.25), -20.0], 4, batch_size=1)(x)
    square = math.log(0.95) ** 2
    assert features.shape == (2, 13)
    assert features[:, :4].tolist() == [[0, 1, 0, 1], [0, 0, 0, 2]]  # the first and second half of the common one
    assert features[0, -5:].tolist() == pytest.approx([math.log(0.95)] * 2 + [square] * 3)


def test_what_the_model_says_where_nothing_is_known() -> None:
    """The mean of the marginals, by enumeration; the mask has none."""
    p = JOINT.p * (1 + JOINT.states[:, 0] + 2 * JOINT.states.sum(1))
    denoiser = exact_denoiser(Joint(JOINT.states, p / p.sum()), AbsorbingProcess(V, MASK))
    denoiser.mask_token_id = MASK  # type: ignore[attr-defined]
    share = float((p[:, None] * JOINT.states).sum(0).mean() / p.sum())  # of token 1
    assert 0.6 < share < 0.9
    found = token_prior(denoiser, L)
    assert found[:2] == pytest.approx([math.log(1 - share), math.log(share)], abs=5.1e-5)
    assert found[2] == pytest.approx(math.log(1e-9), abs=1e-4)


def test_rarity_by_hand() -> None:
    """Shares 0.1, 0.5, 0.15, 0.25: in order of frequency the centres lie at 0.25, 0.625, 0.825, 0.95."""
    prior = [math.log(share) + 2.0 for share in (0.1, 0.5, 0.15, 0.25)]
    assert rarity(prior, 2).tolist() == [1, 0, 1, 1]
    assert rarity(prior, 3).tolist() == [2, 0, 2, 1]
    assert rarity(prior, 10).tolist() == [9, 2, 8, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "`temperature` is 0.5"),
        ({"top_p": 0.5}, "`top_p` 0.5"),
        ({"coefficients": {"2": {"top_p": [0.5, 0.5]}}}, "has 'top_p'"),
        ({"coefficients": {"2": {"gate_b": [1.0, 1.0]}}}, "has a gate"),
        ({"coefficients": {"2": {"contrast": [1.0, 1.0]}}, "token_prior": [0.0] * V}, "has a 'contrast'"),
        ({"coefficients": {"2": {"mixture_weight": [0.0], "mixture_shift": [0.0] * 8}}}, "has a mixture"),
    ],
)
def test_schedulers_without_such_slopes(changes: dict, message: str) -> None:
    scheduler = LearnedScheduler(V, MASK, **changes)
    with pytest.raises(ValueError, match=message):
        roll(EXACT, scheduler, torch.zeros(2, dtype=torch.float64), (3, L), None)
