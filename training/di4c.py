r"""Di4C: distil many steps of a masked model into a student whose tokens depend on each other through a latent.

The teacher is a product over positions, p(x_0 | x_t) = prod_d p^d; the student is a mixture of products with a latent
l ~ U[0, 1]. With J latents for each row, and pbar^d = (1 / J) sum_j p^d(.; l_j),

    P(x_0 | x_t) = (1 / J) sum_j prod_d p^d(x_0^d | x_t; l_j),        Q(x_0 | x_t) = prod_d pbar^d(x_0^d)

Its four losses are, summed over masked positions d, with u < t,

    distillation   (1 / J) sum_j sum_d KL(teacher^d || p^d(.; l_j))        for small t: every component is the teacher
    consistency    E -log P(x_0 | x_t)    one teacher step x_u ~ p(x_u | x_t), then the student, x_0 ~ P(x_0 | x_u)
    correlation    -log P(x_0 | x_t)      with the x_0 that x_t was made of
    marginal       sum_d KL(teacher^d || pbar^d)

In the second and third, -log P is replaced by -(log P - log Q): a control variate. In the second the mean of -log Q given x_u
and the target's latent is known, sum_d CE(m^d, pbar^d), and is added back, so that nothing is biased but for the J under the
logarithm (the log of a mean of few is too low). In the third the marginal loss takes its place: correlations come from data,
marginals from the teacher.

Sampling is ordinary, with a fresh latent for each row and call: [`LatentModel`] and `LearnedScheduler(network_latent=True)`.

Source: Hayakawa et al., ICML 2025 (arXiv 2410.08709), and its released code for weights and zones of t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import Generators, RowLogits, draw_states, uniforms
from discrete_schedulers.schedulers import DiscreteScheduler
from discrete_schedulers.training.objectives import token_nats

Student: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B, L), t (B,), latent (B,)) -> logits (B, L, V)
Teacher: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, L), t (B,)) -> logits (B, L, V)


LOWEST = -1e30  # log 0: minus infinity would leave the gradient of a logarithm of a mean NaN


class Losses(NamedTuple):
    """The four losses of each row, in nats, (B,) each."""

    distillation: Tensor
    consistency: Tensor
    correlation: Tensor
    marginal: Tensor


# Laws and their logarithms. All take normalised log-probabilities of clean tokens and count masked positions only.


def clean_log_p(logits: Tensor, mask_token_id: int) -> Tensor:
    """Normalised log p(x_0 | x_t), (..., V), float32 or as wide as the logits, without the mask; `LOWEST` where it is 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(min=LOWEST)
    never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    never[mask_token_id] = True
    return logits.masked_fill(never, LOWEST).log_softmax(-1)


def mean_law(log_p: Tensor) -> Tensor:
    """log pbar = log (1 / J) sum_j p_j, (B, L, V), from (J, B, L, V)."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def mixture_log_prob(log_p: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
    """log P(x_0) = log (1 / J) sum_j prod_d p_j^d(x_0^d), (T, B).

    Args:
        log_p (`torch.Tensor` of shape `(J, B, L, V)`): The student in each of J latents.
        x_0 (`torch.Tensor` of shape `(T, B, L)`): T completions of each row.
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool; the positions that are counted.
    """
    each = torch.stack([product_log_prob(component, x_0, is_masked) for component in log_p])  # (J, T, B)
    return each.logsumexp(0) - math.log(len(log_p))


def product_log_prob(log_p: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
    """sum_d log p^d(x_0^d), (T, B), of one product (B, L, V). Arguments as in `mixture_log_prob`."""
    taken = log_p.expand(len(x_0), *log_p.shape).gather(-1, x_0[..., None])[..., 0]  # (T, B, L)
    return torch.where(is_masked, taken, 0.0).sum(-1)


def divergence(p: Tensor, log_q: Tensor, is_masked: Tensor) -> Tensor:
    """sum_d KL(p^d || q^d), (..., B), from laws p (..., B, L, V) that have no gradient."""
    each = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
    return torch.where(is_masked, each, 0.0).sum(-1)


# The losses


def distillation_loss(teacher: Tensor, log_p: Tensor, is_masked: Tensor) -> Tensor:
    """(1 / J) sum_j sum_d KL(teacher^d || p_j^d), (B,).

    Args:
        teacher (`torch.Tensor` of shape `(B, L, V)`): The teacher's normalised log-probabilities.
        log_p (`torch.Tensor` of shape `(J, B, L, V)`): The student's.
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool; the positions that are counted.
    """
    return divergence(teacher.exp(), log_p, is_masked).mean(0)


def marginal_loss(teacher: Tensor, log_p: Tensor, is_masked: Tensor) -> Tensor:
    """sum_d KL(teacher^d || pbar^d), (B,). Arguments as in `distillation_loss`."""
    return divergence(teacher.exp(), mean_law(log_p), is_masked)


def correlation_loss(log_p: Tensor, x_0: Tensor, is_masked: Tensor) -> Tensor:
    """-(log P - log Q)(x_0), a mean over T completions, (B,): what the dependence of the tokens gains on them.

    Args:
        log_p (`torch.Tensor` of shape `(J, B, L, V)`): The student.
        x_0 (`torch.Tensor` of shape `(T, B, L)`): The completions.
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool; the positions that are counted.
    """
    gain = mixture_log_prob(log_p, x_0, is_masked) - product_log_prob(mean_law(log_p), x_0, is_masked)
    return -gain.mean(0)


def consistency_loss(log_p: Tensor, x_0: Tensor, target: Tensor, is_masked: Tensor) -> Tensor:
    """Cross-entropy of the student at x_t with its own law after one teacher step, less the entropy of the mean target, (B,).

        -(1 / T) sum_j (log P - log Q)(x_0_j) + sum_d KL(mbar^d || pbar^d)

    Args:
        log_p (`torch.Tensor` of shape `(J, B, L, V)`): The student at x_t.
        x_0 (`torch.Tensor` of shape `(T, B, L)`): One draw from each target.
        target (`torch.Tensor` of shape `(T, B, L, V)`): Law of x_0 at each x_u and latent, known tokens certain.
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool; masks of x_t.
    """
    return correlation_loss(log_p, x_0, is_masked) + divergence(target.mean(0), mean_law(log_p), is_masked)


def correlation_weight(t: Tensor, scale: float = 1.0) -> Tensor:
    """scale * sigmoid(20 (t - 1/2)): correlations of data matter where much is masked. Released: 1 (pixels), 0.1 (text, VQ)."""
    return scale * torch.sigmoid(20 * (t - 0.5))


# One batch


def student_log_p(student: Student, x_t: Tensor, t: Tensor, latents: Tensor, mask_token_id: int) -> Tensor:
    """The student in J latents for each row, (J, B, L, V), in one call of J B rows.

    Args:
        student (`Callable`): The network.
        x_t (`torch.Tensor` of shape `(B, L)`): States.
        t (`torch.Tensor` of shape `(B,)`): Times.
        latents (`torch.Tensor` of shape `(J, B)`): In [0, 1).
        mask_token_id (`int`): The mask.
    """
    count = len(latents)
    logits = student(x_t.repeat(count, 1), t.repeat(count), latents.flatten())
    return clean_log_p(logits, mask_token_id).view(count, *x_t.shape, -1)


def di4c_losses(
    student: Student,
    teacher: Teacher,
    process: AbsorbingProcess,
    x_0: Tensor,
    t: Tensor,
    u: Tensor,
    num_latents: int,
    generator: Generators,
) -> Losses:
    """The four losses of a batch, with x_t ~ q(x_t | x_0), targets from J teacher steps t -> u of each row, and J latents: one
    call of the teacher, two of the student (one without gradient, for the targets).

    Args:
        student (`Callable`): Gradient flows to it.
        teacher (`Callable`): Frozen.
        process (`AbsorbingProcess`): The forward process.
        x_0 (`torch.Tensor` of shape `(B, L)`): Data, or samples of the teacher.
        t (`torch.Tensor` of shape `(B,)`): Times in (0, 1].
        u (`torch.Tensor` of shape `(B,)`): Times in (0, t).
        num_latents (`int`): J, at least 2. Released: 16 (text, pixels) and 32.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Raises:
        ValueError: If there are fewer than two latents, or the times are not in order.
    """
    if num_latents < 2:
        raise ValueError(f"`num_latents` is {num_latents}; a mixture needs at least 2")
    if not ((u > 0) & (u < t) & (t <= 1)).all():
        raise ValueError(f"`t` and `u` are {t.tolist()} and {u.tolist()}; allowed are 0 < u < t <= 1 in each row")
    mask, rows = process.mask_token_id, len(x_0)
    with torch.no_grad():
        x_t = process.add_noise(x_0, t, generator)
        is_masked = x_t == mask
        teacher_log_p = clean_log_p(teacher(x_t, t), mask)  # (B, L, V)
        step = process.posterior(x_t, teacher_log_p.exp(), t, u)
        x_u = draw_states(step.repeat(num_latents, 1, 1), generator)  # (J B, L)
        fresh = uniforms((1, num_latents * rows), generator, x_t.device)
        target = student_log_p(student, x_u, u.repeat(num_latents), fresh, mask)[0].exp()  # (J B, L, V)
        known = torch.nn.functional.one_hot(x_u, target.shape[-1]).to(target.dtype)
        target = torch.where((x_u == mask)[..., None], target, known)
        completions = draw_states(target, generator).view(num_latents, *x_t.shape)
        target = target.view(num_latents, *x_t.shape, -1)
        latents = uniforms((num_latents, rows), generator, x_t.device)
    log_p = student_log_p(student, x_t, t, latents, mask)
    return Losses(
        distillation_loss(teacher_log_p, log_p, is_masked),
        consistency_loss(log_p, completions, target, is_masked),
        correlation_loss(log_p, x_0[None], is_masked),
        marginal_loss(teacher_log_p, log_p, is_masked),
    )


def total_loss(losses: Losses, t: Tensor, distilled_below: float, correlation_scale: float) -> Tensor:
    """The published sum for each row, (B,): below a small time each component is taught, above it all of them together.

        t < distilled_below:  distillation        else:  consistency + a(t) correlation + marginal

    Args:
        losses (`Losses`): Of the batch.
        t (`torch.Tensor` of shape `(B,)`): Its times.
        distilled_below (`float`): Released: 0.02 (text, 30 % of the batches), 0.02 (pixels), 0.05 (VQ).
        correlation_scale (`float`): Of `correlation_weight`; 0 needs no data beyond what makes x_t.
    """
    together = losses.consistency + correlation_weight(t, correlation_scale) * losses.correlation + losses.marginal
    return torch.where(t < distilled_below, losses.distillation, together)


# What it has gained


@torch.no_grad()
def mixture_nll_bound(
    denoiser: Callable[..., RowLogits],
    scheduler: DiscreteScheduler,
    data: Tensor,
    num_inference_steps: int,
    num_latents: int,
    generator: Generators,
) -> Tensor:
    """Bound on the NLL of the sampler with a fresh latent in each step, (B,), in nats per token.

        - (1 / L) sum_k log (1 / J) sum_j prod_{i in S_k} p^i(x_0^i | x_t; l_j)

    S_k are the positions that the scheduler opens. The mean is at least the NLL, by Jensen's inequality for the sets and for
    the J latents: it falls with J. J calls of the network in each step.

    Args:
        denoiser (`Callable`): The network: tokens (B, L), a time, positions, bool (B, L), and `latent` (B,) to [`RowLogits`].
            One that does not read its latent has its ordinary bound, also with J = 1.
        scheduler (`DiscreteScheduler`): Absorbing; draws from the network's own law, and chooses positions without it.
        data (`torch.Tensor` of shape `(B, L)`): Held-out sequences.
        num_inference_steps (`int`): N.
        num_latents (`int`): J.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of sets and latents.
    """
    mask, (rows, length) = scheduler.config.mask_token_id, data.shape
    x_t, total = torch.full_like(data, mask), torch.zeros(rows, dtype=torch.float64, device=data.device)
    scheduler.set_timesteps(num_inference_steps)
    for index, t in enumerate(scheduler.timesteps):
        opens = scheduler.positions(index, x_t, generator)
        assert opens is not None  # absorbing
        each = []
        for _ in range(num_latents):
            found = denoiser(x_t, t, opens, latent=uniforms((rows,), generator, data.device))
            nats = found.put(token_nats(found, data[opens], mask), torch.zeros_like(total)[:, None].expand(-1, length))
            each.append(-nats.sum(1))
        total -= torch.stack(each).logsumexp(0) - math.log(num_latents)
        x_t = torch.where(opens, data, x_t)
    return total / length
