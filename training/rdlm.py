r"""Training of RDLM: cross-entropy of the clean tokens given a point of the sphere that no simulation is needed for.

    loss = E_t E_{x_0} E_{X_t ~ Riemannian normal(x_0, t)} -log p(x_0 | X_t, t)

Its minimum is the denoiser for any law of t, so t is drawn where there is something to learn: for small t tokens can be read
off, for t near 1 nothing can. The published code draws nearly all times from a window too, with importance weights.

Source: Jo and Hwang 2025 (RDLM, NeurIPS, arXiv 2502.11564).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from discrete_schedulers.sampling import Generators, uniforms
from discrete_schedulers.sphere import LogarithmBridge

WINDOW = (0.25, 0.7)  # of the published geometric schedule: 1 minus the code's 0.3 to 0.75
WINDOW_SHARE = 0.9


def draw_times(rows: int, generator: Generators = None, window: tuple[float, float] = WINDOW) -> Tensor:
    """Times (rows,), float64, stratified: 9 of 10 from the window, the others from all of [0, 1].

    Args:
        rows (`int`): How many.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of randomness; a list has `rows` entries.
        window (`tuple[float, float]`, defaults to `(0.25, 0.7)`): Times that matter, 0 <= low < high <= 1.

    Raises:
        ValueError: If `window` is not two numbers in order.
    """
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"`window` is {window}; two numbers in order are needed, from 0 to 1")
    u = (torch.arange(rows) + uniforms((rows,), generator, "cpu")) / rows
    inside = low + (high - low) * u / WINDOW_SHARE
    return torch.where(u < WINDOW_SHARE, inside, (u - WINDOW_SHARE) / (1 - WINDOW_SHARE))


def denoising_cross_entropy(
    model: Callable[..., Any], bridge: LogarithmBridge, x_0: Tensor, t: Tensor, generator: Generators = None
) -> Tensor:
    """The loss, a scalar with gradient, in nats per token.

    Args:
        model (`Callable`): From points (B, L, V), float32, and times (B,) to an output with `logits` (B, L, V).
        bridge (`LogarithmBridge`): The process; `scheduler.bridge`.
        x_0 (`torch.Tensor` of shape `(B, L)`): Clean tokens, int64.
        t (`torch.Tensor` of shape `(B,)`): Times in (0, 1], as from `draw_times`.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of randomness.
    """
    t = t.to(x_0.device)
    logits = model(bridge.add_noise(x_0, t, generator).float(), t.float()).logits.float()
    if bridge.mask_token_id is not None:
        mask = torch.tensor([bridge.mask_token_id], device=logits.device)
        logits = logits.index_fill(-1, mask, -torch.inf)
    return F.cross_entropy(logits.transpose(1, 2), x_0)
