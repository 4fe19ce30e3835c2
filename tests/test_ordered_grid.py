"""The best counts along an order, against enumeration of all counts, a chain with known answers, and the optimal grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from laws import Joint, all_states, exact_denoiser, random_joint

from discrete_schedulers import AbsorbingProcess, LearnedScheduler
from discrete_schedulers.evaluation import sampler_nll_bound
from discrete_schedulers.information import InformationCurve, optimal_counts
from discrete_schedulers.training.ordered_grid import (
    doubling_counts,
    equal_counts,
    optimal_ordered_counts,
    ordered_information,
    ordered_nll,
    spread_ranks,
)

VOCAB, MASK, LENGTH = 4, 3, 6


def all_counts(total: int, calls: int) -> list[tuple[int, ...]]:
    """Positive counts with this sum."""
    return [c for c in itertools.product(range(1, total + 1), repeat=calls) if sum(c) == total]


def random_table(seed: int) -> torch.Tensor:
    """Any non-negative F with zeros below the diagonal."""
    return torch.rand(LENGTH, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu()


@pytest.mark.parametrize("seed", range(5))
def test_optimal_counts_are_those_of_enumeration(seed: int) -> None:
    table = random_table(seed)
    found = optimal_ordered_counts(table, LENGTH)
    for calls, counts in enumerate(found, start=1):
        assert len(counts) == calls
        best = min(ordered_nll(table, other) for other in all_counts(LENGTH, calls))
        assert ordered_nll(table, counts) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_calls_begin_where_it_was_measured(seed: int) -> None:
    table, starts = random_table(seed), {0, 1, 4}
    table[[2, 3, 5]] = math.inf
    found = optimal_ordered_counts(table, 3)
    for calls, counts in enumerate(found, start=1):
        plans = [c for c in all_counts(LENGTH, calls) if set(itertools.accumulate(c[:-1])) <= starts]
        assert tuple(counts) in plans
        assert ordered_nll(table, counts) == pytest.approx(min(ordered_nll(table, c) for c in plans), abs=1e-12)
    with pytest.raises(ValueError, match="`max_steps` is 4, allowed is 1 to 3"):
        optimal_ordered_counts(table, 4)


def test_nll_by_hand() -> None:
    table = torch.tensor([[1.0, 2.0, 4.0], [0.0, 8.0, 16.0], [0.0, 0.0, 32.0]])
    assert [ordered_nll(table, c) for c in ([3], [1, 2], [2, 1], [1, 1, 1])] == [7.0, 25.0, 35.0, 41.0]
    for wrong in ([1, 1], [3, 0], [4], [4, -1]):
        with pytest.raises(ValueError, match="must be positive and have the sum 3"):
            ordered_nll(table, wrong)


def test_a_random_order_has_the_optimal_grid() -> None:
    """There F depends on the number of known tokens only."""
    curve = torch.tensor([2.0, 1.13, 0.9, 0.52, 0.47, 0.1], dtype=torch.float64)
    table = curve[:, None].expand(LENGTH, LENGTH).triu()
    assert optimal_ordered_counts(table, LENGTH) == optimal_counts(
        InformationCurve(curve, torch.zeros_like(curve), 0), LENGTH
    )


def test_the_table_is_that_of_the_joint() -> None:
    """F[m, j] of one order and all of the joint's sequences, from the joint itself: H(x_j | the first m)."""
    joint = random_joint(VOCAB - 1, 3, seed=2)
    denoiser = exact_denoiser(joint, AbsorbingProcess(VOCAB, MASK))
    order = [2, 0, 1]
    weights = torch.round(joint.p * 20000).long()
    data = joint.states.repeat_interleave(weights, dim=0)  # the joint as a data set, up to rounding
    law = weights.double() / weights.sum()
    ranks = torch.tensor([order.index(i) for i in range(3)]).expand(len(data), -1)
    table = ordered_information(denoiser, data, ranks, MASK, batch_size=10**6)

    def nats(known: list[int], position: int) -> float:
        """Cross-entropy of the joint's conditional under the data set."""
        total = 0.0
        for x, p in zip(joint.states, law, strict=True):
            fits = (joint.states[:, known] == x[known]).all(1)
            agrees = fits & (joint.states[:, position] == x[position])
            total -= float(p * (joint.p[agrees].sum() / joint.p[fits].sum()).log())
        return total

    some = ordered_information(denoiser, data, ranks, MASK, 10**6, starts=(2, 0))
    assert torch.equal(some[[0, 2]], table[[0, 2]])
    assert some[1].isinf().all()
    for m, j in itertools.product(range(3), repeat=2):
        assert float(table[m, j]) == pytest.approx(nats(order[:m], order[j]) if j >= m else 0.0, abs=1e-9)


def test_spread_ranks_are_what_the_scheduler_opens() -> None:
    """The first m ranks are a set that `order="spread"` opens first; on a ring of 8 two are opposite, four are every other."""
    ranks = spread_ranks((200, 8), torch.Generator().manual_seed(0))
    assert torch.equal(ranks.sort(1).values, torch.arange(8).expand(200, -1))
    first = (ranks < 2).nonzero()[:, 1].view(200, 2)
    assert (first.diff(dim=1) == 4).all()
    assert ((ranks < 4).roll(2, 1) == (ranks < 4)).all()
    assert len((ranks == 0).nonzero()[:, 1].unique()) == 8  # every position can be the first


def test_neighbours_that_agree_are_opened_in_turn() -> None:
    """Pairs of equal tokens on a ring in the spread order: two calls cost nothing only if the halves go one after another, and
    the sampler's own bound says so."""
    joint = copies()
    denoiser = exact_denoiser(joint, AbsorbingProcess(3, 2))
    data = joint.states.repeat(64, 1)
    ranks = spread_ranks(tuple(data.shape), torch.Generator().manual_seed(1))
    table = ordered_information(denoiser, data, ranks, 2)
    found = optimal_ordered_counts(table, 2)[1]
    entropy = joint.entropy
    assert found == [4, 4]
    assert ordered_nll(table, found) == pytest.approx(entropy, abs=1e-9)
    spread = {"vocab_size": 3, "mask_token_id": 2, "grid": "learned", "order": "spread"}
    for counts, excess in (([4.0, 4.0], 0.0), ([6.0, 2.0], 2 * math.log(2))):  # six of eight: two pairs drawn blindly
        scheduler = LearnedScheduler(**spread, coefficients={"2": {"counts": counts}})
        bound = sampler_nll_bound(denoiser, scheduler, data, 2, torch.Generator().manual_seed(0), len(data))
        assert 8 * float(bound.mean()) == pytest.approx(entropy + excess, abs=1e-6)


def copies() -> Joint:
    """Four pairs of equal bits at neighbouring places of a ring of 8, all alike."""
    bits = all_states(2, 4)
    return Joint(bits.repeat_interleave(2, dim=1), torch.full((16,), 1 / 16, dtype=torch.float64))


def test_plans() -> None:
    assert equal_counts(10, 4) == [2, 3, 2, 3]
    assert doubling_counts(64, 1) == [64]
    assert doubling_counts(64, 2) == [16, 48]
    assert doubling_counts(64, 4) == [8, 8, 16, 32]
    assert doubling_counts(64, 8) == [4, 4, 4, 4, 8, 8, 16, 16]
    for length, plan in itertools.product((1, 5, 16, 49), (equal_counts, doubling_counts)):
        for steps in range(1, length + 1):
            counts = plan(length, steps)
            assert (len(counts), sum(counts)) == (steps, length)
            assert min(counts) >= 1
        with pytest.raises(ValueError, match=f"`num_steps` is {length + 1}; allowed is 1 to {length}"):
            plan(length, length + 1)


def test_bad_input() -> None:
    denoiser = exact_denoiser(random_joint(VOCAB - 1, 3), AbsorbingProcess(VOCAB, MASK))
    data, ranks = torch.zeros(2, 3, dtype=torch.int64), torch.arange(3).expand(2, -1)
    with pytest.raises(ValueError, match=r"`ranks` has shape .*permutations of 0..2 for 2 rows"):
        ordered_information(denoiser, data, ranks * 0, MASK)
    with pytest.raises(ValueError, match="`data` has the mask token 3"):
        ordered_information(denoiser, data + MASK, ranks, MASK)
    with pytest.raises(ValueError, match="`max_steps` is 4, allowed is 1 to 3"):
        optimal_ordered_counts(torch.zeros(3, 3), 4)
