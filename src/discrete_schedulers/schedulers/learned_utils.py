"""The formulae of the learned scheduler (scheduling_learned.py), as pure functions of tensors.

They are differentiable in the logits, the times and every coefficient, so that what `LearnedScheduler.transition` computes from
a config of floats can be learned with the floats as tensors. `times_from_counts` is the grid behind learned counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from discrete_schedulers.processes import AbsorbingProcess, Process, UniformProcess, indicator
from discrete_schedulers.sampling import check_finite
from discrete_schedulers.schedulers.scheduling_utils import own_logits, token_logits

STEP_BLOCKS = ("rate", "contrast", "inverse_temperature", "top_p", "gate_a", "gate_b", "remask")
StepCoefficients: TypeAlias = Mapping[str, Tensor]  # those of `STEP_BLOCKS` that are set, a float64 scalar each


class Mixture(NamedTuple):
    """A latent of each row and step, one of K, that tilts the tokens.

    Args:
        log_weights (`torch.Tensor` of shape `(K,)`): Log-probabilities of the components, float64.
        shift (`torch.Tensor` of shape `(K, L, V)`): Added to the logits in each of them, float64; 0 at the mask.
    """

    log_weights: Tensor
    shift: Tensor


def mixture_of(weight: Tensor, shift: Tensor, vocab_size: int, mask_token_id: int) -> Mixture:
    """The mixture that the blocks `mixture_weight` (K,) and `mixture_shift` (K L (V - 1),) say, differentiable in both.

    Raises:
        ValueError: If the number of shifts is no multiple of K (V - 1).
    """
    each = len(weight) * (vocab_size - 1)
    if shift.numel() == 0 or shift.numel() % each:
        raise ValueError(
            f"'mixture_shift' has {shift.numel()} values; {len(weight)} components of {vocab_size - 1} tokens need a multiple "
            f"of {each}: (component, position, token but the mask)"
        )
    tokens = shift.view(len(weight), -1, vocab_size - 1)
    before, after = tokens[..., :mask_token_id], tokens[..., mask_token_id:]
    return Mixture(weight.log_softmax(0), torch.cat([before, torch.zeros_like(tokens[..., :1]), after], dim=-1))


def learned_law(
    process: Process,
    logits: Tensor,
    sample: Tensor,
    t: Tensor,
    s: Tensor,
    coefficients: StepCoefficients,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prior: Tensor | None = None,
) -> Tensor:
    """Law of x_s for each position, shape (B, L, V), float64; differentiable in logits, times and coefficients.

    Args:
        process (`Process`): The forward process.
        logits (`torch.Tensor` of shape `(B, L, V)`): Logits of log p(x_0 | x_t).
        sample (`torch.Tensor` of shape `(B, L)`): Tokens x_t, int64.
        t (`torch.Tensor`): Time now, a float64 scalar.
        s (`torch.Tensor`): Time next; 0 opens every mask.
        coefficients (`dict[str, torch.Tensor]`): Scalars of this step, by the names of `STEP_BLOCKS`.
        temperature (`float`, defaults to 1.0): Divides the logits, beside the inverse temperature.
        top_p (`float`, defaults to 1.0): Smallest mass of most probable tokens that is kept.
        prior (`torch.Tensor` of shape `(V,)`, *optional*): Log-probabilities of tokens where nothing is known, for a contrast.
    """
    q = sharpened(process, logits, sample, t, coefficients, temperature, top_p, prior).double().softmax(-1)
    if not isinstance(process, AbsorbingProcess):
        return process.posterior(sample, q, t, s)
    return moved_law(process, q, logits, sample, t, s, coefficients)


def learned_mixture(
    process: AbsorbingProcess,
    logits: Tensor,
    sample: Tensor,
    t: Tensor,
    s: Tensor,
    coefficients: StepCoefficients,
    mixture: Mixture,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prior: Tensor | None = None,
) -> Tensor:
    """Law of x_s for each position in each component of a mixture, shape (K, B, L, V), float64. Arguments as in
    `learned_law`, and the mixture: given the component of a row its positions are independent."""
    q = sharpened(process, logits, sample, t, coefficients, temperature, top_p, prior).double()
    q = tilted(q, sample, mixture).softmax(-1)
    return moved_law(process, q, logits, sample, t, s, coefficients)


def tilted(logits: Tensor, sample: Tensor, mixture: Mixture) -> Tensor:
    """Logits (K, B, L, V) of the components, from logits (B, L, V).

    Raises:
        ValueError: If the mixture is for another length.
    """
    length = mixture.shift.shape[1]
    if sample.shape[1] != length:
        raise ValueError(
            f"'mixture_shift' is for {length} positions, but `sample` has {sample.shape[1]}: they must be equal"
        )
    return logits + mixture.shift.to(logits.device)[:, None]


def moved_law(
    process: AbsorbingProcess,
    q: Tensor,
    logits: Tensor,
    sample: Tensor,
    t: Tensor,
    s: Tensor,
    coefficients: StepCoefficients,
) -> Tensor:
    """Law of x_s, (..., B, L, V), where masks that open take tokens of the law q (..., B, L, V). Arguments as in
    `learned_law`."""
    opens = open_probability(process, t, s, coefficients).to(q.device)
    if is_gated(coefficients):
        opens = gated(opens, gate_log_odds(logits, process.mask_token_id, coefficients))[..., None]  # (B, L, 1)
    falls = remask_probability(process, t, s, coefficients).to(q.device)
    mask = process.prior_law(q.device)  # (V,)
    stays = indicator(sample, process.vocab_size)
    is_masked = (sample == process.mask_token_id)[..., None]
    return torch.where(is_masked, opens * q + (1 - opens) * mask, (1 - falls) * stays + falls * mask)


def sharpened(
    process: Process,
    logits: Tensor,
    sample: Tensor,
    t: Tensor,
    coefficients: StepCoefficients,
    temperature: float,
    top_p: float,
    prior: Tensor | None,
) -> Tensor:
    """Logits (..., V) of q, after contrast, temperature and top-p. Arguments as in `learned_law`, of all positions or of some.
    Not differentiable in a step's own top-p, which takes the place of `top_p`."""
    top_p = float(coefficients.get("top_p", top_p))
    mask = process.mask_token_id if isinstance(process, AbsorbingProcess) else None
    beta, contrast = (coefficients.get(name) for name in ("inverse_temperature", "contrast"))
    if beta is None and contrast is None and (mask is not None or temperature == top_p == 1):
        return token_logits(logits, mask, temperature, top_p)
    beta = torch.ones(()) if beta is None else beta
    never = logits == -torch.inf  # times a float they would have the gradient 0 * inf
    if isinstance(process, UniformProcess):
        own = own_logits(process, logits, sample, t)
        powered = (beta * (logits.double().masked_fill(never, 0.0) - own)).masked_fill(never, -torch.inf)
        return token_logits(powered, mask, temperature, top_p) + own
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(never, 0.0)
    if contrast is not None:
        if prior is None:
            raise ValueError("a 'contrast' is with `prior`, log-probabilities (V,) of tokens where nothing is known")
        wide = (1 + contrast) * wide - contrast * prior.to(wide)
    return token_logits((beta * wide).masked_fill(never, -torch.inf), mask, temperature, top_p)


def remask_probability(process: AbsorbingProcess, t: Tensor, s: Tensor, coefficients: StepCoefficients) -> Tensor:
    """rho, a scalar."""
    if "remask" not in coefficients:
        return torch.zeros((), dtype=torch.float64)
    return coefficients["remask"] * process.remask_limit(t, s)


def open_probability(process: AbsorbingProcess, t: Tensor, s: Tensor, coefficients: StepCoefficients) -> Tensor:
    """u, a scalar: before the gate."""
    if s == 0:
        return torch.ones((), dtype=torch.float64)
    opens = process.unmask_probability(t, s)
    if "remask" in coefficients:
        again = process.alpha(t) / (1 - process.alpha(t))
        opens = opens + remask_probability(process, t, s, coefficients) * again
    if "rate" in coefficients:
        opens = coefficients["rate"] * opens
    return opens.clamp(max=1.0)


def is_gated(coefficients: StepCoefficients) -> bool:
    """Whether the probability to open depends on the logits."""
    return "gate_a" in coefficients or "gate_b" in coefficients


def gate_log_odds(logits: Tensor, mask_token_id: int, coefficients: StepCoefficients) -> Tensor:
    """gate_a + gate_b logit max_v p(v), float64 (...), from logits (..., V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
    logits[..., mask_token_id] = -torch.inf
    best, place = logits.max(-1, keepdim=True)
    check_finite(best)
    others = logits.scatter(-1, place, -torch.inf).logsumexp(-1)  # 1 - max p would cancel
    confidence = (
        (best.squeeze(-1) - others).double().clamp(max=40.0)
    )  # 1 in float64; infinite where nothing else can be
    zero = confidence.new_zeros(())
    a, b = (coefficients.get(name, zero).to(confidence.device) for name in ("gate_a", "gate_b"))
    return a + b * confidence


def gated(opens: Tensor, log_odds: Tensor) -> Tensor:
    """sigmoid(logit u + log_odds), without the infinite logits of u = 0 and 1, and exactly u where log_odds is 0."""
    # 700: exp of more overflows in float64
    return opens / (opens + (1 - opens) * torch.exp(-log_odds.clamp(-700.0, 700.0)))


def times_from_counts(process: Process, counts: Tensor) -> Tensor:
    """The grid (N + 1,) at whose times the shares counts / sum(counts) of all positions open, differentiable.

    Args:
        process (`Process`): Gives the time at which a share of the positions is masked.
        counts (`torch.Tensor` of shape `(N,)`): Positive, on any scale.
    """
    left = counts.flip(0).cumsum(0).flip(0)  # before each step
    inner = process.time_of_noise(left[1:] / left[0])  # not at 1, where the inverse of cosine noise is infinitely steep
    return torch.cat([left.new_ones(1), inner, left.new_zeros(1)])
