"""Likelihood estimators: their means by enumeration of all sets, their variances, their draws, and a published bias."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from laws import Joint, all_states, chi_square_z, exact_denoiser, random_denoiser, random_joint
from tiny import MASK, tiny_pipeline
from torch import Tensor

from discrete_schedulers import LikelihoodEstimate, RowLogits, conditional_nll, log_likelihood_ratio, nll
from discrete_schedulers.likelihood import ESTIMATORS, count_law, draw_masks, hidden_nats
from discrete_schedulers.processes import AbsorbingProcess

TOKENS, LENGTH = 3, 4
JOINT = random_joint(TOKENS, LENGTH, seed=0)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
either_way = pytest.mark.parametrize("stratified", [False, True])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def timeless(denoiser: Callable[..., Any]) -> Callable[..., Any]:
    """The tests' denoisers take one time for all rows."""
    return lambda x_t, t, positions: denoiser(x_t, 1.0, positions)


def exact(joint: Joint, tokens: int = TOKENS) -> Callable[..., Any]:
    return timeless(exact_denoiser(joint, AbsorbingProcess(tokens + 1, tokens)))


def all_sets(length: int) -> Tensor:
    """Every set of positions but the empty one, bool (2^L - 1, L)."""
    return torch.tensor(list(itertools.product([False, True], repeat=length)))[1:]


def nats_of_all_sets(denoiser: Callable[..., Any], x_0: Tensor, tokens: int = TOKENS) -> Tensor:
    """S_M for every set, (2^L - 1, B)."""
    sets = all_sets(x_0.shape[1])
    return hidden_nats(denoiser, x_0, sets[:, None].expand(-1, *x_0.shape), tokens, batch_size=100_000)


def law_of_sets(length: int, estimator: str) -> tuple[Tensor, Tensor]:
    """P(M) and the weight of each set, (2^L - 1, 1): for the estimators that draw a count."""
    size = all_sets(length).sum(1)
    ways = torch.tensor([math.comb(length, int(m)) for m in size], dtype=torch.float64)
    p, weight = count_law(length, estimator)
    return (p[size - 1] / ways)[:, None], weight[size - 1][:, None]


def integral_over_time(length: int, power: int, eps: float = 0.0) -> Tensor:
    """The integral of t^m (1 - t)^(L - m) / t^power dt / (1 - eps) from eps to 1 for every set, (2^L - 1, 1)."""
    size = all_sets(length).sum(1, keepdim=True)
    node, share = np.polynomial.legendre.leggauss(64)
    if eps == 0:
        t, width = torch.tensor(node + 1) / 2, torch.tensor(share) / 2
    else:
        t = torch.tensor(eps ** ((1 - node) / 2))
        width = torch.tensor(share) / 2 * -math.log(eps) * t
    return (width * t ** (size - power) * (1 - t) ** (length - size)).sum(1, keepdim=True) / (1 - eps)


def agree(estimate: LikelihoodEstimate, truth: Tensor, estimator: str) -> bool:
    """Whether the estimates lie around the truth as their errors say: in the mean square over rows, and all of them. With
    an infinite variance the error of a row may miss the rare draw that matters; the median row does not care."""
    gap = (estimate.values - truth).abs() / estimate.standard_error.clamp(min=1e-12)
    if estimator == "time_integral":
        return 0.2 < float(gap.median()) < 1.2
    return float(gap.max()) < 7 and float(gap.square().mean()) < 1.5


def means(denoiser: Callable[..., Any], x_0: Tensor, estimator: str) -> Tensor:
    """The exact mean of a draw for each row, over all sets."""
    nats = nats_of_all_sets(denoiser, x_0)
    if estimator == "time_integral":
        return (integral_over_time(x_0.shape[1], 1) * nats).sum(0)
    p, weight = law_of_sets(x_0.shape[1], estimator)
    return (p * weight * nats).sum(0)


def variances(denoiser: Callable[..., Any], x_0: Tensor, estimator: str, tokens: int = TOKENS) -> Tensor:
    """The exact variance of a draw for each row."""
    nats = nats_of_all_sets(denoiser, x_0, tokens)
    p, weight = law_of_sets(x_0.shape[1], estimator)
    return (p * (weight * nats) ** 2).sum(0) - (p * weight * nats).sum(0) ** 2


# Means


@every_estimator
def test_mean_is_the_likelihood(estimator: str) -> None:
    torch.testing.assert_close(means(exact(JOINT), JOINT.states, estimator), -JOINT.p.log(), rtol=0, atol=1e-12)


@every_estimator
def test_mean_of_any_denoiser_is_the_mean_over_orders(estimator: str) -> None:
    """Hence a bound on the law that draws an order and then follows it, and on the code lengths of all rows (Kraft)."""
    denoiser = timeless(random_denoiser(TOKENS + 1, seed=3))

    def restricted(x_t: Tensor, t: float, positions: Tensor) -> Any:
        rows = denoiser(x_t, t, positions)
        return RowLogits(rows.logits.index_fill(-1, torch.tensor([TOKENS]), -math.inf), rows.positions)

    bound = means(restricted, JOINT.states, estimator)
    sets = {tuple(row): number for number, row in enumerate(all_sets(LENGTH).tolist())}
    nats = nats_of_all_sets(restricted, JOINT.states)
    chains = []
    for order in itertools.permutations(range(LENGTH)):
        total = torch.zeros(len(JOINT.states), dtype=torch.float64)
        for known in range(LENGTH):
            hidden = [i in order[known:] for i in range(LENGTH)]
            x_t = JOINT.states.masked_fill(torch.tensor(hidden), TOKENS)
            alone = torch.arange(LENGTH) == order[known]
            logits = restricted(x_t, 1.0, alone.expand(x_t.shape)).logits
            total += -logits.log_softmax(-1).gather(-1, JOINT.states[:, order[known], None])[:, 0]
            assert tuple(hidden) in sets
        chains.append(total)
    chains = torch.stack(chains)
    torch.testing.assert_close(bound, chains.mean(0), rtol=0, atol=1e-12)
    mixture = -(-chains).logsumexp(0) + math.log(len(chains))
    assert (bound >= mixture - 1e-12).all()
    assert float((bound - mixture).max()) > 0.1
    assert float((-bound).exp().sum()) < 1
    assert nats.min() > 0


def test_published_monte_carlo_code_is_biased() -> None:
    """m from 1 to L - 1, normalised by H_{L-1}, times H_L: on average 2.47 instead of 3.17 nats for rows of this joint, 5.06
    instead of 5.65 for uniform rows."""
    nats, size = nats_of_all_sets(exact(JOINT), JOINT.states), all_sets(LENGTH).sum(1)
    harmonic = [sum(1 / k for k in range(1, n + 1)) for n in range(LENGTH + 1)]
    ways = torch.tensor([math.comb(LENGTH, int(m)) for m in size])
    p = torch.where(size < LENGTH, 1 / (size * harmonic[LENGTH - 1] * ways), 0.0)
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    published = harmonic[LENGTH] * (p[:, None].double() * nats).sum(0)
    truth = -JOINT.p.log()
    assert float(JOINT.p @ published) == pytest.approx(2.469, abs=1e-3)
    assert float(JOINT.p @ truth) == pytest.approx(3.175, abs=1e-3)
    assert float(published.mean()) == pytest.approx(5.063, abs=1e-3)
    assert float(truth.mean()) == pytest.approx(5.651, abs=1e-3)
    # which the test of the mean above would see: neither is it the same up to a factor
    assert float((published / truth).min()) < 0.8 < 1 < float((published / truth).max())


@every_estimator
@either_way
def test_estimates_agree_with_the_truth(estimator: str, stratified: bool) -> None:
    x_0, truth = JOINT.states, -JOINT.p.log()
    estimate = nll(exact(JOINT), x_0, TOKENS, 200, seeded(1), estimator, stratified)
    assert estimate.values.dtype == estimate.standard_error.dtype == torch.float64
    assert estimate.values.shape == estimate.standard_error.shape == truth.shape
    assert agree(estimate, truth, estimator)
    assert float(estimate.standard_error.median()) < 0.5


def conditional(joint: Joint, is_answer: list[bool]) -> Tensor:
    """-log p(answer | the others) of every row, by summation."""
    prompt = joint.states[:, [i for i, answer in enumerate(is_answer) if not answer]]
    same = (prompt[:, None] == prompt[None]).all(-1)
    return (same.double() @ joint.p).log() - joint.p.log()


@every_estimator
def test_conditional(estimator: str) -> None:
    """One answer of three positions, and rows with different answers; nothing else is ever masked."""
    x_0, is_answer = JOINT.states, [True, False, True, True]
    truth = conditional(JOINT, is_answer)
    seen = []

    def denoiser(x_t: Tensor, t: Tensor, positions: Tensor) -> Any:
        seen.append((x_t == TOKENS).any(0))
        assert torch.equal(positions, x_t == TOKENS)
        torch.testing.assert_close(t, positions.double().mean(1))
        return exact(JOINT)(x_t, t, positions)

    estimate = conditional_nll(denoiser, x_0, torch.tensor(is_answer), TOKENS, 100, seeded(2), estimator)
    assert torch.stack(seen).any(0).tolist() == is_answer
    assert agree(estimate, truth, estimator)
    each = torch.rand(len(x_0), LENGTH, generator=seeded(3)) < 0.5
    each[:, 0] |= ~each.any(1)
    truth = torch.stack([conditional(JOINT, row.tolist())[i] for i, row in enumerate(each)])
    estimate = conditional_nll(exact(JOINT), x_0, each, TOKENS, 100, seeded(4), estimator)
    single = each.sum(1) == 1
    if estimator != "time_integral":  # one position: there is nothing to draw
        torch.testing.assert_close(estimate.values[single], truth[single], rtol=0, atol=1e-12)
    assert agree(LikelihoodEstimate(*(one[~single] for one in estimate)), truth[~single], estimator)


@every_estimator
def test_ratio_is_coupled(estimator: str) -> None:
    """The same sets for both: equal rows have the ratio 0 exactly, and near ones little noise."""
    x, y = JOINT.states[:-1], JOINT.states[1:]
    truth = JOINT.p[:-1].log() - JOINT.p[1:].log()
    ratio = log_likelihood_ratio(exact(JOINT), x, y, TOKENS, 200, seeded(5), estimator)
    assert agree(ratio, truth, estimator)
    both = [nll(exact(JOINT), one, TOKENS, 200, seeded(5), estimator) for one in (x, y)]
    torch.testing.assert_close(ratio.values, both[1].values - both[0].values, rtol=0, atol=1e-12)
    same = log_likelihood_ratio(exact(JOINT), x, x, TOKENS, 10, seeded(6), estimator)
    assert same.values.abs().max() == same.standard_error.max() == 0
    plain = log_likelihood_ratio(exact(JOINT), x, y, TOKENS, 200, seeded(7), estimator, stratified=False)
    apart = [nll(exact(JOINT), one, TOKENS, 200, seeded(7), estimator, stratified=False) for one in (x, y)]
    uncoupled = sum(estimate.standard_error.square() for estimate in apart)
    assert float(plain.standard_error.square().mean()) < 0.9 * float(uncoupled.mean())
    answers = torch.tensor([False, True, True, False])
    given = log_likelihood_ratio(
        exact(JOINT), x[:1], y[:1], TOKENS, 300, seeded(8), estimator, answer_positions=answers
    )
    truth = conditional(JOINT, answers.tolist())
    assert abs(float(given.values - (truth[1] - truth[0]))) < 5 * float(given.standard_error)


# Variances


@pytest.mark.parametrize("seed", range(3))
def test_variances_on_random_joints(seed: int) -> None:
    """Averaged over x ~ p: 8 for time_free, 3 for masked_count; 23 for time_integral even if it stops at t = 1e-3."""
    joint = random_joint(TOKENS, LENGTH, seed=seed)
    denoiser = exact(joint)
    free, count = (float(joint.p @ variances(denoiser, joint.states, name)) for name in ("time_free", "masked_count"))
    nats = nats_of_all_sets(denoiser, joint.states)

    def truncated(eps: float) -> float:
        first = (integral_over_time(LENGTH, 1, eps) * nats).sum(0)
        return float(joint.p @ ((integral_over_time(LENGTH, 2, eps) * nats**2).sum(0) - first**2))

    integral = [truncated(eps) for eps in (1e-3, 1e-5, 1e-7)]
    assert 7.5 < free < 9
    assert 2.3 < count < 3.2
    assert 22 < integral[0] < 26
    # infinite: each factor of 100 in eps adds log(100) times the squared nats of the last tokens
    last = float(joint.p @ nats[all_sets(LENGTH).sum(1) == 1].square().sum(0))
    assert integral[2] - integral[1] == pytest.approx(math.log(100) * last, rel=1e-3)


def test_variances_for_independent_tokens() -> None:
    """The closed forms of the module: nothing beats masked counts, and for long rows time_free is the worst."""
    length, c = 6, math.log(2)
    states = all_states(2, length)
    joint = Joint(states, torch.full((len(states),), 1 / len(states), dtype=torch.float64))
    harmonic = sum(1 / m for m in range(1, length + 1))
    free = variances(exact(joint, 2), states[:1], "time_free", 2)
    assert float(free) == pytest.approx(c**2 * (harmonic * length * (length + 1) / 2 - length**2), rel=1e-10)
    assert float(variances(exact(joint, 2), states[:1], "masked_count", 2)) == pytest.approx(0, abs=1e-10)
    estimate = nll(exact(joint, 2), states[:2], 2, 10, seeded())
    torch.testing.assert_close(estimate.values, torch.full((2,), length * c, dtype=torch.float64), rtol=0, atol=1e-12)
    assert estimate.standard_error.max() < 1e-12
    eps, size, ways = 1e-3, all_sets(length).sum(1, keepdim=True), (c * all_sets(length).sum(1, keepdim=True)) ** 2
    second = float((integral_over_time(length, 2, eps) * ways).sum())
    first = float((integral_over_time(length, 1, eps) * size * c).sum())
    assert second - first**2 == pytest.approx(c**2 * length * (math.log(1 / eps) / (1 - eps) - 1), rel=1e-6)
    for long, winner in [(4, "time_free"), (64, "time_integral")]:
        of_free = sum(1 / m for m in range(1, long + 1)) * long * (long + 1) / 2 - long**2
        of_integral = long * (math.log(1 / eps) / (1 - eps) - 1)
        assert (of_free < of_integral) == (winner == "time_free")


@every_estimator
@either_way
@pytest.mark.parametrize("num_samples", [11, 12])
def test_standard_error_is_that_of_the_mean(estimator: str, stratified: bool, num_samples: int) -> None:
    """Over 2000 repetitions. Stratified draws have less variance, and their error may be too large, not too small."""
    x_0 = JOINT.states[50:51].expand(2000, LENGTH)
    estimate = nll(exact(JOINT), x_0, TOKENS, num_samples, seeded(9), estimator, stratified, batch_size=10_000)
    spread, stated = estimate.values.var(), estimate.standard_error.square().mean()
    if estimator == "time_integral":  # infinite variance: neither has a limit
        assert estimate.standard_error.isfinite().all()
        return
    truth = float(variances(exact(JOINT), x_0[:1], estimator)) / num_samples
    if stratified:
        assert float(spread) < (0.95 if estimator == "masked_count" else 0.6) * truth
        assert 0.95 < float(stated / spread) < 1.6
    else:
        assert float(spread) == pytest.approx(truth, rel=0.12)
        assert float(stated) == pytest.approx(truth, rel=0.12)


# Draws


@every_estimator
@either_way
def test_drawn_sets_follow_their_law(estimator: str, stratified: bool) -> None:
    """All four positions are answers in the first half of the rows, three of them in the second."""
    rows, length = 6000, 4
    answer = torch.ones(rows, length, dtype=torch.bool)
    answer[rows // 2 :, 1] = False
    is_masked, weight = draw_masks(answer, 5, seeded(10), estimator, stratified)
    assert is_masked.shape == (5, rows, length)
    assert not (is_masked & ~answer).any()
    for part, size in ((slice(0, rows // 2), 4), (slice(rows // 2, rows), 3)):
        masks = is_masked[:, part][..., answer[part.start]].flatten(0, 1)  # (5 R, size)
        code = masks.long() @ 2 ** torch.arange(size - 1, -1, -1)
        sets = all_sets(size)
        if estimator == "time_integral":
            law = torch.cat(
                [torch.tensor([[1 / (size + 1)]], dtype=torch.float64), integral_over_time(size, 0)]
            ).squeeze(1)
        else:
            p, w = law_of_sets(size, estimator)
            law = torch.cat([torch.zeros(1, dtype=torch.float64), p.squeeze(1)])
            torch.testing.assert_close(weight[:, part].flatten(), w[code - 1].squeeze(1), rtol=0, atol=1e-12)
        assert len(law) == len(sets) + 1
        assert float(law.sum()) == pytest.approx(1, abs=1e-9)
        z = chi_square_z(torch.bincount(code, minlength=len(law)), law)
        assert z < 4.5 if not stratified else z < 3  # less than chance allows
    if estimator == "time_integral":
        t = 1 / weight.flatten()
        assert 0 < float(t.min()) < float(t.max()) <= 1
        assert float(t.mean()) == pytest.approx(0.5, abs=0.01)


def test_stratified_counts_come_as_often_as_they_should() -> None:
    answer = torch.ones(20, 8, dtype=torch.bool)
    is_masked, _ = draw_masks(answer, 32, seeded(11), "masked_count", True)
    for row in is_masked.sum(-1).T:
        assert torch.bincount(row, minlength=9)[1:].tolist() == [4] * 8
    plain, _ = draw_masks(answer, 32, seeded(11), "masked_count", False)
    assert any(torch.bincount(row, minlength=9)[1:].tolist() != [4] * 8 for row in plain.sum(-1).T)


@every_estimator
def test_a_batch_is_its_rows_one_by_one(estimator: str) -> None:
    x_0 = JOINT.states[[3, 40, 77]]
    answers = torch.tensor([[True, True, False, True], [True] * 4, [False, False, True, True]])
    generators = [seeded(20 + row) for row in range(3)]
    together = conditional_nll(exact(JOINT), x_0, answers, TOKENS, 7, generators, estimator)
    for row in range(3):
        one = slice(row, row + 1)
        alone = conditional_nll(
            exact(JOINT), x_0[one], answers[one], TOKENS, 7, [seeded(20 + row)], estimator, batch_size=2
        )
        assert float(alone.values) == pytest.approx(float(together.values[row]), abs=1e-12)
        assert float(alone.standard_error) == pytest.approx(float(together.standard_error[row]), abs=1e-12)


def test_with_a_network() -> None:
    """Logits at the masked positions only, of a network with a time of its own for each row."""
    pipe = tiny_pipeline()
    x_0 = torch.randint(2, MASK, (2, 8), generator=seeded(12))
    calls = []
    handle = pipe.model.register_forward_hook(
        lambda module, inputs, kwargs, output: calls.append((len(inputs[0]), kwargs["positions"], output.logits.shape)),
        with_kwargs=True,
    )
    estimate = nll(pipe.denoiser, x_0, MASK, 8, seeded(13), batch_size=6)
    handle.remove()
    assert [rows for rows, _, _ in calls] == [6, 6, 4]
    assert all(shape[0] == int(positions.sum()) for _, positions, shape in calls)
    everywhere = torch.ones_like(x_0, dtype=torch.bool)
    is_masked, weight = draw_masks(everywhere, 8, seeded(13), "masked_count", True)
    total = torch.zeros(8, 2, dtype=torch.float64)
    for sample, row in itertools.product(range(8), range(2)):
        chosen = is_masked[sample, row]
        x_t = x_0[row].masked_fill(chosen, MASK)[None]
        log_p = pipe.denoiser.log_p_0(x_t, float(chosen.double().mean()))[0].double()
        total[sample, row] = -log_p[chosen].gather(-1, x_0[row][chosen][:, None]).sum()
    torch.testing.assert_close(estimate.values, (weight * total).mean(0), rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_0": torch.zeros(2, 3)}, r"`x_0` is torch.float32 of shape \(2, 3\)"),
        ({"x_0": torch.zeros(3, dtype=torch.int64)}, r"`x_0` is torch.int64 of shape \(3,\)"),
        ({"x_0": torch.full((2, 4), TOKENS)}, "`x_0` has the mask token 3 in 8 places"),
        (
            {"answer_positions": torch.ones(2, 3, dtype=torch.bool)},
            r"`answer_positions` is torch.bool of shape \(2, 3\)",
        ),
        ({"answer_positions": torch.ones(2, 4)}, "`answer_positions` is torch.float32"),
        ({"answer_positions": torch.tensor([[True] * 4, [False] * 4])}, "no position in row 1"),
        ({"num_samples": 1}, "`num_samples` is 1; at least 2"),
        ({"estimator": "elbo"}, "`estimator` is 'elbo'; allowed: 'masked_count', 'time_free', 'time_integral'"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"generator": [seeded()]}, "`generator` is a list of 1, but the batch has 2 rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"x_0": JOINT.states[:2], "answer_positions": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        conditional_nll(exact(JOINT), mask_token_id=TOKENS, **arguments | changes)


def test_ratio_refuses_rows_of_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"`y` has shape \(1, 4\), but `x` has \(2, 4\)"):
        log_likelihood_ratio(exact(JOINT), JOINT.states[:2], JOINT.states[:1], TOKENS)
    with pytest.raises(ValueError, match="`x_0` has the mask token 3 in 4 places"):
        log_likelihood_ratio(exact(JOINT), JOINT.states[:1], torch.full((1, 4), TOKENS), TOKENS)


@pytest.mark.parametrize(("bad", "message"), [(math.nan, "NaN for [1-9]"), (-math.inf, "probability 0 for [1-9]")])
def test_a_network_without_a_law_is_refused(bad: float, message: str) -> None:
    def denoiser(x_t: Tensor, t: Tensor, positions: Tensor) -> Any:
        rows = exact(JOINT)(x_t, t, positions)
        return RowLogits(rows.logits.index_fill(-1, torch.tensor([0]), bad), rows.positions)

    with pytest.raises(ValueError, match=message):
        nll(denoiser, JOINT.states[:2], TOKENS)
