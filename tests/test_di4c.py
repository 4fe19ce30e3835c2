"""Di4C on joints that can be enumerated: control variates, the student that exact expectations of the losses lead to, and the
same from sampled batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from laws import all_states, state_index
from torch import Tensor
from toys import MASK, VOCAB, Toy

from discrete_schedulers import AncestralScheduler
from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training.di4c import (
    Losses,
    clean_log_p,
    consistency_loss,
    correlation_loss,
    correlation_weight,
    di4c_losses,
    distillation_loss,
    divergence,
    marginal_loss,
    mean_law,
    mixture_log_prob,
    mixture_nll_bound,
    product_log_prob,
    student_log_p,
    total_loss,
)

slow = pytest.mark.slow
LENGTH, COMPONENTS, GRID = 4, 4, 8
PROCESS = AbsorbingProcess(VOCAB, MASK, "linear")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tables:
    """A student that adds one of K tables to the teacher's logits, (K, S, L, 2), and everything about it by enumeration."""

    def __init__(self, toy: Toy, spread: float, seed: int = 0, components: int = COMPONENTS) -> None:
        self.toy, self.is_masked = toy, toy.states == MASK
        known = torch.where(self.is_masked[..., None], toy.log_p_0, 0.0)
        self.teacher = clean_log_p(known, MASK)  # (S, L, V)
        shape = (components, *self.is_masked.shape, MASK)
        self.table = (spread * torch.randn(shape, generator=seeded(seed), dtype=torch.float64)).requires_grad_()
        self.completions = toy.joint.states[:, None].expand(-1, len(toy.states), -1)  # (X, S, L)
        self.agrees = (self.is_masked | (self.completions == toy.states)).all(-1)  # (X, S)

    def log_p(self) -> Tensor:
        """(K, S, L, V)"""
        return clean_log_p(self.teacher + torch.nn.functional.pad(self.table, (0, 1)), MASK)

    def completion_law(self, log_p: Tensor) -> Tensor:
        """P(x_0 | x_t), (S, X)."""
        return (mixture_log_prob(log_p, self.completions, self.is_masked).exp() * self.agrees).T

    def step(self, log_p: Tensor, t: float, s: float) -> Tensor:
        """P(x_s | x_t) of a product (..., S, L, V), (..., S, S)."""
        states = self.toy.states
        each = [PROCESS.posterior(states, p, t, s) for p in log_p.exp().view(-1, *self.teacher.shape)]
        matrices = [torch.stack([one[:, i, states[:, i]] for i in range(states.shape[1])]).prod(0) for one in each]
        return torch.stack(matrices).view(*log_p.shape[:-3], len(states), len(states))

    def noised(self, t: float) -> Tensor:
        """q(x_t), (S,)."""
        masks = self.is_masked.sum(1)
        return (self.toy.joint.p @ self.agrees.double()) * t**masks * (1 - t) ** (self.is_masked.shape[1] - masks)

    def kl(self, log_p: Tensor, num_steps: int) -> float:
        """KL(data || samples of the student with a fresh latent in each step)."""
        law = torch.zeros(len(self.toy.states), dtype=torch.float64)
        law[-1] = 1.0
        for k in range(num_steps, 0, -1):
            law = law @ self.step(log_p, k / num_steps, (k - 1) / num_steps).mean(0)
        p = self.toy.joint.p
        return float((p * (p / law[self.toy.clean]).log()).sum())


def exact_objective(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """What the expectations over t = k / 8 and x_t need: sum_k q(x_t) T_k for k >= 2, the weight of each state in it, and q at
    t = 1 / 8, where the components are distilled."""
    steps = torch.zeros(len(tables.teacher), len(tables.teacher), dtype=torch.float64)
    for k in range(2, GRID + 1):
        steps += tables.noised(k / GRID)[:, None] * tables.step(tables.teacher, k / GRID, (k - 1) / GRID)
    return steps, steps.sum(1), tables.noised(1 / GRID)


def exact_loss(tables: Tables, given: tuple[Tensor, Tensor, Tensor], with_data: float) -> Tensor:
    """Distillation at t = 1 / 8, consistency above it, and with data the correlation and marginal losses as well."""
    steps, weight, first = given
    log_p = tables.log_p()
    law = tables.completion_law(log_p).detach()
    target = steps @ law  # (S, X), of mass `weight`
    gain = mixture_log_prob(log_p, tables.completions, tables.is_masked)
    gain = gain - product_log_prob(mean_law(log_p), tables.completions, tables.is_masked)
    gain = torch.where(tables.agrees, gain, 0.0).T
    one_hot = torch.nn.functional.one_hot(tables.toy.joint.states, VOCAB).double()
    marginals = torch.einsum("sx,xlv->slv", target, one_hot)
    loss = -(target * gain).sum() + divergence(marginals, mean_law(log_p), tables.is_masked).sum()
    loss = loss + first @ distillation_loss(tables.teacher, log_p, tables.is_masked)
    if with_data:
        posterior = tables.agrees * tables.toy.joint.p[:, None]
        for k in range(2, GRID + 1):
            a = correlation_weight(torch.tensor(k / GRID, dtype=torch.float64), with_data)
            loss = loss - a * tables.noised(k / GRID) @ (posterior / posterior.sum(0) * gain.T).sum(0)
        loss = loss + weight @ marginal_loss(tables.teacher, log_p, tables.is_masked)
    return loss


def learn(tables: Tables, with_data: float, iterations: int) -> dict[int, float]:
    given, optimizer = exact_objective(tables), torch.optim.Adam([tables.table], lr=0.05)
    for _ in range(iterations):
        optimizer.zero_grad()
        exact_loss(tables, given, with_data).backward()
        optimizer.step()
    log_p = tables.log_p().detach()
    return {n: tables.kl(log_p, n) for n in (1, 2, 4)}


@pytest.mark.parametrize(
    ("name", "with_data", "teacher", "learned"),
    [
        ("ising", 0.0, {1: 1.0976, 2: 0.2821, 4: 0.0818, 8: 0.0232}, {1: 0.0563, 2: 0.0190, 4: 0.0064}),
        pytest.param("ising", 1.0, {}, {1: 0.0311, 2: 0.0090, 4: 0.0035}, marks=slow),
        pytest.param(
            *("random", 0.0, {1: 0.4278, 2: 0.1162, 4: 0.0339, 8: 0.0096}, {1: 0.0214, 2: 0.0086, 4: 0.0030}),
            marks=slow,
        ),
    ],
)
def test_exact_expectations(name: str, with_data: float, teacher: dict[int, float], learned: dict[int, float]) -> None:
    """Consistency with a teacher of 8 steps brings a single call near its 8 steps; correlations of data nearer still."""
    tables = Tables(Toy(name, LENGTH), 1.0)
    assert {n: tables.kl(tables.teacher[None], n) for n in teacher} == pytest.approx(teacher, abs=5e-5)
    assert learn(tables, with_data, 600) == pytest.approx(learned, abs=2e-3)


# Control variates


def some_laws(length: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student of 3 components on one row of masks with a table as parameter, a target of 4 products, and all completions."""
    table = torch.randn(3, 1, length, VOCAB, generator=seeded(1), dtype=torch.float64).requires_grad_()
    target = clean_log_p(torch.randn(4, 1, length, VOCAB, generator=seeded(2), dtype=torch.float64), MASK).exp()
    completions = all_states(2, length)[:, None]  # (X, 1, L)
    return table, target, completions, torch.ones(1, length, dtype=torch.bool)


def test_consistency_has_the_mean_and_gradient_of_the_log_likelihood() -> None:
    """Over all draws x_0 ~ target j: -log P itself on one side, the loss of one target at a time on the other. They differ by
    the entropy of the targets, which the student does not change; and the draws differ less."""
    table, target, completions, is_masked = some_laws()
    log_p = clean_log_p(table, MASK)
    plain = -mixture_log_prob(log_p, completions, is_masked)[:, 0]  # (X,)
    means, variances = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for one in target:
        chance = product_log_prob(one.log(), completions, is_masked).exp()[:, 0]
        entropy = -torch.special.xlogy(one, one).sum()
        loss = torch.stack([consistency_loss(log_p, x[None], one[None], is_masked)[0] for x in completions]) + entropy
        both = torch.stack([plain, loss])
        means = means + both @ chance / len(target)
        variances = variances + (both**2) @ chance / len(target)
    assert float((means[0] - means[1]).detach().abs()) < 1e-12
    gradients = [torch.autograd.grad(mean, table, retain_graph=True)[0] for mean in means]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
    assert float(gradients[0].abs().max()) > 0.01
    spread = (variances - means**2).detach()
    assert float(spread[1]) < 0.7 * float(spread[0])


def test_correlation_gradient_has_no_part_in_the_marginals_of_its_own_law() -> None:
    """At data that are the student's own samples -log P has no gradient; with log Q subtracted, what is left is that of the
    marginals' entropy: a student with right correlations is not pushed anywhere else."""
    table, _, completions, is_masked = some_laws()
    log_p = clean_log_p(table, MASK)
    chance = mixture_log_prob(log_p, completions, is_masked).exp().detach()[:, 0]
    loss = torch.stack([correlation_loss(log_p, x[None], is_masked)[0] for x in completions]) @ chance
    marginals = divergence(mean_law(log_p).exp().detach(), mean_law(log_p), is_masked)[0]
    (gradient,) = torch.autograd.grad(loss + marginals, table)
    assert float(gradient.abs().max()) < 1e-12
    total = float(mixture_log_prob(log_p.detach(), completions, is_masked).exp().sum())
    assert total == pytest.approx(1, abs=1e-12)


def test_one_component_is_a_product() -> None:
    table, target, completions, is_masked = some_laws()
    log_p = clean_log_p(table[:1], MASK)
    assert float(correlation_loss(log_p, completions, is_masked).detach().abs()) < 1e-14
    torch.testing.assert_close(
        consistency_loss(log_p, completions[:4], target, is_masked), divergence(target.mean(0), log_p[0], is_masked)
    )
    known = torch.tensor([[True, False, True]])
    expected = log_p[0, 0, 0, 1] + log_p[0, 0, 2, 0]
    found = product_log_prob(log_p[0], torch.tensor([[[1, 0, 0]]]), known)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-14)


def test_distillation_alone_returns_the_teacher() -> None:
    """Every component of it, while the marginal loss holds their mean only."""
    tables = Tables(Toy("random", 2), 1.0)
    optimizer = torch.optim.LBFGS([tables.table], max_iter=200, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distillation_loss(tables.teacher, tables.log_p(), tables.is_masked).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = tables.teacher.exp()
    torch.testing.assert_close(tables.log_p().exp()[0][tables.is_masked], wanted[tables.is_masked], rtol=0, atol=1e-4)
    less = wanted.clone()  # two components with the teacher as their mean
    less[..., 0] *= 0.9
    less[..., 1] = 1 - less[..., 0]
    split = torch.stack([less, 2 * wanted - less]).clamp(min=1e-300).log()
    assert float(marginal_loss(tables.teacher, split, tables.is_masked).abs().max()) < 1e-12
    assert float(distillation_loss(tables.teacher, split, tables.is_masked).max()) > 1e-3
    assert float(distillation_loss(tables.teacher, tables.teacher[None], tables.is_masked).abs().max()) < 1e-15


# Batches


def test_zones_of_time() -> None:
    t = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    parts = Losses(*(torch.full((3,), value, dtype=torch.float64) for value in (1.0, 10.0, 100.0, 1000.0)))
    a = 1 / (1 + torch.tensor(-10.0, dtype=torch.float64).exp())
    assert total_loss(parts, t, 0.02, 0.1).tolist() == pytest.approx([1, 1015, 1010 + 10 * float(a)])


@slow
def test_sampled_batches_lead_there_too() -> None:
    """The same tables as a function of a latent in [0, 1), trained from samples: batches of data, J = 8 latents."""
    tables = Tables(Toy("ising", LENGTH), 0.5)
    toy, generator = tables.toy, seeded(3)
    optimizer = torch.optim.Adam([tables.table], lr=0.05)

    def student(x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        return tables.log_p()[(latent * COMPONENTS).long(), state_index(x_t, VOCAB)]

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        return tables.teacher[state_index(x_t, VOCAB)]

    for _ in range(200):
        rows = torch.multinomial(toy.joint.p, 64, replacement=True, generator=generator)
        t = (torch.randint(1, GRID + 1, (64,), generator=generator) / GRID).double()
        t[:24] = 1.0
        u = (t - 1 / GRID).clamp(min=1e-3)
        losses = di4c_losses(student, teacher, PROCESS, toy.joint.states[rows], t, u, 8, generator)
        loss = total_loss(losses, t, 1.5 / GRID, 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert tables.kl(tables.log_p().detach(), 1) < 0.12  # 1.0976 before


def test_latents_are_rows_of_one_call() -> None:
    calls = []

    def student(x_t: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        calls.append(len(x_t))
        return (latent + 10 * t + 100 * x_t[:, 0])[:, None, None] * torch.tensor([1.0, 2.0, 0.0]).expand(2, 3)

    x, t = torch.tensor([[0, 1], [1, 1]]), torch.tensor([0.1, 0.2])
    latents = torch.tensor([[0.3, 0.6], [0.7, 0.9], [0.0, 0.5]])
    found = student_log_p(student, x, t, latents, MASK)
    assert (calls, found.shape) == ([6], (3, 2, 2, 3))
    slope = (found[..., 1] - found[..., 0])[..., 0]
    torch.testing.assert_close(slope, latents + 10 * t + 100 * x[:, 0])
    assert float(found[..., MASK].max()) < -1e29


def test_bound_on_the_likelihood_of_a_mixture() -> None:
    """One step: -log P itself, as far as J latents show it. Two steps of two: the mean over all sets, weighed by the data."""
    tables = Tables(Toy("ising", LENGTH), 0.7)
    toy, log_p = tables.toy, tables.log_p().detach()
    scheduler = AncestralScheduler(VOCAB, MASK)

    def student(x_t: Tensor, t: Tensor, positions: Tensor, latent: Tensor) -> RowLogits:
        return RowLogits(log_p[(latent * COMPONENTS).long(), state_index(x_t, VOCAB)][positions], positions)

    data = toy.joint.states
    exact = -(mixture_log_prob(log_p, tables.completions, tables.is_masked)[:, -1] / LENGTH)  # (X,)
    found = mixture_nll_bound(student, scheduler, data, 1, 2000, seeded(1))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.04)
    few = mixture_nll_bound(student, scheduler, data.repeat(100, 1), 1, 2, seeded())
    assert float(few.mean()) > float(exact.mean()) + 0.01  # Jensen
    sets = [list(pair) for pair in itertools.combinations(range(LENGTH), 2)]
    pairs = torch.zeros(16, dtype=torch.float64)
    for chosen in sets:
        first = torch.zeros(1, LENGTH, dtype=torch.bool)
        first[0, chosen] = True
        x_t = torch.where(first, data, MASK)
        pairs -= mixture_log_prob(log_p[:, -1:].expand(-1, 16, -1, -1), data[None], first.expand(16, -1))[0]
        later = log_p[:, state_index(x_t, VOCAB)]
        pairs -= mixture_log_prob(later, data[None], (~first).expand(16, -1))[0]
    found = mixture_nll_bound(student, scheduler, data.repeat(80, 1), 2, 100, seeded()).view(80, -1)
    error = found.std(0) / 80**0.5
    assert ((found.mean(0) - pairs / len(sets) / LENGTH).abs() < 4.5 * error + 0.01).all()  # and Jensen


def test_what_is_refused() -> None:
    given = (lambda x, t, latent: None, lambda x, t: None, PROCESS, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="`num_latents` is 1; a mixture needs at least 2"):
        di4c_losses(*given, torch.tensor([0.5]), torch.tensor([0.4]), 1, None)
    with pytest.raises(ValueError, match="allowed are 0 < u < t <= 1"):
        di4c_losses(*given, torch.tensor([0.5]), torch.tensor([0.5]), 2, None)
