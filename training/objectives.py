r"""What `distill` minimises, as pure functions of states, floats and a denoiser. Absorbing processes.

**Coupling.** Teacher and student share two uniforms per position: a threshold U, so that a mask opens as soon as its chance
of still being one has fallen to U, and a token uniform for the inverse cumulative law. Each then has its exact law, and at
a shared time the same positions are open as far as the two agree.

**LSD** (paper, eq. 6): at each t_k, with s the score at the student's state x and s* at the teacher's x*,

    Phi_k = argmin  E sum_{rows masked in both} d(s*(x*, t_k), Phi s(x, t_k)),          s = alpha / (1 - alpha) p_0

| d              | between                        | optimum                                        | scale       |
| generalised KL | s* and Phi s, unnormalised     | sum s* / sum s: 1 for any normalised network   | "score"     |
| L2             | s* and Phi s                   | <s*, s> / <s, s>: below 1 as the states part   | "score"     |
| softmax KL     | s* and s^Phi, both normalised  | a one-dimensional convex problem (Newton)      | "log_score" |

alpha / (1 - alpha) is the same for all rows at t_k and cancels in all three. A softmax KL with a factor on the score itself
does not depend on Phi at all, so each d goes with one scale.

**LSD+** (eq. 8): kappa_k s(x_{tau_k}, tau_k) against (1 / N) s*(x*_{t_k}, t_k) with N teacher steps. As printed its optimum
is near 1 / N, not 1 / M: only early stopping keeps the M steps from stopping short. The repaired form compares with the
teacher's openings over the whole interval, (1 / N) sum_j hazard(t_j), and keeps sum kappa = 1 by a softmax.

Source: arXiv 2509.19962 (NeurIPS 2025). Statistics are sums in float64; scores are never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import RowLogits, categorical
from discrete_schedulers.schedulers import LSDScheduler

SCALE_OF = {"generalised_kl": "score", "l2": "score", "softmax_kl": "log_score"}  # what Phi multiplies in each d
PHI_RANGE = (1e-3, 1e3)  # where Newton's method looks
ROWS_IN_FLOAT64 = 256  # rows of logits held in float64 at a time: 100 MB at V = 50,000
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


def draw_noise(indices: Iterable[int], length: int, seed: int, device: torch.device | str = "cpu") -> SharedNoise:
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
    count = math.floor(share * length + 1e-9)  # 0.29 * 100 is 28.999999999999996
    replaced = noise.junk.argsort(1).argsort(1) < count
    law = unigram.to(start.device).double().log().expand(count, -1)
    for row, chosen, u in zip(start, replaced, noise.junk_tokens, strict=True):  # (count, V) at a time
        row[chosen] = categorical(law, u[chosen])
    return start


class CoupledRoll:
    """A sampler run on shared noise, one step at a time.

    Args:
        denoiser (`Denoiser`): The frozen network.
        scheduler (`LSDScheduler`): Absorbing, with its timesteps set; its coefficients may change between steps.
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

    def step(self, index: int) -> None:
        """From `times[index]` to `times[index + 1]`."""
        is_masked = self.state == self.scheduler.config.mask_token_id
        if self.scheduler.config.scale == "log_score":
            self.step_log_score(index, is_masked)
            return
        self.survival = self.survival * (1 - self.scheduler.open_probability(index))
        opens = is_masked & (self.noise.thresholds >= self.survival)
        for rows in self.batches(opens):  # the network sees only sequences in which something opens
            logits = row_logits(self.denoiser, self.state[rows], self.scheduler.times[index], opens[rows])
            tokens = categorical(self.scheduler.token_logits(logits), self.noise.tokens[rows][opens[rows]])
            self.state[rows] = self.state[rows].masked_scatter(opens[rows], tokens)

    def step_log_score(self, index: int, is_masked: Tensor) -> None:
        """The same where the chance to open depends on the logits: all masked rows are asked for."""
        mask = self.scheduler.config.mask_token_id
        for rows in self.batches(is_masked):
            asked = is_masked[rows]
            logits = row_logits(self.denoiser, self.state[rows], self.scheduler.times[index], asked)
            sheets = (self.survival[rows], self.noise.thresholds[rows], self.noise.tokens[rows])
            survived, drawn = [], []
            for some, before, threshold, u in zip(
                *(values.split(ROWS_IN_FLOAT64) for values in (logits, *(sheet[asked] for sheet in sheets))),
                strict=True,
            ):
                drawn.append(torch.full((len(some),), mask, device=some.device))
                law = self.scheduler.transition(some[:, None], index, drawn[-1][:, None])[:, 0]  # (r, V)
                survived.append(before * law[:, mask])
                opens = threshold >= survived[-1]
                law[:, mask] = 0.0
                drawn[-1][opens] = categorical(law[opens].log(), u[opens])
            self.survival[rows] = self.survival[rows].masked_scatter(asked, torch.cat(survived))
            self.state[rows] = self.state[rows].masked_scatter(asked, torch.cat(drawn))

    def batches(self, wanted: Tensor) -> tuple[Tensor, ...]:
        """Indices of the sequences that have a wanted position, in batches."""
        rows = wanted.any(1).nonzero()[:, 0]
        return rows.split(self.batch_size) if len(rows) else ()


def row_logits(denoiser: Denoiser, x: Tensor, t: Tensor, positions: Tensor) -> Tensor:
    """Logits at chosen positions, (R, V)."""
    rows = denoiser(x, t, positions=positions)
    assert isinstance(rows, RowLogits)
    return rows.logits


def token_nats(rows: RowLogits, tokens: Tensor, mask_token_id: int | None) -> Tensor:
    """-log p of a token of each row, (R,), float64, without the mask; a few rows at a time, never all of them in float64.

    Args:
        rows (`RowLogits`): Logits of R positions.
        tokens (`torch.Tensor` of shape `(R,)`): Int64.
        mask_token_id (`int` or `None`): The mask, where there is one.
    """
    found = [torch.empty(0, dtype=torch.float64, device=tokens.device)]
    for part, some in rows.chunks():
        wide = some.double()
        if mask_token_id is not None:
            wide = wide.index_fill(-1, torch.tensor([mask_token_id], device=some.device), -torch.inf)
        found.append(cross_entropy(wide, tokens[part], reduction="none"))
    return torch.cat(found)


def common_rows(
    denoiser: Denoiser, process: AbsorbingProcess, x: Tensor, teacher_x: Tensor, t: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """log p_0 at the student's and the teacher's state, (R, V) each, float64, at positions masked in both; in batches."""
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        both = (x[part] == process.mask_token_id) & (teacher_x[part] == process.mask_token_id)
        if both.any():
            own, star = (row_logits(denoiser, state, t, both) for state in (x[part], teacher_x[part]))
            for rows in zip(own.split(ROWS_IN_FLOAT64), star.split(ROWS_IN_FLOAT64), strict=True):
                yield rows[0].double().log_softmax(-1), rows[1].double().log_softmax(-1)


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
        process (`AbsorbingProcess`): Says what a mask is.
        x (`torch.Tensor` of shape `(B, L)`): Student's states at t.
        teacher_x (`torch.Tensor` of shape `(B, L)`): Teacher's states at t.
        t (`torch.Tensor`): The shared time.
        objective (`str`): `"generalised_kl"`, `"l2"` or `"softmax_kl"`.
        batch_size (`int`): Sequences in one call of the network.
        reduce (`Callable`): Sums a tensor over processes.

    Returns:
        `float`: The minimiser; 1.0 where no row is masked in both states.
    """
    if objective == "softmax_kl":
        return fit_power(denoiser, process, x, teacher_x, t, batch_size, reduce)
    sums = torch.zeros(2, dtype=torch.float64)  # <target>, <own>
    for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
        p, star = log_p.exp(), log_star.exp()
        own, target = (p, star) if objective == "generalised_kl" else (p * p, p * star)
        sums += torch.stack([target.sum(), own.sum()]).cpu()
    target_sum, own_sum = reduce(sums).tolist()
    return target_sum / own_sum if own_sum > 0 else 1.0


def fit_power(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x: Tensor,
    teacher_x: Tensor,
    t: Tensor,
    batch_size: int,
    reduce: Reduce,
) -> float:
    """argmin over Phi of sum_rows KL(p* || p^Phi / Z), convex: Newton's method, kept between the points where the slope is
    known to be negative and positive. Arguments as in `fit_phi`."""
    phi, (low, high) = 1.0, PHI_RANGE
    for _ in range(60):
        sums = torch.zeros(3, dtype=torch.float64)  # rows, first and second derivative
        for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
            log_score = log_p.masked_fill(log_p.isinf(), 0.0)  # 0 log 0 = 0
            law = (phi * log_p).softmax(-1)
            mean = (law * log_score).sum(-1)
            variance = (law * (log_score - mean[:, None]) ** 2).sum(-1)
            slope = mean - (log_star.exp() * log_score).sum(-1)
            sums += torch.stack([torch.ones_like(slope).sum(), slope.sum(), variance.sum()]).cpu()
        count, slope_sum, variance_sum = reduce(sums).tolist()
        if abs(slope_sum) <= 1e-13 * count:  # also where there are no rows, or uniform laws only
            return phi
        low, high = (phi, high) if slope_sum < 0 else (low, phi)
        newton = phi - slope_sum / variance_sum if variance_sum > 0 else math.inf
        following = newton if low < newton < high else math.sqrt(low * high)
        close = 1e-6 if following == newton else 1e-10  # what is left behind a Newton step is about its square
        if abs(following - phi) < close:
            return following
        phi = following
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
    """d/dPhi of the mean over common rows of d(s*, Phi s), or d(s*, s^Phi) with the softmax KL: what the paper's gradient
    steps follow. Arguments as in `fit_phi`, and the current `phi`, positive."""
    odds = process.alpha(t) / (1 - process.alpha(t))
    sums = torch.zeros(2, dtype=torch.float64)  # rows, gradient
    for log_p, log_star in common_rows(denoiser, process, x, teacher_x, t, batch_size):
        score, star = odds * log_p.exp(), odds * log_star.exp()
        if objective == "generalised_kl":  # sum_v Phi s - s* log(Phi s)
            gradient = (score - star / phi).sum()
        elif objective == "l2":
            gradient = (2 * score * (phi * score - star)).sum()
        else:
            log_score = log_p.masked_fill(log_p.isinf(), 0.0)  # the scale cancels between the two laws
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


def repaired_step_sizes(process: AbsorbingProcess, opened: Tensor, weights: Tensor) -> Tensor:
    """Step sizes kappa (M,), positive with sum 1, that open as much in each interval as the teacher does.

        min over kappa = softmax(logits) of  sum_k [ w_k r_k - a_k log r_k ],      r_k = kappa_k hazard(tau_k)

    the generalised KL of openings, smallest where r_k = a_k / w_k, the teacher's chance to open. tau_k is the time before the
    step and is differentiated too: with a constant hazard there, a grid that runs ahead would make its later steps look too
    large, shrink them, and run further ahead, until one step is all.

    Args:
        process (`AbsorbingProcess`): Gives the hazard. Log-linear or linear noise: with cosine and geometric noise it is 0 at
            t = 1, and no first step opens anything.
        opened (`torch.Tensor` of shape `(M,)`): a_k, openings from t_k to t_{k+1}: sum_j masked_j hazard(t_j) / N.
        weights (`torch.Tensor` of shape `(M,)`): w_k, rows masked at t_k.

    Returns:
        `torch.Tensor` of shape `(M,)`: Float64.

    Raises:
        ValueError: If the hazard is 0 at t = 1.
    """
    if process.noise_schedule not in ("loglinear", "linear"):
        raise ValueError(f"`--repaired` is for loglinear and linear noise; the model has {process.noise_schedule!r}")
    logits = torch.zeros(len(opened), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        kappa = logits.softmax(0)
        tau = kappa.flip(0).cumsum(0).flip(0).clamp(max=1.0)  # what is left of the time before each step
        opening = kappa * process.hazard(tau).reshape(-1)
        value = (weights * opening - opened * opening.log()).sum() / weights.sum()
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().softmax(0)


def times_from_step_sizes(kappa: Tensor) -> list[float]:
    """The grid 1 - cumulative sum, with the last step going to 0 whatever is left.

    Raises:
        ValueError: If a step is not positive or the grid reaches 0 before the last step.
    """
    times = [1.0, *(1 - kappa.double().cumsum(0))[:-1].tolist(), 0.0]
    if not all(a > b for a, b in pairwise(times)):
        raise ValueError(
            f"learned step sizes {kappa.tolist()} give times {times}, which do not fall strictly from 1 to 0"
        )
    return times
