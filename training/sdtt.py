r"""Self-distillation through time (SDTT): one student step is taught what several teacher steps say of each position.

From x_t the teacher makes n ancestral steps t = t_0 > t_1 > ... > t_n. The target at a position is the teacher's law in the
step that opened it, or in the last step where none did. The student learns it at x_t, position by position,

    reverse_kl  KL(student || target)  (published)      forward_kl  KL(target || student)
    tvd         1/2 sum_v |p - q|                       mse         mean_v (log p - log q)^2

and becomes the teacher of the next round, with steps twice as long. What a student of full capacity learns from many targets
is known: the forward KL leads to their arithmetic mean, which by the tower property is the teacher itself, as far as its steps
follow the true joint; the reverse KL to their normalised geometric mean, as a rule sharper. So SDTT sharpens, and repairs a
network that contradicts itself; a product of positions it stays: on the tests' joints each round lowers the entropy of the
samples, gains a little at two steps, and makes a single step worse.

The published time grid of the released code is not t, t - dt, t - 2 dt, ...; here it is.

Source: Deschenaux, Gulcehre, ICLR 2025 (arXiv 2410.21035): 7 rounds, 2 teacher steps for each target, reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess
from discrete_schedulers.sampling import Generators, draw_states
from discrete_schedulers.training.di4c import clean_log_p

Objective = Literal["reverse_kl", "forward_kl", "tvd", "mse"]
Teacher: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, L), t (B,)) -> logits (B, L, V)


@torch.no_grad()
def sdtt_targets(
    teacher: Teacher, process: AbsorbingProcess, x_t: Tensor, times: Tensor, generator: Generators
) -> Tensor:
    """Normalised log-law that the student is taught at each position, (B, L, V); of use at the masks of x_t.

    Args:
        teacher (`Callable`): Frozen. It is called n times.
        process (`AbsorbingProcess`): The forward process.
        x_t (`torch.Tensor` of shape `(B, L)`): States at `times[0]`.
        times (`torch.Tensor` of shape `(n + 1, B)`): Of the teacher's steps, falling. With n = 1 the target is the teacher.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.

    Raises:
        ValueError: If there is no step, or the times do not fall.
    """
    if len(times) < 2 or not (times[:-1] > times[1:]).all():
        raise ValueError(f"`times` is {times.tolist()}; it needs at least 2 rows, each below the one before")
    mask, state, target = process.mask_token_id, x_t, None
    for k, t in enumerate(times[:-1]):
        log_p = clean_log_p(teacher(state, t), mask)
        is_masked = (state == mask)[..., None]
        target = log_p if target is None else torch.where(is_masked, log_p, target)  # until a position opens
        if k < len(times) - 2:  # where the last step leads does not matter
            state = draw_states(process.posterior(state, log_p.exp(), t, times[k + 1]), generator)
    assert target is not None
    return target


def sdtt_loss(log_p: Tensor, target: Tensor, is_masked: Tensor, objective: Objective = "reverse_kl") -> Tensor:
    """Divergence of the student from its targets, a sum over masked positions, (B,).

    Args:
        log_p (`torch.Tensor` of shape `(B, L, V)`): The student's normalised log-probabilities at x_t.
        target (`torch.Tensor` of shape `(B, L, V)`): From `sdtt_targets`.
        is_masked (`torch.Tensor` of shape `(B, L)`): Bool; masks of x_t.
        objective (`str`, defaults to `"reverse_kl"`): See the head of the file.

    Raises:
        ValueError: For another objective.
    """
    if objective == "reverse_kl":
        each = (log_p.exp() * (log_p - target)).sum(-1)  # `divergence` has no gradient in p where p is 0
    elif objective == "forward_kl":
        each = (target.exp() * (target - log_p)).sum(-1)
    elif objective == "tvd":
        each = (log_p.exp() - target.exp()).abs().sum(-1) / 2
    elif objective == "mse":
        each = (log_p - target).square().mean(-1)  # ids that are never drawn have the same logarithm in both
    else:
        raise ValueError(f"`objective` is {objective!r}; allowed are 'reverse_kl', 'forward_kl', 'tvd' and 'mse'")
    return torch.where(is_masked, each, 0.0).sum(-1)


def fixed_point(targets: Tensor, weights: Tensor, objective: Literal["reverse_kl", "forward_kl"]) -> Tensor:
    """Where a student of full capacity ends: the law with the smallest mean divergence from weighted targets, as logarithms.

        forward_kl:  sum_j w_j q_j        reverse_kl:  prod_j q_j^w_j / Z

    Args:
        targets (`torch.Tensor` of shape `(T, ..., V)`): log q_j, normalised.
        weights (`torch.Tensor` of shape `(T, ...)`): w_j, which sum to 1 over j.
        objective (`str`): `"reverse_kl"` or `"forward_kl"`.

    Returns:
        `torch.Tensor` of shape `(..., V)`: Normalised.
    """
    if objective == "forward_kl":
        return (weights[..., None] * targets.exp()).sum(0).log()
    return (weights[..., None] * targets).sum(0).log_softmax(-1)
