"""The mixture block of the learned scheduler: dependent tokens in one call of a frozen network, its law by enumeration, learned
by the marginal objective, and what the config says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from laws import all_states, chi_square_z, kl, random_denoiser, state_index
from torch import Tensor
from toys import MASK, VOCAB, Toy, minimise

from discrete_schedulers import AncestralScheduler, LearnedScheduler
from discrete_schedulers.evaluation import sampler_nll_bound
from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.schedulers.learned_utils import mixture_of, tilted
from discrete_schedulers.training.marginal import Coefficients, descend, learned_kernel

FACTS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "mask_token_id": MASK,
    "unmasking": "bernoulli",
    "noise_schedule": "linear",
}
PROCESS = AbsorbingProcess(VOCAB, MASK, "linear")
ONE_STEP = torch.tensor([1.0, 0.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start_of(components: int, length: int, seed: int = 0) -> Coefficients:
    shift = torch.randn(components * length * (VOCAB - 1), generator=seeded(seed), dtype=torch.float64)
    return {"mixture_weight": torch.zeros(components, dtype=torch.float64), "mixture_shift": shift}


def scheduler_of(coefficients: Coefficients, num_steps: int, **changes: Any) -> LearnedScheduler:
    blocks = {name: block.tolist() for name, block in coefficients.items()}
    scheduler = LearnedScheduler(**FACTS | changes, coefficients={str(num_steps): blocks})
    scheduler.set_timesteps(num_steps)
    return scheduler


def together(law: Tensor, states: Tensor) -> Tensor:
    """Product over positions of a law (..., S, L, V), as a matrix over all states, (..., S, S)."""
    return torch.stack([law[..., i, states[:, i]] for i in range(states.shape[1])]).prod(0)


def final_law(scheduler: LearnedScheduler, toy: Toy, num_steps: int) -> Tensor:
    """Law of the last sample over the clean rows, from `components`."""
    law = torch.zeros(len(toy.states), dtype=torch.float64)
    law[-1] = 1.0
    for index in range(num_steps):
        log_weights, each = scheduler.components(toy.log_p_0, index, toy.states)
        law = law @ torch.einsum("k,kst->st", log_weights.exp(), together(each, toy.states))
    return law[toy.clean]


def learned_law_of(toy: Toy, coefficients: Coefficients, num_steps: int) -> Tensor:
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    step_of = learned_kernel(PROCESS, times)
    law = torch.zeros(len(toy.states), dtype=torch.float64)
    law[-1] = 1.0
    for index in range(num_steps):
        step = step_of(coefficients, index, toy.log_p_0.clamp(min=-1e30), toy.states)
        law = law @ torch.einsum("k,kst->st", step.log_weights.exp(), together(step.law, toy.states))
    return law[toy.clean]


@pytest.mark.parametrize(
    ("name", "components", "teacher", "best"),
    [
        ("ising", 2, 1.0976, 0.0705),
        ("random", 2, 0.4278, 0.0470),
        pytest.param("random", 4, 0.4278, 0.0, marks=pytest.mark.slow),
    ],
)
def test_one_call_with_a_mixture(name: str, components: int, teacher: float, best: float, tmp_path: Path) -> None:
    """No temperature and no grid helps a single call; a latent for each row does. 18 floats for two components."""
    toy = Toy(name, 4)
    p = toy.joint.p
    plain = LearnedScheduler(**FACTS)
    plain.set_timesteps(1)
    product = together(plain.transition(toy.log_p_0, 0, toy.states), toy.states)[-1, toy.clean]
    assert kl(p, product) == pytest.approx(teacher, abs=5e-5)
    found = [
        minimise(lambda c: (p * (p / learned_law_of(toy, c, 1)).log()).sum(), start_of(components, 4, seed), 60.0)
        for seed in range(3)
    ]
    coefficients, value = min(found, key=lambda pair: pair[1])
    assert value == pytest.approx(best, abs=6e-5)
    assert sum(block.numel() for block in coefficients.values()) == components * 9
    scheduler = scheduler_of(coefficients, 1)
    scheduler.save_pretrained(tmp_path)
    loaded = LearnedScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(1)
    assert loaded.config.coefficients == scheduler.config.coefficients
    assert kl(p, final_law(loaded, toy, 1)) == pytest.approx(value, abs=1e-9)
    x = torch.full((20_000, 4), MASK)
    x = loaded.step(toy.denoiser(x, 1.0), 0, x, generator=seeded()).prev_sample
    assert chi_square_z(state_index(x, 2).bincount(minlength=16), final_law(loaded, toy, 1)) < 4.5


def test_learned_by_the_marginal_objective() -> None:
    """Score-function gradients of KL(data || sampler), exact ratio; the floats go into the config as they are."""
    toy, first = Toy("ising", 4), start_of(2, 4, seed=1)

    def log_ratio(coefficients: Coefficients, x: Tensor) -> Tensor:
        with torch.no_grad():
            return (learned_law_of(toy, coefficients, 1) / toy.joint.p).log()[state_index(x, 2)]

    masks, bounds = torch.full((512, 4), MASK), {"mixture_shift": (-6.0, 6.0)}
    given = (
        learned_kernel(PROCESS, ONE_STEP),
        first,
        toy.denoiser,
        masks,
        ONE_STEP[:1],
        log_ratio,
        250,
        seeded(),
        bounds,
    )
    *_, last = descend(*given, divergence="forward_kl")
    assert kl(toy.joint.p, final_law(scheduler_of(last, 1), toy, 1)) < 1.15 * 0.0705


def some_blocks(num_steps: int, length: int) -> Coefficients:
    blocks = {"rate": [0.8, 1.3], "inverse_temperature": [0.6, 1.7], "gate_b": [0.3, -0.4], "counts": [1.0, 2.0]}
    one = {name: torch.tensor(values[:num_steps], dtype=torch.float64) for name, values in blocks.items()}
    weight = torch.tensor([0.4, -0.3, 0.0], dtype=torch.float64)
    return one | start_of(3, length, seed=5) | {"mixture_weight": weight}


def test_samples_have_the_law_beside_all_other_blocks() -> None:
    toy, blocks = Toy("ising", 3), some_blocks(2, 3)
    scheduler = scheduler_of(blocks, 2, grid="learned")
    expected = final_law(scheduler, toy, 2)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(learned_law_of(toy, blocks, 2), expected, rtol=0, atol=1e-12)
    x, generator = torch.full((20_000, 3), MASK), seeded(1)
    for t in scheduler.timesteps:
        chosen = scheduler.positions(t, x, generator)  # all masks: there is a gate
        rows = RowLogits(toy.denoiser(x, t)[chosen], chosen)
        x = scheduler.step(rows, t, x, generator=generator).prev_sample
    assert chi_square_z(state_index(x, 2).bincount(minlength=8), expected) < 4.5


def test_transition_is_the_law_of_each_position() -> None:
    toy = Toy("random", 3)
    scheduler = scheduler_of(some_blocks(2, 3), 2, grid="learned")
    log_weights, each = scheduler.components(toy.log_p_0, 1, toy.states)
    matrix = torch.einsum("k,kst->st", log_weights.exp(), together(each, toy.states))
    law = scheduler.transition(toy.log_p_0, 1, toy.states)
    for i in range(3):
        for v in range(VOCAB):
            expected = matrix[:, toy.states[:, i] == v].sum(1)
            torch.testing.assert_close(law[:, i, v], expected, rtol=0, atol=1e-12)
    assert float((together(law, toy.states) - matrix).abs().max()) > 0.01  # and not that of the row


def test_equal_components_are_none() -> None:
    """Laws, not draws: a latent takes a random number of its own."""
    zero = {"mixture_weight": [0.3, -1.0], "mixture_shift": [0.0] * 16}
    ours = LearnedScheduler(**FACTS, coefficients={"3": zero})
    other = AncestralScheduler(**FACTS)
    x = all_states(VOCAB, 4)
    logits = random_denoiser(VOCAB)(x, 1.0)
    for scheduler in (ours, other):
        scheduler.set_timesteps(3)
    for index in range(3):
        law = other.transition(logits, index, x)
        torch.testing.assert_close(ours.transition(logits, index, x), law, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.components(logits, index, x)[1][1], law, rtol=0, atol=1e-12)
        found = ours.step(logits, index, x, generator=seeded())
        torch.testing.assert_close(
            found.pred_logits.softmax(-1)[..., :MASK], logits[..., :MASK].softmax(-1), rtol=0, atol=1e-12
        )


def test_the_mask_may_stand_anywhere_among_the_ids() -> None:
    mixture = mixture_of(torch.zeros(2), torch.arange(12.0), 4, 1)
    assert mixture.shift.tolist()[0] == [[0, 0, 1, 2], [3, 0, 4, 5]]
    assert mixture.log_weights.exp().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("unmasking", ["counts", "bernoulli"])
def test_a_batch_is_its_rows(unmasking: str) -> None:
    scheduler = scheduler_of(start_of(2, 6, seed=3), 2, unmasking=unmasking)
    x = torch.full((5, 6), MASK)
    x[:, 1] = torch.tensor([0, 1, MASK, 1, 0])
    logits = random_denoiser(VOCAB)(x, 1.0)
    whole = scheduler.step(logits, 0, x, generator=[seeded(i) for i in range(5)]).prev_sample
    for i in range(5):
        row = slice(i, i + 1)
        assert torch.equal(scheduler.step(logits[row], 0, x[row], generator=seeded(i)).prev_sample, whole[row])
    assert torch.equal(whole[x != MASK], x[x != MASK])


def test_what_is_refused() -> None:
    good = {"mixture_weight": [0.0, 0.0], "mixture_shift": [0.0] * 16}
    for blocks, message in [
        ({"mixture_weight": [0.0]}, "a mixture is 'mixture_weight' and 'mixture_shift', not one of them"),
        (
            good | {"mixture_shift": [0.0] * 15},
            "'mixture_shift' has 15 values; 2 components of 2 tokens need a multiple of 4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            LearnedScheduler(**FACTS, coefficients={"2": blocks})
    with pytest.raises(ValueError, match="'mixture_shift' is for masks"):
        LearnedScheduler(vocab_size=3, process="uniform", coefficients={"2": {"mixture_shift": [0.0]}})
    scheduler = LearnedScheduler(**FACTS, coefficients={"2": good, "3": {"rate": [1.0] * 3}})
    scheduler.set_timesteps(2)
    x = torch.full((1, 5), MASK)
    with pytest.raises(ValueError, match="'mixture_shift' is for 4 positions, but `sample` has 5"):
        scheduler.step(random_denoiser(VOCAB)(x, 1.0), 0, x)
    with pytest.raises(ValueError, match="LearnedScheduler has a mixture"):
        sampler_nll_bound(random_denoiser(VOCAB), scheduler, torch.zeros(2, 4, dtype=torch.int64), 2)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="coefficients for 3 steps have no 'mixture_weight'"):
        scheduler.components(random_denoiser(VOCAB)(x, 1.0), 0, x)


def test_shifts_are_added_by_hand() -> None:
    """What learning finds, it finds for either sign; published coefficients mean this one."""
    shift = torch.tensor([0.0, 0.0, 0.3, -0.2], dtype=torch.float64)  # of two components, one position, two tokens
    mixture = mixture_of(torch.zeros(2, dtype=torch.float64), shift, VOCAB, MASK)
    found = tilted(torch.tensor([[[1.0, 2.0, -5.0]]], dtype=torch.float64), torch.full((1, 1), MASK), mixture)
    assert found.squeeze().tolist() == [[1.0, 2.0, -5.0], [1.3, 1.8, -5.0]]
