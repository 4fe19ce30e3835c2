r"""Learn the filter of [`Learn2PDScheduler`] from the frozen network's own decoding: no reward, no labels from outside.

The network decodes masks one by one, the most confident first, block after block. At each state on the way a masked position
of the present block has a prediction, the most probable token; its label is whether decoding ended with this very token. The
filter learns the label from the confidences of the block by logistic loss, so that f is the share of final predictions among
those that look like this one. Blocks that are still to come are left out: the scheduler asks about the present one only.

Source: Bao et al. 2025 (Learn2PD, arXiv 2509.25188).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from discrete_schedulers.sampling import RowLogits, top_subset
from discrete_schedulers.schedulers.scheduling_learn2pd import FilterFloats, filter_log_odds


class Decoded(NamedTuple):
    """States of greedy decoding, R of them.

    Args:
        confidence (`torch.Tensor` of shape `(R, w)`): Largest probability at each mask, 1 at known tokens, float64.
        is_final (`torch.Tensor` of shape `(R, w)`): Bool; masks whose most probable token is the one decoding ended with.
        is_masked (`torch.Tensor` of shape `(R, w)`): Bool.
    """

    confidence: Tensor
    is_final: Tensor
    is_masked: Tensor


@torch.no_grad()
def decode_one_by_one(
    denoiser: Callable[..., RowLogits], start: Tensor, mask_token_id: int, block_length: int | None = None
) -> Decoded:
    """Decode greedily, one token of each row in each call, blocks from left to right, and label every state on the way.

    Args:
        denoiser (`Callable`): The frozen network: tokens (B, L), a time and positions, bool (B, L), to [`RowLogits`] there.
            It is told the masked share.
        start (`torch.Tensor` of shape `(B, L)`): Prompts and masks.
        mask_token_id (`int`): The mask.
        block_length (`int`, *optional*): w; divides L. `None` is one block.

    Raises:
        ValueError: If the block length does not divide L.
    """
    width = block_length or start.shape[1]
    if start.shape[1] % width:
        raise ValueError(
            f"`block_length` is {block_length}, which does not divide the {start.shape[1]} positions of `start`"
        )
    states = block_states(denoiser, start, mask_token_id, width)
    return with_masks(Decoded(*(part.transpose(0, 1) for part in states)))


def with_masks(states: Decoded) -> Decoded:
    """States (..., w) as (R, w); those without masks are left out."""
    rows = [part.flatten(0, -2) for part in states]
    keep = rows[2].any(1)
    return Decoded(*(part[keep] for part in rows))


@torch.no_grad()
def block_states(denoiser: Callable[..., RowLogits], start: Tensor, mask_token_id: int, width: int) -> Decoded:
    """The block of each state of `decode_one_by_one` that is decoded there, (B, T, w), in T calls. Arguments as there."""
    length = start.shape[1]
    block = torch.arange(length, device=start.device) // width
    state, seen = start.clone(), []
    while (state == mask_token_id).any():
        is_masked = state == mask_token_id
        first = torch.where(is_masked, block, length).amin(1, keepdim=True)  # (B, 1)
        current = is_masked & (block == first)
        rows = denoiser(state, float(is_masked.double().mean()), current)
        probability, token = most_probable(rows, mask_token_id)
        confidence = rows.put(probability, torch.ones(state.shape, dtype=torch.float64, device=state.device))
        guess = rows.put(token, state)
        place = first.clamp(max=length // width - 1) * width + torch.arange(width, device=state.device)  # (B, w)
        seen.append([place, *(sheet.gather(1, place) for sheet in (confidence, guess, is_masked))])
        state = torch.where(top_subset(current, current.any(1).long(), confidence), guess, state)
    places, confidence, guess, masked = (torch.stack(part, dim=1) for part in zip(*seen, strict=True))  # (B, T, w)
    final = state.gather(1, places.flatten(1)).view_as(guess)
    return Decoded(confidence, masked & (guess == final), masked)


def most_probable(rows: RowLogits, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, (R,), float64, and its token, (R,); the mask has none."""
    device = rows.positions.device
    found = [(torch.empty(0, dtype=torch.float64, device=device), torch.empty(0, dtype=torch.int64, device=device))]
    for _, some in rows.chunks():
        wide = some.double().index_fill(-1, torch.tensor([mask_token_id], device=device), -torch.inf)
        found.append(wide.softmax(-1).max(-1))
    probability, token = (torch.cat(part) for part in zip(*found, strict=True))
    return probability, token


def threshold_for(probability: Tensor, decoded: Decoded, final_share: float) -> float:
    """The lowest of the thresholds 0.50, 0.51, ..., 0.99 on f above which at least so many of the predictions are final; 1,
    which accepts none, if that holds for none of them, or nothing lies above it.

    Args:
        probability (`torch.Tensor` of shape `(R, w)`): f.
        decoded (`Decoded`): Of sequences that the filter was not fitted on.
        final_share (`float`): In (0, 1].
    """
    for percent in range(50, 100):
        accepted = decoded.is_masked & (probability > percent / 100)
        if accepted.any() and float(decoded.is_final[accepted].double().mean()) >= final_share:
            return percent / 100
    return 1.0


def fit_filter(
    decoded: Decoded,
    hidden: int,
    iterations: int,
    generator: torch.Generator,
    learning_rate: float = 0.01,
    batch_size: int = 512,
) -> FilterFloats:
    """The filter with the smallest logistic loss at masked positions, by Adam: `Learn2PDScheduler(filter=...)`.

    Args:
        decoded (`Decoded`): From `decode_one_by_one`; held-out prompts are for the choice of the threshold.
        hidden (`int`): H; 32 with w = 32 in the paper.
        iterations (`int`): Steps of Adam.
        generator (`torch.Generator`): Of the first weights and the batches.
        learning_rate (`float`, defaults to 0.01): Falls to 0 over the run, linearly.
        batch_size (`int`, defaults to 512): States in a batch.

    Raises:
        ValueError: If there is nothing to learn from.
    """
    if not decoded.is_masked.any():
        raise ValueError("`decoded` has no masked position: decode from states with masks")
    width = decoded.confidence.shape[1]
    shapes = {"hidden_weight": (hidden, width), "hidden_bias": (hidden,)}
    shapes |= {"output_weight": (width, hidden), "output_bias": (width,)}
    layers = {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()
        for name, shape in shapes.items()
    }
    optimizer = torch.optim.Adam(layers.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    for _ in range(iterations):
        rows = torch.randint(len(decoded.confidence), (batch_size,), generator=generator)
        log_odds = filter_log_odds(layers, decoded.confidence[rows])
        wanted, counted = decoded.is_final[rows].double(), decoded.is_masked[rows].double()
        each = binary_cross_entropy_with_logits(log_odds, wanted, reduction="none")
        optimizer.zero_grad()
        ((each * counted).sum() / counted.sum()).backward()
        optimizer.step()
        schedule.step()
    return {name: layer.detach().tolist() for name, layer in layers.items()}
