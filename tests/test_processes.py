"""Every formula of the forward processes against enumeration: transition matrices, Bayes, small joints."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import all_states, chi_square_z, exact_denoiser, random_joint, state_index
from scipy.integrate import quad
from torch import Tensor

from discrete_schedulers import AbsorbingProcess, UniformProcess
from discrete_schedulers.processes import Process, as_time, survival, survival_slope

V = 4  # states, the mask included
MASK = 3
SCHEDULES = ["loglinear", "linear", "cosine", "geometric"]
PROCESSES = ["absorbing", "uniform"]
TIMES = [0.05, 0.3, 0.62, 0.97]
quick = settings(max_examples=60, deadline=None, derandomize=True)
times = st.floats(1e-4, 0.9999)


def make(kind: str, noise_schedule: str) -> Process:
    if kind == "absorbing":
        return AbsorbingProcess(V, MASK, noise_schedule)
    return UniformProcess(V, noise_schedule)


@pytest.fixture(params=[(kind, noise) for kind in PROCESSES for noise in SCHEDULES], ids=lambda pair: "-".join(pair))
def process(request: pytest.FixtureRequest) -> Process:
    return make(*request.param)


def rate_matrix(process: Process) -> Tensor:
    """Q(x -> y) per unit of total noise: rows sum to 0."""
    eye = torch.eye(V, dtype=torch.float64)
    if isinstance(process, AbsorbingProcess):
        return eye[MASK].expand(V, V) - eye
    return torch.full((V, V), 1 / V, dtype=torch.float64) - eye


def matrix(process: Process, s: float, t: float) -> Tensor:
    """P(x_t = y | x_s = x), (V, V): the exponential of the integrated rate."""
    noise = float(process.alpha(s).log() - process.alpha(t).log())
    return torch.matrix_exp(noise * rate_matrix(process))


def clean_laws(process: Process, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All states as x_t, (1, V), and a random p_0 for each, (1, V, V). At a token of an absorbing process p_0 is that
    token: nothing else agrees with it."""
    p_0 = torch.randn(1, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if not isinstance(process, AbsorbingProcess):
        return torch.arange(V)[None], p_0.softmax(-1)
    p_0[..., MASK] = -math.inf
    p_0 = p_0.softmax(-1)
    p_0[0, :MASK] = torch.eye(V, dtype=torch.float64)[:MASK]
    return torch.arange(V)[None], p_0


def bayes(process: Process, p_0: Tensor, t: float, s: float) -> Tensor:
    """q(x_s | x_t = x, p_0) for each x, (V, V): sum over x_0 of p_0(x_0) P_0s(x_0, .) P_st(., x) / P_0t(x_0, x)."""
    from_0_to_s, from_s_to_t, from_0_to_t = matrix(process, 0, s), matrix(process, s, t), matrix(process, 0, t)
    rows = []
    for x in range(V):
        terms = [
            p_0[0, x, x_0] * from_0_to_s[x_0] * from_s_to_t[:, x] / from_0_to_t[x_0, x]
            for x_0 in range(V)
            if p_0[0, x, x_0] > 0
        ]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows)


# Noise schedules


@pytest.mark.parametrize(
    ("noise_schedule", "t", "expected"),
    [
        ("loglinear", 1.0, 1e-3),
        ("loglinear", 0.25, 1 - 0.999 * 0.25),
        ("linear", 1.0, 0.0),
        ("linear", 0.25, 0.75),
        ("cosine", 1.0, 0.0),
        ("cosine", 0.5, 1 - math.sqrt(0.5)),
        ("cosine", 1 / 3, 0.5),
        ("geometric", 1.0, math.exp(-20)),
        ("geometric", 0.5, math.exp(-math.sqrt(1e-4 * 20))),
        ("geometric", 1e-12, math.exp(-1e-4)),  # it jumps at 0: the published last denoising step
    ],
)
def test_alpha_known_values(noise_schedule: str, t: float, expected: float) -> None:
    assert float(UniformProcess(V, noise_schedule).alpha(t)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_alpha_at_time_0_is_exactly_1(noise_schedule: str) -> None:
    assert float(UniformProcess(V, noise_schedule).alpha(0)) == 1.0


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
@pytest.mark.parametrize("t", TIMES)
def test_slope_is_the_derivative_of_alpha(noise_schedule: str, t: float) -> None:
    process, h = UniformProcess(V, noise_schedule), 1e-5
    difference = float(process.alpha(t + h) - process.alpha(t - h)) / (2 * h)
    assert float(process.alpha_slope(t)) == pytest.approx(difference, rel=2e-6, abs=1e-9)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_alpha_is_the_exponential_of_the_integrated_rate(noise_schedule: str) -> None:
    process = UniformProcess(V, noise_schedule)
    total, _ = quad(lambda u: float(process.jump_speed(u)), 0.2, 0.9, epsabs=1e-12)
    assert float(process.alpha(0.9) / process.alpha(0.2)) == pytest.approx(math.exp(-total), rel=1e-9)
    assert float(process.total_noise(0.9) - process.total_noise(0.2)) == pytest.approx(total, rel=1e-9)


@quick
@given(t=times, step=st.floats(1e-6, 0.5), noise_schedule=st.sampled_from(SCHEDULES))
def test_alpha_falls_from_1_to_0(t: float, step: float, noise_schedule: str) -> None:
    process = UniformProcess(V, noise_schedule)
    later = float(process.alpha(min(1.0, t + step)))
    assert 0 <= later < float(process.alpha(t)) < 1
    assert float(process.alpha_slope(t)) < 0


def test_times_are_float64_whatever_comes_in() -> None:
    process = UniformProcess(V)
    assert process.alpha(0.3).dtype == process.alpha(torch.tensor(0.3, dtype=torch.float32)).dtype == torch.float64
    assert process.alpha(torch.tensor([0.1, 0.2])).shape == (2, 1, 1)
    assert as_time(1).shape == ()


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_time_of_noise_is_where_a_share_of_the_noise_is_there(noise_schedule: str) -> None:
    process = UniformProcess(V, noise_schedule)
    share = torch.arange(17, dtype=torch.float64) / 16
    t = process.time_of_noise(share)
    assert (t[0], t[-1]) == (0, 1)
    reached = torch.stack([(1 - process.alpha(time)) / (1 - process.alpha(1.0)) for time in t])
    torch.testing.assert_close(reached, share, rtol=0, atol=1e-12)


def test_all_the_noise_is_at_time_1_whatever_is_learned() -> None:
    """A constant: t = share with linear noise, but nothing flows back from the end, where cosine noise has no slope."""
    share = torch.tensor([0.25, 1.0], dtype=torch.float64, requires_grad=True)
    t = UniformProcess(V, "linear").time_of_noise(share)
    assert t.tolist() == [0.25, 1.0]
    assert torch.autograd.grad(t.sum(), share)[0].tolist() == [1.0, 0.0]


# Marginals


def test_marginal_is_a_row_of_the_transition_matrix(process: Process) -> None:
    x_0 = torch.arange(V)[None]
    for t in TIMES:
        torch.testing.assert_close(process.marginal(x_0, t)[0], matrix(process, 0, t), rtol=0, atol=1e-12)


def test_chapman_kolmogorov(process: Process) -> None:
    x_0 = torch.arange(V)[None]
    for s, t in [(0.05, 0.3), (0.3, 0.97), (0.0, 0.62)]:
        through_s = process.marginal(x_0, s)[0] @ matrix(process, s, t)
        torch.testing.assert_close(process.marginal(x_0, t)[0], through_s, rtol=0, atol=1e-12)


def test_prior_law_is_the_marginal_at_time_1(process: Process) -> None:
    alpha = float(process.alpha(1.0))
    gap = (process.marginal(torch.arange(V)[None], 1.0)[0] - process.prior_law()).abs().max()
    assert float(gap) <= alpha
    assert float(process.prior_law().sum()) == pytest.approx(1, abs=1e-15)


# Posterior


def test_posterior_is_bayes(process: Process) -> None:
    x_t, p_0 = clean_laws(process)
    for t, s in [(0.97, 0.62), (0.62, 0.05), (0.3, 0.0), (0.05, 0.049)]:
        law = process.posterior(x_t, p_0, t, s)[0]
        torch.testing.assert_close(law, bayes(process, p_0, t, s), rtol=0, atol=1e-11)


def test_posterior_from_time_1_without_survivors() -> None:
    """alpha_1 = 0: x_t says nothing, so x_s has the marginal of p_0."""
    for noise_schedule in ["linear", "cosine"]:
        process = UniformProcess(V, noise_schedule)
        x_t, p_0 = clean_laws(process)
        alpha = float(process.alpha(0.4))
        expected = alpha * p_0 + (1 - alpha) / V
        torch.testing.assert_close(process.posterior(x_t, p_0, 1.0, 0.4), expected, rtol=0, atol=1e-14)


def test_posterior_has_the_exact_marginals_of_a_joint(process: Process) -> None:
    """The factorised kernel with the exact denoiser: every position has exactly the law p(x_s^i | x_t)."""
    length, t, s = 2, 0.6, 0.25
    joint = random_joint(V - 1 if isinstance(process, AbsorbingProcess) else V, length, seed=1)
    states = all_states(V, length)
    denoiser = exact_denoiser(joint, process)
    law = process.posterior(states, denoiser(states, t).exp(), t, s)  # (S, L, V)
    to_s, to_t = matrix(process, 0, s), matrix(process, s, t)
    at_s = torch.einsum("n,na,nb->ab", joint.p, to_s[joint.states[:, 0]], to_s[joint.states[:, 1]])
    together = torch.einsum("ab,ac,bd->abcd", at_s, to_t, to_t)  # p(x_s^1, x_s^2, x_t^1, x_t^2)
    given_t = together / together.sum((0, 1))
    for row, (c, d) in enumerate(states.tolist()):
        torch.testing.assert_close(law[row, 0], given_t[:, :, c, d].sum(1), rtol=0, atol=1e-12)
        torch.testing.assert_close(law[row, 1], given_t[:, :, c, d].sum(0), rtol=0, atol=1e-12)


@quick
@given(
    t=times,
    share=st.floats(0, 1),
    kind=st.sampled_from(PROCESSES),
    noise_schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 2**31),
)
def test_posterior_rows_are_laws(t: float, share: float, kind: str, noise_schedule: str, seed: int) -> None:
    process = make(kind, noise_schedule)
    x_t, p_0 = clean_laws(process, seed)
    law = process.posterior(x_t, p_0, t, t * share)
    assert (law >= 0).all()
    torch.testing.assert_close(law.sum(-1), torch.ones(1, V, dtype=torch.float64), rtol=0, atol=1e-12)


@quick
@given(t=times, kind=st.sampled_from(PROCESSES), noise_schedule=st.sampled_from(SCHEDULES), seed=st.integers(0, 2**31))
def test_posterior_ends(t: float, kind: str, noise_schedule: str, seed: int) -> None:
    process = make(kind, noise_schedule)
    x_t, p_0 = clean_laws(process, seed)
    torch.testing.assert_close(process.posterior(x_t, p_0, t, 0.0), p_0, rtol=0, atol=1e-12)
    identity = torch.eye(V, dtype=torch.float64)[None]
    torch.testing.assert_close(process.posterior(x_t, p_0, t, t), identity, rtol=0, atol=1e-12)


def test_posterior_takes_a_time_for_each_row(process: Process) -> None:
    x_t, p_0 = clean_laws(process)
    t, s = torch.tensor([0.9, 0.3]), torch.tensor([0.5, 0.1])
    both = process.posterior(x_t.expand(2, V), p_0.expand(2, V, V), t, s)
    for row in range(2):
        alone = process.posterior(x_t, p_0, t[row].double(), s[row].double())
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-14)


def test_mass_on_the_mask_is_ignored() -> None:
    process = AbsorbingProcess(V, MASK)
    x_t = torch.tensor([[MASK]])
    p_0 = torch.tensor([[[0.1, 0.2, 0.1, 0.6]]], dtype=torch.float64)
    expected = torch.tensor([0.25 * 0.5, 0.5 * 0.5, 0.25 * 0.5, 0.5], dtype=torch.float64)  # opens with 1 - s / t = 1/2
    torch.testing.assert_close(process.posterior(x_t, p_0, 0.8, 0.4)[0, 0], expected, rtol=0, atol=1e-15)
    rate = process.reverse_rate(x_t, p_0, 0.8)[0, 0]
    torch.testing.assert_close(rate[:3] * 0.8, expected[:3] * 2, rtol=0, atol=1e-15)


# Rates


def test_reverse_rate_is_the_limit_of_the_posterior(process: Process) -> None:
    x_t, p_0 = clean_laws(process)
    off_diagonal = ~torch.eye(V, dtype=torch.bool)[None]
    for t in TIMES:
        h = 1e-5 * t
        quotient = [process.posterior(x_t, p_0, t, t - step) / step for step in (h, h / 2)]
        limit = torch.where(off_diagonal, 2 * quotient[1] - quotient[0], 0.0)
        torch.testing.assert_close(process.reverse_rate(x_t, p_0, t), limit, rtol=1e-5, atol=1e-6)


def test_reverse_rate_is_the_time_reversal_of_the_forward_rate(process: Process) -> None:
    """R_t(x -> v) = p_t(v) / p_t(x) Q_t(v -> x), Campbell et al. 2022, eq. 4, with one position."""
    t = 0.62
    joint = random_joint(V - 1 if isinstance(process, AbsorbingProcess) else V, 1, seed=2)
    clean = torch.zeros(V, dtype=torch.float64)
    clean[state_index(joint.states, V)] = joint.p
    at_t = clean @ matrix(process, 0, t)
    speed = float(-process.alpha_slope(t) / process.alpha(t))
    expected = at_t[None, :] / at_t[:, None] * speed * rate_matrix(process).T  # (x, v)
    expected.fill_diagonal_(0.0)
    x_t = torch.arange(V)[:, None]  # (V, 1): one position, V rows
    p_0 = exact_denoiser(joint, process)(x_t, t).exp()
    torch.testing.assert_close(process.reverse_rate(x_t, p_0, t)[:, 0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_unmask_probability_and_hazard(noise_schedule: str) -> None:
    process = AbsorbingProcess(V, MASK, noise_schedule)
    from_0_to_s, from_0_to_t = matrix(process, 0, 0.2), matrix(process, 0, 0.7)
    opens = 1 - from_0_to_s[0, MASK] / from_0_to_t[0, MASK]  # P(token at s | mask at t)
    assert float(process.unmask_probability(0.7, 0.2)) == pytest.approx(float(opens), rel=1e-12)
    total, _ = quad(lambda u: float(process.hazard(u)), 0.2, 0.7, epsabs=1e-13)
    assert 1 - math.exp(-total) == pytest.approx(float(opens), rel=1e-9)
    assert float(process.unmask_probability(1.0, 0.0)) == 1.0


@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
def test_infinite_rate_at_time_1_stays_a_number(noise_schedule: str) -> None:
    process = UniformProcess(V, noise_schedule)
    x_t, p_0 = clean_laws(process)
    rate = process.reverse_rate(x_t, p_0, 1.0)
    assert rate.isfinite().all()
    assert (rate[0] + 1e9 * torch.eye(V) > 1e8).all()  # equal and large to all other states


# The uniform process on a joint


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_leave_one_out_and_score_on_a_joint(noise_schedule: str) -> None:
    process, length, t = UniformProcess(3, noise_schedule), 3, 0.45
    joint = random_joint(3, length, seed=3)
    to_t = process.marginal(torch.arange(3)[None], t)[0]  # P(x_t | x_0), (3, 3)
    at_t = torch.einsum("abc,ai,bj,ck->ijk", joint.p.view(3, 3, 3), to_t, to_t, to_t)
    x_t = all_states(3, length)
    p_0 = exact_denoiser(joint, process)(x_t, t).exp()
    one_out, score = process.leave_one_out(x_t, p_0, t), process.score(x_t, p_0, t)
    # p(x_0^1, x_t^2, x_t^3), and the same for the other positions
    pairs = [
        torch.einsum("abc,bj,ck->ajk", joint.p.view(3, 3, 3), to_t, to_t),
        torch.einsum("abc,ai,ck->bik", joint.p.view(3, 3, 3), to_t, to_t),
        torch.einsum("abc,ai,bj->cij", joint.p.view(3, 3, 3), to_t, to_t),
    ]
    for row, x in enumerate(x_t.tolist()):
        for i in range(length):
            others = [x[j] for j in range(length) if j != i]
            weight = pairs[i][:, others[0], others[1]]
            torch.testing.assert_close(one_out[row, i], weight / weight.sum(), rtol=0, atol=1e-11)
            changed = [tuple(x[:i] + [v] + x[i + 1 :]) for v in range(3)]
            ratio = torch.stack([at_t[place] / at_t[tuple(x)] for place in changed])
            torch.testing.assert_close(score[row, i], ratio, rtol=1e-10, atol=0)


# Draws


def test_add_noise_draws_the_marginal(process: Process) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.tensor([[0, 1, 2]]).expand(4000, 3)
    for t in (0.3, 0.62):
        x_t = process.add_noise(x_0, t, generator)
        assert x_t.dtype == torch.int64
        law = process.marginal(x_0[:1], t)[0]
        for i in range(3):
            assert chi_square_z(torch.bincount(x_t[:, i], minlength=V), law[i]) < 4.5


def test_add_noise_positions_are_independent() -> None:
    process = UniformProcess(V)
    x_t = process.add_noise(torch.zeros(6000, 2, dtype=torch.int64), 0.6, torch.Generator().manual_seed(1))
    one = process.marginal(torch.zeros(1, 1, dtype=torch.int64), 0.6)[0, 0]
    assert chi_square_z(torch.bincount(state_index(x_t, V), minlength=V**2), torch.outer(one, one).flatten()) < 4.5


def test_add_noise_takes_a_time_for_each_row() -> None:
    process = AbsorbingProcess(V, MASK, "linear")
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = process.add_noise(torch.zeros(3, 20000, dtype=torch.int64), t, torch.Generator().manual_seed(2))
    share = (x_t == MASK).double().mean(1)
    assert share[0] == 0
    assert share[2] == 1
    assert abs(float(share[1]) - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 20000)


def test_add_noise_with_given_noise() -> None:
    """The tokens to fall to come from outside; where they equal the clean token, nothing is seen of it."""
    process = UniformProcess(2)
    x_0, noise = torch.zeros(20000, 2, dtype=torch.int64), torch.tensor([[0, 1]]).expand(20000, 2)
    x_t = process.add_noise(x_0, 0.5, torch.Generator().manual_seed(3), noise)
    assert (x_t[:, 0] == 0).all()
    moved = 1 - float(process.alpha(0.5))
    assert abs(float(x_t[:, 1].double().mean()) - moved) < 4.5 * math.sqrt(moved * (1 - moved) / 20000)


def test_prior_draws_the_prior_law() -> None:
    uniform = UniformProcess(7).prior((5000, 2), torch.Generator().manual_seed(4))
    assert chi_square_z(torch.bincount(uniform.flatten(), minlength=7), UniformProcess(7).prior_law()) < 4.5
    assert (AbsorbingProcess(V, MASK).prior((3, 2)) == MASK).all()


def test_rows_have_generators_of_their_own() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    for process in (UniformProcess(50), AbsorbingProcess(50, 49)):
        x_0 = torch.arange(40).view(1, 40).expand(2, 40)
        both = process.add_noise(x_0, 0.5, generators())
        alone = process.add_noise(x_0[1:], 0.5, generators()[1:])
        assert torch.equal(both[1:], alone)
        assert not torch.equal(both[0], both[1])


def test_from_noise_to_noise_nothing_moves() -> None:
    """Where alpha_s is 0, or rounds to it as near t = 1 of cosine noise, the law of x_s is x_t, in both forms of it."""
    x_t, p_0 = torch.tensor([[0, 2]]), torch.full((1, 2, V), 1 / V, dtype=torch.float64)
    for noise_schedule, s in (("linear", 1.0), ("cosine", 1.0), ("cosine", 1 - 1e-9)):
        process = UniformProcess(V, noise_schedule)
        assert process.alpha(s) == 0
        assert torch.equal(process.posterior(x_t, p_0, 1.0, s), torch.eye(V, dtype=torch.float64)[x_t])
        assert [float(jump) for jump in process.posterior_jumps(1.0, s)] == [0.0, 0.0, 0.0]


# Errors


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_times_outside_are_refused(t: float) -> None:
    with pytest.raises(ValueError, match=r"time is .*from 0 \(clean\) to 1 \(noise\)"):
        UniformProcess(V).alpha(t)


def test_unknown_noise_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="`noise_schedule` is 'sqrt'; allowed: 'loglinear'"):
        UniformProcess(V, "sqrt")
    with pytest.raises(ValueError, match="noise_schedule"):
        survival(torch.tensor(0.5), "sqrt")
    assert survival_slope(torch.tensor(0.5, dtype=torch.float64), "linear") == -1


def test_bad_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="`vocab_size` is 1; at least 2"):
        UniformProcess(1)
    for mask_token_id in (None, -1, V):
        with pytest.raises(ValueError, match=r"`mask_token_id` is .*in \[0, 4\)"):
            AbsorbingProcess(V, mask_token_id)


@pytest.mark.parametrize("cls", [AbsorbingProcess, UniformProcess])
@pytest.mark.parametrize("name", ["prior", "prior_law", "posterior", "reverse_rate"])
def test_defaults_of_the_abstract_process_hold(cls: type[Process], name: str) -> None:
    said, done = (inspect.signature(getattr(some, name)).parameters for some in (Process, cls))
    assert {key: value.default for key, value in said.items()} == {key: value.default for key, value in done.items()}
