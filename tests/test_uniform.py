"""Samplers of the uniform process: exact laws by enumeration, and diffusers' own scheduler beside ours."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from laws import (
    all_states,
    chi_square_z,
    exact_denoiser,
    kl,
    prior_law,
    random_denoiser,
    random_joint,
    run_law,
    state_index,
    step_matrix,
    total_variation,
)
from scheduler_cases import CASES, SchedulerCase
from torch import Tensor, nn

from discrete_schedulers import (
    AncestralScheduler,
    DiscreteDDIMScheduler,
    DiscreteScheduler,
    EulerScheduler,
    GibbsCorrectorScheduler,
    LSDScheduler,
    NetworkDenoiser,
    PsiScheduler,
    RowLogits,
    TauLeapingScheduler,
    UniformProcess,
)
from discrete_schedulers.sampling import draw_states
from discrete_schedulers.schedulers.scheduling_utils import selection_confidence

V, LENGTH = 3, 3
JOINT = random_joint(V, LENGTH, seed=12)
STATES = all_states(V, LENGTH)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_grid(scheduler: Any, num_steps: int) -> Any:
    scheduler.set_timesteps(num_steps)
    return scheduler


def noise_law(alpha: float, width: int = V) -> Tensor:
    """q(x_t | x_0), (x_0, x_t)."""
    return alpha * torch.eye(width, dtype=torch.float64) + (1 - alpha) / width


def run_error(scheduler: DiscreteScheduler, num_steps: int) -> float:
    """Total variation between the joint and the law of the samples."""
    return total_variation(
        JOINT.p, run_law(scheduler, exact_denoiser(JOINT, scheduler.noise_process), num_steps, LENGTH)
    )


# Ancestral steps, whatever the network returns


class Law(nn.Module):
    """p(x_0^i | x_t), or with `is_blind` without looking at x_t^i, by enumeration of all clean rows."""

    def __init__(self, alpha: float, is_blind: bool) -> None:
        super().__init__()
        self.noise, self.is_blind = noise_law(alpha), is_blind

    def forward(self, x_t: Tensor) -> Tensor:
        evidence = self.noise[JOINT.states[None], x_t[:, None]]  # (B, S, L), q(x_t^j | x_0^j)
        law = torch.zeros(*x_t.shape, V, dtype=torch.float64)
        for i in range(LENGTH):
            seen = [j for j in range(LENGTH) if j != i or not self.is_blind]
            weight = JOINT.p * evidence[:, :, seen].prod(-1)
            for v in range(V):
                law[:, i, v] = weight[:, JOINT.states[:, i] == v].sum(1)
        return law.log() + 3.0  # no normalisation


@pytest.mark.parametrize("noise_schedule", ["loglinear", "cosine"])
def test_ancestral_is_exact_for_each_position(noise_schedule: str) -> None:
    """Both parametrizations, against a sum over x_0 of p(x_0 | x_t) q(x_s^i | x_t^i, x_0^i), for every x_t."""
    scheduler = on_grid(AncestralScheduler(V, process="uniform", noise_schedule=noise_schedule), 3)
    alpha_t, alpha_s = (float(scheduler.noise_process.alpha(time)) for time in scheduler.times[1:3])
    to_s, to_t, later = noise_law(alpha_s), noise_law(alpha_t), noise_law(alpha_t / alpha_s)
    weight = JOINT.p * to_t[JOINT.states[None], STATES[:, None]].prod(-1)  # (x_t, x_0)
    weight = weight / weight.sum(1, keepdim=True)
    bridge = to_s[:, :, None] * later[None] / to_t[:, None]  # (x_0, x_s, x_t)
    expected = torch.stack(
        [torch.einsum("tc,cst->ts", weight, bridge[JOINT.states[:, i]][:, :, STATES[:, i]]) for i in range(LENGTH)], 1
    )
    laws = {}
    for is_blind in (False, True):
        for parametrization in ("x0", "leave_one_out"):
            network = Law(alpha_t, is_blind)
            denoiser = NetworkDenoiser(
                network, V, process="uniform", parametrization=parametrization, noise_schedule=noise_schedule
            )
            laws[is_blind, parametrization] = scheduler.transition(denoiser(STATES, scheduler.times[1]), 1, STATES)
    for right in ((False, "x0"), (True, "leave_one_out")):
        torch.testing.assert_close(laws[right], expected, rtol=0, atol=1e-12)
    for wrong in ((True, "x0"), (False, "leave_one_out")):
        assert (laws[wrong] - expected).abs().sum(-1).max() / 2 > 0.04


def plug_in(y: Tensor, x_t: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """The published bridge (UDLM, DUO) with a law y in place of a clean token, one position, (V,)."""
    width, kept = len(y), alpha_t / alpha_s
    own = torch.nn.functional.one_hot(x_t, width).double()
    law = (alpha_t * width * y + kept - alpha_t) * own + (alpha_s - alpha_t) * y + (1 - kept) * (1 - alpha_s) / width
    return law / (alpha_t * width * y[x_t] + 1 - alpha_t)


def test_the_published_bridge_wants_the_leave_one_out_law() -> None:
    """Five tokens, one position: with l it is our step, with p_0 it is off by 0.04."""
    prior = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    scheduler = on_grid(AncestralScheduler(5, process="uniform", noise_schedule="linear"), 4)
    x_t, alpha_t, alpha_s = torch.tensor(3), 0.5, 0.75
    p_0 = prior * noise_law(alpha_t, 5)[:, x_t]
    p_0 = p_0 / p_0.sum()
    law = scheduler.transition(p_0.log()[None, None], 2, x_t[None, None])[0, 0]
    torch.testing.assert_close(plug_in(prior, x_t, alpha_t, alpha_s), law, rtol=0, atol=1e-12)
    assert total_variation(plug_in(p_0, x_t, alpha_t, alpha_s), law) > 0.03


# Temperature and top-p


def sharpened(p: Tensor, temperature: float, top_p: float) -> Tensor:
    """p^(1 / temperature), then the most probable tokens with a mass of at least top_p; p falls."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    kept = p.cumsum(0) - p < top_p
    return p * kept / (p * kept).sum()


@pytest.mark.parametrize("cls", [AncestralScheduler, DiscreteDDIMScheduler, PsiScheduler])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.0, 0.75), (0.7, 0.9), (0.0, 1.0)])
def test_a_sharpened_leave_one_out_law_is_what_is_sampled(
    cls: type[DiscreteScheduler], temperature: float, top_p: float
) -> None:
    """One position: every step is that of the sharpened data, and so the samples have their law, whatever the number of
    steps. Sharpening p_0, which holds what x_t says of itself, gives another law for each."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    wanted = sharpened(p, temperature, top_p) if temperature else torch.eye(4, dtype=torch.float64)[0]
    joint = random_joint(4, 1)._replace(p=p)
    arguments: dict[str, Any] = {"process": "uniform", "noise_schedule": "linear"}
    arguments |= {"temperature": temperature, "top_p": top_p}
    error = {}
    for tempered in ("leave_one_out", "denoiser"):
        scheduler = cls(4, tempered=tempered, **arguments)
        denoiser = exact_denoiser(joint, scheduler.noise_process)
        error[tempered] = [total_variation(wanted, run_law(scheduler, denoiser, n, 1)) for n in (1, 2, 8, 32)]
    assert max(error["leave_one_out"]) < 1e-12
    ours, plain = on_grid(cls(4, **arguments), 4), on_grid(cls(4, process="uniform", noise_schedule="linear"), 4)
    of_the_wanted, x = exact_denoiser(joint._replace(p=wanted), plain.noise_process), torch.arange(4)[:, None]
    for index, t in enumerate(ours.timesteps):
        law = ours.transition(denoiser(x, t), index, x)
        torch.testing.assert_close(law, plain.transition(of_the_wanted(x, t), index, x), rtol=0, atol=1e-12)
    assert error["denoiser"][0] < 1e-12  # at t = 1 the token says nothing
    assert error["denoiser"][-1] > 0.02


def test_top_p_of_the_denoiser_freezes_what_it_should_correct() -> None:
    """By hand: V = 1000, alpha_t = 1/2, so the token's own gain is 1001. With l = 0.02 it has 0.953 of p_0, and top-p 0.9
    leaves nothing else. Of l alone it is not among the best 0.9."""
    width = 1000
    one_out = torch.full((width,), 0.98 / (width - 1), dtype=torch.float64)
    one_out[0], one_out[7] = 0.92, 0.02
    one_out[[v for v in range(width) if v not in (0, 7)]] = 0.06 / (width - 2)
    x_t = torch.tensor([[7]])
    law = {}
    for tempered in ("leave_one_out", "denoiser"):
        scheduler = AncestralScheduler(width, process="uniform", noise_schedule="linear", top_p=0.9, tempered=tempered)
        on_grid(scheduler, 2)
        p_0 = one_out.clone()
        p_0[7] *= 1001
        output = scheduler.step(p_0.log()[None, None], 1, x_t, generator=seeded())
        law[tempered] = scheduler.transition(p_0.log()[None, None], 1, x_t)[0, 0]
        torch.testing.assert_close(output.pred_logits.softmax(-1)[0, 0], law[tempered], rtol=0, atol=1e-12)
    assert law["denoiser"][7] == 1
    assert law["leave_one_out"][0] == 1


# Discrete DDIM and Psi


@pytest.mark.parametrize("sigma_share", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_forward_marginal(sigma_share: float) -> None:
    """sum over x_t of q(x_t | x_0) q_sigma(x_s | x_t, x_0) = q(x_s | x_0): with a certain x_0 as the prediction."""
    scheduler = on_grid(DiscreteDDIMScheduler(4, sigma_share=sigma_share), 5)
    for index in range(5):
        alpha_t, alpha_s = (float(scheduler.noise_process.alpha(time)) for time in scheduler.times[index : index + 2])
        x_t = torch.arange(4)[None]
        for x_0 in range(4):
            certain = torch.full((1, 4, 4), -math.inf).index_fill(-1, torch.tensor([x_0]), 0.0)
            kernel = scheduler.transition(certain, index, x_t)[0]  # (x_t, x_s)
            arrived = noise_law(alpha_t, 4)[x_0] @ kernel
            torch.testing.assert_close(arrived, noise_law(alpha_s, 4)[x_0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_single_positions_keep_their_law(value: float, num_steps: int) -> None:
    """Positions that do not depend on each other are sampled exactly, for every value of the knob."""
    marginals = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64)
    joint = random_joint(V, 2)._replace(p=torch.outer(*marginals).flatten())
    for scheduler in (
        DiscreteDDIMScheduler(V, noise_schedule="linear", sigma_share=value),
        PsiScheduler(V, noise_schedule="linear", kappa=value),
    ):
        law = run_law(scheduler, exact_denoiser(joint, scheduler.noise_process), num_steps, 2)
        assert total_variation(joint.p, law) < 1e-13


def test_ddim_routes_by_hand() -> None:
    """alpha_t = 1/2, alpha_s = 3/4: the largest sigma is 1/2, which leaves 1/2 for p_0 and nothing for noise; half of it
    leaves 5/8 and 1/8."""
    own, p_0 = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64)
    for sigma_share, parts in ((1.0, (1 / 2, 1 / 2, 0)), (0.5, (1 / 4, 5 / 8, 1 / 8)), (0.0, (0, 3 / 4, 1 / 4))):
        scheduler = on_grid(DiscreteDDIMScheduler(3, noise_schedule="linear", sigma_share=sigma_share), 4)
        law = scheduler.transition(p_0.log()[None, None], 2, torch.tensor([[1]]))[0, 0]
        torch.testing.assert_close(law, parts[0] * own + parts[1] * p_0 + parts[2] / 3, rtol=0, atol=1e-14)
        assert scheduler.routes(2) == pytest.approx(parts, abs=1e-15)


def test_ddim_asks_for_logits_where_it_draws() -> None:
    scheduler = on_grid(DiscreteDDIMScheduler(5), 4)
    x = torch.zeros(400, 10, dtype=torch.int64)
    for index in range(4):
        share = float(scheduler.positions(index, x, seeded(index)).double().mean())
        expected = 1 / (4 - index)  # (alpha_s - alpha_t) / (1 - alpha_t) with log-linear noise
        assert share == pytest.approx(expected, abs=4.5 * (expected * (1 - expected) / x.numel()) ** 0.5)


def test_psi_by_hand() -> None:
    """kappa 1 is the ancestral step; kappa 0 noises a fresh prediction."""
    x, logits = torch.tensor([[1, 0, 2]]), random_denoiser(V)(torch.tensor([[1, 0, 2]]), 1.0)
    ancestral = on_grid(AncestralScheduler(V, process="uniform", noise_schedule="linear"), 4).transition(logits, 1, x)
    fresh = 0.5 * logits.softmax(-1) + 0.5 / 3
    for kappa in (0.0, 0.3, 1.0):
        law = on_grid(PsiScheduler(V, noise_schedule="linear", kappa=kappa), 4).transition(logits, 1, x)
        torch.testing.assert_close(law, kappa * ancestral + (1 - kappa) * fresh, rtol=0, atol=1e-14)


def test_ddim_and_psi_are_two_curves() -> None:
    """No kappa gives the step that never adds noise."""
    x, logits = torch.tensor([[1]]), random_denoiser(V)(torch.tensor([[1]]), 1.0)
    ddim = on_grid(DiscreteDDIMScheduler(V), 4).transition(logits, 1, x)
    gap = [
        float((on_grid(PsiScheduler(V, kappa=k / 20), 4).transition(logits, 1, x) - ddim).abs().max())
        for k in range(21)
    ]
    assert min(gap) > 0.02


def test_laws_of_whole_runs() -> None:
    """Three dependent tokens: the more a step carries over, the closer; the maximal coupling is closer than ancestral
    sampling for every number of steps above 1."""
    for num_steps in (1, 2, 4, 8):
        ddim = [run_error(DiscreteDDIMScheduler(V, sigma_share=share), num_steps) for share in (0.0, 0.5, 1.0)]
        psi = [run_error(PsiScheduler(V, kappa=kappa), num_steps) for kappa in (0.0, 0.5, 1.0)]
        assert psi[2] == pytest.approx(run_error(AncestralScheduler(V, process="uniform"), num_steps), abs=1e-14)
        assert psi[0] == pytest.approx(ddim[0], abs=1e-14)  # both forget x_t
        if num_steps == 1:
            assert max(ddim + psi) - min(ddim + psi) < 1e-12
        else:
            assert ddim[0] > ddim[1] > ddim[2]
            assert psi[0] > psi[1] > psi[2] > ddim[2]


@pytest.mark.parametrize(("cls", "knob"), [(DiscreteDDIMScheduler, "sigma_share"), (PsiScheduler, "kappa")])
def test_a_constant_share_stops_converging(cls: type[DiscreteScheduler], knob: str) -> None:
    """Half as many redraws in steps half as long keep first order; as many redraws in each step do not."""
    constant = [run_error(cls(V, **{knob: 0.5}), n) for n in (32, 64, 128)]
    assert 0.02 < constant[2] < constant[0] < 0.035
    shrinking = []
    for n in (32, 64, 128):
        coefficients = {str(n): {knob: [1 - 2 / n] * n}}
        shrinking.append(run_error(cls(V, coefficients=coefficients), n))
    assert math.log2(shrinking[2] / shrinking[1]) == pytest.approx(-1, abs=0.1)
    assert shrinking[2] < 0.01


def test_errors_of_constant_shares() -> None:
    """The figures of the docstring, at 128 steps."""
    errors = [run_error(DiscreteDDIMScheduler(V, sigma_share=share), 128) for share in (0.0, 0.5, 1.0)]
    assert errors == pytest.approx([0.052, 0.024, 0.004], abs=5e-4)


@pytest.mark.parametrize(("cls", "knob"), [(DiscreteDDIMScheduler, "sigma_share"), (PsiScheduler, "kappa")])
def test_learned_knobs(cls: type[DiscreteScheduler], knob: str) -> None:
    learned = cls(V, coefficients={"2": {knob: [0.25, 0.5]}})
    constant = [cls(V, **{knob: value}) for value in (0.25, 0.5)]
    x = STATES[:4]
    logits = random_denoiser(V)(x, 1.0)
    on_grid(learned, 2)
    for index in (0, 1):
        expected = on_grid(constant[index], 2).transition(logits, index, x)
        assert torch.equal(learned.transition(logits, index, x), expected)
    with pytest.raises(ValueError, match="no coefficients for `num_inference_steps` 3; learned budgets: 2"):
        learned.set_timesteps(3)
    cls(V, grid="learned", coefficients={"2": {"times": [1, 0.4, 0]}}).set_timesteps(2)  # the constant is meant
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(
            ValueError, match=rf"`{knob}` is \[?{bad}\]?; (allowed are numbers in \[0, 1\]|it must be a finite)"
        ):
            cls(V, **{knob: bad})
    with pytest.raises(ValueError, match=rf"`{knob}` for 2 steps is \[0.5, 1.5\]"):
        cls(V, coefficients={"2": {knob: [0.5, 1.5]}})


def test_a_scheduler_for_uniform_noise_swaps_into_one_for_both() -> None:
    """`process` has another default there: diffusers drops defaults on the way, and what was passed by position."""
    for scheduler in (DiscreteDDIMScheduler(V), PsiScheduler(V), GibbsCorrectorScheduler(vocab_size=V)):
        there = AncestralScheduler.from_config(scheduler.config)
        assert (there.config.process, there.config.vocab_size) == ("uniform", V)
    assert AncestralScheduler.from_config(AncestralScheduler(5, 4).config).config.mask_token_id == 4
    # a class of diffusers has the name of this one: its config is not taken for theirs
    ddim = DiscreteDDIMScheduler(V, sigma_share=0.5, temperature=0.7)
    there = AncestralScheduler.from_config(ddim.config)
    assert there.config.temperature == 0.7
    assert DiscreteDDIMScheduler.from_config(there.config).config.sigma_share == 0.5
    with pytest.raises(ValueError, match="`process` is 'absorbing'; PsiScheduler is for 'uniform'"):
        PsiScheduler.from_config(AncestralScheduler(5, 4).config)


# diffusers' discrete DDIM


@pytest.mark.parametrize("index", [0, 2, 3])
def test_discrete_ddim_of_diffusers_is_ancestral_sampling(index: int) -> None:
    """Their step draws x_0 and then one of three routes. Over its draws the law is our transition, at temperature 1."""
    theirs, batch = diffusers.DiscreteDDIMScheduler(), 6000
    theirs.set_timesteps(4)
    ours = on_grid(AncestralScheduler(V, process="uniform", noise_schedule="linear"), 4)
    x = torch.tensor([[1, 0, 2]])
    logits = random_denoiser(V, seed=3)(x, 1.0)
    drawn = theirs.step(
        logits.expand(batch, -1, -1), index, x.expand(batch, -1), temperature=1.0, generator=seeded(index)
    ).prev_sample
    law = ours.transition(logits, index, x)[0]
    for i in range(3):
        assert chi_square_z(torch.bincount(drawn[:, i], minlength=V), law[i]) < 4.5
    other = on_grid(DiscreteDDIMScheduler(V, noise_schedule="linear"), 4).transition(logits, index, x)[0]
    if index == 2:  # the family that bears the name elsewhere is not it
        assert max(chi_square_z(torch.bincount(drawn[:, i], minlength=V), other[i]) for i in range(3)) > 10


@pytest.mark.parametrize("tempered", ["denoiser", "leave_one_out"])
def test_temperature_of_diffusers_discrete_ddim_is_the_denoisers(tempered: str) -> None:
    theirs, batch = diffusers.DiscreteDDIMScheduler(), 6000
    theirs.set_timesteps(4)
    ours = AncestralScheduler(V, process="uniform", noise_schedule="linear", temperature=0.5, tempered=tempered)
    x = torch.tensor([[1]])
    logits = random_denoiser(V, seed=4)(x, 1.0)
    drawn = theirs.step(
        logits.expand(batch, -1, -1), 2, x.expand(batch, -1), temperature=0.5, generator=seeded()
    ).prev_sample
    law = on_grid(ours, 4).transition(logits, 2, x)[0, 0]
    z = chi_square_z(torch.bincount(drawn[:, 0], minlength=V), law)
    assert z < 4.5 if tempered == "denoiser" else z > 10


# Leave-one-out corrections


def corrector(**kwargs: Any) -> GibbsCorrectorScheduler:
    return GibbsCorrectorScheduler(V, **kwargs)


def noisy_law(scheduler: DiscreteScheduler, t: float) -> Tensor:
    """p_t over all states, (S,)."""
    one = noise_law(float(scheduler.noise_process.alpha(t)))
    return torch.einsum("abc,ax,by,cz->xyz", JOINT.p.view(V, V, V), one, one, one).flatten()


def choice_law(scheduler: GibbsCorrectorScheduler, law: Tensor) -> Tensor:
    """P(position i is the one that is drawn anew), (S, L): Gumbel noise makes it a softmax."""
    if scheduler.config.selection == "random":
        return torch.full(STATES.shape, 1 / LENGTH, dtype=torch.float64)
    confidence = selection_confidence(law.log(), STATES, scheduler.config.selection)
    return (-confidence / scheduler.config.selection_temperature).softmax(-1)


def correction_matrix(scheduler: GibbsCorrectorScheduler, logits: Tensor, index: int) -> Tensor:
    """P(x' | x) of a correction of one position, (S, S)."""
    law = scheduler.conditional(logits, index, STATES)
    choice = choice_law(scheduler, law)
    matrix = torch.zeros(len(STATES), len(STATES), dtype=torch.float64)
    for i in range(LENGTH):
        others = [j for j in range(LENGTH) if j != i]
        is_neighbour = (STATES[:, None, others] == STATES[None, :, others]).all(-1)
        matrix += choice[:, i, None] * is_neighbour * law[:, i, STATES[:, i]]
    return matrix


def corrected_run_law(scheduler: GibbsCorrectorScheduler, num_steps: int) -> Tensor:
    """Law of the samples of a run over all states, (S,)."""
    on_grid(scheduler, num_steps)
    predictor = on_grid(AncestralScheduler.from_config(scheduler.config), num_steps)
    denoiser = exact_denoiser(JOINT, scheduler.noise_process)
    law = prior_law(scheduler, LENGTH)
    for index, t in enumerate(scheduler.timesteps):
        step, is_correction = scheduler.place(index)
        if is_correction:
            law = law @ correction_matrix(scheduler, denoiser(STATES, t), index)
        else:
            law = law @ step_matrix(predictor, denoiser, step, LENGTH)
    return law


@pytest.mark.parametrize("noise_schedule", ["loglinear", "cosine"])
def test_a_random_correction_keeps_the_law(noise_schedule: str) -> None:
    scheduler = on_grid(corrector(noise_schedule=noise_schedule), 4)
    denoiser = exact_denoiser(JOINT, scheduler.noise_process)
    for index in (1, 3, 5):
        s = float(scheduler.timesteps[index])
        assert scheduler.place(index) == (index // 2, True)
        p_s = noisy_law(scheduler, s)
        matrix = correction_matrix(scheduler, denoiser(STATES, s), index)
        torch.testing.assert_close(p_s @ matrix, p_s, rtol=0, atol=1e-15)
        assert (matrix - torch.eye(len(STATES))).abs().max() > 0.1  # and it does something
        gain = math.log(float(UniformProcess(V, noise_schedule).own_gain(s)))
        own = torch.zeros(*STATES.shape, V, dtype=torch.float64).scatter(-1, STATES[..., None], gain)
        # a leave-one-out law taken for p_0, from which the token's own word is then taken away a second time
        wrong = correction_matrix(scheduler, denoiser(STATES, s) - own, index)
        assert total_variation(p_s @ wrong, p_s) > 1e-5
        # p_0 taken for the leave-one-out law is no such fault: to predict one token and to noise it again keeps p_s too ...
        renoised = correction_matrix(scheduler, denoiser(STATES, s) + own, index)
        torch.testing.assert_close(p_s @ renoised, p_s, rtol=0, atol=1e-15)
        uniform = torch.full((len(STATES),), 1 / len(STATES), dtype=torch.float64)
        assert kl(uniform @ matrix, p_s) < kl(uniform @ renoised, p_s) < kl(uniform, p_s)  # ... but moves less


def test_a_random_correction_brings_a_wrong_law_closer() -> None:
    scheduler = on_grid(corrector(), 4)
    logits = exact_denoiser(JOINT, scheduler.noise_process)(STATES, scheduler.timesteps[3])
    p_s, law = noisy_law(scheduler, 0.5), torch.full((len(STATES),), 1 / len(STATES), dtype=torch.float64)
    distance = [kl(law, p_s)]
    for _ in range(40):
        law = law @ correction_matrix(scheduler, logits, 3)
        distance.append(kl(law, p_s))
    assert all(after < before for before, after in itertools.pairwise(distance))
    assert distance[-1] < 0.01 * distance[0]


@pytest.mark.parametrize("selection", ["lowest_margin", "lowest_max_probability", "lowest_current_probability"])
def test_an_informed_correction_moves_the_law(selection: str) -> None:
    """Said to keep p_s; it does not, and the samples of a long run are farther off than without corrections."""
    scheduler = on_grid(corrector(selection=selection), 4)
    p_s = noisy_law(scheduler, 0.5)
    logits = exact_denoiser(JOINT, scheduler.noise_process)(STATES, scheduler.timesteps[3])
    assert total_variation(p_s @ correction_matrix(scheduler, logits, 3), p_s) > 0.005
    plain = run_law(
        AncestralScheduler(V, process="uniform"), exact_denoiser(JOINT, scheduler.noise_process), 16, LENGTH
    )
    assert kl(JOINT.p, corrected_run_law(corrector(selection=selection), 16)) > kl(JOINT.p, plain)


def test_laws_of_corrected_runs() -> None:
    """Random corrections help a run with as many steps, and first order stays; as many calls without them are better here."""
    ancestral, process = AncestralScheduler(V, process="uniform"), UniformProcess(V)
    denoiser, error = exact_denoiser(JOINT, process), {}
    for n in (1, 2, 4, 8, 16, 32):
        error[n] = kl(JOINT.p, corrected_run_law(corrector(), n))
        if n > 1:
            assert error[n] < kl(JOINT.p, run_law(ancestral, denoiser, n, LENGTH))
            assert error[n] > kl(JOINT.p, run_law(ancestral, denoiser, 2 * n - 1, LENGTH)) or n == 2
    assert error[1] == pytest.approx(kl(JOINT.p, run_law(ancestral, denoiser, 1, LENGTH)), abs=1e-14)
    assert math.log2(error[32] / error[16]) == pytest.approx(-2, abs=0.15)  # of the KL, quadratic in the error


@pytest.mark.parametrize("selection", ["random", "lowest_margin"])
def test_samples_of_a_corrected_run_follow_its_law(selection: str) -> None:
    scheduler, batch = corrector(selection=selection, num_corrector_steps=2, selection_temperature=0.7), 4000
    law = corrected_run_law(scheduler, 3)
    denoiser = exact_denoiser(JOINT, scheduler.noise_process)
    x = scheduler.sample_prior((batch, LENGTH), seeded(1))
    generator = seeded(2)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x, generator=generator).prev_sample
    assert chi_square_z(torch.bincount(state_index(x, V), minlength=len(law)), law) < 4.5


def test_a_learned_selection_temperature_is_that_of_the_step_before() -> None:
    """0 in the first step: its correction takes the least confident position; 50 in the second: any."""
    coefficients = {"3": {"selection_temperature": [0.0, 50.0, 0.0]}}
    scheduler = on_grid(corrector(selection="lowest_current_probability", coefficients=coefficients), 3)
    law = torch.tensor([[[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.1, 0.8, 0.1]]], dtype=torch.float64).expand(900, -1, -1)
    x = torch.tensor([[0, 1, 2]]).expand(900, -1)
    first, second = (scheduler.least_confident(law, step, x, seeded()).double().mean(0) for step in (0, 1))
    assert first.tolist() == [0.0, 0.0, 1.0]
    assert second.tolist() == pytest.approx([1 / 3] * 3, abs=0.08)
    logits = law.log()
    one, other = (scheduler.step(logits, index, x, generator=seeded(1)).prev_sample for index in (1, 3))
    assert torch.equal(one[:, :2], x[:, :2])
    assert not torch.equal(other[:, :2], x[:, :2])


def test_calls_of_a_corrected_run() -> None:
    for corrections in (0, 1, 2):
        scheduler = on_grid(corrector(num_corrector_steps=corrections), 4)
        expected = [1.0] + [0.75] * (corrections + 1) + [0.5] * (corrections + 1) + [0.25] * (corrections + 1)
        assert scheduler.timesteps.tolist() == expected
        assert scheduler.order == corrections + 1
        kinds = [scheduler.place(index) for index in range(len(expected))]
        inner = [[(step - 1, True)] * corrections + [(step, False)] for step in (1, 2, 3)]
        assert kinds == [(0, False), *inner[0], *inner[1], *inner[2]]
    single = on_grid(corrector(), 1)
    assert single.timesteps.tolist() == [1.0]


def test_choice_of_positions_by_hand() -> None:
    """Probabilities of three tokens at three positions; the tokens are 0, 1, 2. Margins: log .5/.3, log .6/.3, log .1/.8;
    largest: .5, .6, .8; current: .5, .6, .1."""
    law = torch.tensor([[[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.1, 0.8, 0.1]]], dtype=torch.float64)
    sample = torch.tensor([[0, 1, 2]])
    expected = {
        "lowest_margin": ([math.log(0.5 / 0.3), math.log(2), math.log(0.1 / 0.8)], [True, False, True]),
        "lowest_max_probability": ([math.log(p) for p in (0.5, 0.6, 0.8)], [True, True, False]),
        "lowest_current_probability": ([math.log(p) for p in (0.5, 0.6, 0.1)], [True, False, True]),
    }
    for selection, (confidence, chosen) in expected.items():
        scheduler = corrector(selection=selection, positions_per_correction=2, selection_temperature=0.0)
        assert selection_confidence(law.log(), sample, selection)[0].tolist() == pytest.approx(confidence, abs=1e-15)
        assert scheduler.least_confident(law, 0, sample, seeded())[0].tolist() == chosen


@pytest.mark.parametrize("selection", ["lowest_margin", "lowest_max_probability", "lowest_current_probability"])
def test_noisy_choice_is_a_softmax(selection: str) -> None:
    """The largest of numbers with Gumbel noise: position i with a probability in proportion to exp(-confidence / tau)."""
    scheduler, batch = corrector(selection=selection, selection_temperature=0.5), 6000
    law = random_denoiser(V)(torch.tensor([[0, 1, 2, 0]]), 1.0).softmax(-1)
    sample = torch.tensor([[0, 1, 2, 0]])
    expected = (-selection_confidence(law.log(), sample, selection)[0] / 0.5).softmax(-1)
    chosen = scheduler.least_confident(law.expand(batch, -1, -1), 0, sample.expand(batch, -1), seeded())
    assert (chosen.sum(1) == 1).all()
    assert chi_square_z(chosen.sum(0), expected) < 4.5


def test_corrections_change_as_many_positions_as_asked() -> None:
    x = torch.randint(0, 50, (6, 20), generator=seeded())
    for selection in ("random", "lowest_margin"):
        scheduler = GibbsCorrectorScheduler(50, selection=selection, positions_per_correction=4)
        on_grid(scheduler, 3)
        after = scheduler.step(random_denoiser(50)(x, 1.0), 1, x, generator=seeded(1)).prev_sample
        assert ((after != x).sum(1) <= 4).all()
        assert (after != x).sum() > 12
        if selection == "random":
            assert (scheduler.positions(1, x, seeded(2)).sum(1) == 4).all()
        assert scheduler.positions(4, x, seeded(2)).all()  # the last step, and those before it ask fewer
        assert not scheduler.positions(2, x, seeded(2)).all()


JUMPING = [case for case in CASES if not case.is_absorbing and case.has_law and case.cls is not DiscreteDDIMScheduler]
JUMPING += [case for case in CASES if case.name == "predictor-corrector-uniform"]  # each call has a law


@pytest.mark.parametrize("case", JUMPING, ids=[case.name for case in JUMPING])
def test_jumps_are_the_transition(case: SchedulerCase) -> None:
    """Choose, then sample, by enumeration: with p = p_0(x_t), the chance to be asked, to jump, to x_0 != x_t and to any other
    state make the transition law of every token, at every call; nobody is asked less often than it jumps."""
    for width in (2, 7):
        scheduler = case.build(width)
        scheduler.set_timesteps(7)
        if case.kwargs.get("jumps") == "reject" or case.kwargs.get("scale") == "log_score":
            assert scheduler.jumps_at(0) is None
            assert scheduler.positions(0, torch.zeros(1, 2, dtype=torch.int64)) is None
            continue
        asked = []
        for index in range(len(scheduler.calls)):
            logits = 3 * torch.randn(1, width, width, dtype=torch.float64, generator=seeded(index))
            x_t = torch.arange(width)[None]
            p_0 = scheduler.shaped_law(logits, index, x_t)[0]  # (x_t, v)
            to_clean, at_random, at_random_own = scheduler.jumps_at(index)
            own = p_0.diagonal()
            clean, other = to_clean * (1 - own), at_random * (1 - own) + at_random_own * own
            factor = scheduler.jump_factor(index, clean + other)
            asked.append(float((to_clean + at_random) * scheduler.jump_factor(index, to_clean + at_random)))
            law = (clean * factor / (1 - own))[:, None] * p_0 + (other * factor / (width - 1))[:, None]
            law = law.fill_diagonal_(0.0)
            assert (law.sum(1) <= asked[-1] + 1e-12).all()
            law = law + (1 - law.sum(1)).diag()
            torch.testing.assert_close(law, scheduler.transition(logits, index, x_t)[0], rtol=0, atol=1e-13)
        assert asked[-1] == pytest.approx(1)
        assert min(asked) < 0.85  # and the rest of the network's head is not run


@pytest.mark.parametrize("cls", [AncestralScheduler, EulerScheduler, LSDScheduler, TauLeapingScheduler])
@pytest.mark.parametrize("draw", ["one_stage_float32", "one_stage_1e-6"])
def test_published_races_are_run_over_all_states(cls: type[DiscreteScheduler], draw: str) -> None:
    """No position is chosen before, and a step is the race of its transition law, uniform by uniform."""
    more = {"unmasking": "bernoulli"} if cls is AncestralScheduler else {}
    scheduler = on_grid(cls(5, process="uniform", draw=draw, **more), 4)
    x, logits = torch.randint(0, 5, (3, 8), generator=seeded()), torch.randn(3, 8, 5, generator=seeded(1))
    assert scheduler.positions(1, x, seeded()) is None
    law = scheduler.transition(logits, 1, x)
    expected = draw_states(law, seeded(2), draw)
    assert torch.equal(scheduler.step(logits, 1, x, generator=seeded(2)).prev_sample, expected)
    with pytest.raises(ValueError, match="needs all of them"):
        scheduler.step(RowLogits.everywhere(logits), 1, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_jumps_over_a_wide_vocabulary(temperature: float, dtype: torch.dtype) -> None:
    """How often a token stays, and which hundred it goes to, as in the transition: weights are summed by blocks of 128."""
    width, number = 700, 4000
    width, number = 700, 4000
    scheduler = on_grid(AncestralScheduler(width, process="uniform", temperature=temperature), 4)
    logits = torch.randn(width, generator=seeded(), dtype=torch.float64)
    logits[300] += 7.0  # of its own token
    logits, x = logits.to(dtype), torch.full((1, number), 300)
    after = scheduler.step(logits.expand(1, number, -1), 2, x, generator=seeded(1)).prev_sample
    law = scheduler.transition(logits[None, None], 2, x[:, :1])[0, 0]
    place = torch.arange(width) // 100
    place[300] = 7
    law = torch.zeros(8, dtype=torch.float64).index_add_(0, place, law)
    assert 0.1 < law[7] < 0.9
    assert chi_square_z(torch.bincount(place[after[0]], minlength=8), law) < 4.5


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_jumps_where_the_network_is_sure_of_the_token(temperature: float) -> None:
    """Others have no share at all, or one that float32 has no number for: the token stays, but for noise. The step is the last,
    or one with P(jump) = (V - 1) / V (1 - kept) (1 - alpha_s) / (1 - alpha_t + V alpha_t)."""
    x = torch.randint(0, 5, (40, 100), generator=seeded())
    scheduler = on_grid(AncestralScheduler(5, process="uniform", noise_schedule="linear", temperature=temperature), 4)
    for gap in (math.inf, 300.0, 2000.0):
        logits = torch.full((40, 100, 5), -gap).scatter_(2, x[..., None], 5.0)
        assert torch.equal(scheduler.step(logits, 3, x, generator=seeded(1)).prev_sample, x)
        after = scheduler.step(logits, 1, x, generator=seeded(1)).prev_sample  # from alpha 1/4 to 1/2
        expected = 4 / 5 * 0.5 * 0.5 / (0.75 + 5 * 0.25) * x.numel()
        assert abs(int((after != x).sum()) - expected) < 4.5 * math.sqrt(expected)
    logits[0, 0] = -math.inf
    with pytest.raises(ValueError, match="`model_output` has NaN"):
        scheduler.step(logits, 3, x, generator=seeded(1))


def test_diffusers_corrections_have_our_conditional() -> None:
    """Their `step_correct` at one position, after the predictor step 1 of 4: alpha_s = 1/2."""
    theirs, batch = diffusers.DiscreteDDIMScheduler(corrector_steps=1, corrector_selection="random"), 6000
    theirs.set_timesteps(4)
    scheduler = on_grid(corrector(noise_schedule="linear"), 4)
    x = torch.tensor([[2]])
    logits = random_denoiser(V, seed=5)(x, 1.0)
    drawn = theirs.step_correct(logits.expand(batch, -1, -1), 1, x.expand(batch, -1), generator=seeded()).prev_sample
    law = scheduler.conditional(logits, 3, x)[0, 0]
    assert scheduler.timesteps[3] == 0.5
    assert chi_square_z(torch.bincount(drawn[:, 0], minlength=V), law) < 4.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_corrector_steps": -1}, "`num_corrector_steps` is -1; it must be at least 0"),
        ({"positions_per_correction": 0}, "`positions_per_correction` is 0; it must be at least 1"),
        ({"selection": "lowest"}, "`selection` is 'lowest'; allowed: 'random', 'lowest_margin'"),
        ({"selection_temperature": -1.0}, r"`selection_temperature` is -1.0; allowed"),
        ({"selection_temperature": math.nan}, "`selection_temperature` is nan"),
        ({"tempered": "both"}, "`tempered` is 'both'; allowed: 'leave_one_out', 'denoiser'"),
        (
            {"process": "absorbing", "mask_token_id": 2},
            "`process` is 'absorbing'; GibbsCorrectorScheduler is for 'uniform'",
        ),
        ({"mask_token_id": 2}, "`mask_token_id` must be None for the uniform process"),
    ],
)
def test_arguments_that_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrector(**kwargs)
