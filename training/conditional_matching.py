r"""Exact conditional distribution matching: what a score says of p(x_0 | x_t), and a student that learns it as a joint law.

Six identities. K_t(x_0, x_t) is the forward kernel, r(y) = p_t(y) / p_t(x_t) the ratios at x_t, all states enumerated:

    1  p_{0|t}(x_0 | x_t) = sum_{x_s} p_{s|t}(x_s | x_t) p_{0|s}(x_0 | x_s)                       `compose`
    2  p_{0|t}(x_0 | x_t) = K_t(x_0, x_t) (K_t^{-T} r)(x_0)                                       `recover`
    3  p_{s|t}(x_s | x_t) = K_{t|s}(x_s, x_t) (K_{t|s}^{-T} r)(x_s)                               `recover`
    4  2 with the kernel of one token and ratios of states that differ in one position gives that
       position's marginal p^d_{0|t}, and nothing of the joint                                    `recover_marginals`
    5  masks: r = alpha / (1 - alpha) p^d(v | x_t), so recovery is a multiplication, and ratios
       chained while positions open one by one give the joint: the chain rule in any order        `chain_log_prob`
    6  uniform noise: (a I + (1 - a) / S 1 1^T)^-1 = (I - (1 - a) / S 1 1^T) / a                   `uniform_inverse`

Recovery through 6 is ill-conditioned where little survives: errors of the ratios grow like a^-D, and "probabilities" get
negative.

The objective. Only the abstract and the introduction of the source could be read here: this is a reconstruction. From x_t on,
the teacher's own law of x_s is composed of many small steps by 1; the student matches it in one:

    min E_{x_t} KL( p^teacher_{s|t}(. | x_t), composed || P^student_{s|t}(. | x_t) ),        s = 0 for a student of one step

Its gradient needs draws of x_s only, -grad log P(x_s | x_t), since the entropy of the target is constant. A product student
returns the teacher's marginals, whatever is composed; a mixture (training/di4c.py) learns the joint. Di4C's consistency
loss reaches the same law by steps of the student instead of the teacher.

Source: Gao, Sun 2025 (arXiv 2512.12889); 2 is the discrete Tweedie identity of SEDD.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import Generators, draw_states, uniforms
from discrete_schedulers.training.di4c import Student, clean_log_p, mixture_log_prob, student_log_p

# The identities. Laws over enumerated states stand in the last axis.


def compose(p_s: Tensor, p_0: Tensor) -> Tensor:
    """Identity 1: law of x_0 given x_t, (..., X), from that of x_s given x_t, (..., S), and of x_0 given x_s, (S, X)."""
    return p_s @ p_0


def recover(kernel: Tensor, ratios: Tensor, state: int) -> Tensor:
    """Identities 2 and 3: law of x_s given x_t, (S,), from the ratios at x_t.

    Args:
        kernel (`torch.Tensor` of shape `(S, S)`): K(x_s, x_t), rows sum to 1; it has an inverse.
        ratios (`torch.Tensor` of shape `(S,)`): p_t(y) / p_t(x_t) of all states y.
        state (`int`): x_t.
    """
    return kernel[:, state] * torch.linalg.solve(kernel.T, ratios)


def recover_marginals(kernel: Tensor, ratios: Tensor, x_t: Tensor) -> Tensor:
    """Identity 4: p^d_{0|t} of each position, (B, L, V), from what a score network gives.

    Args:
        kernel (`torch.Tensor` of shape `(V, V)`): Forward kernel of one token.
        ratios (`torch.Tensor` of shape `(B, L, V)`): p_t(x_t with v at d) / p_t(x_t); 1 where v is the token itself.
        x_t (`torch.Tensor` of shape `(B, L)`): Tokens, int64.
    """
    weights = torch.linalg.solve(kernel.T, ratios.flatten(0, 1).T).T.view_as(ratios)
    return kernel.T[x_t] * weights


def uniform_inverse(alpha: float, size: int) -> Tensor:
    """Identity 6: inverse of the uniform kernel of one token, (S, S), float64.

    Raises:
        ValueError: If nothing survives: then there is none.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` is {alpha}; the kernel has an inverse for alpha in (0, 1]")
    return (torch.eye(size, dtype=torch.float64) - (1 - alpha) / size) / alpha


def mask_ratios(log_p_0: Tensor, alpha: float) -> Tensor:
    """Identity 5: log-ratios of opening a mask, log alpha / (1 - alpha) + log p^d(v | x_t), (..., V), from log p^d."""
    odds = torch.tensor(alpha, dtype=torch.float64)
    return log_p_0 + (odds / (1 - odds)).log()


def chain_log_prob(
    log_p_0: Callable[[Tensor], Tensor], x_t: Tensor, x_0: Tensor, order: Tensor, mask_token_id: int
) -> Tensor:
    """Identity 5: log p_{0|t}(x_0 | x_t) of masks, (B,), as positions open one by one: exact in any order.

    Args:
        log_p_0 (`Callable`): Tokens (B, L) to normalised log-probabilities (B, L, V): called once for each position.
        x_t (`torch.Tensor` of shape `(B, L)`): Tokens and masks.
        x_0 (`torch.Tensor` of shape `(B, L)`): A completion of it.
        order (`torch.Tensor` of shape `(L,)`): All positions, in the order in which they open; tokens are passed over.
        mask_token_id (`int`): The mask.
    """
    state, total = x_t.clone(), torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
    for i in order.tolist():
        is_masked = state[:, i] == mask_token_id
        taken = log_p_0(state)[:, i].gather(-1, x_0[:, i : i + 1])[:, 0]
        total = total + torch.where(is_masked, taken, 0.0)
        state[:, i] = torch.where(is_masked, x_0[:, i], state[:, i])
    return total


# The objective


@torch.no_grad()
def teacher_draws(
    teacher: Callable[[Tensor, Tensor], Tensor],
    process: AbsorbingProcess,
    x_t: Tensor,
    times: Tensor,
    generator: Generators,
) -> Tensor:
    """x_s after n small steps of the teacher, (B, L): a draw of identity 1.

    Args:
        teacher (`Callable`): (x_t, t) to logits (B, L, V).
        process (`AbsorbingProcess`): The forward process.
        x_t (`torch.Tensor` of shape `(B, L)`): States at `times[0]`.
        times (`torch.Tensor` of shape `(n + 1, B)`): Falling; the last is s, which may be 0.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Raises:
        ValueError: If there is no step, or the times do not fall.
    """
    if len(times) < 2 or not (times[:-1] > times[1:]).all():
        raise ValueError(f"`times` is {times.tolist()}; it needs at least 2 rows, each below the one before")
    for t, s in pairwise(times):
        p_0 = clean_log_p(teacher(x_t, t), process.mask_token_id).exp()
        x_t = draw_states(process.posterior(x_t, p_0, t, s), generator)
    return x_t


def matching_loss(
    student: Student,
    x_t: Tensor,
    x_s: Tensor,
    t: Tensor,
    num_latents: int,
    mask_token_id: int,
    generator: Generators,
) -> Tensor:
    """-log P^student(x_s | x_t) at positions that opened, (B,), up to the chance to open, which the student does not change.

    Args:
        student (`Callable`): A mixture: (x_t, t, latent) to logits. Gradient flows to it.
        x_t (`torch.Tensor` of shape `(B, L)`): States.
        x_s (`torch.Tensor` of shape `(B, L)`): From `teacher_draws`.
        t (`torch.Tensor` of shape `(B,)`): Times of x_t.
        num_latents (`int`): J for each row: the loss is too high by Jensen's gap where J is small.
        mask_token_id (`int`): The mask.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the latents.
    """
    latents = uniforms((1, num_latents * len(x_t)), generator, x_t.device).view(num_latents, -1)
    log_p = student_log_p(student, x_t, t, latents, mask_token_id)
    opened = (x_t == mask_token_id) & (x_s != mask_token_id)
    return -mixture_log_prob(log_p, x_s[None], opened)[0]
