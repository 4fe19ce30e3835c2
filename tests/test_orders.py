"""Orders by the predictions: LLaDA's, Dream's and MaskGIT's rules by brute force and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import AmusedScheduler
from laws import (
    ExactDenoiser,
    all_states,
    chi_square_z,
    exact_denoiser,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    total_variation,
)
from torch import Tensor

from discrete_schedulers import AncestralScheduler, ConfidenceScheduler, MaskGITScheduler, WINOScheduler
from discrete_schedulers.schedulers.order_utils import due_counts, top_two

MASK = 6  # of 7 states


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(logits: Tensor) -> Tensor:
    """softmax without the mask, float64."""
    logits = logits.double().clone()
    logits[..., -1] = -math.inf
    return logits.softmax(-1)


def candidates(scheduler: ConfidenceScheduler | MaskGITScheduler, logits: Tensor, x: Tensor, seed: int) -> Tensor:
    """The tokens that a step draws at all masks: those of a run of one step, which opens them all, with the same seed."""
    one = type(scheduler).from_config(scheduler.config, coefficients=None)
    return one.step(logits, 0, x, generator=seeded(seed)).prev_sample


def test_the_two_largest_of_narrow_and_wide_rows() -> None:
    """Also of two states, with both in one block of 128, and in the last block that is not whole."""
    assert [t.tolist() for t in top_two(torch.tensor([[0.25, 0.75]]))] == [[0.75], [0.25]]
    for width, places in [(600, (3, 5)), (600, (3, 599)), (600, (598, 599)), (640, (127, 128))]:
        law = torch.full((1, width), 0.125)
        law[0, list(places)] = torch.tensor([0.5, 0.25])
        assert [t.tolist() for t in top_two(law)] == [[0.5], [0.25]]


def test_logits_without_a_temperature_are_scored_as_they_are() -> None:
    """Not even rounded: top-p of 1 keeps all, also what the sum of the others hides."""
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK, score_law="tempered")
    logits = torch.tensor([[0.0, -50.0, -60.0]], dtype=torch.float64)
    scored = scheduler.scored_logits()
    assert scored is not None
    assert scored(logits, slice(None)).tolist() == logits.tolist()


def test_who_goes_by_blocks() -> None:
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK, block_length=4)
    assert [scheduler.goes_by_blocks(size) for size in (4, 8, 6, 2)] == [True, True, False, False]
    assert not ConfidenceScheduler(vocab_size=7, mask_token_id=MASK).goes_by_blocks(4)
    assert not WINOScheduler(vocab_size=7, mask_token_id=MASK, block_length=4).goes_by_blocks(4)


# LLaDA and Dream


def sharpened(p: list[float], temperature: float, top_p: float) -> list[float]:
    """A law after temperature and top-p; temperature 0 divides nothing."""
    powers = [v ** (1 / temperature) if temperature else v for v in p]
    powers = [v / sum(powers) for v in powers]
    kept, mass = set(), 0.0
    for v in sorted(range(len(p)), key=lambda v: -powers[v]):
        if mass < top_p:
            kept.add(v)
            mass += powers[v]
    return [powers[v] / mass if v in kept else 0.0 for v in range(len(p))]


def score_of(score: str, p: list[float], token: int) -> float:
    if score == "confidence":
        return p[token]
    if score == "margin":
        best, second = sorted(p)[-1:-3:-1]
        return best - second
    return sum(v * math.log(v) for v in p if v > 0)


SHARP = {"temperature": 0.5, "top_p": 0.8}


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"score_law": "model", **SHARP},
        {"score_law": "tempered", **SHARP},
        {"score_law": "tempered", "temperature": 0.0, "top_p": 0.6},
        {"rounding": "down", "temperature": 1.7, "score_law": "tempered"},
    ],
)
@pytest.mark.parametrize("block_length", [None, 4])
def test_the_positions_that_open(score: str, settings: dict, block_length: int | None) -> None:
    """Against the rule, one position after the other, on random logits and partly known rows. Some rows have ties."""
    length, num_steps = 11, 4
    scheduler = ConfidenceScheduler(
        vocab_size=7, mask_token_id=MASK, score=score, block_length=block_length, **settings
    )
    scheduler.set_timesteps(num_steps)
    x = torch.randint(0, 6, (6, length), generator=seeded(1))
    x[torch.rand(6, length, generator=seeded(2)) < 0.75] = MASK
    logits = random_denoiser(7, seed=3)(x, 1.0)
    logits[4:] = logits[4:, :1]  # equal laws everywhere
    law = clean(logits).tolist()
    for index in range(num_steps - 1):
        after = scheduler.step(logits, index, x, generator=seeded(index)).prev_sample
        drawn = candidates(scheduler, logits, x, index)
        for row in range(6):
            masked = [i for i in range(length) if x[row, i] == MASK]
            exact = len(masked) / (num_steps - index)
            due = math.floor(exact) if scheduler.config.rounding == "down" else math.ceil(exact)
            scores = {}
            for i in masked:
                p = law[row][i]
                if scheduler.config.score_law == "tempered":
                    p = sharpened(p, scheduler.config.temperature, scheduler.config.top_p)
                scores[i] = score_of(score, p, int(drawn[row, i]))
            if block_length is not None and masked:  # the current block only, shared out evenly
                blocks, calls = sorted({i // block_length for i in masked}), num_steps - index
                masked = [i for i in masked if i // block_length in blocks[: math.ceil(len(blocks) / calls)]]
                even = len(masked) / math.ceil(len(masked) / exact)
                due = math.floor(even) if scheduler.config.rounding == "down" else math.ceil(even)
                due = len(masked) if len(blocks) >= calls else due  # no call to spare
            ranked = sorted(masked, key=lambda i: (-round(scores[i], 10), i))
            opened = ranked[:due]
            expected = [int(drawn[row, i]) if i in opened else int(x[row, i]) for i in range(length)]
            assert after[row].tolist() == expected


def llada(logits_of: ExactDenoiser, x: Tensor, num_steps: int, block_length: int) -> list[list[int]]:
    """Greedy LLaDA as published: steps shared out among blocks, base + 1 tokens in the first `remainder` steps of a block."""
    history = []
    blocks = x.shape[1] // block_length
    steps = num_steps // blocks
    for block in range(blocks):
        window = range(block * block_length, (block + 1) * block_length)
        masks = sum(int(x[0, i]) == MASK for i in window)
        for step in range(steps):
            count = masks // steps + (step < masks % steps)
            p = clean(logits_of(x, 1.0))[0]
            confidence = {i: float(p[i].max()) for i in window if x[0, i] == MASK}
            x = x.clone()
            for i in sorted(confidence, key=lambda i: -confidence[i])[:count]:
                x[0, i] = int(p[i].argmax())
            history.append(x[0].tolist())
    return history


@pytest.mark.parametrize(
    ("length", "num_steps", "block_length"),
    [(12, 6, 4), (12, 3, 4), (12, 5, 12), (16, 12, 8), (64, 10, 32), (24, 15, 8)],
)
def test_llada(length: int, num_steps: int, block_length: int) -> None:
    """12 tokens, blocks of 4, 6 steps: two steps of two tokens in each block, from left to right. 16 tokens in 12 steps and two
    blocks: counts 2, 2, 1, 1, 1, 1 in each block."""
    denoiser = random_denoiser(7, seed=5)
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK, temperature=0.0, block_length=block_length)
    scheduler.set_timesteps(num_steps)
    x = torch.full((1, length), MASK)
    expected = llada(denoiser, x, num_steps, block_length)
    for index in range(num_steps):
        chosen = scheduler.positions(index, x)
        if (length, num_steps) == (12, 6):  # only the current block is read
            block = index // 2 * 4
            assert chosen[0].nonzero().flatten().tolist() == [i for i in range(block, block + 4) if x[0, i] == MASK]
        x = scheduler.step(denoiser(x, 1.0, chosen), index, x).prev_sample
        assert x[0].tolist() == expected[index]
    assert (x != MASK).all()


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
@pytest.mark.parametrize("num_steps", [3, 4, 5, 7, 12, 40])
def test_one_block_a_call(num_steps: int, grid: str, rounding: str) -> None:
    """Rows with masks anywhere and a last block that is shorter: no call opens a block while an earlier one has masks, whatever
    the counts; the last call finds one block at most, unless there are more blocks than calls."""
    scheduler = ConfidenceScheduler(
        vocab_size=7, mask_token_id=MASK, block_length=4, grid=grid, rounding=rounding, score="random"
    )
    denoiser, x = random_denoiser(7, seed=5), torch.full((20, 18), MASK)
    x = torch.where(torch.rand(x.shape, generator=seeded(1)) < torch.linspace(0, 1, 20)[:, None], 0, x)
    x[0] = MASK
    scheduler.set_timesteps(num_steps)
    enough = torch.stack([(part == MASK).any(1) for part in x.split(4, 1)]).sum(0) <= num_steps  # (B,)
    assert enough.any()
    for index in range(num_steps):
        chosen = scheduler.positions(index, x)
        after = scheduler.step(denoiser(x, 1.0, chosen), index, x, generator=seeded(index)).prev_sample
        for row in range(20):
            changed = {i // 4 for i in range(18) if after[row, i] != x[row, i]}
            first = min((i // 4 for i in range(18) if x[row, i] == MASK), default=None)
            if enough[row]:
                assert changed <= {first}
                assert {i // 4 for i in chosen[row].nonzero().flatten().tolist()} <= {first}
        x = after
    assert (x != MASK).all()


def test_fewer_calls_than_blocks() -> None:
    """Five blocks in three calls: two, two, one, each opened whole."""
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK, block_length=4)
    scheduler.set_timesteps(3)
    denoiser, x = random_denoiser(7, seed=5), torch.full((1, 18), MASK)
    left = []
    for index in range(3):
        x = scheduler.step(
            denoiser(x, 1.0, scheduler.positions(index, x)), index, x, generator=seeded(index)
        ).prev_sample
        left.append((x[0] == MASK).nonzero().flatten().tolist())
    assert left == [list(range(8, 18)), list(range(16, 18)), []]


def test_counts_rounded_up_are_lladas() -> None:
    """Base + 1 for the first `remainder` steps: what is left, divided by the steps left, rounded up."""
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK)
    for masks, num_steps in itertools.product(range(1, 30), (1, 2, 3, 5, 8, 13, 40)):
        scheduler.set_timesteps(num_steps)
        left, counts = masks, []
        for index in range(num_steps):
            count = int(scheduler.due(torch.full((1, left), MASK), index)) if left else 0
            counts.append(count)
            left -= count
        assert counts == [masks // num_steps + (step < masks % num_steps) for step in range(num_steps)]


def test_counts_rounded_down_are_dreams() -> None:
    """int(masks * (1 - s / t)) on a grid that ends at 0; Dream's own ends at 1e-3, which takes one from every whole number."""
    for num_steps, eps in itertools.product((1, 4, 7, 16), (0.0, 1e-3)):
        times = [1 + (eps - 1) * k / num_steps for k in range(num_steps)] + [0.0]
        coefficients = {str(num_steps): {"times": times}}
        scheduler = ConfidenceScheduler(
            vocab_size=7,
            mask_token_id=MASK,
            noise_schedule="linear",
            grid="learned",
            rounding="down",
            coefficients=coefficients,
        )
        scheduler.set_timesteps(num_steps)
        published = [*times[:-1], eps]
        for masks in range(1, 65):
            for index in range(num_steps):
                last = index == num_steps - 1
                share = 1 - published[index + 1] / published[index]
                expected = masks if last else int(masks * share + 1e-9)
                assert int(scheduler.due(torch.full((1, masks), MASK), index)) == expected
    assert due_counts(torch.ones(1, 64, dtype=torch.bool), 1 - (1 - (1 - 1e-3) / 8), "down").tolist() == [7]
    assert due_counts(torch.ones(1, 64, dtype=torch.bool), 1 / 8, "down").tolist() == [8]
    few = torch.ones(1, 8, dtype=torch.bool)  # half a mask is due, also of a block
    assert [due_counts(few, 1 / 16, rounding, few).tolist() for rounding in ("down", "up")] == [[0], [1]]


def test_model_and_tempered_law_by_hand() -> None:
    """(.6, .4) has the surer best token, its square (.69, .31) is less sure than that of (.55, .25, .2): (.75, .15, .1)."""
    law = torch.tensor([[0.6, 0.4, 0, 0], [0.55, 0.25, 0.2, 0]], dtype=torch.float64)
    x = torch.full((1, 2), 3)
    opened = {}
    for score_law, temperature, top_p in itertools.product(("model", "tempered"), (0.0, 0.5), (1.0, 0.7)):
        scheduler = ConfidenceScheduler(
            vocab_size=4, mask_token_id=3, score_law=score_law, temperature=temperature, top_p=top_p
        )
        scheduler.set_timesteps(2)
        seed = 1  # with it the best tokens are drawn at temperature 0.5, too
        assert candidates(scheduler, law.log()[None], x, seed).tolist() == [[0, 0]]
        after = scheduler.step(law.log()[None], 0, x, generator=seeded(seed)).prev_sample[0]
        opened[score_law, temperature, top_p] = int((after != 3).nonzero())
    assert {opened["model", temperature, top_p] for temperature in (0.0, 0.5) for top_p in (1.0, 0.7)} == {0}
    assert opened["tempered", 0.0, 1.0] == 0  # temperature 0 divides nothing
    assert opened["tempered", 0.0, 0.7] == 1  # (.55, .25) of .8 against (.6, .4)
    assert opened["tempered", 0.5, 1.0] == 1


def test_entropy_opens_the_surest_first() -> None:
    """KLASS's released code has the sign the other way round."""
    p = torch.tensor([[0.4, 0.3, 0.3, 0], [0.5, 0.5, 0, 0], [0.9, 0.05, 0.05, 0]], dtype=torch.float64)
    scheduler = ConfidenceScheduler(vocab_size=4, mask_token_id=3, score="entropy")
    scheduler.set_timesteps(3)
    opened = scheduler.step(p.log()[None], 0, torch.full((1, 3), 3), generator=seeded()).prev_sample[0] != 3
    assert opened.tolist() == [False, False, True]


def without_replacement(weights: list[float], count: int) -> dict[frozenset[int], float]:
    """Law of the set of `count` draws without replacement."""
    law: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        p, left = 1.0, sum(weights)
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        law[frozenset(order)] = law.get(frozenset(order), 0.0) + p
    return law


@pytest.mark.parametrize("score", ["confidence", "entropy"])
@pytest.mark.parametrize("learned", [False, True])
def test_score_temperature_draws_without_replacement(score: str, learned: bool) -> None:
    """Weights softmax(score / score_temperature), over the scores and not their logarithms; at temperature 0 the tokens and so
    the scores are fixed."""
    knobs = {"score_temperature": 0.4}
    if learned:
        knobs = {"score_temperature": 9.0, "coefficients": {"2": {"score_temperature": [0.4, 1.0]}}}
    scheduler = ConfidenceScheduler(vocab_size=7, mask_token_id=MASK, temperature=0.0, score=score, **knobs)
    scheduler.set_timesteps(2)
    x = torch.full((4000, 4), MASK)
    logits = random_denoiser(7, seed=6)(x[:1], 1.0)
    p = clean(logits)[0]
    scores = p.max(-1).values if score == "confidence" else torch.xlogy(p, p).sum(-1)
    law = without_replacement(torch.exp(scores / 0.4).tolist(), 2)
    opened = scheduler.step(logits.expand(4000, -1, -1), 0, x, generator=seeded(7)).prev_sample != MASK
    drawn = [frozenset(row.nonzero().flatten().tolist()) for row in opened]
    counts = torch.tensor([drawn.count(subset) for subset in law])
    assert counts.sum() == 4000
    assert chi_square_z(counts, torch.tensor(list(law.values()), dtype=torch.float64)) < 4.5


def test_random_scores_are_ancestral_sampling_with_counts() -> None:
    """The one score that keeps the model's law: samples have the law of fixed counts, confidence has not."""
    joint = random_joint(2, 4, seed=8)
    ancestral = AncestralScheduler(vocab_size=3, mask_token_id=2)
    denoiser = exact_denoiser(joint, ancestral.noise_process)
    law = run_law(ancestral, denoiser, 2, 4)
    for score, follows in (("random", True), ("confidence", False)):
        scheduler = ConfidenceScheduler(vocab_size=3, mask_token_id=2, score=score)
        scheduler.set_timesteps(2)
        x, generator = scheduler.sample_prior((6000, 4)), seeded(9)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
        z = chi_square_z(torch.bincount(state_index(x, 3), minlength=len(law)), law)
        assert (z < 4.5) == follows


# MaskGIT

SCHEDULES = ["cosine", "linear", "square", "cubic", "root", "log", "exp", "grid"]


def gamma(schedule: str, r: float, start: int) -> float:
    """The share of masks that is left, by the formulas."""
    if schedule == "cosine":
        return math.cos(math.pi * r / 2)
    if schedule == "log":
        return min(max(-math.log2(r) / math.log2(start), 1e-6), 1.0) if start > 1 else 1.0
    if schedule == "exp":
        return min(max(1 - 2 ** (-math.log2(start) * (1 - r)), 1e-6), 1.0)
    power = {"linear": 1, "square": 2, "cubic": 3, "root": 0.5, "grid": 1}[schedule]
    return 1 - r**power


def planned(schedule: str, num_steps: int, start: int) -> list[int]:
    """n_0, n_1, ..., n_N of the module's docstring."""
    counts = [start]
    for k in range(num_steps - 1):
        quota = math.floor(start * gamma(schedule, (k + 1) / num_steps, start) + 1e-9)
        counts.append(min(max(1, min(counts[-1] - 1, quota)), counts[-1]))
    return [*counts, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("length", "num_steps"), [(64, 1), (64, 2), (64, 7), (64, 12), (5, 8), (1, 3)])
def test_counts_of_maskgit(schedule: str, length: int, num_steps: int) -> None:
    """Those of the formula; with more steps than tokens one is left for the last step."""
    scheduler = MaskGITScheduler(vocab_size=7, mask_token_id=MASK, mask_schedule=schedule)
    scheduler.set_timesteps(num_steps)
    x, counts = torch.full((2, length), MASK), [length]
    denoiser, generator = random_denoiser(7), seeded()
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
        left = (x == MASK).sum(1).tolist()
        assert left[0] == left[1]
        counts.append(left[0])
    assert counts == planned(schedule, num_steps, length)


@pytest.mark.parametrize(("schedule", "num_steps", "index", "start"), [("log", 3, 0, 27), ("exp", 2, 0, 9)])
def test_counts_of_maskgit_are_computed_in_float64(schedule: str, num_steps: int, index: int, start: int) -> None:
    """In float32 the share of so many masks comes out on the other side of a whole number."""
    scheduler = MaskGITScheduler(vocab_size=7, mask_token_id=MASK, mask_schedule=schedule)
    scheduler.set_timesteps(num_steps)
    expected = math.floor(start * gamma(schedule, (index + 1) / num_steps, start) + 1e-9)
    assert scheduler.quota(index, torch.tensor([start])).tolist() == [expected]


def test_the_published_counts_of_12_steps() -> None:
    """256 cos(pi k / 24), rounded down."""
    assert planned("cosine", 12, 256) == [256, 253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_with_known_tokens_are_within_a_few(schedule: str) -> None:
    """The number at the start is not remembered, and what is left of it says it only up to the rounding."""
    length, num_steps = 256, 16
    scheduler = MaskGITScheduler(vocab_size=7, mask_token_id=MASK, mask_schedule=schedule)
    scheduler.set_timesteps(num_steps)
    masks = torch.arange(length + 1)
    plans = torch.tensor([planned(schedule, num_steps, n) if n else [0] * (num_steps + 1) for n in masks.tolist()])
    for index in range(num_steps - 1):
        after = scheduler.masks_after(index, masks, length)
        assert ((after < masks) | (masks < 2)).all()
        masks = after
        assert (masks - plans[:, index + 1]).abs().max() <= 4
        assert masks[length] == plans[length, index + 1]
    assert (masks[1:] >= 1).all()


def test_maskgit_fills_blocks_from_left_to_right() -> None:
    """The counts are those of one block as far as the current block goes: every block is full before the next one begins."""
    settings = {"vocab_size": 7, "mask_token_id": 6, "mask_schedule": "linear"}
    scheduler = MaskGITScheduler(**settings, block_length=4)
    denoiser = random_denoiser(7, seed=5)
    scheduler.set_timesteps(5)
    x, opened = torch.full((8, 12), 6), 0
    assert planned("linear", 5, 12) == [12, 9, 7, 4, 2, 0]
    for k, t in enumerate(scheduler.timesteps):
        positions = scheduler.positions(t, x)
        end = 4 * (opened // 4 + 1)
        assert not positions[:, end:].any()  # read no farther
        x = scheduler.step(denoiser(x, t, positions), t, x, generator=seeded(k)).prev_sample
        opened = min(end, 12 - planned("linear", 5, 12)[k + 1])
        in_blocks = (x != 6).view(8, 3, 4).sum(2)
        assert in_blocks.tolist() == [[min(4, max(0, opened - 4 * block)) for block in range(3)]] * 8


def maskgit_law(p: Tensor, tau: float, count: int) -> Tensor:
    """Law of a row after `count` of L masks have opened, over all states with the mask last, by enumeration of all drawn
    tokens (rows of `all_states`) and of all sets drawn without replacement with weights p^(1 / tau)."""
    length, num_tokens = p.shape
    law = torch.zeros((num_tokens + 1) ** length, dtype=torch.float64)
    for tokens in all_states(num_tokens, length):
        each = p[torch.arange(length), tokens]
        for subset, q in without_replacement((each ** (1 / tau)).tolist(), count).items():
            after = torch.tensor([[int(tokens[i]) if i in subset else num_tokens for i in range(length)]])
            law[state_index(after, num_tokens + 1)] += each.prod() * q
    return law


def limit_law(p: Tensor, tau: float) -> Tensor:
    """(position, token) in proportion to p^(1 + 1 / tau), (L, V)."""
    power = p ** (1 + 1 / tau)
    return power / power.sum()


@pytest.mark.parametrize(
    ("index", "masked", "count", "kwargs"),
    [
        (0, [0, 1, 2], 1, {}),  # linear, 3 steps: 3, 2, 1 masks
        (0, [0, 1, 2], 2, {"mask_schedule": "root"}),
        (1, [0, 2], 1, {"choice_temperature": 9.0}),
        (0, [0, 1, 2], 1, {"coefficients": {"3": {"choice_temperature": [0.6, 1.0, 1.0]}}}),
    ],
)
def test_law_of_maskgit_by_enumeration(index: int, masked: list[int], count: int, kwargs: dict) -> None:
    """(positions, tokens) of a step. The implicit temperature is a limit: three positions do not follow it."""
    rows, num_tokens = 8000, 3
    scheduler = MaskGITScheduler(
        vocab_size=num_tokens + 1, mask_token_id=num_tokens, **{"mask_schedule": "linear"} | kwargs
    )
    scheduler.set_timesteps(3)
    choice = kwargs.get("coefficients", {"3": {"choice_temperature": [kwargs.get("choice_temperature", 4.5)] * 3}})
    tau = choice["3"]["choice_temperature"][index] * (1 - (index + 1) / 3)
    x = torch.zeros(1, 3, dtype=torch.int64)
    x[:, masked] = num_tokens
    logits = random_denoiser(num_tokens + 1, seed=2)(x, 1.0) / 3
    p = clean(logits)[0, masked, :num_tokens]
    after = scheduler.step(logits.expand(rows, -1, -1), index, x.expand(rows, -1), generator=seeded(3)).prev_sample
    assert (after[:, [i for i in range(3) if i not in masked]] == 0).all()
    law = maskgit_law(p, tau, count)
    counts = torch.bincount(state_index(after[:, masked], num_tokens + 1), minlength=len(law))
    assert chi_square_z(counts, law) < 4.5
    if count == 1:
        limit = torch.zeros_like(law)
        for i, v in itertools.product(range(len(masked)), range(num_tokens)):
            state = torch.full((1, len(masked)), num_tokens)
            state[0, i] = v
            limit[state_index(state, num_tokens + 1)] = limit_law(p, tau)[i, v]
        assert float(limit.sum()) == pytest.approx(1)
        assert total_variation(law, limit) > 0.01


def test_the_implicit_temperature_is_the_limit_of_many_positions() -> None:
    """One of 300 masks opens, of two kinds of position: in proportion to p^(1 + 1 / tau), by kind and token. By the exact law,
    sum_i E p_i(v)^(1 + 1/tau) / (p_i(v)^(1/tau) + the others' weights), too."""
    length, rows, tau = 300, 3000, 1.5
    kinds = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)
    scheduler = MaskGITScheduler(
        vocab_size=4, mask_token_id=3, mask_schedule="linear", choice_temperature=tau / (1 - 1 / length)
    )
    scheduler.set_timesteps(length)
    x = torch.full((500, length), 3)
    kind = torch.arange(length) % 2
    logits = torch.cat([kinds.log(), torch.zeros(2, 1, dtype=torch.float64)], 1)[kind].expand(500, -1, -1)
    generator, counts = seeded(4), torch.zeros(2, 3, dtype=torch.int64)
    for _ in range(rows // 500):
        after = scheduler.step(logits, 0, x, generator=generator).prev_sample
        row, place = (after != 3).nonzero(as_tuple=True)
        assert row.tolist() == list(range(500))
        counts += torch.bincount(kind[place] * 3 + after[row, place], minlength=6).view(2, 3)
    assert chi_square_z(counts.flatten(), limit_law(kinds, tau).flatten()) < 4.5
    assert chi_square_z(counts.flatten(), (kinds / kinds.sum()).flatten()) > 4.5  # not the law itself
    assert chi_square_z(counts.flatten(), limit_law(kinds, tau / 2).flatten()) > 4.5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_positions_are_those_of_amused(schedule: str) -> None:
    """diffusers' AmusedScheduler without noise, on laws that are uniform over 1, 2, 3, ... tokens: then the confidence of a
    position does not depend on which token was drawn, and both open the same positions in each step."""
    length, width, num_steps = 24, 26, 8
    ours = MaskGITScheduler(vocab_size=width, mask_token_id=width - 1, mask_schedule=schedule, choice_temperature=0.0)
    peer = AmusedScheduler(mask_token_id=width - 1, masking_schedule=schedule)
    ours.set_timesteps(num_steps)
    peer.set_timesteps(num_steps, temperature=(0, 0))
    generator = seeded(5)
    x = torch.full((3, length), width - 1)
    for index in range(num_steps):
        support = torch.stack([torch.randperm(length, generator=generator) + 1 for _ in range(3)])  # (3, L)
        logits = torch.where(torch.arange(width - 1) < support[..., None], 0.0, -math.inf)  # (3, L, V - 1)
        theirs = peer.step(logits, peer.timesteps[index], x, generator=generator).prev_sample
        with_mask = torch.cat([logits, torch.zeros(3, length, 1)], -1)
        after = ours.step(with_mask, index, x, generator=generator).prev_sample
        assert torch.equal(after == width - 1, theirs == width - 1)
        x = theirs
    assert (x != width - 1).all()


# Errors


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (ConfidenceScheduler, {"score": "logit"}, "`score` is 'logit'; allowed: 'confidence', 'margin', 'entropy'"),
        (ConfidenceScheduler, {"score_law": "raw"}, "`score_law` is 'raw'; allowed: 'model', 'tempered'"),
        (ConfidenceScheduler, {"score_temperature": -1.0}, "`score_temperature` is -1.0; allowed are numbers of"),
        (ConfidenceScheduler, {"block_length": 0}, "`block_length` is 0"),
        (
            ConfidenceScheduler,
            {"coefficients": {"1": {"score_temperature": [-1.0]}}},
            r"`score_temperature` for 1 steps is \[-1.0\]",
        ),
        (MaskGITScheduler, {"mask_schedule": "uniform"}, "`mask_schedule` is 'uniform'; allowed: 'cosine', 'linear'"),
        (MaskGITScheduler, {"choice_temperature": math.nan}, "`choice_temperature` is nan"),
    ],
)
def test_arguments_that_are_refused(cls: type, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(vocab_size=7, mask_token_id=MASK, **kwargs)


@pytest.mark.parametrize(
    ("cls", "name"), [(ConfidenceScheduler, "score_temperature"), (MaskGITScheduler, "choice_temperature")]
)
def test_a_learned_knob_is_for_its_budgets(cls: type, name: str) -> None:
    scheduler = cls(vocab_size=7, mask_token_id=MASK, coefficients={"2": {name: [1.0, 2.0]}})
    scheduler.set_timesteps(2)
    assert [scheduler.per_step(name, index) for index in (0, 1)] == [1.0, 2.0]
    with pytest.raises(ValueError, match="learned budgets: 2"):
        scheduler.set_timesteps(3)
