"""Spread orders: the orders themselves, their laws, and what they are worth on a Markov chain and an Ising grid, where
the exact conditionals and the exact likelihood are known."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from laws import (
    Joint,
    all_states,
    chi_square_z,
    clean_part,
    exact_denoiser,
    kl,
    random_joint,
    run_law,
    shifted_order_law,
    spread_scheduler_law,
    state_index,
)
from torch import Tensor

from discrete_schedulers import AncestralScheduler, DiscreteScheduler, RowLogits, SpreadScheduler
from discrete_schedulers.evaluation import sampler_nll_bound
from discrete_schedulers.schedulers.position_orders import (
    dilated_ranks,
    fitting_shifts,
    halton_ranks,
    pattern_ranks,
    radical_inverse_places,
    van_der_corput_ranks,
)

LENGTH, STATES = 32, 16
MASK = STATES


class MarkovDenoiser:
    """Exact log p(x_0^i | known tokens) of a stationary Markov chain, by messages from the left and from the right."""

    vocab_size, mask_token_id = STATES + 1, MASK

    def __init__(self, transition: Tensor, start: Tensor) -> None:
        self.transition, self.start = transition, start

    def __call__(self, x_t: Tensor, t: Tensor | float, positions: Tensor | None = None) -> Tensor | RowLogits:
        known = torch.nn.functional.one_hot(x_t, STATES + 1)[..., :STATES].double()
        is_masked = (x_t == MASK)[..., None]
        left, right = torch.empty_like(known), torch.empty_like(known)
        message = self.start.expand(len(x_t), -1)
        for i in range(LENGTH):
            left[:, i] = message
            message = torch.where(is_masked[:, i], message, known[:, i]) @ self.transition
        message = torch.ones(len(x_t), STATES, dtype=torch.float64)
        for i in reversed(range(LENGTH)):
            right[:, i] = message
            message = torch.where(is_masked[:, i], message, known[:, i]) @ self.transition.T
        logits = torch.full((*x_t.shape, STATES + 1), -math.inf, dtype=torch.float64)
        logits[..., :STATES] = (left * right).log()
        return logits if positions is None else RowLogits(logits[positions], positions)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        x = [torch.multinomial(self.start.expand(count, -1), 1, generator=generator)]
        for _ in range(LENGTH - 1):
            x.append(torch.multinomial(self.transition[x[-1][:, 0]], 1, generator=generator))
        return torch.cat(x, dim=1)

    def nats(self, x: Tensor) -> Tensor:
        """-log p(x) of each row, exact."""
        return -self.start[x[:, 0]].log() - self.transition[x[:, :-1], x[:, 1:]].log().sum(1)


@pytest.fixture(scope="module")
def chain() -> MarkovDenoiser:
    generator = torch.Generator().manual_seed(0)
    transition = (2 * torch.randn(STATES, STATES, generator=generator, dtype=torch.float64)).softmax(1)
    return MarkovDenoiser(transition, torch.linalg.matrix_power(transition, 200)[0])


def excess(
    chain: MarkovDenoiser,
    steps: int,
    rows: int = 128,
    cls: type[DiscreteScheduler] = AncestralScheduler,
    **settings: str | int,
) -> tuple[float, float]:
    """KL(data || sampler given its order) in nats per sequence and its standard error: bound minus exact likelihood."""
    generator = torch.Generator().manual_seed(1)
    data = chain.sample(rows, generator)
    scheduler = cls(vocab_size=STATES + 1, mask_token_id=MASK, **settings)
    difference = sampler_nll_bound(chain, scheduler, data, steps, generator) * LENGTH - chain.nats(data)
    return float(difference.mean()), float(difference.std() / math.sqrt(len(data)))


def test_conditionals_are_those_of_the_chain(chain: MarkovDenoiser) -> None:
    """One token per step, in any order, has the chain's own likelihood."""
    mean, error = excess(chain, LENGTH, rows=8)
    assert abs(mean) < 1e-9
    assert error < 1e-9


def test_spread_order_beats_random_order(chain: MarkovDenoiser) -> None:
    """At 4 calls of 8 tokens a spread order puts every token of a step 4 places from the next known one."""
    spread, spread_error = excess(chain, 4, order="spread")
    random, random_error = excess(chain, 4, order="random")
    print(f"KL at 4 calls: spread {spread:.3f} +- {spread_error:.3f}, random {random:.3f} +- {random_error:.3f}")
    assert spread > -4.5 * spread_error  # a KL is not negative
    assert spread + 4.5 * spread_error < 0.2 * random


def test_counts_beat_bernoulli(chain: MarkovDenoiser) -> None:
    """At 16 calls two tokens of a step are seldom neighbours, but Bernoulli steps often open more than two."""
    counts, counts_error = excess(chain, 16)
    bernoulli, bernoulli_error = excess(chain, 16, unmasking="bernoulli")
    print(
        f"KL at 16 calls: counts {counts:.3f} +- {counts_error:.3f}, Bernoulli {bernoulli:.3f} +- {bernoulli_error:.3f}"
    )
    assert bernoulli - counts > 3 * math.hypot(counts_error, bernoulli_error)


SEQUENCE_PATTERNS = ["farthest", "dilated", "van_der_corput"]


@pytest.mark.parametrize("pattern", SEQUENCE_PATTERNS)
def test_every_pattern_beats_random_order(chain: MarkovDenoiser, pattern: str) -> None:
    """20 times closer at 4 calls: 8 tokens 4 places apart, the 8 between them, and twice 8 with known neighbours."""
    spread, spread_error = excess(chain, 4, cls=SpreadScheduler, pattern=pattern)
    random, _ = excess(chain, 4, order="random")
    print(f"KL at 4 calls: {pattern} {spread:.3f} +- {spread_error:.3f}, random {random:.3f}")
    assert spread > -4.5 * spread_error
    assert 20 * (spread + 4.5 * spread_error) < random


@pytest.mark.parametrize("pattern", SEQUENCE_PATTERNS)
def test_patterns_with_known_tokens(chain: MarkovDenoiser, pattern: str) -> None:
    """After a prompt, and between the tokens of a template: the order goes on to be spread. The exact likelihood given what is
    known is the bound with one token per call. Farthest picks fill a gap that is no power of two from its ends inward, and so
    end with neighbours in one step."""
    prompt = torch.arange(LENGTH) < 11
    template = torch.rand(LENGTH, generator=torch.Generator().manual_seed(3)) < 0.4
    data = chain.sample(96, torch.Generator().manual_seed(4))
    for frozen in (prompt, template):
        excesses = []
        for cls, settings in ((SpreadScheduler, {"pattern": pattern}), (AncestralScheduler, {})):
            scheduler = cls(vocab_size=STATES + 1, mask_token_id=MASK, **settings)
            bound, exact = (
                sampler_nll_bound(chain, scheduler, data, n, torch.Generator().manual_seed(5), frozen=frozen)
                for n in (4, LENGTH)
            )
            excesses.append(float((bound - exact).mean() * (~frozen).sum()))
        print(f"{pattern} with {int(frozen.sum())} known: {excesses[0]:.3f}, random {excesses[1]:.3f}")
        assert excesses[0] < excesses[1] / (1.5 if pattern == "farthest" else 5)


def test_blocks_cost_distance(chain: MarkovDenoiser) -> None:
    """In blocks of 16 the first tokens stand 2 places apart instead of 4; random order is worse still."""
    whole, _ = excess(chain, 4, cls=SpreadScheduler)
    blocks, error = excess(chain, 4, cls=SpreadScheduler, block_length=16)
    random, _ = excess(chain, 4)
    print(f"KL at 4 calls: {whole:.3f}, in blocks of 16 {blocks:.3f} +- {error:.3f}, random {random:.3f}")
    assert whole + 4.5 * error < blocks < random / 1.5


# The orders


def order_of(ranks: Tensor) -> list[int]:
    return ranks.flatten().argsort().tolist()


def test_orders_by_hand() -> None:
    assert order_of(van_der_corput_ranks(8)) == [0, 4, 2, 6, 1, 5, 3, 7]  # three bits, reversed
    # 12 phi_2(n) = 0, 6, 3, 9, 1.5, 7.5, 4.5, 10.5, (0.75), (6.75), (3.75), (9.75), 2.25, 8.25, 5.25, 11.25
    assert order_of(van_der_corput_ranks(12)) == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    assert order_of(dilated_ranks(1, 8)) == [0, 4, 2, 6, 1, 3, 5, 7]
    assert order_of(dilated_ranks(1, 12)) == [0, 6, 3, 9, 2, 4, 8, 10, 1, 5, 7, 11]  # strides 6, 3, 2, 1
    assert order_of(dilated_ranks(1, 7)) == [0, 4, 2, 6, 1, 3, 5]
    # strides 2 and 1; the even cells of a stride first
    expected = [[0, 8, 2, 9], [10, 4, 11, 5], [3, 12, 1, 13], [14, 6, 15, 7]]
    assert dilated_ranks(4, 4).tolist() == expected
    # (phi_2, phi_3) = (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), (5/8, 7/9), (3/8, 2/9): rows of 4, columns of 3
    assert order_of(halton_ranks(4, 3))[:6] == [2 * 3 + 1, 1 * 3 + 2, 3 * 3 + 0, 0 * 3 + 1, 2 * 3 + 2, 1 * 3 + 0]


def test_orders_hold_every_place_once() -> None:
    for length in range(1, 70):
        for ranks in (van_der_corput_ranks(length), dilated_ranks(1, length), halton_ranks(1, length)):
            assert sorted(ranks.flatten().tolist()) == list(range(length))
    for shape in ((2, 2), (5, 3), (3, 5), (7, 1), (16, 16), (24, 40)):
        for ranks in (halton_ranks(*shape), dilated_ranks(*shape)):
            assert ranks.shape == shape
            assert sorted(ranks.flatten().tolist()) == list(range(shape[0] * shape[1]))


def test_a_stride_never_takes_neighbours() -> None:
    """Not so with strides rounded down: 6, 3, 1 of 12 would open 1 and 2 together."""
    for length in range(2, 70):
        strides = [-(-length // 2**k) for k in range(1, (length - 1).bit_length() + 1)]
        assert strides[-1] == 1
        known: set[int] = set()
        order = order_of(dilated_ranks(1, length))
        for stride in strides:
            group = sorted(set(range(0, length, stride)) - known)
            assert order[len(known) : len(known) + len(group)] == group
            if len(group) > 1 and length > 3:
                gaps = [(b - a) % length for a, b in zip(group, group[1:] + group[:1], strict=True)]
                assert min(gaps) >= 2
            known |= set(group)


def test_powers_of_two_are_evenly_spaced() -> None:
    for length in range(2, 70):
        order = order_of(van_der_corput_ranks(length))
        for count in (2**k for k in range(length.bit_length())):
            places = sorted(order[:count])
            gaps = [(b - a) % length or length for a, b in zip(places, places[1:] + places[:1], strict=True)]
            assert {length // count, -(-length // count)} >= set(gaps)


def visited(size: int, points: int) -> set[tuple[int, int]]:
    numbers = torch.arange(1, points + 1)
    cells = [radical_inverse_places(numbers, base, size).tolist() for base in (2, 3)]
    return set(zip(*cells, strict=True))


def test_the_published_number_of_points_misses_cells() -> None:
    """10,000 points, 1-based as in the Halton sampler: complete up to 48 x 48."""
    needed = {24: 2_201, 32: 2_292, 48: 7_070, 64: 10_363}
    for size, points in needed.items():
        assert len(visited(size, points)) == size**2
        assert len(visited(size, points - 1)) == size**2 - 1
    for size, missed in ((64, 6), (96, 1_787), (128, 7_116)):
        assert size**2 - len(visited(size, 10_000)) == missed
        assert sorted(halton_ranks(size, size).flatten().tolist()) == list(range(size**2))


def test_halton_cells_stand_in_the_order_of_their_first_points() -> None:
    for height, width in ((4, 6), (9, 5)):
        cells: list[int] = []
        for n in range(1, 5_000):
            y, x = 0.0, 0.0
            for base, digits in ((2, n), (3, n)):
                value, unit = 0.0, 1.0
                while digits:
                    unit /= base
                    value += unit * (digits % base)
                    digits //= base
                y, x = (value, x) if base == 2 else (y, value)
            cell = int(y * height + 1e-12) * width + int(x * width + 1e-12)
            if cell not in cells:
                cells.append(cell)
        assert order_of(halton_ranks(height, width)) == cells


def test_patterns_without_a_fixed_order_are_refused() -> None:
    for pattern, height in (("farthest", 1), ("van_der_corput", 2)):
        with pytest.raises(ValueError, match=f"has no fixed order of a grid of {height} x 8"):
            pattern_ranks(pattern, height, 8)


# Shifts

KINDS = [("van_der_corput", 1, 12), ("dilated", 1, 12), ("dilated", 3, 4), ("halton", 3, 4)]


@pytest.mark.parametrize(("pattern", "height", "width"), KINDS)
def test_shifts_that_fit_what_is_known(pattern: str, height: int, width: int) -> None:
    """Against the definition, one shift after the other."""
    ranks = pattern_ranks(pattern, height, width)
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(200, 1, 1, generator=generator)
    is_known = torch.rand(200, height, width, generator=generator) < share
    is_known[0], is_known[1] = False, True
    found = fitting_shifts(is_known, ranks)
    for known, fitting in zip(is_known, found, strict=True):
        longest = torch.zeros(height, width, dtype=torch.int64)
        for y, x in itertools.product(range(height), range(width)):
            masked = ranks.roll((y, x), (0, 1))[~known]
            longest[y, x] = masked.min() if len(masked) else height * width
        assert torch.equal(fitting, longest == longest.max())


@pytest.mark.parametrize(("pattern", "height", "width"), KINDS)
def test_the_sets_of_a_run_have_the_law_of_one_shift(pattern: str, height: int, width: int) -> None:
    """Drawing a fitting shift anew in each step, from all masks: what is known and what opens next have the joint law that
    they have when each run keeps one shift."""
    length, order = height * width, order_of(pattern_ranks(pattern, height, width))
    everything = frozenset(range(length))
    anew, kept = {frozenset[int](): 1.0}, [frozenset[int]()] * length
    for count in (1, 2, 4, 2, 3):
        pairs: dict[tuple, float] = defaultdict(float)
        for known, p in anew.items():
            for subset, q in shifted_order_law(sorted(everything - known), count, order, (height, width)).items():
                pairs[known, subset] += p * q
        of_one: dict[tuple, float] = defaultdict(float)
        for shift in range(length):
            y, x = shift // width, shift % width
            moved = [(c // width + y) % height * width + (c % width + x) % width for c in order]
            subset = frozenset(moved[len(kept[shift]) : len(kept[shift]) + count])
            of_one[kept[shift], subset] += 1 / length
            kept[shift] |= subset
        assert pairs.keys() == of_one.keys()
        assert all(pairs[pair] == pytest.approx(of_one[pair], abs=1e-12) for pair in pairs)
        anew = defaultdict(float)
        for (known, subset), p in pairs.items():
            anew[known | subset] += p
    assert anew == {everything: pytest.approx(1)}


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"pattern": "farthest"}, 10),
        ({"pattern": "dilated"}, 10),
        ({"pattern": "van_der_corput"}, 10),
        ({"pattern": "farthest", "grid_shape": [3, 4]}, 12),
        ({"pattern": "dilated", "grid_shape": [3, 4]}, 12),
        ({"pattern": "halton", "grid_shape": [3, 4]}, 12),
    ],
)
def test_no_position_is_favoured(settings: dict, length: int) -> None:
    """From all masks every position is equally likely to open in each step."""
    rows, scheduler = 2400, SpreadScheduler(vocab_size=3, mask_token_id=2, **settings)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(2)
    x = scheduler.sample_prior((rows, length))
    for index in range(5):
        opens = scheduler.positions(index, x, generator)
        counts = opens.sum(0)
        x = x.masked_fill(opens, 0)
        # of a fixed number in each row: the variance is that of a Bernoulli count, and the sum over positions is fixed
        share = float(counts.sum()) / (rows * length)
        statistic = ((counts - rows * share) ** 2).sum() / (rows * share * (1 - share)) * (length - 1) / length
        assert statistic < (length - 1) + 4.5 * math.sqrt(2 * (length - 1))
    assert (x == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "van_der_corput"},
        {"pattern": "dilated"},
        {"pattern": "halton", "grid_shape": [3, 4]},
        {"pattern": "van_der_corput", "block_length": 5},
        {"pattern": "dilated", "block_length": 4, "rounding": "down"},
        {"pattern": "farthest", "block_length": 5},
    ],
)
def test_positions_follow_their_law(settings: dict) -> None:
    """12 places, from templates and from halves of runs; the sets of blocks that end in the middle of a step too."""
    scheduler = SpreadScheduler(vocab_size=3, mask_token_id=2, **settings)
    scheduler.set_timesteps(3)
    starts = ["222222222222", "022222222220", "022002022222", "000000002222", "220222002220"]
    for seed, (index, start) in enumerate(itertools.product((0, 1), starts)):
        x = torch.tensor([[int(token) for token in start]])
        law = spread_scheduler_law(scheduler, (x[0] == 2).nonzero().flatten().tolist(), index, 12)
        opens = scheduler.positions(index, x.expand(1500, 12), torch.Generator().manual_seed(seed))
        subsets = list(law)
        drawn = [frozenset(row.nonzero().flatten().tolist()) for row in opens]
        assert set(drawn) <= set(subsets)
        counts = torch.tensor([drawn.count(subset) for subset in subsets])
        assert chi_square_z(counts, torch.tensor([law[subset] for subset in subsets], dtype=torch.float64)) < 4.5


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"pattern": "van_der_corput"}, 5),
        ({"pattern": "dilated", "rounding": "down"}, 5),
        ({"pattern": "dilated", "grid_shape": [2, 2]}, 4),
        ({"pattern": "halton", "grid_shape": [2, 2]}, 4),
        ({"pattern": "farthest", "block_length": 3}, 5),
    ],
)
def test_laws_on_enumerated_joints(settings: dict, length: int) -> None:
    """Two tokens and the mask: samples follow the law of the run; one token per call is exact."""
    joint = random_joint(2, length, seed=7)
    scheduler = SpreadScheduler(vocab_size=3, mask_token_id=2, **settings)
    denoiser = exact_denoiser(joint, scheduler.noise_process)
    excesses = [
        kl(joint.p, clean_part(run_law(scheduler, denoiser, n, length), scheduler, joint)) for n in (1, 2, 4, 8)
    ]
    marginals = torch.stack([joint.p @ joint.states[:, i].double() for i in range(length)])
    product = torch.where(joint.states == 1, marginals, 1 - marginals).prod(1)
    assert excesses[0] == pytest.approx(kl(joint.p, product), rel=1e-9)
    assert excesses[0] > excesses[1] > 1e-4
    assert (excesses[2] < 1e-12) == (length == 4)
    assert excesses[3] < 1e-12
    generator, num_steps = torch.Generator().manual_seed(8), 3
    law = run_law(scheduler, denoiser, num_steps, length)
    x = scheduler.sample_prior((3000, length))
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, 3), minlength=len(law)), law) < 4.5


# Images


def ising(side: int, coupling: float) -> Joint:
    """Spins 0 and 1 on a grid with borders, weight exp(coupling) for each pair of equal neighbours."""
    states = all_states(2, side * side)
    grid = states.view(-1, side, side)
    equal = (grid[:, 1:] == grid[:, :-1]).sum((1, 2)) + (grid[:, :, 1:] == grid[:, :, :-1]).sum((1, 2))
    return Joint(states, (coupling * equal.double()).softmax(0))


def order_excess(joint: Joint, scheduler: DiscreteScheduler, num_steps: int, rows: int) -> float:
    """KL(data || sampler given its order) in nats, exact for each of `rows` drawn orders: the sum over steps of the entropies
    H(x_i | known) minus the joint one H(all of the step | known)."""
    length = joint.states.shape[1]
    cube, everywhere = joint.p.view([2] * length), frozenset(range(length))
    cache: dict[frozenset[int], float] = {}

    def entropy(places: frozenset[int]) -> float:
        if places not in cache:
            others = sorted(everywhere - places)
            p = cube.sum(others) if others else cube
            cache[places] = -float(torch.xlogy(p, p).sum())
        return cache[places]

    scheduler.set_timesteps(num_steps)
    x, total = scheduler.sample_prior((rows, length)), 0.0
    generator = torch.Generator().manual_seed(0)
    for index in range(num_steps):
        opens = scheduler.positions(index, x, generator)
        for row, before in zip(opens, x, strict=True):
            known = frozenset((before != 2).nonzero().flatten().tolist())
            step = frozenset(row.nonzero().flatten().tolist())
            total += sum(entropy(known | {i}) - entropy(known) for i in step) - entropy(known | step) + entropy(known)
        x = x.masked_fill(opens, 0)
    return total / rows


@pytest.mark.parametrize("pattern", ["farthest", "dilated", "halton"])
def test_patterns_of_images_on_an_ising_grid(pattern: str) -> None:
    """4 x 4 spins at 4 calls: near ones depend on each other most."""
    joint = ising(4, coupling=0.9)
    settings = {"vocab_size": 3, "mask_token_id": 2}
    spread = order_excess(joint, SpreadScheduler(pattern=pattern, grid_shape=[4, 4], **settings), 4, rows=16)
    random = order_excess(joint, AncestralScheduler(**settings), 4, rows=24)
    print(f"KL at 4 calls: {pattern} {spread:.3f}, random {random:.3f}")
    assert 0 < spread < random / 1.5
    one_by_one = order_excess(joint, SpreadScheduler(pattern=pattern, grid_shape=[4, 4], **settings), 16, rows=1)
    assert one_by_one == pytest.approx(0, abs=1e-9)


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "sobol"}, "`pattern` is 'sobol'; allowed: 'farthest', 'dilated', 'van_der_corput', 'halton'"),
        ({"pattern": "halton"}, "`pattern='halton'` needs `grid_shape`"),
        ({"pattern": "van_der_corput", "grid_shape": [2, 2]}, "`pattern='van_der_corput'` is for sequences"),
        ({"grid_shape": [2, 2], "block_length": 2}, "`block_length` and `grid_shape` cannot both be given"),
        ({"block_length": 0}, "`block_length` is 0; it must be at least 1"),
        ({"rounding": "nearest"}, "`rounding` is 'nearest'; allowed: 'up', 'down'"),
    ],
)
def test_arguments_that_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpreadScheduler(vocab_size=3, mask_token_id=2, **kwargs)


@pytest.mark.parametrize("pattern", ["farthest", "halton"])
def test_a_grid_that_does_not_hold_the_sample_is_refused(pattern: str) -> None:
    scheduler = SpreadScheduler(vocab_size=3, mask_token_id=2, pattern=pattern, grid_shape=[2, 3])
    with pytest.raises(ValueError, match="but the sample has 5 positions"):
        scheduler.positions(0, torch.full((1, 5), 2))
