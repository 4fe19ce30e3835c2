"""Samplers that look at the predictions to say how many positions open, or fall back: each rule by hand or by brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EntropyBoundScheduler as DiffusersEntropyBoundScheduler
from laws import (
    ExactDenoiser,
    Joint,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    kl,
    random_denoiser,
    random_joint,
    state_index,
)
from torch import Tensor

from discrete_schedulers import (
    DiscreteScheduler,
    EntropyBoundScheduler,
    KLASSScheduler,
    PathPlanningScheduler,
    PCSamplerScheduler,
    RowLogits,
    ThresholdScheduler,
    UniformEntropyBoundScheduler,
)
from discrete_schedulers.sampling import weigh
from discrete_schedulers.schedulers.order_utils import OrderScheduler

TOKENS = 3  # and the mask, which has the last id
MASK = TOKENS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(cls: type[DiscreteScheduler], num_steps: int, vocab_size: int = TOKENS + 1, **kwargs: Any) -> Any:
    """A scheduler whose mask has the last id, ready for N steps."""
    scheduler = cls(vocab_size=vocab_size, mask_token_id=vocab_size - 1, **kwargs)
    scheduler.set_timesteps(num_steps)
    return scheduler


def logits_of(law: Tensor) -> Tensor:
    """Laws over the tokens (..., V - 1) as logits (..., V); the mask's own logit is anything and must not be read."""
    law = torch.as_tensor(law, dtype=torch.float64)
    own = 5 * torch.arange(law[..., 0].numel(), dtype=torch.float64).cos().view(law[..., :1].shape)
    return torch.cat([law.log(), own], -1)


def confident(confidence: list[float]) -> Tensor:
    """Logits (1, L, V) in which token 0 has these probabilities and the others share the rest."""
    best = torch.tensor([confidence], dtype=torch.float64)
    return logits_of(torch.stack([best, (1 - best) / 2, (1 - best) / 2], -1))


def random_laws(shape: tuple[int, ...], seed: int, spread: float = 2.0) -> Tensor:
    """Laws over the tokens."""
    return (spread * torch.randn(*shape, TOKENS, generator=seeded(seed), dtype=torch.float64)).softmax(-1)


def opened(scheduler: DiscreteScheduler, logits: Tensor, index: int, x: Tensor, seed: int = 0) -> list[list[int]]:
    """The places of each row that are a mask before a step and a token after it; the rest has not changed."""
    after = scheduler.step(logits, index, x, generator=seeded(seed)).prev_sample
    was, now = x == scheduler.config.mask_token_id, after == scheduler.config.mask_token_id
    assert torch.equal(after[~was], x[~was])
    assert not (now & ~was).any()
    return [row.nonzero().flatten().tolist() for row in was & ~now]


def ranks(score: list[float]) -> list[int]:
    """Places from the highest score to the lowest, the left one first among equals."""
    return sorted(range(len(score)), key=lambda i: (-score[i], i))


def masks(length: int, batch: int = 1) -> Tensor:
    return torch.full((batch, length), MASK)


def partly_known(batch: int, length: int, seed: int) -> Tensor:
    x = torch.randint(0, TOKENS, (batch, length), generator=seeded(seed))
    return x.masked_fill(torch.rand(batch, length, generator=seeded(seed + 1)) < 0.7, MASK)


ADAPTIVE = [
    (ThresholdScheduler, {"threshold": 1.0}),  # nothing is that sure: only what is due opens
    (ThresholdScheduler, {"rule": "factor", "factor": 1e-9}),
    (KLASSScheduler, {"threshold": 1.0}),
    (EntropyBoundScheduler, {"entropy_bound": 0.0}),
]


@pytest.mark.parametrize(("cls", "kwargs"), ADAPTIVE)
@pytest.mark.parametrize("rounding", ["up", "down"])
def test_what_is_due_opens_at_least_and_one_where_calls_are_plenty(
    cls: type[OrderScheduler], kwargs: dict[str, Any], rounding: str
) -> None:
    for num_steps in (1, 2, 3, 8, 20):
        scheduler, denoiser = build(cls, num_steps, rounding=rounding, **kwargs), random_denoiser(TOKENS + 1)
        x, left = masks(8), 8
        for index in range(num_steps):
            if not left:
                assert not scheduler.positions(index, x).any()  # no call
            (places,) = opened(scheduler, denoiser(x, 1.0), index, x)
            share = left / (num_steps - index)
            due = math.ceil(share) if rounding == "up" else math.floor(share)
            assert len(places) == (left if index == num_steps - 1 else min(left, max(1, due)))
            left -= len(places)
            x = scheduler.step(denoiser(x, 1.0), index, x, generator=seeded()).prev_sample
        assert left == 0


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (ThresholdScheduler, {"threshold": 0.1}),
        (ThresholdScheduler, {"rule": "factor", "factor": 50.0}),
        (EntropyBoundScheduler, {"entropy_bound": 50.0}),
    ],
)
def test_blocks_open_from_left_to_right(cls: type[OrderScheduler], kwargs: dict[str, Any]) -> None:
    """Rules that accept all: a block in each call, the next one where it is done, and no third one."""
    scheduler, denoiser = build(cls, 10, block_length=3, **kwargs), random_denoiser(TOKENS + 1)
    x = torch.tensor([[MASK, 0, MASK, MASK, MASK, MASK, 1, MASK], [0, 0, 0, 1, 1, 1, MASK, MASK]])
    assert opened(scheduler, denoiser(x, 1.0), 0, x) == [[0, 2], [6, 7]]
    x[0, :3] = 0
    assert opened(scheduler, denoiser(x, 1.0), 1, x) == [[3, 4, 5], [6, 7]]


# Fast-dLLM


@pytest.mark.parametrize(
    ("kwargs", "confidence", "expected"),
    [
        ({}, [0.95, 0.5, 0.91, 0.4], [0, 2]),
        ({}, [0.6, 0.85, 0.7, 0.4], [1]),  # none: the best
        ({"threshold": 0.65}, [0.6, 0.85, 0.7, 0.4], [1, 2]),
        # (n + 1)(1 - c): 0.02, 0.06, 3.6. Released code accepts the last of the block too where it fails alone
        ({"rule": "factor"}, [0.99, 0.98, 0.1], [0, 1]),
        ({"rule": "factor"}, [0.1, 0.99, 0.98, 0.7], [1, 2]),  # 4 * 0.3 > 1
        ({"rule": "factor"}, [0.1, 0.99, 0.98, 0.76], [1, 2, 3]),  # 4 * 0.24 < 1
        ({"rule": "factor"}, [0.4, 0.35], [0]),
        ({"rule": "factor", "factor": 2.0}, [0.4, 0.35], [0, 1]),  # 3 * 0.65 < 2
    ],
)
def test_fast_dllm_by_hand(kwargs: dict[str, Any], confidence: list[float], expected: list[int]) -> None:
    scheduler = build(ThresholdScheduler, 20, temperature=0.0, **kwargs)
    assert opened(scheduler, confident(confidence), 0, masks(len(confidence))) == [expected]


def test_as_sure_as_the_threshold_is_not_enough() -> None:
    scheduler = build(ThresholdScheduler, 20, temperature=0.0, threshold=0.5)
    even = [0.5, 0.5, 0.0]
    assert opened(scheduler, logits_of(torch.tensor([[[0.75, 0.25, 0.0], even, even]])), 0, masks(3)) == [[0]]


def test_the_last_call_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, asked = build(ThresholdScheduler, 2), []
    predict = scheduler.predict
    monkeypatch.setattr(
        scheduler, "predict", lambda rows, reads, source: asked.append(reads) or predict(rows, reads, source)
    )
    for index in (0, 1):
        scheduler.step(confident([0.5, 0.6]), index, masks(2), generator=seeded())
    assert asked == [("token_probability",), ()]


@pytest.mark.parametrize("rule", ["threshold", "factor"])
@pytest.mark.parametrize("seed", range(5))
def test_fast_dllm_by_brute_force(rule: str, seed: int) -> None:
    """The drawn tokens have the confidence of the law before temperature."""
    scheduler = build(ThresholdScheduler, 50, rule=rule, threshold=0.7, factor=1.6, temperature=1.8, top_p=0.95)
    x, law = partly_known(6, 9, seed), random_laws((6, 9), seed)
    after = scheduler.step(logits_of(law), 0, x, generator=seeded(seed)).prev_sample
    everything = build(ThresholdScheduler, 1, temperature=1.8, top_p=0.95)
    tokens = everything.step(logits_of(law), 0, x, generator=seeded(seed)).prev_sample  # the same draw, all opened
    for row in range(6):
        places = (x[row] == MASK).nonzero().flatten().tolist()
        confidence = [float(law[row, i, tokens[row, i]]) for i in places]
        ranked = [confidence[i] for i in ranks(confidence)]
        if rule == "threshold":
            count = sum(c > 0.7 for c in confidence)
        else:
            count = max((n for n in range(1, len(ranked) + 1) if (n + 1) * (1 - ranked[n - 1]) < 1.6), default=0)
        expected = {places[i] for i in ranks(confidence)[: max(count, 1)]}
        assert {i for i in places if after[row, i] != MASK} == expected
        assert all(after[row, i] == tokens[row, i] for i in expected)


def test_learned_thresholds() -> None:
    coefficients = {"4": {"threshold": [0.95, 0.3, 0.9, 0.9], "factor": [1e-9, 9.0, 1.0, 1.0]}}
    for rule in ("threshold", "factor"):
        scheduler = build(ThresholdScheduler, 4, rule=rule, coefficients=coefficients, temperature=0.0)
        logits = confident([0.9, 0.8, 0.4])
        assert opened(scheduler, logits, 0, masks(3)) == [[0]]
        assert opened(scheduler, logits, 1, masks(3)) == [[0, 1, 2]]
        with pytest.raises(ValueError, match="learned budgets: 4"):
            scheduler.set_timesteps(3)


def marginal(joint: Joint, places: list[int]) -> dict[tuple[int, ...], float]:
    """Law of the tokens at some places."""
    law: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(TOKENS), repeat=len(places)), 0.0)
    for state, p in zip(joint.states[:, places].tolist(), joint.p.tolist(), strict=True):
        law[tuple(state)] += p
    return law


def given(joint: Joint, x: Tensor) -> Joint:
    """The joint, given the tokens of a row x."""
    fits = ((joint.states == x) | (x == MASK)).all(1)
    p = joint.p * fits
    return Joint(joint.states, p / p.sum())


def test_what_the_factor_rule_opens_is_the_most_probable_joint_value() -> None:
    """Theorem of Fast-dLLM, on exact joints: also after some tokens are known."""
    sizes = []
    for seed in range(60):
        joint = random_joint(TOKENS, 4, seed=seed, spread=4.5)
        scheduler = build(ThresholdScheduler, 9, rule="factor", temperature=0.0)
        denoiser = exact_denoiser(joint, scheduler.noise_process)
        x = masks(4)
        for index in range(3):
            (places,) = opened(scheduler, denoiser(x, 1.0), index, x)
            after = scheduler.step(denoiser(x, 1.0), index, x).prev_sample
            law = marginal(given(joint, x[0]), places)
            if places:
                assert tuple(after[0, places].tolist()) == max(law, key=lambda value: law[value])
            sizes.append(len(places))
            x = after
    assert sum(size > 1 for size in sizes) > 40  # the theorem has been put to the test
    # and a larger factor is too much: 3 * 0.35 = 1.05
    p = {(0, 0): 0.30, (0, 1): 0.35, (1, 0): 0.35}
    states = all_states(TOKENS, 2)
    joint = Joint(states, torch.tensor([p.get(tuple(s), 0.0) for s in states.tolist()], dtype=torch.float64))
    for factor, expected in ((1.04, [[0]]), (1.06, [[0, 1]])):
        scheduler = build(ThresholdScheduler, 5, rule="factor", factor=factor, temperature=0.0)
        logits = exact_denoiser(joint, scheduler.noise_process)(masks(2), 1.0)
        assert opened(scheduler, logits, 0, masks(2)) == expected
    assert scheduler.step(logits, 0, masks(2)).prev_sample.tolist() == [[0, 0]]  # the least probable of the three


# KLASS


def test_klass_by_hand() -> None:
    """A is sure and stays, B is sure and moves, C stays and is not sure, two others are surer than all and open first."""
    scheduler = build(KLASSScheduler, 10, threshold=0.8, temperature=0.0)
    a, c, first, second = [0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.99, 0.005, 0.005], [0.98, 0.01, 0.01]
    b = [[0.9, 0.08, 0.02], [0.9, 0.02, 0.08], [0.9, 0.02, 0.08], [0.9, 0.02, 0.08]]  # 0.06 log 4 = 0.083 nats
    x = masks(5)
    expected = [[3], [4], [0], [1]]
    for index in range(4):
        logits = logits_of(torch.tensor([[a, b[index], c, first, second]]))
        assert opened(scheduler, logits, index, x) == [expected[index]]
        assert opened(scheduler, logits, index, x) == [expected[index]]  # a second time from the same memory
        x[0, expected[index]] = 0
    looser = build(KLASSScheduler, 10, threshold=0.8, temperature=0.0, kl_threshold=0.084, history_length=1)
    x = masks(5)
    logits = [logits_of(torch.tensor([[a, b[index], c, first, second]])) for index in range(2)]
    assert opened(looser, logits[0], 0, x) == [[3]]
    x[0, 3] = 0
    assert opened(looser, logits[1], 1, x) == [[0, 1, 4]]
    strict = build(KLASSScheduler, 10, threshold=0.8, temperature=0.0, kl_threshold=1e-12, history_length=1)
    same = logits_of(torch.tensor([[a, b[0], c, first, second]])).float()
    assert opened(strict, same, 0, masks(5)) == [[3]]
    assert opened(strict, same, 1, masks(5)) == [[0, 1, 3, 4]]  # equal laws are equal, of float32 logits too
    looser.set_timesteps(10)  # forgets
    assert opened(looser, logits[1], 1, x) == [[4]]
    with pytest.raises(ValueError, match=r"`sample` has shape \(2, 5\), but \(1, 5\) in the call before"):
        looser.step(logits[1].expand(2, 5, 4), 2, x.expand(2, 5))


def test_klass_compares_the_law_with_the_one_before() -> None:
    """KL(now || before) = 0.05 log(0.05 / 0.099) + 0.05 log(50) = 0.161, and 0.064 the other way round."""
    even, uneven = [0.9, 0.05, 0.05], [0.9, 0.099, 0.001]
    for before, now, settled in ((uneven, even, False), (even, uneven, True)):
        scheduler = build(KLASSScheduler, 9, threshold=0.8, temperature=0.0, kl_threshold=0.1, history_length=1)
        surer = [0.98, 0.01, 0.01]
        scheduler.step(logits_of(torch.tensor([[before, surer, surer]])), 0, masks(3))
        places = opened(scheduler, logits_of(torch.tensor([[now, surer, surer]])), 1, masks(3))
        assert places == [[0, 1, 2] if settled else [1, 2]]


@pytest.mark.parametrize("block_length", [None, 12])
@pytest.mark.parametrize("seed", range(3))
def test_klass_by_brute_force(seed: int, block_length: int | None) -> None:
    """Laws that drift, rows of different ages, and a history that is kept here in full."""
    batch, length, num_steps, history, fallback = 4, 24, 40, 2, 2
    knobs = {"threshold": 0.5, "kl_threshold": 0.02, "history_length": history, "fallback_count": fallback}
    scheduler = build(KLASSScheduler, num_steps, block_length=block_length, temperature=0.0, **knobs)
    x, state = (
        partly_known(batch, length, seed),
        2 * torch.randn(batch, length, TOKENS, generator=seeded(seed)).double(),
    )
    seen: list[tuple[Tensor, Tensor]] = []  # law and eligible positions of each call
    stable_counts = []
    for index in range(8):
        state = state + 0.12 * torch.randn(state.shape, generator=seeded(100 * seed + index)).double()
        law, eligible = state.softmax(-1), scheduler.positions(index, x)
        seen.append((law, eligible))
        expected = []
        for row in range(batch):
            places = eligible[row].nonzero().flatten().tolist()
            stable = []
            for i in places:
                recent = seen[-history - 1 :]
                known = len(recent) == history + 1 and all(bool(was[row, i]) for _, was in recent)
                p = [one[row, i] for one, _ in recent]
                change = [float((now * (now / old).log()).sum()) for old, now in itertools.pairwise(p)]
                if known and all(d < 0.02 for d in change) and float(p[-1].max()) > 0.5:
                    stable.append(i)
            stable_counts.append(len(stable))
            by_confidence = sorted(places, key=lambda i: -float(law[row, i].max()))
            expected.append(sorted(stable or by_confidence[:fallback]))
        assert opened(scheduler, logits_of(law), index, x) == expected
        x = scheduler.step(logits_of(law), index, x).prev_sample
    assert sum(count > 1 for count in stable_counts) >= 2
    assert 0 in stable_counts[batch:]


# PC-Sampler


def test_pc_sampler_by_hand() -> None:
    """Two tokens for each call. f = 0.5, 0.01, 1e-6: surprises of 0.693, 4.605, 13.8."""
    frequencies = [0.5, 0.01, 1e-6, 1.0]

    def first(law: list[list[float]], **kwargs: Any) -> list[int]:
        kwargs = {"token_frequencies": frequencies} | kwargs
        scheduler = build(PCSamplerScheduler, len(law), temperature=0.0, **kwargs)
        return opened(scheduler, logits_of(torch.tensor([law])), 0, masks(len(law)))[0]

    common, rare, rarest = [0.98, 0.01, 0.01], [0.2, 0.7, 0.1], [0.02, 0.02, 0.96]
    # 0.68 e^0; 3.22 e^-0.25 = 2.51; 13.3 capped at 10, e^-0.5 = 6.07
    assert first([common, rare, rarest]) == [2]
    assert first([common, rare, rarest], score_cap=4.0) == [1]  # 0.68, 2.51, 4 e^-0.5 = 2.43
    assert first([common, rare, rarest], position_decay=2.0) == [0]  # 0.68, 0.436, 0.183
    assert first([common, rare, rarest], position_decay=1.6) == [0]  # 0.68, 0.650, 0.408
    assert first([common, rare, rarest], position_decay=1.5) == [1]  # 0.68, 0.718, 0.498
    assert first([rare, common, rarest], token_frequencies=None, position_decay=0.0) == [1]  # confidence alone
    assert first([rare, common, rarest], token_frequencies=None) == [1]  # 0.7, 0.763, 0.582
    assert first([rare, common, rarest], token_frequencies=None, position_decay=0.4) == [0]  # 0.7, 0.657
    known = build(
        PCSamplerScheduler, 3, temperature=0.0, token_frequencies=[1.0] * 4
    )  # all scores are 0: from the left
    x = torch.tensor([[0, MASK, MASK, MASK]])
    assert opened(known, logits_of(torch.tensor([[common] * 4])), 0, x)[0] == [1]


@pytest.mark.parametrize("block_length", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_pc_sampler_by_brute_force(seed: int, block_length: int | None) -> None:
    frequencies = torch.rand(TOKENS + 1, generator=seeded(seed), dtype=torch.float64).tolist()
    scheduler = build(PCSamplerScheduler, 4, token_frequencies=frequencies, score_cap=0.5, block_length=block_length)
    x, law = partly_known(6, 12, seed), random_laws((6, 12), seed)
    tokens = build(PCSamplerScheduler, 1).step(logits_of(law), 0, x, generator=seeded(seed)).prev_sample
    places = opened(scheduler, logits_of(law), 0, x, seed)
    width = block_length or 12
    for row in range(6):
        masked = (x[row] == MASK).nonzero().flatten().tolist()
        scores = {}
        for i in masked:
            rarity = -float(law[row, i, tokens[row, i]]) * math.log(frequencies[tokens[row, i]])
            scores[i] = math.exp(-0.25 * (i % width)) * min(0.5, rarity)
        due, current = math.ceil(len(masked) / 4), [i for i in masked if i // width == masked[0] // width]
        if block_length is not None:  # shared out evenly over the calls of the current block
            due = math.ceil(len(current) / math.ceil(len(current) / (len(masked) / 4)))
        assert places[row] == sorted(sorted(current, key=lambda i: -scores[i])[:due])


def test_pc_sampler_far_to_the_right() -> None:
    """exp(-0.25 * 4000) is 0 in float64, and still the surer of two neighbours there opens first."""
    scheduler = build(PCSamplerScheduler, 4, temperature=0.0)
    x, logits = torch.zeros(1, 4002, dtype=torch.int64), confident([0.5] * 4000 + [0.4, 0.9])
    x[0, 4000:] = MASK
    assert opened(scheduler, logits, 0, x) == [[4001]]


def test_token_frequencies_are_checked_and_saved(tmp_path: Path) -> None:
    assert build(PCSamplerScheduler, 4).surprise.tolist() == pytest.approx(
        [math.log(TOKENS + 1)] * (TOKENS + 1), rel=1e-14
    )
    frequencies = [1 / 3, 0.1, 1e-12, 1.0]
    scheduler = build(PCSamplerScheduler, 2, token_frequencies=frequencies)
    scheduler.save_pretrained(tmp_path)
    loaded = PCSamplerScheduler.from_pretrained(tmp_path)
    assert loaded.config.token_frequencies == frequencies
    assert torch.equal(loaded.surprise, scheduler.surprise)
    frequencies[0] = 0.9
    assert scheduler.config.token_frequencies[0] == 1 / 3
    for bad in ([0.5, 0.5, 0.0, 1.0], [0.5, 0.5, -0.1, 1.0], [0.5, 0.5, math.nan, 1.0], [0.5, 0.5, 1.5, 1.0]):
        with pytest.raises(ValueError, match=r"`token_frequencies` has numbers that are not in \(0, 1\]"):
            build(PCSamplerScheduler, 2, token_frequencies=bad)
    with pytest.raises(ValueError, match="`token_frequencies` has 3 numbers; `vocab_size` is 4"):
        build(PCSamplerScheduler, 2, token_frequencies=[0.1, 0.2, 0.3])


# EB-Sampler


def entropy(law: Tensor) -> float:
    return -float(torch.xlogy(law, law).sum())


@pytest.mark.parametrize("proxy", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("seed", range(4))
def test_entropy_bound_by_brute_force(proxy: str, seed: int) -> None:
    """The largest prefix: no longer one is within the bound either. The draw has no part in it."""
    scheduler = build(EntropyBoundScheduler, 50, proxy=proxy, entropy_bound=0.8, temperature=0.5)
    x, law = partly_known(8, 9, seed), random_laws((8, 9), seed)
    places = opened(scheduler, logits_of(law), 0, x, seed)
    assert places == opened(scheduler, logits_of(law), 0, x, seed + 1)
    sizes = []
    for row in range(8):
        masked = (x[row] == MASK).nonzero().flatten().tolist()
        two = law[row].topk(2, -1).values
        error = {
            "entropy": [entropy(p) for p in law[row]],
            "confidence": [-float(p) for p in two[:, 0]],
            "margin": [-float(p) for p in two[:, 0] - two[:, 1]],
        }[proxy]
        order = sorted(masked, key=lambda i: error[i])
        excess = []
        for n in range(1, len(order) + 1):
            h = [entropy(law[row, i]) for i in order[:n]]
            excess.append(sum(h) - max(h))
        count = max(n for n in range(1, len(order) + 1) if excess[n - 1] <= 0.8)
        assert places[row] == sorted(order[:count])
        sizes.append(count)
    assert 1 < sum(sizes) / 8 < 6


def test_entropy_bound_proxies_differ() -> None:
    """(0.6, 0.2, 0.2), (0.55, 0.45, 0), (0.5, 0.25, 0.25) with N = 9 and no bound to spare: one opens, another one each."""
    law = torch.tensor([[[0.60, 0.21, 0.19], [0.55, 0.45, 0.0], [0.599, 0.2005, 0.2005]]])
    for proxy, expected in (("entropy", 1), ("confidence", 0), ("margin", 2)):
        if proxy == "margin":
            law[0, 0] = torch.tensor([0.60, 0.39, 0.01])
        scheduler = build(EntropyBoundScheduler, 9, proxy=proxy, entropy_bound=0.0)
        assert opened(scheduler, logits_of(law), 0, masks(3)) == [[expected]]


def total_correlation(joint: Joint, places: list[int]) -> float:
    """KL(law of the tokens at some places || product of their laws)."""
    together = marginal(joint, places)
    single = [marginal(joint, [i]) for i in places]
    value = 0.0
    for tokens, p in together.items():
        if p > 0:
            value += p * math.log(p / math.prod(law[(v,)] for law, v in zip(single, tokens, strict=True)))
    return value


@pytest.mark.parametrize("bound", [0.3, 1.0])
def test_the_bound_holds_for_the_dependence_of_what_opens(bound: float) -> None:
    """total correlation <= sum H - max H <= bound, in every state of an exact joint."""
    tight, several = 0.0, 0
    for seed in range(3):
        joint = random_joint(TOKENS, 4, seed=seed, spread=3.0)
        scheduler = build(EntropyBoundScheduler, 4, entropy_bound=bound)
        denoiser = exact_denoiser(joint, scheduler.noise_process)
        x = all_states(TOKENS + 1, 4)
        x = x[((x == MASK).sum(1) > 1)]
        chosen = opened(scheduler, denoiser(x, 1.0), 0, x)
        for row, places in zip(x, chosen, strict=True):
            law = given(joint, row)
            dependence = total_correlation(law, places)
            h = [entropy(torch.tensor(list(marginal(law, [i]).values()))) for i in places]
            assert dependence <= sum(h) - max(h) + 1e-9
            assert sum(h) - max(h) <= bound + 1e-6
            tight, several = max(tight, dependence), several + (len(places) > 1)
    assert several > 50
    assert tight > 0.2 * bound


def run_law(scheduler: OrderScheduler, denoiser: ExactDenoiser, num_steps: int, length: int) -> Tensor:
    """Law of the last sample over all states, when the logits alone decide what opens."""
    scheduler.set_timesteps(num_steps)
    states = all_states(TOKENS + 1, length)
    logits = denoiser(states, 1.0)
    clean = scheduler.clean_law(logits)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[state_index(masks(length), TOKENS + 1)] = 1.0
    for index in range(num_steps):
        matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
        for row, places in enumerate(opened(scheduler, logits, index, states)):
            factors = [
                clean[row, i, states[:, i]] if i in places else states[:, i] == states[row, i] for i in range(length)
            ]
            matrix[row] = torch.stack([factor.double() for factor in factors]).prod(0)
        law = law @ matrix
    return law


def test_entropy_bound_bounds_the_kl_of_samples() -> None:
    """Exact with a bound of 0; otherwise no more than the bound for each call, and growing with it. Draws follow the law."""
    joint = random_joint(TOKENS, 3, seed=5, spread=2.5)
    errors = []
    for bound in (0.0, 0.4, 1.2, 9.0):
        scheduler = build(EntropyBoundScheduler, 3, entropy_bound=bound)
        denoiser = exact_denoiser(joint, scheduler.noise_process)
        law = run_law(scheduler, denoiser, 3, 3)
        assert float(law.sum()) == pytest.approx(1, abs=1e-9)
        errors.append(kl(joint.p, clean_part(law, scheduler, joint)))
        assert errors[-1] <= 3 * bound + 1e-9
        x, generator = masks(3, batch=4000), seeded(1)
        for index in range(3):
            x = scheduler.step(denoiser(x, 1.0), index, x, generator=generator).prev_sample
        assert chi_square_z(torch.bincount(state_index(x, TOKENS + 1), minlength=len(law)), law.clamp(min=0)) < 4.5
    assert errors[0] < 1e-9
    assert 1e-3 < errors[1] < errors[2] < errors[3]
    for num_steps in (1, 2, 8):  # fewer calls than tokens: what is due opens; more: still exact
        scheduler = build(EntropyBoundScheduler, num_steps, entropy_bound=0.0)
        law = run_law(scheduler, denoiser, num_steps, 3)
        error = kl(joint.p, clean_part(law, scheduler, joint))
        assert error < 1e-9 if num_steps == 8 else error > 1e-3


def test_an_entropy_bound_of_0_opens_what_is_certain_and_one_more() -> None:
    law = torch.tensor([[[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]]])
    scheduler = build(EntropyBoundScheduler, 9, entropy_bound=0.0)
    assert opened(scheduler, logits_of(law), 0, masks(4)) == [[0, 1, 3]]


def test_entropies_are_summed_in_float64() -> None:
    """In float32 the sum of 2,000 equal numbers is off by more than a millionth of one of them."""
    logits = torch.tensor([0.3, 0.0, -math.inf]).expand(1, 4096, 3)
    each = float(weigh(RowLogits.everywhere(logits[:, :1]), without=2, with_entropy=True).entropy()[0])
    for bound, opened in ((1999.999999 * each, 2000), (2000.000001 * each, 2001)):  # the largest one is free
        scheduler = EntropyBoundScheduler(vocab_size=3, mask_token_id=2, entropy_bound=bound)
        scheduler.set_timesteps(4096)
        x = scheduler.step(logits, 0, torch.full((1, 4096), 2), generator=seeded()).prev_sample
        assert (x != 2).sum() == opened


def test_learned_entropy_bounds() -> None:
    coefficients = {"4": {"entropy_bound": [0.0, 9.0, 0.0, 0.0]}}
    scheduler = build(EntropyBoundScheduler, 4, coefficients=coefficients)
    logits = confident([0.9, 0.8, 0.4])
    assert [opened(scheduler, logits, index, masks(3)) for index in range(2)] == [[[0]], [[0, 1, 2]]]


# EB-Sampler for uniform noise


@pytest.mark.parametrize("bound", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("temperatures", [(0.8, 0.4), (0.5, 1.5)])
def test_uniform_entropy_bound_accepts_what_diffusers_accepts(bound: float, temperatures: tuple[float, float]) -> None:
    first, last = temperatures
    theirs = DiffusersEntropyBoundScheduler(entropy_bound=bound, t_max=first, t_min=last)
    theirs.set_timesteps(7)
    ours = UniformEntropyBoundScheduler(
        vocab_size=50, entropy_bound=bound, first_temperature=first, last_temperature=last
    )
    ours.set_timesteps(7)
    counts = []
    for index in range(6):
        logits = 6 * torch.randn(5, 12, 50, generator=seeded(index), dtype=torch.float64)
        x = torch.randint(0, 50, (5, 12), generator=seeded(1))
        expected = theirs.step(logits, index, x, generator=seeded(2))
        assert torch.equal(ours.accepted(ours.weighed(logits, index), index), expected.accepted_index)
        output = ours.step(logits, index, x, generator=seeded(2))
        torch.testing.assert_close(output.pred_logits, expected.pred_logits)
        counts += expected.accepted_index.sum(1).tolist()
        # logits so sharp that both draw the same token wherever they accept
        sharp = (300 - torch.arange(12)[:, None]) * torch.nn.functional.one_hot(logits.argmax(-1), 50).double()
        sharp[:, ::2] *= 1e-4  # these stay open
        expected = theirs.step(sharp, index, x, generator=seeded(2))
        drawn, kept = ours.step(sharp, index, x, generator=seeded(2)).prev_sample, expected.accepted_index
        certain = kept & (torch.arange(12) % 2 == 1)
        assert certain.sum() == (5 * 6 if bound else 5)
        assert torch.equal(drawn[certain], expected.prev_sample[certain])
        kept = kept | (torch.arange(12) % 2 == 1)  # ours: what rounds to no entropy is within a bound of 0
        assert torch.equal(drawn[:, 1::2], sharp.argmax(-1)[:, 1::2])
        assert (drawn[~kept] == sharp.argmax(-1)[~kept]).double().mean() < 0.3  # the rest is noise
    assert (max(counts) > min(counts)) == (bound > 0)


def test_uniform_entropy_bound_draws() -> None:
    """One accepted position of the annealed law, one of noise; in the last step both of their laws."""
    scheduler = UniformEntropyBoundScheduler(
        vocab_size=3, entropy_bound=0.0, first_temperature=0.5, last_temperature=0.25, temperature=0.5
    )
    scheduler.set_timesteps(2)
    logits = torch.tensor([[[0.0, 0.2, 0.1], [0.0, 0.3, 0.6]]], dtype=torch.float64).expand(4000, 2, 3)
    x = torch.zeros(4000, 2, dtype=torch.int64)
    for index, annealing in ((0, 0.5), (1, 0.375)):
        drawn = scheduler.step(logits, index, x, generator=seeded(index)).prev_sample
        sharp = (logits[0] / (annealing * 0.5)).softmax(-1)
        noise = torch.full((3,), 1 / 3, dtype=torch.float64)
        for place, law in ((0, sharp[0] if index else noise), (1, sharp[1])):
            assert chi_square_z(torch.bincount(drawn[:, place], minlength=3), law) < 4.5
    some = RowLogits(logits[:, 0], torch.tensor([[True, False]]).expand(4000, 2))
    with pytest.raises(ValueError, match="logits of some positions only"):
        scheduler.step(some, 0, x)
    whole = RowLogits(logits.flatten(0, 1), torch.ones(4000, 2, dtype=torch.bool))
    assert torch.equal(scheduler.step(whole, 1, x, generator=seeded(1)).prev_sample, drawn)


# P2


def planned(scheduler: PathPlanningScheduler, law: Tensor, tokens: Tensor, x: Tensor, keep: int, eta: float) -> Tensor:
    """One step from its equation, row by row."""
    after = x.clone()
    for row in range(len(x)):
        score = [
            eta * float(law[row, i, tokens[row, i]]) if x[row, i] == MASK else float(law[row, i, x[row, i]])
            for i in range(x.shape[1])
        ]
        kept = ranks(score)[:keep]
        for i in range(x.shape[1]):
            after[row, i] = tokens[row, i] if i in kept else MASK
    return after


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_path_planning_by_brute_force(seed: int, eta: float) -> None:
    num_steps, length = 5, 11
    scheduler = build(PathPlanningScheduler, num_steps, stochasticity=eta, temperature=1.5)
    everything = build(PathPlanningScheduler, 1, temperature=1.5)
    x = partly_known(4, length, seed)
    for index in range(num_steps):
        law = random_laws((4, length), 10 * seed + index)
        tokens = everything.step(logits_of(law), 0, x, generator=seeded(index)).prev_sample
        keep = length - math.floor((1 - (index + 1) / num_steps) * length + 1e-9)
        expected = planned(scheduler, law, tokens, x, keep, eta)
        assert (scheduler.positions(index, x) is None) == (index < num_steps - 1)
        x = scheduler.step(logits_of(law), index, x, generator=seeded(index)).prev_sample
        assert torch.equal(x, expected)
        assert ((x == MASK).sum(1) == length - keep).all()
    assert (x != MASK).all()


def test_path_planning_by_hand_and_its_direction() -> None:
    """kappa = 1/2 of four: two stay. Masks draw token 0 with 0.5 and 0.3, tokens 0 and 1 are believed at 0.6 and 0.2."""
    x = torch.tensor([[MASK, 0, MASK, 1]])
    law = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.4, 0.3, 0.3], [0.7, 0.2, 0.1]]])
    expected = {
        0.0: [MASK, 0, MASK, 1],  # both tokens before any mask
        0.45: [0, 0, MASK, MASK],  # 0.225, 0.6, 0.18, 0.2
        1.0: [0, 0, MASK, MASK],  # 0.5, 0.6, 0.4, 0.2
        1.4: [0, 0, MASK, MASK],  # 0.7, 0.6, 0.56, 0.2
        1.6: [0, MASK, 0, MASK],  # 0.8, 0.6, 0.64, 0.2
    }
    for eta, row in expected.items():
        scheduler = build(PathPlanningScheduler, 4, stochasticity=eta, temperature=0.0)
        assert scheduler.step(logits_of(law), 1, x).prev_sample.tolist() == [row]
    remasked = []
    x, law = partly_known(40, 12, 3), random_laws((40, 12), 4)
    for eta in (0.0, 0.5, 1.0, 2.0, 8.0):
        scheduler = build(PathPlanningScheduler, 4, stochasticity=eta)
        after = scheduler.step(logits_of(law), 1, x, generator=seeded()).prev_sample
        remasked.append(int(((x != MASK) & (after == MASK)).sum()))
    assert remasked == sorted(remasked)
    assert len(set(remasked)) == 5
    learned = build(PathPlanningScheduler, 4, coefficients={"4": {"stochasticity": [1.0, 8.0, 1.0, 1.0]}})
    assert torch.equal(learned.step(logits_of(law), 1, x, generator=seeded()).prev_sample, after)


def test_path_planning_where_the_network_repeats_tokens() -> None:
    """No token falls back up to stochasticity 1: masks open by confidence. Above it some do."""
    joint = random_joint(TOKENS, 4, seed=2)
    for eta, falls_back in ((0.5, False), (1.0, False), (6.0, True)):
        scheduler = build(PathPlanningScheduler, 4, stochasticity=eta)
        denoiser, x, generator = exact_denoiser(joint, scheduler.noise_process), masks(4, batch=50), seeded()
        fell = 0
        for index in range(4):
            after = scheduler.step(denoiser(x, 1.0), index, x, generator=generator).prev_sample
            fell += int(((x != MASK) & (after == MASK)).sum())
            x = after
        assert (fell > 0) == falls_back


def test_path_planning_calls_the_network_only_while_it_can_act() -> None:
    """More steps than positions: the last ones keep all, so that only masks are read, and none where none is left."""
    scheduler, denoiser = build(PathPlanningScheduler, 20, temperature=0.7), random_denoiser(TOKENS + 1)
    x, generator, calls = masks(5, batch=3), seeded(), 0
    for index in range(20):
        positions = scheduler.positions(index, x, generator)
        calls += positions is None or bool(positions.any())
        x = scheduler.step(denoiser(x, 1.0, positions), index, x, generator=generator).prev_sample
    assert (x != MASK).all()
    assert calls == 17  # 5 (1 - kappa) < 1 from the 17th step on
    with pytest.raises(ValueError, match="are not those that `positions` named"):
        scheduler.step(RowLogits(torch.zeros(3, 4), masks(3) == MASK), 0, masks(3))


def test_path_planning_takes_in_blocks_from_left_to_right() -> None:
    """As many are revealed as without blocks, none of them beyond the blocks that hold so many; a known token there stays."""
    scheduler = PathPlanningScheduler(vocab_size=5, mask_token_id=4, block_length=4, stochasticity=1.3)
    scheduler.set_timesteps(6)
    logits = torch.randn(64, 12, 5, generator=torch.Generator().manual_seed(0))
    x = torch.full((64, 12), 4)
    for k in range(6):
        x = scheduler.step(logits, k, x, generator=torch.Generator().manual_seed(k)).prev_sample
        count = 2 * (k + 1)
        assert ((x != 4).sum(1) == count).all()
        assert (x[:, 4 * math.ceil(count / 4) :] == 4).all()
        if count % 4 == 2:  # a block and a half: not always the whole block first, since tokens are taken back
            assert (x[:, count:] != 4).any()
    known = torch.full((1, 12), 4)
    known[0, 11] = 2
    sure = logits[:1].clone()
    sure[0, 11, 2] = 50.0
    after = scheduler.step(sure, 0, known, generator=torch.Generator().manual_seed(0)).prev_sample
    assert after[0, 11] == 2
    assert (after[0, 4:11] == 4).all()


def test_path_planning_with_frozen_tokens() -> None:
    """As the pipeline does it: what it puts back was ranked with the rest, so there are fewer masks than planned."""
    scheduler, denoiser = build(PathPlanningScheduler, 6, stochasticity=2.0), random_denoiser(TOKENS + 1, seed=3)
    frozen = torch.arange(12).expand(20, 12) < 5
    prompt = torch.randint(0, TOKENS, (20, 12), generator=seeded(4))
    x, generator = torch.where(frozen, prompt, MASK), seeded(5)
    fewer = 0
    for index in range(6):
        x = scheduler.step(denoiser(x, 1.0), index, x, generator=generator).prev_sample
        x = torch.where(frozen, prompt, x)
        left = (x == MASK).sum(1)
        assert (left <= scheduler.num_masks(index, 12)).all()
        fewer += int((left < scheduler.num_masks(index, 12)).sum())
    assert fewer > 0
    assert (x != MASK).all()
    assert torch.equal(x[frozen], prompt[frozen])


def test_path_planning_refuses_what_is_no_law_at_a_known_token() -> None:
    scheduler, x = build(PathPlanningScheduler, 4), torch.tensor([[0, MASK, MASK]])
    for bad in (math.nan, math.inf):
        logits = logits_of(random_laws((1, 3), 0))
        logits[0, 0, 1] = bad
        with pytest.raises(ValueError, match="`model_output` has NaN"):
            scheduler.step(logits, 0, x)


# Config


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (ThresholdScheduler, {"rule": "both"}, "`rule` is 'both'; allowed: 'threshold', 'factor'"),
        (ThresholdScheduler, {"factor": 0.0}, "`factor` is 0.0; allowed are positive numbers"),
        (ThresholdScheduler, {"factor": math.nan}, "`factor` is nan"),
        (ThresholdScheduler, {"block_length": 0}, "`block_length` is 0"),
        (KLASSScheduler, {"history_length": 0}, "`history_length` is 0; it must be at least 1"),
        (KLASSScheduler, {"fallback_count": 0}, "`fallback_count` is 0; it must be at least 1"),
        (PCSamplerScheduler, {"position_decay": -1.0}, "`position_decay` is -1.0; it cannot be negative"),
        (PCSamplerScheduler, {"score_cap": 0.0}, "`score_cap` is 0.0; it must be positive"),
        (EntropyBoundScheduler, {"proxy": "random"}, "`proxy` is 'random'; allowed: 'entropy', 'confidence', 'margin'"),
        (EntropyBoundScheduler, {"entropy_bound": -0.1}, "`entropy_bound` is -0.1; allowed are numbers of at least 0"),
        (PathPlanningScheduler, {"stochasticity": -1.0}, "`stochasticity` is -1.0; allowed are numbers of at least 0"),
    ],
)
def test_arguments_that_are_refused(cls: type[DiscreteScheduler], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(cls, 2, **kwargs)


@pytest.mark.parametrize(
    ("cls", "knob", "bad"),
    [
        (ThresholdScheduler, "threshold", 1.5),
        (ThresholdScheduler, "factor", 0.0),
        (KLASSScheduler, "threshold", 1.5),
        (KLASSScheduler, "kl_threshold", -0.5),
        (EntropyBoundScheduler, "entropy_bound", -0.1),
        (UniformEntropyBoundScheduler, "entropy_bound", -0.1),
        (PathPlanningScheduler, "stochasticity", -0.1),
    ],
)
def test_learned_knobs_are_checked_before_a_run(cls: type[DiscreteScheduler], knob: str, bad: float) -> None:
    """Their values by the constructor, their budgets by `set_timesteps`: before the network is called."""
    mask = None if cls is UniformEntropyBoundScheduler else 3
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3; learned budgets: 2"):
        cls(4, mask, coefficients={"2": {knob: [0.5, 0.5]}}).set_timesteps(3)
    with pytest.raises(ValueError, match=rf"`{knob}` for 2 steps is \[0.5, {bad}\]; allowed are"):
        cls(4, mask, coefficients={"2": {knob: [0.5, bad]}})


@pytest.mark.parametrize("name", ["entropy_bound", "first_temperature", "last_temperature"])
def test_uniform_arguments_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` is -1.0"):
        UniformEntropyBoundScheduler(vocab_size=4, **{name: -1.0})


@pytest.mark.parametrize("scheduler", [ThresholdScheduler, KLASSScheduler])
def test_a_threshold_is_a_probability(scheduler: type) -> None:
    """Not per cent, in the constructor or among coefficients."""
    with pytest.raises(ValueError, match=r"`threshold` is 90.0; allowed are numbers in \[0, 1\]"):
        build(scheduler, 2, threshold=90.0)
    with pytest.raises(ValueError, match=r"`threshold` for 2 steps is \[0.9, -0.1\]; allowed are numbers in \[0, 1\]"):
        build(scheduler, 2, coefficients={"2": {"threshold": [0.9, -0.1]}})
