"""Correctors and verifiers that read the law of revealed tokens: exact invariance, rules by hand, shadow masks, a trained
hollow network."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from laws import (
    ExactDenoiser,
    Joint,
    all_states,
    as_denoiser,
    chi_square_z,
    kl,
    random_joint,
    state_index,
    total_variation,
    uniform_subset_law,
)
from tiny import LENGTH, MASK, WORDS, randomised, seeded, tiny_model, tiny_pipeline
from torch import Tensor

from discrete_schedulers import (
    AncestralScheduler,
    DDiTModel,
    HollowTransformerModel,
    InformedCorrectorScheduler,
    NetworkDenoiser,
    RowLogits,
    WINOScheduler,
    nll,
)
from discrete_schedulers.schedulers.scheduling_utils import selection_confidence

TOKENS, L = 3, 3
V = TOKENS + 1  # the mask is the last


def leave_one_out(joint: Joint) -> ExactDenoiser:
    """log p(x_0^i = v | the other positions of x_t) at every position, masked or not, by summation over all clean rows."""

    def log_law(x_t: Tensor, t: float) -> Tensor:
        width = int(joint.states.max()) + 2
        law = torch.zeros(*x_t.shape, width, dtype=torch.float64)
        for i in range(x_t.shape[1]):
            hidden = x_t.clone()
            hidden[:, i] = width - 1
            agrees = ((hidden[:, None] == joint.states) | (hidden[:, None] == width - 1)).all(-1)
            one_hot = torch.nn.functional.one_hot(joint.states[:, i], width).double()
            law[:, i] = (agrees * joint.p) @ one_hot
        return (law / law.sum(-1, keepdim=True)).log()

    return as_denoiser(log_law)


def informed(**kwargs: Any) -> InformedCorrectorScheduler:
    return InformedCorrectorScheduler(vocab_size=V, mask_token_id=TOKENS, **kwargs)


STATES = all_states(V, L)


def noisy_law(joint: Joint, alpha: float) -> Tensor:
    """p_s over all states: each position of a clean row is a mask with probability 1 - alpha."""
    law = torch.zeros(len(STATES), dtype=torch.float64)
    for row, p in zip(joint.states, joint.p, strict=True):
        for kept in itertools.product([True, False], repeat=L):
            x = row.masked_fill(~torch.tensor(kept), TOKENS)
            weight = alpha ** sum(kept) * (1 - alpha) ** (L - sum(kept))
            law[state_index(x[None], V)[0]] += p * weight
    return law


def selection_law(scheduler: InformedCorrectorScheduler, law: Tensor, x: Tensor) -> dict[frozenset[int], float]:
    """The sets of revealed places that a correction of x takes: uniform, or by Gumbel noise one after the other with weights
    exp(-confidence / temperature)."""
    config = scheduler.config
    revealed = [i for i in range(L) if x[i] != TOKENS]
    count = min(config.positions_per_correction, len(revealed))
    if config.selection == "random":
        return uniform_subset_law(revealed, count)
    weight = {}
    for i in revealed:
        p = law[i, :TOKENS]
        current, others = float(p[x[i]]), float(p[torch.arange(TOKENS) != x[i]].max())
        confidence = {
            "lowest_margin": current / others,
            "lowest_max_probability": max(current, others),
            "lowest_current_probability": current,
        }[config.selection]
        weight[i] = confidence ** (-1 / config.selection_temperature)
    chances: dict[frozenset[int], float] = {}
    for order in itertools.permutations(revealed, count):
        chance, left = 1.0, dict(weight)
        for i in order:
            chance *= left[i] / sum(left.values())
            del left[i]
        chances[frozenset(order)] = chances.get(frozenset(order), 0.0) + chance
    return chances


def correction_matrix(scheduler: InformedCorrectorScheduler, denoiser: ExactDenoiser) -> Tensor:
    """P(after | before) of one correction, (S, S)."""
    laws = denoiser(STATES, 1.0).softmax(-1)
    matrix = torch.zeros(len(STATES), len(STATES), dtype=torch.float64)
    for row, x in enumerate(STATES):
        for chosen, chance in selection_law(scheduler, laws[row], x).items():
            factors = [laws[row, i, STATES[:, i]] if i in chosen else (STATES[:, i] == x[i]).double() for i in range(L)]
            matrix[row] += chance * torch.stack([factor.double() for factor in factors]).prod(0)
    return matrix


def run_law(scheduler: InformedCorrectorScheduler, denoiser: ExactDenoiser, num_steps: int) -> Tensor:
    """Law of the last sample over all states: ancestral steps, each followed by its corrections. By the docstring's rule."""
    config, process = scheduler.config, scheduler.noise_process
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    laws, correction = denoiser(STATES, 1.0).softmax(-1), correction_matrix(scheduler, denoiser)
    law = torch.zeros(len(STATES), dtype=torch.float64)
    law[-1] = 1.0
    for step in range(num_steps):
        share = float(process.unmask_probability(times[step], times[step + 1]))
        matrix = torch.zeros(len(STATES), len(STATES), dtype=torch.float64)
        for row, x in enumerate(STATES):
            masked = [i for i in range(L) if x[i] == TOKENS]
            if config.unmasking == "bernoulli":
                n = len(masked)
                counts = {k: math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)}
            else:
                due = len(masked) * share
                counts = {0: 1 - due, 1: due} if 0 < due < 0.5 else {round(due): 1.0}
            for count, chance in counts.items():
                for chosen, p in uniform_subset_law(masked, count).items():
                    factors = [
                        laws[row, i, STATES[:, i]] if i in chosen else (STATES[:, i] == x[i]).double() for i in range(L)
                    ]
                    matrix[row] += chance * p * torch.stack(factors).prod(0)
        law = law @ matrix
        if step < num_steps - 1 or config.correct_last_step:
            law = law @ torch.linalg.matrix_power(correction, config.num_corrector_steps)
    return law


def clean(law: Tensor, joint: Joint) -> Tensor:
    return law[state_index(joint.states, V)]


# Informed correctors: laws


@pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])
def test_one_random_position_keeps_the_marginal(alpha: float) -> None:
    joint = random_joint(TOKENS, L, seed=1)
    matrix = correction_matrix(informed(), leave_one_out(joint))
    before = noisy_law(joint, alpha)
    assert float(before.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(before @ matrix, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "off"),
    [
        ({"positions_per_correction": 2}, 0.109),
        ({"positions_per_correction": 3}, 0.199),
        ({"selection": "lowest_current_probability"}, 0.062),
        ({"selection": "lowest_margin"}, 0.123),
        ({"selection": "lowest_max_probability"}, 0.028),
    ],
    ids=str,
)
def test_other_selections_do_not(kwargs: dict[str, Any], off: float) -> None:
    """Distance of p_0 from itself after one correction. The largest probability of any token looks at the other tokens only,
    but it competes with those of the other positions, which look at this one."""
    joint = random_joint(TOKENS, L, seed=1)
    before = noisy_law(joint, 1.0)
    after = before @ correction_matrix(informed(**kwargs), leave_one_out(joint))
    assert total_variation(before, after) == pytest.approx(off, abs=5e-4)


CORRECTIONS = [
    {},
    {"positions_per_correction": 2},
    {"selection": "lowest_current_probability", "positions_per_correction": 2},
    {"selection": "lowest_margin", "selection_temperature": 0.5},
    {"selection": "lowest_max_probability"},
]


@pytest.mark.parametrize("kwargs", CORRECTIONS, ids=str)
def test_draws_of_a_correction_follow_their_law(kwargs: dict[str, Any]) -> None:
    joint, batch = random_joint(TOKENS, L, seed=2), 3000
    scheduler, denoiser = informed(**kwargs), leave_one_out(joint)
    scheduler.set_timesteps(2)
    matrix = correction_matrix(scheduler, denoiser)
    for seed, start in enumerate([[0, 1, 2], [2, TOKENS, 1], [TOKENS, 1, TOKENS], [TOKENS] * 3]):
        x = torch.tensor([start]).expand(batch, L)
        drawn = scheduler.step(denoiser(x, 0.5), 1, x, generator=seeded(seed)).prev_sample
        counts = torch.bincount(state_index(drawn, V), minlength=len(STATES))
        assert chi_square_z(counts, matrix[state_index(x[:1], V)[0]]) < 4.5


@pytest.mark.parametrize("least", [0, 1])
def test_the_least_sure_of_very_sure_positions(least: int) -> None:
    """Log-probabilities of -1e-9 and less, which are all 0 in float32."""
    scheduler = informed(selection="lowest_max_probability", selection_temperature=0.0)
    scheduler.set_timesteps(2)
    logits = torch.full((1, 2, V), -30.0)
    logits[..., 0], logits[0, least, 1] = 0.0, -20.0
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    rows = RowLogits.chosen(logits, everywhere)
    chosen = scheduler.least_confident(rows, 0, torch.zeros(1, 2, dtype=torch.int64), seeded())
    assert chosen.nonzero().tolist() == [[0, least]]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"unmasking": "bernoulli"},
        {"num_corrector_steps": 2, "correct_last_step": True},
        {"selection": "lowest_current_probability", "correct_last_step": True},
    ],
    ids=str,
)
def test_samples_of_a_run_follow_their_law(kwargs: dict[str, Any]) -> None:
    joint = random_joint(TOKENS, L, seed=3)
    scheduler, denoiser = informed(**kwargs), leave_one_out(joint)
    scheduler.set_timesteps(3)
    x, generator = scheduler.sample_prior((4000, L)), seeded(4)
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generator)
        x = scheduler.step(denoiser(x, t, chosen), t, x, generator=generator).prev_sample
    law = run_law(scheduler, denoiser, 3)
    assert chi_square_z(torch.bincount(state_index(x, V), minlength=len(STATES)), law.clamp(min=0)) < 4.5


@pytest.mark.parametrize("num_steps", [L, 8])
def test_corrections_keep_an_exact_run_exact(num_steps: int) -> None:
    joint = random_joint(TOKENS, L, seed=5)
    for kwargs in ({}, {"num_corrector_steps": 3, "correct_last_step": True}):
        law = run_law(informed(**kwargs), leave_one_out(joint), num_steps)
        assert kl(joint.p, clean(law, joint)) < 1e-12


def test_corrections_lower_the_error_of_few_steps() -> None:
    """Exact denoiser, one position for each correction: with enough of them on the clean sample no error is left."""
    joint = random_joint(TOKENS, L, seed=5)
    denoiser = leave_one_out(joint)

    def error(num_steps: int, **kwargs: Any) -> float:
        return kl(joint.p, clean(run_law(informed(unmasking="bernoulli", **kwargs), denoiser, num_steps), joint))

    plain = [error(n, num_corrector_steps=0) for n in (1, 2)]
    last = [error(1, num_corrector_steps=c, correct_last_step=True) for c in (1, 2, 4, 16, 64)]
    assert error(1) == pytest.approx(plain[0], rel=1e-12)  # nothing is corrected before the last step
    assert all(a > b for a, b in itertools.pairwise([plain[0], *last]))
    assert last[-1] < 1e-6
    assert error(2, correct_last_step=True) < error(2) < plain[1]


@pytest.mark.parametrize(
    ("kwargs", "order"),
    [
        ({"num_corrector_steps": 0}, 1.0),
        ({}, 1.85),
        ({"num_corrector_steps": 2}, 1.9),
        ({"positions_per_correction": L}, -0.2),
        ({"selection": "lowest_current_probability"}, -0.4),
    ],
    ids=str,
)
def test_order_of_convergence(kwargs: dict[str, Any], order: float) -> None:
    """The errors of early steps are forgotten, so that the distance falls nearly as N^-2. The inexact corrections pull to
    their own law, the more of them the further: more steps make it worse (0.12, 0.16 away on this joint)."""
    joint = random_joint(TOKENS, L, seed=12)
    scheduler = informed(unmasking="bernoulli", **kwargs)
    errors = [
        total_variation(joint.p, clean(run_law(scheduler, leave_one_out(joint), n), joint)) for n in (4, 8, 16, 32)
    ]
    for a, b in itertools.pairwise(errors):
        assert math.log2(a / b) == pytest.approx(order, abs=0.3 if order < 0 else 0.12)
    if order < 0:
        assert errors[-1] > 0.15


# Informed correctors: rules


def test_calls_by_hand() -> None:
    scheduler = informed(num_corrector_steps=2)
    scheduler.set_timesteps(3)
    third = [1, 2 / 3, 2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3]
    assert scheduler.timesteps.tolist() == pytest.approx(third, abs=1e-15)
    assert [scheduler.place(i) for i in range(7)] == [
        (0, False), (0, True), (0, True), (1, False), (1, True), (1, True), (2, False)
    ]  # fmt: skip
    last = informed(num_corrector_steps=2, correct_last_step=True)
    last.set_timesteps(3)
    assert last.timesteps.tolist() == pytest.approx([*third, 1e-5, 1e-5], abs=1e-15)
    assert [last.place(i) for i in (7, 8)] == [(2, True), (2, True)]
    late = informed(
        correct_last_step=True, grid="learned", coefficients={"2": {"times": [1, 1e-6, 0]}}
    )  # still decreasing
    late.set_timesteps(2)
    assert late.timesteps.tolist() == [1, 1e-6, 1e-6, 5e-7]
    plain = informed(num_corrector_steps=0, correct_last_step=True)
    plain.set_timesteps(3)
    assert plain.timesteps.tolist() == plain.times[:-1].tolist()


def test_confidences_by_hand() -> None:
    """Three revealed tokens and a mask. The mask's own logit is not read, and temperature does not change who is chosen."""
    p = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], dtype=torch.float64)
    logits = torch.cat([p.log() + 3, torch.full((4, 1), 50.0, dtype=torch.float64)], dim=1)[None]
    x = torch.tensor([[0, 1, 2, TOKENS]])
    expected = {
        "lowest_margin": ([0.5 / 0.4, 0.3 / 0.4, 0.7 / 0.2], 1),
        "lowest_current_probability": ([0.5, 0.3, 0.7], 1),
        "lowest_max_probability": ([0.5, 0.4, 0.7], 1),
    }
    for selection, (values, place) in expected.items():
        scheduler = informed(selection=selection, selection_temperature=0.0, temperature=0.5)
        rows = RowLogits(logits[x != TOKENS], x != TOKENS)
        confidence = selection_confidence(p[:3].log(), x[x != TOKENS], selection)
        torch.testing.assert_close(confidence, torch.tensor(values, dtype=torch.float64).log(), rtol=0, atol=1e-12)
        chosen = scheduler.least_confident(rows, 0, x, seeded())
        assert chosen.tolist() == [[i == place for i in range(4)]]
        scheduler.set_timesteps(2)
        drawn = torch.stack(
            [scheduler.step(logits, 1, x, generator=seeded(seed)).prev_sample[0] for seed in range(300)]
        )
        assert torch.equal(drawn[:, [0, 2, 3]], x[:, [0, 2, 3]].expand(300, 3))
        sharp = p[1] ** 2 / (p[1] ** 2).sum()
        assert chi_square_z(torch.bincount(drawn[:, 1], minlength=3), sharp) < 4.5
    two = informed(selection="lowest_current_probability", selection_temperature=0.0, positions_per_correction=2)
    assert two.least_confident(rows, 0, x, seeded()).tolist() == [[True, True, False, False]]
    many = informed(selection="lowest_current_probability", positions_per_correction=9)
    assert torch.equal(many.least_confident(rows, 0, x, seeded()), x != TOKENS)


def test_a_correction_reads_revealed_positions_only() -> None:
    x = torch.tensor([[0, TOKENS, 2, TOKENS], [TOKENS] * 4])
    for selection, count in (("random", 1), ("lowest_margin", 2)):
        scheduler = informed(selection=selection)
        scheduler.set_timesteps(3)
        chosen = scheduler.positions(1, x, seeded())
        assert not (chosen & (x == TOKENS)).any()
        assert chosen.sum(1).tolist() == [count, 0]  # so there may be no call at all
        assert not (scheduler.positions(3 - 1, x, seeded()) & (x != TOKENS)).any()


def test_learned_selection_temperature() -> None:
    coefficients = {"2": {"selection_temperature": [0.0, 5.0]}}
    scheduler = informed(selection="lowest_current_probability", coefficients=coefficients, correct_last_step=True)
    scheduler.set_timesteps(2)
    x = torch.tensor([[0, 1]]).expand(400, 2)
    rows = RowLogits(torch.tensor([[1.0, 0, 0, 0], [2.0, 1.0, 0, 0]]).repeat(400, 1), x < TOKENS)
    first, second = (scheduler.least_confident(rows, step, x, seeded()).double().mean(0) for step in (0, 1))
    assert first.tolist() == [0, 1]
    assert 0.3 < float(second[0]) < 0.6
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3"):
        scheduler.set_timesteps(3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_corrector_steps": -1}, "`num_corrector_steps` is -1"),
        ({"positions_per_correction": 0}, "`positions_per_correction` is 0"),
        ({"selection_temperature": -0.1}, "`selection_temperature` is -0.1"),
        (
            {"coefficients": {"1": {"selection_temperature": [-1.0]}}},
            r"`selection_temperature` for 1 steps is \[-1.0\]",
        ),
        ({"selection": "highest"}, "`selection` is 'highest'; allowed: 'random', 'lowest_margin'"),
        ({"process": "uniform", "mask_token_id": None}, "InformedCorrectorScheduler is for 'absorbing'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InformedCorrectorScheduler(**({"vocab_size": V, "mask_token_id": TOKENS} | kwargs))


# WINO


def wino(**kwargs: Any) -> WINOScheduler:
    return WINOScheduler(vocab_size=V, mask_token_id=TOKENS, **kwargs)


def logits_with(best: list[float], token: int = 0) -> Tensor:
    """Logits (1, L, V) that give one token these probabilities, and the mask the largest logit of all."""
    p = torch.tensor(best, dtype=torch.float64)[:, None].expand(-1, TOKENS).clone()
    others = [v for v in range(TOKENS) if v != token]
    p[:, others] = (1 - p[:, others]) / 2
    return torch.cat([p.log(), torch.full((len(best), 1), 9.0, dtype=torch.float64)], dim=1)[None]


def test_draft_and_verify_by_hand() -> None:
    """Eight positions, eight calls, tokens 0. `_` is a mask, and each row below is one call."""
    calls = [  # probabilities; drafted at masks, of the token that is there elsewhere -> what is there afterwards
        # six above 0.6, but 0.7 * 8 = 5.6 lets five open
        ([0.9, 0.8, 0.7, 0.65, 0.62, 0.61, 0.5, 0.4], "00000___"),
        # two open; four tokens below 0.9, and five opened in the call before, so all four fall
        ([0.95, 0.5, 0.4, 0.85, 0.6, 0.7, 0.65, 0.5], "0____00_"),
        # one opens: nothing is verified
        ([0.4, 0.99, 0.5, 0.5, 0.5, 0.4, 0.4, 0.5], "00___00_"),
        # two open, but only one did in the call before: none may fall
        ([0.4, 0.4, 0.7, 0.7, 0.5, 0.4, 0.4, 0.5], "0000_00_"),
        # two open, two did before: the least confident one of six falls
        ([0.7, 0.7, 0.7, 0.7, 0.8, 0.5, 0.4, 0.8], "000000_0"),
        # nothing above 0.6: one opens all the same
        ([0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.45, 0.4], "00000000"),
    ]
    scheduler = wino(temperature=0.0)
    scheduler.set_timesteps(8)
    x = torch.full((1, 8), TOKENS)
    for index, (probabilities, after) in enumerate(calls):
        assert torch.equal(
            scheduler.positions(index, x), torch.ones_like(x, dtype=torch.bool) if index else x == TOKENS
        )
        x = scheduler.step(logits_with(probabilities), index, x, generator=seeded()).prev_sample
        assert x.tolist() == [[TOKENS if c == "_" else 0 for c in after]]
    assert not scheduler.positions(6, x).any()  # no more calls
    again = scheduler.step(logits_with(calls[5][0]), 6, x).prev_sample
    assert torch.equal(again, x)


def test_the_last_call_opens_all_and_known_tokens_never_fall() -> None:
    x = torch.tensor([[1, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, 2]])
    scheduler = wino(temperature=0.0)
    for num_steps in (1, 2):
        scheduler.set_timesteps(num_steps)
        sample = x
        for index in range(num_steps):
            sample = scheduler.step(logits_with([0.45] * 8), index, sample).prev_sample
            assert sample[0, [0, 7]].tolist() == [1, 2]
        assert (sample != TOKENS).all()
    scheduler.set_timesteps(4)
    # four masks are due in three calls here: 6 / 4 rounded up opens two, then two; those before fall but for the known ones
    sample = scheduler.step(logits_with([0.1, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4, 0.1]), 0, x).prev_sample
    assert sample.tolist() == [[1, 0, 0, 3, 3, 3, 3, 2]]
    assert scheduler.positions(1, sample).tolist() == [[False, True, True, True, True, True, True, False]]
    sample = scheduler.step(logits_with([0.1, 0.5, 0.95, 0.45, 0.45, 0.4, 0.4, 0.1]), 1, sample).prev_sample
    assert sample.tolist() == [[1, 3, 0, 0, 0, 3, 3, 2]]
    assert not scheduler.positions(3, sample)[0, [0, 2, 3, 4, 7]].any()  # the last call verifies nothing


def test_blocks_are_verified_alone() -> None:
    """Blocks of four: the first is full before the second begins, and then it is final."""
    scheduler = wino(temperature=0.0, block_length=4)
    scheduler.set_timesteps(8)
    x = torch.full((1, 8), TOKENS)
    assert scheduler.positions(0, x).tolist() == [[True] * 4 + [False] * 4]
    x = scheduler.step(logits_with([0.7, 0.7, 0.7, 0.5] + [0.9] * 4), 0, x).prev_sample
    assert x.tolist() == [[0, 0, 0, 3, 3, 3, 3, 3]]
    assert scheduler.positions(1, x).tolist() == [[True] * 4 + [False] * 4]
    x = scheduler.step(logits_with([0.7] * 8), 1, x).prev_sample
    assert x.tolist() == [[0, 0, 0, 0, 3, 3, 3, 3]]  # one opened: nothing fell
    assert scheduler.positions(2, x).tolist() == [[False] * 4 + [True] * 4]
    x = scheduler.step(logits_with([0.1] * 4 + [0.7] * 3 + [0.5]), 2, x).prev_sample
    assert x.tolist() == [[0] * 7 + [3]]


def test_fewer_fall_than_opened_before() -> None:
    """Under random beliefs; hence a run gains at least a token a call on average, and ends before its calls do."""
    scheduler = wino(accept_threshold=0.5, remask_threshold=1.0)
    scheduler.set_timesteps(40)
    x, generator = torch.full((30, 24), TOKENS), seeded(1)
    opened_before, fell_ever = torch.zeros(30, dtype=torch.int64), 0
    for index in range(40):
        logits = 2 * torch.randn(30, 24, V, generator=generator, dtype=torch.float64)
        after = scheduler.step(logits, index, x, generator=generator).prev_sample
        opened = ((x == TOKENS) & (after != TOKENS)).sum(1)
        fell = ((x != TOKENS) & (after == TOKENS)).sum(1)
        assert (fell <= (opened_before - 1).clamp(min=0)).all()
        assert ((fell == 0) | (opened > 1)).all()
        assert (opened[(x == TOKENS).any(1)] >= 1).all()
        assert (opened <= 20).all()
        fell_ever += int(fell.sum())
        x, opened_before = after, opened
    assert (x != TOKENS).all()
    assert fell_ever > 100


def test_memory_is_of_one_run() -> None:
    scheduler = wino(temperature=0.0)
    scheduler.set_timesteps(8)
    x = scheduler.step(logits_with([0.7] * 8), 0, torch.full((1, 8), TOKENS)).prev_sample
    first = scheduler.step(logits_with([0.7] * 8), 1, x).prev_sample
    assert torch.equal(scheduler.step(logits_with([0.7] * 8), 1, x).prev_sample, first)  # asked for again
    assert (first[x != TOKENS] == TOKENS).sum() == 4
    with pytest.raises(ValueError, match=r"`sample` has shape \(2, 8\), but this run has \(1, 8\)"):
        scheduler.positions(2, first.expand(2, 8))
    scheduler.set_timesteps(8)
    assert torch.equal(scheduler.step(logits_with([0.7] * 8), 1, x).prev_sample[x != TOKENS], x[x != TOKENS])
    with pytest.raises(ValueError, match="are not those that `positions` named"):
        scheduler.step(RowLogits(torch.zeros(8, V), torch.ones(1, 8, dtype=torch.bool)), 1, x)


def test_learned_thresholds() -> None:
    coefficients = {"2": {"accept_threshold": [0.9, 0.1], "remask_threshold": [0.0, 0.0]}}
    scheduler = wino(coefficients=coefficients, temperature=0.0)
    scheduler.set_timesteps(2)
    x = scheduler.step(logits_with([0.95, 0.8, 0.8, 0.8]), 0, torch.full((1, 4), TOKENS)).prev_sample
    assert (x != TOKENS).sum() == 2  # the number due
    for name, value in [("accept_threshold", 1.5), ("remask_threshold", -0.1), ("accept_share", 2.0)]:
        with pytest.raises(ValueError, match=f"`{name}` is .*{value}.*; allowed are numbers in"):
            wino(**{name: value})
    with pytest.raises(ValueError, match="`accept_threshold` for 1 steps"):
        wino(coefficients={"1": {"accept_threshold": [2.0]}})
    with pytest.raises(ValueError, match="`block_length` is 0"):
        wino(block_length=0)


# In a pipeline


def hollow(seed: int = 0, **changes: Any) -> HollowTransformerModel:
    arguments = {"vocab_size": len(WORDS), "hidden_size": 32, "num_blocks": 1, "num_readout_blocks": 1, "num_heads": 4}
    return randomised(HollowTransformerModel(**(arguments | {"max_length": 32} | changes)), seed)


def test_a_model_without_revealed_logits_is_refused() -> None:
    scheduler = InformedCorrectorScheduler(vocab_size=len(WORDS), mask_token_id=MASK)
    pipe = tiny_pipeline(scheduler)
    with pytest.raises(ValueError, match=r"InformedCorrectorScheduler, which reads .* Use a HollowTransformerModel"):
        pipe(length=LENGTH, num_inference_steps=2)
    for pipe in (
        tiny_pipeline(scheduler, model=hollow()),
        tiny_pipeline(scheduler, denoiser={"revealed_logits": "shadow"}),
    ):
        output = pipe(length=LENGTH, num_inference_steps=3, num_samples=2, generator=seeded(), output_type="pt")
        assert (output.sequences != MASK).all()
        assert output.num_model_calls == 5


def test_known_tokens_stay_and_rows_stand_alone() -> None:
    scheduler = InformedCorrectorScheduler(
        vocab_size=len(WORDS), mask_token_id=MASK, positions_per_correction=6, correct_last_step=True
    )
    pipe = tiny_pipeline(scheduler, model=hollow().double())
    template = torch.tensor([[2, 4, -1, -1, 7, -1, -1, -1]])
    generators = [seeded(seed) for seed in range(3)]
    together = pipe(
        template=template, num_samples=3, num_inference_steps=4, generator=generators, output_type="pt"
    ).sequences
    assert (together[:, [0, 1, 4]] == torch.tensor([2, 4, 7])).all()
    alone = pipe(template=template, num_inference_steps=4, generator=[seeded(2)], output_type="pt").sequences
    assert torch.equal(alone[0], together[2])


# Shadow masks


def shadowed(model: torch.nn.Module, **facts: Any) -> NetworkDenoiser:
    return NetworkDenoiser(model, len(WORDS), MASK, revealed_logits="shadow", **facts)


@torch.no_grad()
@pytest.mark.parametrize("split_head", [False, True])
def test_a_shadow_is_the_masked_position_with_one_layer(split_head: bool) -> None:
    """The logits at each revealed position are those of the network with this position masked, in the one call; at masks they
    are what they were."""
    model = tiny_model(num_blocks=1, cond_dim=None).double()
    denoiser = shadowed(model, split_head=split_head)
    plain = NetworkDenoiser(model, len(WORDS), MASK)
    x = torch.randint(0, MASK, (3, 9), generator=seeded(1))
    x[torch.rand(3, 9, generator=seeded(2)) < 0.4] = MASK
    expected = plain(x, 0.5)
    for i in range(9):
        hidden = x.clone()
        hidden[:, i] = MASK
        expected[:, i] = plain(hidden, 0.5)[:, i]
    assert (plain(x, 0.5) - expected)[..., :MASK].abs().amax(-1)[x != MASK].min() > 1e-3
    torch.testing.assert_close(denoiser(x, 0.5), expected, rtol=0, atol=1e-10)
    for share in (0.2, 0.6):
        wanted = torch.rand(3, 9, generator=seeded(3)) < share
        rows = denoiser(x, 0.5, wanted)
        torch.testing.assert_close(rows.logits, expected[wanted], rtol=0, atol=1e-10)
    only_masks = denoiser(x, 0.5, x == MASK).logits
    torch.testing.assert_close(only_masks, expected[x == MASK], rtol=0, atol=1e-10)


@torch.no_grad()
def test_shadows_change_nothing_else_and_cost_what_is_asked_for() -> None:
    """With more layers: nothing sees a shadow, and a shadow sees neither its own token nor another shadow."""
    model = tiny_model().double()
    denoiser = shadowed(model, split_head=True, time_input="sigma")
    plain = NetworkDenoiser(model, len(WORDS), MASK, time_input="sigma")
    x = torch.randint(0, MASK, (2, 9), generator=seeded(4))
    x[:, [2, 5]] = MASK
    torch.testing.assert_close(denoiser(x, 0.5)[x == MASK], plain(x, 0.5)[x == MASK], rtol=0, atol=1e-10)
    lengths = []
    handle = model.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    one, two = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    one[:, 3] = two[:, 3] = two[:, 7] = True
    alone, together = denoiser(x, 0.5, one).logits, denoiser(x, 0.5, two).logits
    denoiser(x, 0.5, x == MASK)
    denoiser.log_p_0(x, 0.5)
    denoiser(x, 0.5)
    handle.remove()
    assert lengths == [10, 11, 9, 9, 16]
    torch.testing.assert_close(alone, together[::2], rtol=0, atol=1e-10)
    # an estimate only: the first layer has told the others about the token
    hidden = x.clone()
    hidden[:, 3] = MASK
    gap = (alone - plain(hidden, 0.5)[:, 3])[:, :MASK].abs()
    assert gap.max() > 1e-3
    # but it is nearer than the network's own output at the token
    own = (plain(x, 0.5)[:, 3] - plain(hidden, 0.5)[:, 3])[:, :MASK].abs()
    assert float(gap.mean()) < float(own.mean())


@pytest.mark.parametrize("facts", ["hollow", "shadow"])
def test_wino_in_a_pipeline(facts: str) -> None:
    """Confident networks need fewer calls than they may have; a network without the law of its tokens is refused."""
    scheduler = WINOScheduler(vocab_size=len(WORDS), mask_token_id=MASK, accept_threshold=0.05, remask_threshold=0.02)
    changes: dict[str, Any] = {"model": hollow()} if facts == "hollow" else {"denoiser": {"revealed_logits": "shadow"}}
    pipe = tiny_pipeline(scheduler, **changes)
    template = torch.tensor([[2, 4, -1, -1, 7, -1, -1, -1, -1, -1, -1, -1]])
    output = pipe(template=template, num_inference_steps=12, num_samples=3, generator=seeded(), output_type="pt")
    assert (output.sequences != MASK).all()
    assert (output.sequences[:, [0, 1, 4]] == torch.tensor([2, 4, 7])).all()
    assert output.num_model_calls < 9
    with pytest.raises(ValueError, match="`scheduler` is a WINOScheduler, which reads"):
        tiny_pipeline(scheduler)(length=LENGTH)


@torch.no_grad()
def test_position_ids() -> None:
    model, ids = tiny_model().double(), torch.randint(0, MASK, (2, 6), generator=seeded(5))
    sigma = torch.ones(2)
    place = torch.arange(6)
    expected = model(ids, sigma).logits
    torch.testing.assert_close(model(ids, sigma, position_ids=place[None]).logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(ids, sigma, position_ids=place[None] + 5).logits, expected, rtol=0, atol=1e-5)
    order = torch.randperm(6, generator=seeded(6))
    each = torch.stack([place, order])
    moved = torch.stack([ids[0], ids[1, order]])
    output = model(moved, sigma, position_ids=each).logits
    torch.testing.assert_close(output[1], expected[1, order], rtol=0, atol=1e-10)
    torch.testing.assert_close(output[0], expected[0], rtol=0, atol=1e-10)


def test_facts_that_contradict_each_other() -> None:
    model = DDiTModel(4, hidden_size=8, num_blocks=1, num_heads=2, cond_dim=None)
    with pytest.raises(ValueError, match="`revealed_logits='leave_one_out'` is for the absorbing process"):
        NetworkDenoiser(model, 4, process="uniform", revealed_logits="leave_one_out")
    with pytest.raises(ValueError, match="`revealed_logits='shadow'` needs `shift` 0"):
        NetworkDenoiser(model, 4, 3, shift=1, revealed_logits="shadow")
    with pytest.raises(ValueError, match="`revealed_logits` is 'all'; allowed: 'none', 'leave_one_out', 'shadow'"):
        NetworkDenoiser(model, 4, 3, revealed_logits="all")


# A trained hollow network

T, LONG = 4, 8  # tokens and positions of a Markov chain; its mask is T
TRANSITION = (2.0 * torch.randn(T, T, generator=seeded(0), dtype=torch.float64)).softmax(-1)
MARGINALS = [torch.full((T,), 1 / T, dtype=torch.float64)]
for _ in range(LONG - 1):
    MARGINALS.append(MARGINALS[-1] @ TRANSITION)
PAIRS = torch.stack([p[:, None] * TRANSITION for p in MARGINALS[:-1]])  # (L - 1, T, T)


def chain(rows: int, generator: torch.Generator) -> Tensor:
    x = [torch.randint(0, T, (rows,), generator=generator)]
    for _ in range(LONG - 1):
        x.append(torch.multinomial(TRANSITION[x[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(x, dim=1)


def chain_nats(x: Tensor) -> Tensor:
    """-log p of each row under the chain."""
    return math.log(T) - TRANSITION.log()[x[:, :-1], x[:, 1:]].sum(1)


@pytest.fixture(scope="module")
def trained() -> NetworkDenoiser:
    """A hollow network of the chain, trained for a few seconds on all positions, masked or not."""
    torch.manual_seed(0)
    model = HollowTransformerModel(
        T + 1, hidden_size=32, num_blocks=1, num_readout_blocks=1, num_heads=2, max_length=LONG
    )
    optimizer, generator, steps = torch.optim.AdamW(model.parameters()), seeded(1), 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 * (steps - step) / steps)
        x_0 = chain(96, generator)
        masked = torch.rand(96, LONG, generator=generator) < torch.rand(96, 1, generator=generator)
        logits = model(x_0.masked_fill(masked, T)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x_0.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return NetworkDenoiser(model.eval(), T + 1, T, split_head=True, revealed_logits="leave_one_out")


@torch.no_grad()
def sampled(denoiser: NetworkDenoiser, scheduler: Any, num_steps: int, rows: int = 5000) -> tuple[int, float, float]:
    """Model calls, distance of the law of neighbours to the chain's, and excess of nats under the chain over its entropy."""
    scheduler.set_timesteps(num_steps)
    x, generator, calls = scheduler.sample_prior((rows, LONG)), seeded(2), 0
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generator)
        x = scheduler.step(denoiser(x, t, chosen), t, x, generator=generator).prev_sample
        calls += int(chosen.any())
    counts = torch.bincount((x[:, :-1] * T + x[:, 1:]).flatten(), minlength=T * T).view(T, T)
    entropy = math.log(T) - float((PAIRS * TRANSITION.log()).sum())
    distance = total_variation(counts / counts.sum(), PAIRS.mean(0))
    return calls, distance, float(chain_nats(x).mean()) - entropy


@pytest.mark.slow
@torch.no_grad()
def test_trained_on_all_positions_it_knows_revealed_ones(trained: NetworkDenoiser) -> None:
    """Its leave-one-out law at revealed positions against the chain's, which is two transitions; and its likelihood."""
    x = chain(300, seeded(3))
    law = trained(x, 1e-3).double().softmax(-1)[..., :T]
    inner = TRANSITION[x[:, :-2]] * TRANSITION.T[x[:, 2:]]  # (B, L - 2, T), up to a factor
    inner = inner / inner.sum(-1, keepdim=True)
    gap = 0.5 * (law[:, 1:-1] - inner).abs().sum(-1).mean()
    marginal = 0.5 * (torch.stack(MARGINALS[1:-1]) - inner).abs().sum(-1).mean()
    assert float(gap) < 0.1 < 0.35 < float(marginal)
    bound = nll(trained, x, T, 32, seeded(4))
    assert 0 < float((bound.values - chain_nats(x)).mean()) < 0.35


@pytest.mark.slow
def test_corrections_with_a_trained_network(trained: NetworkDenoiser) -> None:
    """What holds here, with 3 steps and 2 corrections against 5 steps: a random correction is worth about as much as a step
    (distance of neighbours' law 0.074 and 0.076), one of the least probable token more (0.051). It is not the chain's law
    that it goes to, see `test_order_of_convergence`: its samples score better than real ones (0.08 nats below the entropy,
    plain ones 1.45 above)."""
    mask = {"vocab_size": T + 1, "mask_token_id": T}
    plain = {n: sampled(trained, AncestralScheduler(**mask), n) for n in (3, 5)}
    random = sampled(trained, InformedCorrectorScheduler(**mask), 3)
    chosen = {"selection": "lowest_current_probability"}
    informed = sampled(trained, InformedCorrectorScheduler(**mask, **chosen), 3)
    assert [plain[3][0], plain[5][0], random[0], informed[0]] == [3, 5, 5, 5]
    assert random[1] < 0.75 * plain[3][1]
    assert random[2] < 0.75 * plain[3][2]
    assert 0.6 < random[1] / plain[5][1] < 1.6
    assert informed[1] < 0.85 * plain[5][1]
    assert informed[2] < 0.3 < 1 < plain[5][2]
