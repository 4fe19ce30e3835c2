r"""Masked diffusion neural sampler (MDNS): train a masked network to sample from an energy, without data.

The target is pi(x) = exp(-U(x)) / Z. A masked network s whose s(v | z) is pi(x_d = v | visible part of z) draws from it
exactly, one position at a time. For a network that is not there yet, a run that opens sets S_1, ..., S_N has the log-weight

    W = -U(x) - sum_k sum_{i in S_k} log s(x_i | z_k),          E[e^W] = Z           for every network and any number of steps

since the sets are as likely in the run as when the masks of a finished x are put back: sizes fixed, places uniformly random. So
mean e^W estimates Z without bias, samples with weights e^W have the law pi, and

    ESS = (sum w)^2 / (n sum w^2),    w = e^W,           in (0, 1], 1 for the exact sampler one position at a time

The loss is the weighted denoising cross-entropy: finished samples, masked anew with a share l ~ U(0, 1), count as data of pi,

    WDCE = sum_x softmax(W)_x E_l (1 / l) sum_{masked i} -log s(x_i | masked x)

whose minimum is the target's own conditionals, wherever the samples came from. The result is an ordinary masked model: any
scheduler of the library serves it.

Source: MDNS, NeurIPS 2025 (arXiv 2508.10684). Sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from discrete_schedulers.sampling import Generators, RowLogits, draw_tokens, uniform_subset, uniforms

Energy = Callable[[Tensor], Tensor]  # tokens (B, L) -> U, (B,)


class Weighted(NamedTuple):
    """Samples and what they weigh.

    Args:
        x (`torch.Tensor` of shape `(B, L)`): Tokens, int64.
        log_weights (`torch.Tensor` of shape `(B,)`): W, float64.
    """

    x: Tensor
    log_weights: Tensor


@torch.no_grad()
def weighted_samples(
    denoiser: Callable[[Tensor, float], Tensor],
    energy: Energy,
    rows: int,
    counts: list[int],
    mask_token_id: int,
    generator: Generators,
    device: torch.device | str = "cpu",
) -> Weighted:
    """Draw from the network and weigh by the energy; one call for each count.

    Args:
        denoiser (`Callable`): Tokens (B, L) and a time to logits (B, L, V). It is told the masked share.
        energy (`Callable`): U.
        rows (`int`): Samples B.
        counts (`list[int]`): Positions that open in each step, positive; all of them together are the length L.
        mask_token_id (`int`): The mask.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
        device (`torch.device`, defaults to `"cpu"`): Of the samples.

    Raises:
        ValueError: If a count is not positive.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"`counts` is {counts}; positive numbers are needed, one for each step")
    length = sum(counts)
    x = torch.full((rows, length), mask_token_id, device=device)
    log_prob = torch.zeros(rows, dtype=torch.float64, device=device)
    for count in counts:
        is_masked = x == mask_token_id
        opens = uniform_subset(is_masked, torch.full((rows,), count, device=device), generator)
        logits = denoiser(x, float(is_masked.double().mean()))[opens].double()  # (B count, V)
        logits[:, mask_token_id] = -math.inf
        tokens = draw_tokens(RowLogits(logits, opens), generator)
        taken = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        log_prob += taken.view(rows, count).sum(1)  # row-major: every row opens as many
        x = x.masked_scatter(opens, tokens)
    return Weighted(x, -energy(x).double() - log_prob)


def log_partition(log_weights: Tensor) -> float:
    """log of the mean of e^W: the estimate of log Z."""
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> float:
    """ESS as a share of the samples, in (0, 1]."""
    total, squares = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    return math.exp(float(2 * total - squares)) / len(log_weights)


def denoising_cross_entropy(
    denoiser: Callable[[Tensor, float], Tensor],
    samples: Weighted,
    mask_token_id: int,
    replicates: int,
    generator: Generators,
) -> Tensor:
    """WDCE, a scalar with gradient; in nats.

    Each sample is masked anew `replicates` times, the numbers of masks spread evenly among them. The number m is uniform on
    1, ..., L, so that L / m takes the place of 1 / l.

    Args:
        denoiser (`Callable`): Tokens (B, L) and a time to logits (B, L, V). It is told the mean masked share.
        samples (`Weighted`): Of this network, or of an earlier one: then with the weights of that time.
        mask_token_id (`int`): The mask.
        replicates (`int`): Maskings of each sample.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of randomness.
    """
    x, length = samples.x.repeat(replicates, 1), samples.x.shape[1]
    start = uniforms((len(samples.x),), generator, x.device).repeat(replicates)
    turn = torch.arange(replicates, device=x.device).repeat_interleave(len(samples.x)) / replicates
    masks = ((start + turn) % 1 * length).long() + 1  # uniform on 1, ..., L
    is_masked = uniform_subset(torch.ones_like(x, dtype=torch.bool), masks, generator)
    x_t = torch.where(is_masked, mask_token_id, x)
    logits = denoiser(x_t, float(is_masked.double().mean()))
    logits = logits.index_fill(-1, torch.tensor([mask_token_id], device=x.device), -math.inf)
    nats = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
    each = torch.where(is_masked, nats, 0.0).sum(1).double() * length / masks
    return (samples.log_weights.softmax(0).repeat(replicates) * each).sum() / replicates
