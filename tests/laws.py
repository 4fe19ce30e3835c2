"""Exact laws on small joints: the ground truth that the tests hold samplers against. Everything is float64.

A state is a row of L tokens; S = V^L states stand in the order of `all_states`, last position fastest. With an absorbing
process the mask is the last of the V ids and a joint has V - 1 tokens; with a uniform process all V are tokens.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from scipy.stats import chi2, norm
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, Process
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.schedulers import DiscreteScheduler
from discrete_schedulers.schedulers.position_orders import pattern_ranks

ExactDenoiser: TypeAlias = Callable[..., "Tensor | RowLogits"]


class Joint(NamedTuple):
    """Law of x_0.

    Args:
        states (`torch.Tensor` of shape `(S, L)`): All rows of clean tokens, int64.
        p (`torch.Tensor` of shape `(S,)`): Their probabilities.
    """

    states: Tensor
    p: Tensor

    @property
    def entropy(self) -> float:
        """In nats."""
        return -float(torch.xlogy(self.p, self.p).sum())


def all_states(num_states: int, length: int) -> Tensor:
    """All rows, shape (num_states^length, length), in lexicographic order."""
    return torch.tensor(list(itertools.product(range(num_states), repeat=length)))


def state_index(x: Tensor, num_states: int) -> Tensor:
    """Place of each row of x, shape (B, L), in `all_states`, shape (B,)."""
    return x @ num_states ** torch.arange(x.shape[1] - 1, -1, -1)


def random_joint(num_tokens: int, length: int, seed: int = 0, spread: float = 1.5) -> Joint:
    """A joint with full support and dependent positions: log-probabilities are normal with the given spread."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_tokens**length, generator=generator, dtype=torch.float64)
    return Joint(all_states(num_tokens, length), logits.softmax(0))


# Denoisers


def as_denoiser(log_p_0: Callable[[Tensor, float], Tensor]) -> ExactDenoiser:
    """A function of (x_t, t) to (B, L, V) with the protocol of the library: `positions` picks rows."""

    def denoiser(x_t: Tensor, t: Tensor | float, positions: Tensor | None = None) -> Tensor | RowLogits:
        logits = log_p_0(x_t, float(t))
        return logits if positions is None else RowLogits(logits[positions], positions)

    return denoiser


def exact_denoiser(joint: Joint, process: Process) -> ExactDenoiser:
    """log p(x_0^i = v | x_t), (B, L, V), at all positions, by Bayes over all clean rows: weights p(x_0) q(x_t | x_0)."""

    def log_p_0(x_t: Tensor, t: float) -> Tensor:
        place = x_t[:, None, :]  # (B, 1, L)
        if isinstance(process, AbsorbingProcess):  # the powers of alpha are the same for all rows that agree with x_t
            likelihood = ((place == joint.states) | (place == process.mask_token_id)).double()
        else:
            alpha = float(process.alpha(t))
            likelihood = alpha * (place == joint.states).double() + (1 - alpha) / process.vocab_size
        weight = joint.p * likelihood.prod(-1)  # (B, S)
        one_hot = torch.nn.functional.one_hot(joint.states, process.vocab_size).double()  # (S, L, V)
        p_0 = torch.einsum("bs,slv->blv", weight, one_hot)
        return (p_0 / p_0.sum(-1, keepdim=True)).log()

    return as_denoiser(log_p_0)


def random_denoiser(vocab_size: int, seed: int = 0) -> ExactDenoiser:
    """Logits in [-4, 4] that are a hash of (x_t, position, state): different for every row, the same in every batch, and
    as large at the mask and at revealed tokens as anywhere."""
    modulus = 2**31 - 1

    def logits(x_t: Tensor, t: float) -> Tensor:
        code = torch.zeros(len(x_t), dtype=torch.int64)
        for column in x_t.unbind(1):
            code = (code * 48271 + column + 1) % modulus
        place = 69621 * torch.arange(x_t.shape[1])[:, None] + 16807 * torch.arange(vocab_size)  # (L, V)
        h = (code[:, None, None] + place) % modulus
        for _ in range(4):
            h = (h * 48271 + seed + 12345) % modulus
            h = h ^ (h >> 11)
        return h.double() / modulus * 8 - 4

    return as_denoiser(logits)


# Subsets of positions


def uniform_subset_law(eligible: Iterable[int], count: int) -> dict[frozenset[int], float]:
    """Every subset of `count` places, equally likely."""
    subsets = [frozenset(chosen) for chosen in itertools.combinations(eligible, count)]
    return {subset: 1 / len(subsets) for subset in subsets}


def torus_gap(a: int, b: int, grid_shape: tuple[int, int]) -> int:
    """Squared distance of two cells of a grid without borders, by trying all nine ways round."""
    height, width = grid_shape
    turns = itertools.product((-height, 0, height), (-width, 0, width))
    return min((a // width - b // width + y) ** 2 + (a % width - b % width + x) ** 2 for y, x in turns)


def spread_subset_law(eligible: Iterable[int], count: int, grid_shape: tuple[int, int]) -> dict[frozenset[int], float]:
    """Farthest-point picks whose ties go by one order of the places, over all orders: for up to 7 eligible places."""
    eligible = list(eligible)
    cells = range(grid_shape[0] * grid_shape[1])
    gap = {(i, j): torus_gap(i, j, grid_shape) for i in eligible for j in cells}
    known = [j for j in cells if j not in eligible]
    law: dict[frozenset[int], float] = defaultdict(float)
    for order in itertools.permutations(eligible):
        chosen: list[int] = []
        for _ in range(count):
            free = [i for i in order if i not in chosen]
            first_best = max(free, key=lambda i: min((gap[i, j] for j in known + chosen), default=0))
            chosen.append(first_best)
        law[frozenset(chosen)] += 1 / math.factorial(len(eligible))
    return dict(law)


# Laws of schedulers. A scheduler that draws a set of positions and then a token for each needs the law of these sets:
# class name -> function of (scheduler, masked places, index, length) to the probability of each subset.
SUBSET_LAWS: dict[str, Callable[[DiscreteScheduler, list[int], int, int], dict[frozenset[int], float]]] = {}


def step_matrix(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, index: int, length: int) -> Tensor:
    """P(x_s | x_t) of one step, (S, S): the product of `transition`, or the mixture over all sets of positions that a
    fixed count can take."""
    num_states = scheduler.config.vocab_size
    states = all_states(num_states, length)
    logits = denoiser(states, scheduler.timesteps[index])
    subsets = SUBSET_LAWS.get(type(scheduler).__name__)
    if scheduler.config.get("unmasking") == "counts" and scheduler.config.process == "absorbing":
        subsets = counts_subset_law
    if subsets is not None:
        return subset_matrix(scheduler, logits, states, index, subsets)
    law = scheduler.transition(logits, index, states)  # (S, L, V)
    return torch.stack([law[:, i, states[:, i]] for i in range(length)]).prod(0)


def counts_subset_law(
    scheduler: DiscreteScheduler, masked: list[int], index: int, length: int
) -> dict[frozenset[int], float]:
    """The sets that open when a fixed number of masks does."""
    due = len(masked) * float(
        scheduler.noise_process.unmask_probability(scheduler.times[index], scheduler.times[index + 1])
    )
    law: dict[frozenset[int], float] = defaultdict(float)
    for count, chance in ({0: 1 - due, 1: due} if 0 < due < 0.5 else {round(due): 1.0}).items():
        if scheduler.config.order == "spread":
            subsets = spread_subset_law(masked, count, tuple(scheduler.config.grid_shape or (1, length)))
        else:
            subsets = uniform_subset_law(masked, count)
        for subset, p in subsets.items():
            law[subset] += chance * p
    return dict(law)


def equal_groups_law(
    scheduler: DiscreteScheduler, masked: list[int], index: int, length: int
) -> dict[frozenset[int], float]:
    """First hitting: as many masks as make the calls left come out even, rounded up."""
    return uniform_subset_law(masked, math.ceil(len(masked) / (scheduler.num_inference_steps - index)))


def gillespie_subset_law(
    scheduler: DiscreteScheduler, masked: list[int], index: int, length: int
) -> dict[frozenset[int], float]:
    """k-Gillespie on masks: k_j of them if all that can be are still masked, else the same share; all in the last call."""
    steps = scheduler.num_inference_steps
    learned = (scheduler.config.coefficients or {}).get(str(steps), {})
    counts = learned.get("counts") or [length * (j + 1) // steps - length * j // steps for j in range(steps)]
    left = sum(counts[index:])
    share = 1.0 if index == steps - 1 else counts[index] / left if left else 0.0
    return uniform_subset_law(masked, round(len(masked) * share))


SUBSET_LAWS |= {"FirstHittingScheduler": equal_groups_law, "GillespieScheduler": gillespie_subset_law}


def shifted_order_law(
    eligible: list[int], count: int, order: list[int], grid_shape: tuple[int, int]
) -> dict[frozenset[int], float]:
    """The first eligible cells of an order of the cells, moved by a shift of the torus: all shifts of which the longest
    beginning is not eligible, equally likely."""
    height, width = grid_shape
    longest, opened = -1, []
    for y, x in itertools.product(range(height), range(width)):
        moved = [(cell // width + y) % height * width + (cell % width + x) % width for cell in order]
        known = min((rank for rank, cell in enumerate(moved) if cell in eligible), default=len(moved))
        if known > longest:
            longest, opened = known, []
        if known == longest:
            opened.append(frozenset([cell for cell in moved if cell in eligible][:count]))
    return {subset: opened.count(subset) / len(opened) for subset in set(opened)}


def spread_scheduler_law(
    scheduler: DiscreteScheduler, masked: list[int], index: int, length: int
) -> dict[frozenset[int], float]:
    """Block after block, each with as many as are still due."""
    config = scheduler.config
    due = len(masked) * float(
        scheduler.noise_process.unmask_probability(scheduler.times[index], scheduler.times[index + 1])
    )
    left = math.ceil(due - 1e-9) if config.rounding == "up" else math.floor(due + 1e-9)
    if (
        config.block_length is not None and masked
    ):  # the current block, shared out evenly; whole, if no call is to spare
        current = [i for i in masked if i // config.block_length == masked[0] // config.block_length]
        even = len(current) / max(1, math.ceil(len(current) / due - 1e-9)) if due else 0
        left = math.ceil(even - 1e-9) if config.rounding == "up" else math.floor(even + 1e-9)
        blocks, calls = sorted({i // config.block_length for i in masked}), len(scheduler.calls) - index
        if len(blocks) >= calls:
            current = [i for i in masked if i // config.block_length in blocks[: math.ceil(len(blocks) / calls)]]
            left = len(current)
        masked = current
    law = {frozenset[int](): 1.0}
    for start in range(0, length, config.block_length or length):
        size = min(config.block_length or length, length - start)
        eligible = [i - start for i in masked if start <= i < start + size]
        count = min(left, len(eligible))
        left -= count
        shape = tuple(config.grid_shape or (1, size))
        if config.pattern == "farthest":
            block = spread_subset_law(eligible, count, shape)
        else:
            order = pattern_ranks(config.pattern, *shape).flatten().argsort().tolist()
            block = shifted_order_law(eligible, count, order, shape)
        law = {subset | {i + start for i in here}: p * q for subset, p in law.items() for here, q in block.items()}
    return law


SUBSET_LAWS |= {"SpreadScheduler": spread_scheduler_law}


def subset_matrix(
    scheduler: DiscreteScheduler,
    logits: Tensor,
    states: Tensor,
    index: int,
    subsets: Callable[[DiscreteScheduler, list[int], int, int], dict[frozenset[int], float]],
) -> Tensor:
    """P(x_s | x_t), (S, S), when a random set of masks opens, each to a token of its own law."""
    clean = scheduler.clean_law(logits)  # (S, L, V)
    length = states.shape[1]
    matrix = torch.zeros(len(states), len(states), dtype=torch.float64)
    for row, x_t in enumerate(states):
        masked = [i for i in range(length) if x_t[i] == scheduler.config.mask_token_id]
        for subset, p in subsets(scheduler, masked, index, length).items():
            factors = [clean[row, i, states[:, i]] if i in subset else states[:, i] == x_t[i] for i in range(length)]
            matrix[row] += p * torch.stack([factor.double() for factor in factors]).prod(0)
    return matrix


def prior_law(scheduler: DiscreteScheduler, length: int) -> Tensor:
    """Law of the first sample over all states, (S,)."""
    one = scheduler.noise_process.prior_law()
    return one[all_states(len(one), length)].prod(-1)


def run_law(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, length: int) -> Tensor:
    """Law of the last sample of a run over all states, (S,)."""
    scheduler.set_timesteps(num_steps)
    law = prior_law(scheduler, length)
    for index in range(num_steps):
        law = law @ step_matrix(scheduler, denoiser, index, length)
    return law


def forward_matrix(process: Process, s: float, t: float, length: int) -> Tensor:
    """P(x_t | x_s) of the forward process over all states, (S, S), s < t."""
    kept = process.alpha(t) / process.alpha(s)
    one = kept * torch.eye(process.vocab_size, dtype=torch.float64) + (1 - kept) * process.prior_law()  # (V, V)
    states = all_states(process.vocab_size, length)
    return torch.stack([one[place][:, place] for place in states.unbind(1)]).prod(0)


def path_kl(scheduler: DiscreteScheduler, denoiser: ExactDenoiser, num_steps: int, joint: Joint) -> float:
    """KL(forward process || sampler) of the whole path x_0, ..., x_1 on the grid, in nats: the sum over steps of
    E KL(exact reverse kernel || step). It bounds the KL of the last samples."""
    scheduler.set_timesteps(num_steps)
    process, length = scheduler.noise_process, joint.states.shape[1]
    clean = torch.zeros(process.vocab_size**length, dtype=torch.float64)
    clean[state_index(joint.states, process.vocab_size)] = joint.p
    times = scheduler.times.tolist()
    total = kl(clean @ forward_matrix(process, 0.0, times[0], length), prior_law(scheduler, length))
    for index in range(num_steps):
        t, s = times[index], times[index + 1]
        at_s = clean @ forward_matrix(process, 0.0, s, length)
        together = (at_s[:, None] * forward_matrix(process, s, t, length)).T  # (x_t, x_s)
        sampled = together.sum(1, keepdim=True) * step_matrix(scheduler, denoiser, index, length)
        total += kl(together, sampled)
    return total


def clean_part(law: Tensor, scheduler: DiscreteScheduler, joint: Joint) -> Tensor:
    """The entries of a law over all states that are states of the joint, in its order."""
    return law[state_index(joint.states, scheduler.config.vocab_size)]


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats, exact for laws that are nearly equal: the terms p log(p / q) - p + q do not cancel."""
    ratio = q / p
    return float((p * (ratio - 1 - torch.log1p(ratio - 1)))[p > 0].sum() + q[p == 0].sum())


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of the differences."""
    return 0.5 * float((p - q).abs().sum())


def chi_square_z(counts: Tensor, law: Tensor) -> float:
    """How surprising the counts are under the law: the normal quantile of Pearson's chi-square test.

    The cells that expect fewer than 5 are pooled, rarest first, into groups that expect 10. One count where the law is 0
    is infinitely surprising.
    """
    if (counts[law <= 0] > 0).any():
        return float("inf")
    expected = law / law.sum() * counts.sum()
    order = expected.argsort()
    expected, observed = expected[order], counts[order].double()
    rare = expected < 5
    group = (expected.cumsum(0) / 10).floor().long()
    group = torch.where(rare, group, 0)
    first = int(group.max()) + 1  # the large cells are groups of their own
    group = torch.where(rare, group, first + torch.arange(len(group)) - int(rare.sum()))
    bins = int(group.max()) + 1
    pooled_expected = torch.zeros(bins, dtype=torch.float64).index_add_(0, group, expected)
    pooled_observed = torch.zeros(bins, dtype=torch.float64).index_add_(0, group, observed)
    used = pooled_expected > 0
    freedom = int(used.sum()) - 1
    if freedom == 0:
        return 0.0
    statistic = float(((pooled_observed - pooled_expected)[used] ** 2 / pooled_expected[used]).sum())
    return float(norm.isf(chi2.sf(statistic, freedom)))
