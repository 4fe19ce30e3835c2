"""The spread order on a Markov chain, where the exact conditionals and the exact likelihood are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from discrete_schedulers import AncestralScheduler, RowLogits
from discrete_schedulers.evaluation import sampler_nll_bound

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


def excess(chain: MarkovDenoiser, steps: int, rows: int = 128, **settings: str) -> tuple[float, float]:
    """KL(data || sampler given its order) in nats per sequence and its standard error: bound minus exact likelihood."""
    generator = torch.Generator().manual_seed(1)
    data = chain.sample(rows, generator)
    scheduler = AncestralScheduler(vocab_size=STATES + 1, mask_token_id=MASK, **settings)
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
