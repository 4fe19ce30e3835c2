r"""What `distill` minimises, as pure functions of states, floats and a denoiser. Absorbing processes.

**Coupling.** Teacher and student share two uniforms per position: a threshold U, so that a mask opens as soon as its chance
of still being one has fallen to U, and a token uniform for the inverse cumulative law. Each then has its exact law, and at
a shared time the same positions are open as far as the two agree.

**LSD** (paper, eq. 6): at each t_k, with s the score at the student's state x and s* at the teacher's x*,

    Phi_k = argmin  E sum_{rows masked in both} d(s*(x*, t_k), Phi s(x, t_k)),          s = alpha / (1 - alpha) p_0

| d                | between                       | optimum                                        |
| generalised KL   | s* and Phi s, unnormalised    | sum s* / sum s: 1 for any normalised network   |
| L2               | s* and Phi s                  | <s*, s> / <s, s>: below 1 as the states part   |
| softmax KL       | p* and p^Phi, normalised      | a one-dimensional convex problem (Newton)      |

**LSD+** (eq. 8): kappa_k s(x_{tau_k}, tau_k) against (1 / N) s*(x*_{t_k}, t_k) with N teacher steps. As printed its optimum
is near 1 / N, not 1 / M: only early stopping keeps the M steps from stopping short. The repaired form compares with the
teacher's opening probability over the whole interval, (1 / N) sum_j hazard(t_j), and keeps sum kappa = 1 by a softmax.

Source: arXiv 2509.19962 (NeurIPS 2025). Statistics are sums in float64; scores are never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import RowLogits, categorical
from discrete_schedulers.schedulers import LSDScheduler

OBJECTIVES = ("generalised_kl", "l2", "softmax_kl")
Reduce = Callable[[Tensor], Tensor]


@dataclass
class SharedNoise:
    """Randomness of some samples, a function of (seed, sample index) alone.

    Args:
        thresholds (`torch.Tensor` of shape `(B, L)`): A mask opens when its survival falls to this.
        tokens (`torch.Tensor` of shape `(B, L)`): Uniforms for the token draws.
        junk (`torch.Tensor` of shape `(B, L)`): Uniforms that choose the positions perturbed in the relaxed objective.
        junk_tokens (`torch.Tensor` of shape `(B, L)`): Uniforms for the tokens put there.
    """

    thresholds: Tensor
    tokens: Tensor
    junk: Tensor
    junk_tokens: Tensor


def draw_noise(indices: range, length: int, seed: int, device: torch.device | str = "cpu") -> SharedNoise:
    """The shared uniforms of the samples with these indices, float64."""
    sheets = []
    for index in indices:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        sheets.append(torch.rand(4, length, generator=generator, dtype=torch.float64))
    stacked = torch.stack(sheets, dim=1).to(device)  # (4, B, L)
    return SharedNoise(*stacked)


def perturbed_start(noise: SharedNoise, mask_token_id: int, share: float, unigram: Tensor) -> Tensor:
    """All masks, with floor(share * L) positions of each row replaced by unigram tokens (the relaxed objective, eq. 9).

    Args:
        noise (`SharedNoise`): Chooses positions and tokens.
        mask_token_id (`int`): The mask.
        share (`float`): Hamming distance over L, in [0, 1).
        unigram (`torch.Tensor` of shape `(V,)`): Law of the junk tokens, 0 at the mask.

    Returns:
        `torch.Tensor` of shape `(B, L)`: The student's first state.
    """
    batch, length = noise.junk.shape
    start = torch.full((batch, length), mask_token_id, device=noise.junk.device)
    count = int(share * length)
    if count == 0:
        return start
    replaced = noise.junk.argsort(1).argsort(1) < count
    law = unigram.double().log().expand(batch * length, -1)
    junk = categorical(law, noise.junk_tokens.flatten()).view(batch, length)
    return torch.where(replaced, junk, start)


class CoupledRoll:
    """A sampler run on shared noise, one step at a time.

    Args:
        denoiser (`Denoiser`): The frozen network.
        scheduler (`LSDScheduler`): With its timesteps set; its coefficients may change between steps.
        noise (`SharedNoise`): Of the B samples.
        start (`torch.Tensor` of shape `(B, L)`): First state.
        batch_size (`int`): Sequences in one call of the network.
    """

    def __init__(
        self, denoiser: Denoiser, scheduler: LSDScheduler, noise: SharedNoise, start: Tensor, batch_size: int
    ) -> None:
        self.denoiser, self.scheduler, self.noise, self.batch_size = denoiser, scheduler, noise, batch_size
        self.state = start.clone()
        self.survival = torch.ones_like(noise.thresholds)  # chance of each position to be masked still
        self.num_evaluations = 0

    def step(self, index: int) -> None:
        """From `times[index]` to `times[index + 1]`."""
        process = self.scheduler.noise_process
        for start in range(0, len(self.state), self.batch_size):
            part = slice(start, start + self.batch_size)
            x, threshold, survival = self.state[part], self.noise.thresholds[part], self.survival[part]
            is_masked = x == process.mask_token_id
            if self.scheduler.config.scale == "score":
                opening, asked = self.scheduler.open_probability(index), None
            else:
                asked = self.denoiser(x, self.scheduler.times[index], positions=is_masked)
                law = self.row_law(asked.logits, index)  # (R, V)
                opening = torch.zeros_like(survival).masked_scatter(is_masked, 1 - law[:, process.mask_token_id])
            survival = survival * (1 - opening)
            opens = is_masked & (threshold >= survival)
            self.num_evaluations += int((opens if asked is None else is_masked).any(1).sum())
            if asked is None:
                rows = self.denoiser(x, self.scheduler.times[index], positions=opens).logits
            else:
                rows = law.index_fill(1, torch.tensor([process.mask_token_id], device=law.device), 0.0)
                rows = rows[opens[is_masked]].log()
            self.state[part] = x.masked_scatter(opens, categorical(rows, self.noise.tokens[part][opens]))
            self.survival[part] = survival

    def row_law(self, logits: Tensor, index: int) -> Tensor:
        """The scheduler's transition law of masked rows, (R, V)."""
        masks = torch.full((len(logits), 1), self.scheduler.config.mask_token_id, device=logits.device)
        return self.scheduler.transition(logits[:, None], index, masks)[:, 0]


def common_rows(
    denoiser: Denoiser, process: AbsorbingProcess, x: Tensor, teacher_x: Tensor, t: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """log p_0 at the student's and the teacher's state, (R, V) each, float64, at positions masked in both; in batches."""
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        both = (x[part] == process.mask_token_id) & (teacher_x[part] == process.mask_token_id)
        if both.any():
            rows: list[RowLogits] = [denoiser(state, t, positions=both) for state in (x[part], teacher_x[part])]
            yield rows[0].logits.double().log_softmax(-1), rows[1].logits.double().log_softmax(-1)


def fit_phi(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x: Tensor,
    teacher_x: Tensor,
    t: Tensor,
    objective: str,
    batch_size: int,
    reduce: Reduce,
) -> float:
    """Phi_k in closed form (generalised KL, L2) or by Newton's method (softmax KL).

    Args:
        denoiser (`Denoiser`): The frozen network.
        process (`AbsorbingProcess`): Gives the score's scale alpha / (1 - alpha).
        x (`torch.Tensor` of shape `(B, L)`): Student's states at t.
        teacher_x (`torch.Tensor` of shape `(B, L)`): Teacher's states at t.
        t (`torch.Tensor`): The shared time.
        objective (`str`): `"generalised_kl"`, `"l2"` or `"softmax_kl"`.
        batch_size (`int`): Sequences in one call of the network.
        reduce (`Callable`): Sums a tensor over processes.

    Returns:
        `float`: The minimiser; 1.0 where no row is masked in both states.
    """
    odds = process.alpha(t) / (1 - process.alpha(t))
    if objective != "softmax_kl":
        sums = torch.zeros(3, dtype=torch.float64)  # rows, target, own
        for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
            score, star = odds * log_p.exp(), odds * log_star.exp()
            own, target = (score, star) if objective == "generalised_kl" else (score * score, score * star)
            sums += torch.stack([torch.tensor(float(len(score))), target.sum().cpu(), own.sum().cpu()])
        sums = reduce(sums)
        return float(sums[1] / sums[2]) if sums[0] > 0 else 1.0

    phi = 1.0
    for _ in range(50):
        sums = torch.zeros(3, dtype=torch.float64)  # rows, first and second derivative
        for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
            log_score = torch.where(log_p.isfinite(), log_p + odds.log(), 0.0)  # the scale cancels, kept as in eq. 6
            law = (phi * log_p).softmax(-1)
            mean = (law * log_score).sum(-1)
            variance = (law * (log_score - mean[:, None]) ** 2).sum(-1)
            slope = mean - (log_star.exp() * log_score).sum(-1)
            sums += torch.stack([torch.tensor(float(len(law))), slope.sum().cpu(), variance.sum().cpu()])
        sums = reduce(sums)
        if sums[0] == 0 or sums[2] <= 0:
            return phi
        change = float((sums[1] / sums[2]).clamp(-0.5, 0.5))
        phi = max(phi - change, 1e-3)
        if abs(change) < 1e-10:
            break
    return phi


def phi_gradient(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x: Tensor,
    teacher_x: Tensor,
    t: Tensor,
    phi: float,
    objective: str,
    batch_size: int,
    reduce: Reduce,
) -> float:
    """d/dPhi of the mean over common rows of d(s*, Phi s): what the paper's gradient steps follow. Arguments as in
    `fit_phi`, and the current `phi`."""
    odds = process.alpha(t) / (1 - process.alpha(t))
    sums = torch.zeros(2, dtype=torch.float64)  # rows, gradient
    for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
        score, star = odds * log_p.exp(), odds * log_star.exp()
        if objective == "generalised_kl":  # sum_v Phi s - s* log(Phi s)
            gradient = (score - star / phi).sum()
        elif objective == "l2":
            gradient = (2 * score * (phi * score - star)).sum()
        else:
            log_score = torch.where(log_p.isfinite(), log_p, 0.0)
            gradient = (((phi * log_p).softmax(-1) - log_star.exp()) * log_score).sum()
        sums += torch.stack([torch.tensor(float(len(score))), gradient.cpu()])
    sums = reduce(sums)
    return float(sums[1] / sums[0]) if sums[0] > 0 else 0.0


def literal_kappa_gradient(
    process: AbsorbingProcess, tau: Tensor, t: Tensor, kappa: float, teacher_steps: int
) -> float:
    """d/dkappa of the generalised KL of (1 / N) s*(x*_t, t) and kappa s(x_tau, tau), a row's mean: LSD+ as printed (eq. 8).

    A normalised network has sum_v s = alpha / (1 - alpha) at every masked row, so this needs no logits.

    Args:
        process (`AbsorbingProcess`): Gives the odds alpha / (1 - alpha).
        tau (`torch.Tensor`): The student's time.
        t (`torch.Tensor`): The teacher's time.
        kappa (`float`): Current step size.
        teacher_steps (`int`): N.
    """
    own, target = (float(a / (1 - a)) for a in (process.alpha(tau), process.alpha(t)))
    return own - target / teacher_steps / kappa


def repaired_step_sizes(process: AbsorbingProcess, opened: Tensor, weights: Tensor, iterations: int = 2000) -> Tensor:
    """Step sizes kappa (M,), positive with sum 1, from the teacher's opening probability over each interval.

        min over softmax logits of  sum_k w_k [ kappa_k h_k - a_k log(kappa_k h_k) ],  h_k = hazard(tau_k), not differentiated

    Args:
        process (`AbsorbingProcess`): Gives the hazard.
        opened (`torch.Tensor` of shape `(M,)`): a_k, mean over rows masked at t_k of the accumulated teacher term.
        weights (`torch.Tensor` of shape `(M,)`): Rows masked at t_k.
        iterations (`int`, defaults to 2000): Steps of Adam on M numbers.

    Returns:
        `torch.Tensor` of shape `(M,)`: Float64.
    """
    logits = torch.zeros(len(opened), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        kappa = logits.softmax(0)
        tau = (1 - kappa.detach().cumsum(0) + kappa.detach()).clamp(min=1e-9, max=1.0)  # time before each step
        hazard = process.hazard(tau.reshape(-1)).reshape(-1)
        jump = kappa * hazard
        loss = (weights / weights.sum() * (jump - opened * jump.log())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return logits.detach().softmax(0)


def times_from_step_sizes(kappa: Tensor) -> list[float]:
    """The grid 1 - cumulative sum, with the last step going to 0 whatever is left.

    Raises:
        ValueError: If a step is not positive or the grid reaches 0 before the last step.
    """
    times = [1.0, *(1 - kappa.double().cumsum(0))[:-1].tolist(), 0.0]
    if not all(a > b for a, b in zip(times, times[1:], strict=False)):
        raise ValueError(
            f"learned step sizes {kappa.tolist()} give times {times}, which do not fall strictly from 1 to 0"
        )
    return times
