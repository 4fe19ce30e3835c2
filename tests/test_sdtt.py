"""SDTT on joints that can be enumerated: its targets, its fixed points, and what rounds of it do to the law of the samples."""

from __future__ import annotations

import math

import pytest
import torch
from laws import state_index
from torch import Tensor
from toys import MASK, VOCAB, Toy

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.training.di4c import clean_log_p
from discrete_schedulers.training.sdtt import fixed_point, sdtt_loss, sdtt_targets

PROCESS = AbsorbingProcess(VOCAB, MASK, "linear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tabular:
    """A joint, its exact conditionals as the teacher, and steps of a product over positions as matrices over all states."""

    def __init__(self, name: str, length: int) -> None:
        self.toy = Toy(name, length)
        self.states, self.is_masked = self.toy.states, self.toy.states == MASK
        self.teacher = clean_log_p(torch.where(self.is_masked[..., None], self.toy.log_p_0, 0.0), MASK)  # (S, L, V)

    def step(self, log_p: Tensor, t: float, s: float) -> Tensor:
        """P(x_s | x_t), (S, S)."""
        law = PROCESS.posterior(self.states, log_p.exp(), t, s)
        return torch.stack([law[:, i, self.states[:, i]] for i in range(self.toy.length)]).prod(0)

    def learned(
        self, now: Tensor, then: Tensor, t: float, s: float, objective: str, step: Tensor | None = None
    ) -> Tensor:
        """The fixed point of two sub-steps t -> s -> ...: a position of x_t opens in the first, with the law `now`, or is a
        mask of x_s and has the law `then` there. Enumerated over x_s."""
        step = self.step(now, t, s) if step is None else step
        columns = []
        for i in range(self.toy.length):
            masked = step * self.is_masked[:, i]  # (S, S): weights of `then`, which sum to P(i stays)
            opened = 1 - masked.sum(1)
            weights = torch.cat([opened[None], masked.T])  # (1 + S, S)
            targets = torch.cat([now[None, :, i], then[:, None, i].expand(-1, len(self.states), -1)])
            columns.append(fixed_point(targets, weights, objective))
        return torch.where(self.is_masked[..., None], torch.stack(columns, 1), now)

    def kl_and_entropy(self, tables: dict[float, Tensor], num_steps: int) -> tuple[float, float]:
        """KL(data || samples) and the samples' entropy, with the table of each time."""
        law = torch.zeros(len(self.states), dtype=torch.float64)
        law[-1] = 1.0
        for k in range(num_steps, 0, -1):
            law = law @ self.step(tables[k / num_steps], k / num_steps, (k - 1) / num_steps)
        law, p = law[self.toy.clean], self.toy.joint.p
        return float((p * (p / law).log()).sum()), float(torch.special.entr(law).sum())


def rounds(world: Tabular, num_steps: int, objective: str) -> list[dict[float, Tensor]]:
    """Tables of the student by time, of each round: the teacher's N steps become N / 2, ..., 1."""
    tables = [{k / num_steps: world.teacher for k in range(1, num_steps + 1)}]
    for n in iter(lambda: round(1 / min(tables[-1])), 1):
        last = tables[-1]
        tables.append(
            {
                k / n: world.learned(last[k / n], last[(k - 1) / n], k / n, (k - 1) / n, objective)
                for k in range(2, n + 1, 2)
            }
        )
    return tables


@pytest.mark.parametrize(
    ("name", "two_steps", "entropy", "one_step"),
    [
        ("ising", [0.2821, 0.2740, 0.2614, 0.2496], [2.4843, 2.4709, 2.4466, 2.4101], [1.0976, 1.1247]),
        ("random", [0.1162, 0.1134, 0.1092, 0.1053], [2.4519, 2.4435, 2.4287, 2.4093], [0.4278, 0.4382]),
    ],
)
def test_rounds_sharpen(name: str, two_steps: list[float], entropy: list[float], one_step: list[float]) -> None:
    """Reverse KL, exact, 16 teacher steps: a little is gained at two steps, the entropy falls, and a single step gets worse."""
    world = Tabular(name, 4)
    tables = rounds(world, 16, "reverse_kl")
    at_two = [world.kl_and_entropy(one, 2) for one in tables[:4]]
    assert [kl for kl, _ in at_two] == pytest.approx(two_steps, abs=6e-5)
    assert [h for _, h in at_two] == pytest.approx(entropy, abs=6e-5)
    assert [world.kl_and_entropy(one, 1)[0] for one in (tables[0], tables[-1])] == pytest.approx(one_step, abs=6e-5)


def test_the_arithmetic_mean_is_the_teacher_under_the_true_joint() -> None:
    """Tower property: with x_s from the true posterior the forward KL has nothing to teach; with the product kernel almost."""
    world = Tabular("ising", 4)
    p, clean = world.toy.joint.p, world.toy.joint.states
    t, s = 1.0, 0.5
    forward = torch.zeros(len(clean), len(world.states), dtype=torch.float64)  # q(x_s | x_0)
    for row, x_0 in enumerate(clean):
        kept = torch.where(world.is_masked, s, (1 - s) * (world.states == x_0).double())
        forward[row] = kept.prod(1)
    true_step = torch.eye(len(world.states), dtype=torch.float64)
    true_step[-1] = p @ forward  # from all masks at t = 1 nothing is known
    given = (world.teacher, world.teacher, t, s)
    exact = world.learned(*given, "forward_kl", true_step)[-1].exp()
    torch.testing.assert_close(exact, world.teacher[-1].exp(), rtol=0, atol=1e-12)
    product = world.learned(*given, "forward_kl")[-1].exp()
    assert 1e-4 < float((product - exact).abs().max()) < 0.01


def test_the_geometric_mean_is_sharper_as_a_rule() -> None:
    world = Tabular("random", 4)
    entropy = [
        torch.special.entr(world.learned(world.teacher, world.teacher, 0.5, 0.25, objective).exp()).sum(-1)
        for objective in ("forward_kl", "reverse_kl")
    ]
    lost = (entropy[0] - entropy[1])[world.is_masked]
    assert float(lost.mean()) > 1e-3
    assert float(lost.median()) > 0
    # and not always: a rare target that is sure of the unlikely token
    targets = torch.tensor([[0.3, 0.7], [0.999, 0.001]], dtype=torch.float64).log()
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64)
    ends = [float(fixed_point(targets, weights, kind).exp()[0]) for kind in ("forward_kl", "reverse_kl")]
    assert ends == pytest.approx([0.3699, 0.4820], abs=1e-4)


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl"])
def test_fixed_points_are_minima(objective: str) -> None:
    targets = torch.randn(5, 1, 2, 4, generator=seeded(1), dtype=torch.float64).log_softmax(-1)
    weights = torch.rand(5, generator=seeded(2), dtype=torch.float64)
    weights, everywhere = weights / weights.sum(), torch.ones(1, 2, dtype=torch.bool)
    gradients = {}
    for name in ("reverse_kl", "forward_kl"):
        at = fixed_point(targets, weights[:, None, None].expand(5, 1, 2), name).requires_grad_()
        loss = sum(
            w * sdtt_loss(at.log_softmax(-1), q, everywhere, objective).sum()
            for w, q in zip(weights, targets, strict=True)
        )
        gradients[name] = float(torch.autograd.grad(loss, at)[0].abs().max())
    assert gradients[objective] < 1e-8
    assert max(gradients.values()) > 1e-2


def test_sampled_targets_have_the_exact_means() -> None:
    world = Tabular("ising", 3)
    calls = []

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return world.teacher[state_index(x_t, VOCAB)]

    n = 20_000
    x_t = torch.tensor([[MASK, 0, MASK]]).expand(n, -1)
    times = torch.tensor([0.8, 0.4, 0.2], dtype=torch.float64)[:, None].expand(3, n)
    target = sdtt_targets(teacher, PROCESS, x_t, times, seeded(3))
    assert calls == [0.8, 0.4]
    row = int(state_index(x_t[:1], VOCAB))
    exact = world.learned(world.teacher, world.teacher, 0.8, 0.4, "forward_kl")[row].exp()
    for i in (0, 2):
        p = target[:, i].exp()
        error = p.std(0) / math.sqrt(n) + 1e-12
        assert (((p.mean(0) - exact[i]) / error).abs() < 4.5).all()
        assert float((p.mean(0) - world.teacher[row, i].exp()).abs().max()) < 0.05
        assert len(p[:, 0].round(decimals=9).unique()) == 3  # now, or with the other position open to 0 or 1
    one_step = sdtt_targets(teacher, PROCESS, x_t[:1], times[:2, :1], None)
    assert torch.equal(one_step, world.teacher[row][None])


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "tvd", "mse"])
def test_losses_are_zero_at_the_target_and_finite_elsewhere(objective: str) -> None:
    world = Tabular("random", 3)
    student = clean_log_p(world.teacher + torch.randn(world.teacher.shape, generator=seeded()), MASK).requires_grad_()
    assert float(sdtt_loss(world.teacher, world.teacher, world.is_masked, objective).abs().max()) < 1e-12
    loss = sdtt_loss(student, world.teacher, world.is_masked, objective)
    assert (loss[world.is_masked.any(1)] > 0).all()
    assert (loss[~world.is_masked.any(1)] == 0).all()
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def test_losses_by_hand() -> None:
    p, q = torch.tensor([[[0.5, 0.5, 0.0]]]).double(), torch.tensor([[[0.9, 0.1, 0.0]]]).double()
    log_p, log_q = (x.clamp(min=1e-300).log() for x in (p, q))
    one = torch.ones(1, 1, dtype=torch.bool)
    assert float(sdtt_loss(log_p, log_q, one)) == pytest.approx(0.5 * math.log(0.25 / 0.09))
    assert float(sdtt_loss(log_p, log_q, one, "forward_kl")) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert float(sdtt_loss(log_p, log_q, one, "tvd")) == pytest.approx(0.4)
    assert float(sdtt_loss(log_p, log_q, one, "mse")) == pytest.approx((math.log(1.8) ** 2 + math.log(0.2) ** 2) / 3)
    with pytest.raises(ValueError, match="`objective` is 'kl'; allowed are 'reverse_kl'"):
        sdtt_loss(log_p, log_q, one, "kl")
    with pytest.raises(ValueError, match="it needs at least 2 rows"):
        sdtt_targets(lambda x, t: x, PROCESS, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None)
