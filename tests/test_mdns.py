"""Training from an energy: log-weights that give Z for any network, the loss whose minimum is the target, and the example."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from laws import Joint, all_states, exact_denoiser, random_denoiser, state_index
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.training.mdns import (
    Weighted,
    denoising_cross_entropy,
    effective_sample_size,
    log_partition,
    weighted_samples,
)

MASK, VOCAB = 2, 3


def load_example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "train_from_energy.py"
    spec = importlib.util.spec_from_file_location("train_from_energy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def energy(x: Tensor) -> Tensor:
    """A 2 x 2 torus with a field on one spin, so that states differ."""
    return EXAMPLE.lattice_energy(x, 2, 0.3, 2) + 0.7 * (x[:, 0] == 1)


STATES = all_states(2, 4)
LOG_Z = float((-energy(STATES)).logsumexp(0))
TARGET = Joint(STATES, (-energy(STATES) - LOG_Z).exp())


def exact(x: Tensor, t: float) -> Tensor:
    """The target's own conditionals."""
    return exact_denoiser(TARGET, AbsorbingProcess(VOCAB, MASK))(x, 0.5)


def test_bonds_by_hand() -> None:
    """A 3 x 3 torus has 18 bonds; one spin turned breaks 4 of them."""
    ones = torch.ones(1, 9, dtype=torch.int64)
    turned = ones.clone()
    turned[0, 4] = 0
    assert float(EXAMPLE.lattice_energy(ones, 3, 0.5, 2)) == -9.0
    assert float(EXAMPLE.lattice_energy(turned, 3, 0.5, 2)) == -5.0
    assert float(EXAMPLE.lattice_energy(turned, 3, 0.5, 3)) == -7.0  # 14 equal neighbours


@pytest.mark.parametrize(("side", "states", "beta"), [(2, 2, 0.4), (3, 2, 0.3), (2, 3, 0.7), (4, 2, 0.28)])
def test_transfer_matrix_is_the_sum_over_all_states(side: int, states: int, beta: float) -> None:
    length = side**2
    every = (torch.arange(states**length)[:, None] // states ** torch.arange(length)) % states
    expected = float((-EXAMPLE.lattice_energy(every, side, beta, states)).logsumexp(0))
    assert EXAMPLE.exact_log_partition(side, beta, states) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [2, 2], [3, 1], [4]])
def test_mean_weight_is_z_for_any_network_and_any_steps(counts: list[int]) -> None:
    """All ways to open the positions, all tokens, a network that knows nothing of the energy: E[e^W] = Z, and the weighted
    law is the target."""
    network = random_denoiser(VOCAB, seed=3)
    ends = list(itertools.accumulate(counts))
    law, ways = torch.zeros(16, dtype=torch.float64), 0
    for order in itertools.permutations(range(4)):
        sets = [order[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        ways += 1
        log_prob, x_t = torch.zeros(16, dtype=torch.float64), torch.full((16, 4), MASK)
        for chosen in sets:
            log_p = network(x_t, 1.0)[..., :MASK].log_softmax(-1)
            for i in chosen:
                log_prob = log_prob + log_p[torch.arange(16), i, STATES[:, i]]
            x_t = x_t.clone()
            for i in chosen:
                x_t[:, i] = STATES[:, i]
        log_weight = -energy(STATES) - log_prob
        law += (log_prob + log_weight).exp()  # P(path) e^W
        if order == tuple(range(4)) and counts == [4]:
            forward = weighted_samples(network, energy, 50, counts, MASK, seeded())
            expected = log_weight[state_index(forward.x, 2)]
            torch.testing.assert_close(forward.log_weights, expected, rtol=0, atol=1e-12)
    law /= ways
    assert float(law.sum().log()) == pytest.approx(LOG_Z, abs=1e-12)
    torch.testing.assert_close(law / law.sum(), TARGET.p, rtol=0, atol=1e-12)
    drawn = weighted_samples(network, energy, 20_000, counts, MASK, seeded(1))
    weights = (drawn.log_weights - LOG_Z).exp()
    assert abs(float(weights.mean()) - 1) < 4.5 * float(weights.std()) / math.sqrt(20_000)
    shares = torch.zeros(16, dtype=torch.float64).index_add_(0, state_index(drawn.x, 2), weights / 20_000)
    assert float((shares - TARGET.p).abs().max()) < 0.1


def test_the_targets_own_conditionals_have_equal_weights() -> None:
    """One position at a time W is log Z for every sample; two at a time it is not, and its mean still is."""
    drawn = weighted_samples(exact, energy, 500, [1] * 4, MASK, seeded(2))
    torch.testing.assert_close(drawn.log_weights, torch.full((500,), LOG_Z, dtype=torch.float64), rtol=0, atol=1e-10)
    assert effective_sample_size(drawn.log_weights) == pytest.approx(1, abs=1e-10)
    pairs = weighted_samples(exact, energy, 500, [2, 2], MASK, seeded(3))
    assert effective_sample_size(pairs.log_weights) < 0.98
    with pytest.raises(ValueError, match=r"`counts` is \[4, 0\]; positive numbers are needed"):
        weighted_samples(exact, energy, 5, [4, 0], MASK, None)


def test_weights_by_hand() -> None:
    log_weights = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64).log()
    assert log_partition(log_weights) == pytest.approx(math.log(5 / 3))
    assert effective_sample_size(log_weights) == pytest.approx(25 / 11 / 3)
    assert effective_sample_size(log_weights + 1000) == pytest.approx(25 / 11 / 3)


def test_loss_counts_every_position_once() -> None:
    """With a law that does not see the others the loss is -log q(x), whatever is masked: here its mean over many maskings, with
    the samples' weights."""
    q = torch.randn(4, VOCAB, generator=seeded(4), dtype=torch.float64)
    q[:, MASK] = -torch.inf
    nats = -q.log_softmax(-1)
    x, log_weights = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    each = torch.stack([nats[torch.arange(4), row].sum() for row in x])
    expected = float(log_weights.softmax(0) @ each)
    samples, generator = Weighted(x, log_weights), seeded(5)

    def fixed(x: Tensor, t: float) -> Tensor:
        return q.expand(len(x), -1, -1)

    found = torch.stack([denoising_cross_entropy(fixed, samples, MASK, 4, generator) for _ in range(3000)])
    assert abs(float(found.mean()) - expected) < 4.5 * float(found.std()) / math.sqrt(3000)


def test_the_minimum_is_the_target() -> None:
    """Weighted samples of a network that knows nothing: a table over all states learns the target's conditionals."""
    states, is_masked = all_states(VOCAB, 4), all_states(VOCAB, 4) == MASK
    table = torch.zeros(81, 4, VOCAB, dtype=torch.float64, requires_grad=True)

    def denoiser(x: Tensor, t: float) -> Tensor:
        return table[state_index(x, VOCAB)]

    generator = seeded(6)
    samples = weighted_samples(denoiser, energy, 3000, [1] * 4, MASK, generator)
    before = effective_sample_size(samples.log_weights)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        denoising_cross_entropy(denoiser, samples, MASK, 2, generator).backward()
        optimizer.step()
    after = weighted_samples(denoiser, energy, 3000, [1] * 4, MASK, generator)
    assert before < 0.5
    assert effective_sample_size(after.log_weights) > 0.97
    wanted = exact(states, 0.5)[..., :MASK].exp()
    found = table.detach()[..., :MASK].softmax(-1)
    assert float((found - wanted)[is_masked].abs().mean()) < 0.03


def test_the_example(tmp_path: Path) -> None:
    small = ["--side", "2", "--states", "3", "--beta", "0.5", "--rounds", "25", "--batch", "256", "--hidden", "64"]
    small += ["--steps_per_round", "8", "--replicates", "4", "--learning_rate", "0.005", "--num_eval_samples", "2000"]
    table = EXAMPLE.main([*small, "--output_dir", str(tmp_path)])
    assert [row["calls"] for row in table] == [4, 2, 1]
    assert table[0]["log Z"] == pytest.approx(table[0]["exact log Z"], abs=0.05)
    assert table[0]["ESS"] > 0.9
    assert table[0]["ESS"] > table[1]["ESS"] > table[2]["ESS"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "table.json"]
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    EXAMPLE.SpinModel(4, 4, 64).load_state_dict(state)
