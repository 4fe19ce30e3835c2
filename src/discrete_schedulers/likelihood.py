r"""Likelihood of clean sequences under a masked model, by Monte Carlo: no time grid, no sampler.

With M a uniformly random set of m of the L positions, and S_M(x) = sum_{i in M} -log p(x_i | x without M),

    -log p(x) = sum_{m=1}^{L} E_{|M| = m}[S_M(x)] / m

if p is the exact denoiser of a law; else the right side is the mean over all orders of the chain rule, hence an upper bound
on -log of their mixture (Jensen). The estimators differ in how often they draw each m, and in nothing else:

    "masked_count"   P(m) = 1 / L, weight L / m
    "time_free"      P(m) = 1 / (m H_L), weight H_L = 1 + 1/2 + ... + 1/L
    "time_integral"  t uniform in (0, 1), each position masked with probability t, weight 1 / t

All have the same mean, for every denoiser, and very different variances. For independent tokens of c nats each, a draw has

    "masked_count"   0
    "time_free"      c^2 (H_L L (L + 1) / 2 - L^2)
    "time_integral"  infinite: c^2 L (log(1 / eps) - 1 + eps) with t from eps to 1

So `masked_count` is the default. The others only gain on it where the nats that are hidden do not grow with m, because one
latent choice rules all tokens. The published comparison is with `time_integral` only.

Sources: Jeon et al. 2025 (Information-Theoretic Discrete Diffusion, arXiv 2510.24088, time-free forms, conditional, coupled
ratio); Nie et al. 2025 (LLaDA, masked counts); Ou et al. 2024 (RADD, equality of the forms). The first one's released Monte
Carlo code draws m from 1 to L - 1, normalises by H_{L-1} and multiplies by H_L: it never sees the sequence with all masked,
and its mean is not -log p(x). Here m = L is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from discrete_schedulers.sampling import Generators, top_subset, uniforms

Estimator: TypeAlias = Literal["masked_count", "time_free", "time_integral"]

ESTIMATORS = ("masked_count", "time_free", "time_integral")
_ROWS_IN_FLOAT64 = 256  # rows of logits held in float64 at a time: 100 MB at V = 50,000


class LikelihoodEstimate(NamedTuple):
    """An estimate for each row.

    Args:
        values (`torch.Tensor` of shape `(B,)`): float64, in nats.
        standard_error (`torch.Tensor` of shape `(B,)`): float64. With `stratified` draws rather too large than too small.
    """

    values: Tensor
    standard_error: Tensor


def nll(
    denoiser: Callable[..., Any],
    x_0: Tensor,
    mask_token_id: int,
    num_samples: int = 128,
    generator: Generators = None,
    estimator: Estimator = "masked_count",
    stratified: bool = True,
    batch_size: int = 64,
) -> LikelihoodEstimate:
    """-log p(x_0), or an upper bound on it where the denoiser is not that of a law.

    Args:
        denoiser (`Callable`): `denoiser(x_t, t, positions=is_masked)` -> `RowLogits` of log p(x_0 | x_t). The time t is the
            masked share of each row, float64 (b,), whatever the estimator.
        x_0 (`torch.Tensor` of shape `(B, L)`): Clean sequences, int64, where the network runs.
        mask_token_id (`int`): State that stands for a masked token.
        num_samples (`int`, defaults to 128): Random sets for each row, 2 or more; each is a row in a call of the network.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the sets; one, or one per row.
        estimator (`str`, defaults to `"masked_count"`): `"masked_count"`, `"time_free"` or `"time_integral"`, see the module.
        stratified (`bool`, defaults to `True`): Draw the count (or time) of sample j from the j-th of `num_samples` equal
            parts of its law. Same mean, less variance.
        batch_size (`int`, defaults to 64): Rows in one call of the network. It does not change the estimate.

    Returns:
        [`LikelihoodEstimate`]: Nats per sequence.

    Raises:
        ValueError: If an argument is not as above, `x_0` has masks, or the network gives NaN or a clean token probability 0.
    """
    everywhere = torch.ones_like(x_0, dtype=torch.bool)
    return conditional_nll(
        denoiser, x_0, everywhere, mask_token_id, num_samples, generator, estimator, stratified, batch_size
    )


@torch.no_grad()
def conditional_nll(
    denoiser: Callable[..., Any],
    x_0: Tensor,
    answer_positions: Tensor,
    mask_token_id: int,
    num_samples: int = 128,
    generator: Generators = None,
    estimator: Estimator = "masked_count",
    stratified: bool = True,
    batch_size: int = 64,
) -> LikelihoodEstimate:
    """-log p(answer | the other tokens): as `nll`, with L the number of answer positions; the other tokens are never masked.

    Args:
        denoiser (`Callable`): See `nll`.
        x_0 (`torch.Tensor` of shape `(B, L)`): Clean sequences, int64.
        answer_positions (`torch.Tensor` of shape `(B, L)` or `(L,)`): Bool, at least one in each row.
        mask_token_id (`int`): State that stands for a masked token.
        num_samples (`int`, defaults to 128): Random sets for each row, 2 or more.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the sets.
        estimator (`str`, defaults to `"masked_count"`): See `nll`.
        stratified (`bool`, defaults to `True`): See `nll`.
        batch_size (`int`, defaults to 64): Rows in one call of the network.

    Returns:
        [`LikelihoodEstimate`]: Nats per answer.

    Raises:
        ValueError: As in `nll`, or if a row has no answer.
    """
    answer = check(x_0, answer_positions, mask_token_id, num_samples, estimator, batch_size)
    is_masked, weight = draw_masks(answer, num_samples, generator, estimator, stratified)
    return summary(weight * hidden_nats(denoiser, x_0, is_masked, mask_token_id, batch_size), stratified)


@torch.no_grad()
def log_likelihood_ratio(
    denoiser: Callable[..., Any],
    x: Tensor,
    y: Tensor,
    mask_token_id: int,
    num_samples: int = 128,
    generator: Generators = None,
    estimator: Estimator = "masked_count",
    stratified: bool = True,
    batch_size: int = 64,
    answer_positions: Tensor | None = None,
) -> LikelihoodEstimate:
    """log p(x) - log p(y), with the same sets masked in both: what they share cancels, sample by sample.

    Args:
        denoiser (`Callable`): See `nll`. Where it is not that of a law this is a difference of two bounds, hence no bound.
        x (`torch.Tensor` of shape `(B, L)`): Clean sequences, int64.
        y (`torch.Tensor` of shape `(B, L)`): Those that they are compared with.
        mask_token_id (`int`): State that stands for a masked token.
        num_samples (`int`, defaults to 128): Random sets for each row, 2 or more; each costs two rows of the network.
        generator (`torch.Generator`, `list[torch.Generator]` or `None`): Source of the sets.
        estimator (`str`, defaults to `"masked_count"`): See `nll`.
        stratified (`bool`, defaults to `True`): See `nll`.
        batch_size (`int`, defaults to 64): Rows in one call of the network.
        answer_positions (`torch.Tensor` of shape `(B, L)` or `(L,)`, *optional*): Bool; the ratio is then that of the answers
            given the other tokens, which should be the same in both.

    Returns:
        [`LikelihoodEstimate`]: Nats.

    Raises:
        ValueError: As in `nll`, or if the shapes differ or a row has no answer.
    """
    if x.shape != y.shape:
        raise ValueError(f"`y` has shape {tuple(y.shape)}, but `x` has {tuple(x.shape)}: both need one length")
    wanted = torch.ones_like(x, dtype=torch.bool) if answer_positions is None else answer_positions
    answer = check(x, wanted, mask_token_id, num_samples, estimator, batch_size)
    check(y, wanted, mask_token_id, num_samples, estimator, batch_size)
    is_masked, weight = draw_masks(answer, num_samples, generator, estimator, stratified)
    of_x, of_y = (hidden_nats(denoiser, one, is_masked, mask_token_id, batch_size) for one in (x, y))
    return summary(weight * (of_y - of_x), stratified)


def check(
    x_0: Tensor, answer_positions: Tensor, mask_token_id: int, num_samples: int, estimator: str, batch_size: int
) -> Tensor:
    """The answer positions as bool (B, L). Raises `ValueError` if an argument is not allowed."""
    if x_0.dim() != 2 or x_0.dtype != torch.int64 or x_0.numel() == 0:
        raise ValueError(f"`x_0` is {x_0.dtype} of shape {tuple(x_0.shape)}; it must be int64 (B, L) and not empty")
    if answer_positions.dtype != torch.bool or tuple(answer_positions.shape) not in (
        tuple(x_0.shape),
        x_0.shape[1:],
    ):
        raise ValueError(
            f"`answer_positions` is {answer_positions.dtype} of shape {tuple(answer_positions.shape)}; "
            f"it must be bool {tuple(x_0.shape)} or {tuple(x_0.shape[1:])}"
        )
    answer = answer_positions.to(x_0.device).expand(x_0.shape)
    if not answer.any(1).all():
        raise ValueError(f"`answer_positions` has no position in row {int((~answer.any(1)).nonzero()[0])}")
    num_masks = int((x_0 == mask_token_id).sum())
    if num_masks > 0:
        raise ValueError(f"`x_0` has the mask token {mask_token_id} in {num_masks} places: pass clean sequences")
    if num_samples < 2:
        raise ValueError(f"`num_samples` is {num_samples}; at least 2 are needed for a standard error")
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {estimator!r}; allowed: {', '.join(map(repr, ESTIMATORS))}")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1")
    return answer


def count_law(length: int, estimator: Literal["time_free", "masked_count"]) -> tuple[Tensor, Tensor]:
    """P(m) and the weight of S_M for m = 1..L masked positions, float64 (L,) each. Their product is 1 / m."""
    m = torch.arange(1, length + 1, dtype=torch.float64)
    if estimator == "time_free":
        harmonic = (1 / m).sum()
        return 1 / (m * harmonic), harmonic.expand(length)
    return torch.full((length,), 1 / length, dtype=torch.float64), length / m


def draw_masks(
    answer: Tensor, num_samples: int, generator: Generators, estimator: Estimator, stratified: bool
) -> tuple[Tensor, Tensor]:
    """Random sets of answer positions, bool (n, B, L), and their weights, float64 (n, B).

    Sample by sample one sheet of uniforms (B, L + 1): the first says how many, the others which.
    """
    batch, length = answer.shape
    sizes, row_size = answer.sum(1).unique(return_inverse=True)  # rows with equally many answers share a law
    laws = [] if estimator == "time_integral" else [count_law(int(size), estimator) for size in sizes]
    masks, weights = [], []
    for sample in range(num_samples):
        sheet = uniforms((batch, length + 1), generator, answer.device)
        u, priority = sheet[:, 0].cpu(), sheet[:, 1:]
        if stratified:
            u = (sample + u) / num_samples
        if estimator == "time_integral":
            t = 1 - u  # in (0, 1]
            masks.append(answer & (priority < t[:, None].to(answer.device)))
            weights.append(1 / t)
            continue
        count, weight = torch.empty(batch, dtype=torch.int64), torch.empty(batch, dtype=torch.float64)
        for number, (p, weight_of) in enumerate(laws):
            rows = (row_size == number).cpu()
            place = torch.searchsorted(p.cumsum(0), u[rows], right=True).clamp(max=len(p) - 1)
            count[rows], weight[rows] = place + 1, weight_of[place]
        masks.append(top_subset(answer, count.to(answer.device), priority))
        weights.append(weight)
    return torch.stack(masks), torch.stack(weights).to(answer.device)


def hidden_nats(
    denoiser: Callable[..., Any], x_0: Tensor, is_masked: Tensor, mask_token_id: int, batch_size: int
) -> Tensor:
    """S_M = sum of -log p(x_i | x without M) over the masked positions i, float64 (n, B), for masks (n, B, L)."""
    masked = is_masked.flatten(0, 1)  # (n B, L)
    clean = x_0.expand(is_masked.shape).flatten(0, 1)
    total = torch.zeros(len(masked), dtype=torch.float64, device=x_0.device)
    for rows in masked.any(1).nonzero().squeeze(1).split(batch_size):  # a set drawn at a small time may be empty
        chosen, truth = masked[rows], clean[rows]
        share = chosen.double().mean(1)
        logits = denoiser(truth.masked_fill(chosen, mask_token_id), share, positions=chosen).logits  # (R, V)
        pieces = zip(logits.split(_ROWS_IN_FLOAT64), truth[chosen].split(_ROWS_IN_FLOAT64), strict=True)
        nats = torch.cat([cross_entropy(piece.double(), token, reduction="none") for piece, token in pieces])
        if not nats.isfinite().all():
            raise ValueError(
                f"`denoiser` gives NaN for {int(nats.isnan().sum())} and probability 0 for {int(nats.isposinf().sum())} "
                f"of {len(nats)} masked tokens: neither is allowed"
            )
        sheet = torch.zeros(chosen.shape, dtype=torch.float64, device=x_0.device)
        total[rows] = sheet.masked_scatter(chosen, nats).sum(1)
    return total.view(is_masked.shape[:2])


def summary(draws: Tensor, stratified: bool) -> LikelihoodEstimate:
    """Mean and standard error of draws (n, B).

    Stratified draws have one in each stratum, so two neighbours (and the last three where n is odd) are taken for draws from
    one: the difference of their means counts as variance too, which makes the error an upper bound.
    """
    n = len(draws)
    if not stratified:
        return LikelihoodEstimate(draws.mean(0), (draws.var(0) / n).sqrt())
    paired = draws[: n - 3] if n % 2 else draws
    total = (paired[::2] - paired[1::2]).square().sum(0)  # of the variances of all draws
    if n % 2:
        total = total + 3 * draws[-3:].var(0)
    return LikelihoodEstimate(draws.mean(0), total.sqrt() / n)
