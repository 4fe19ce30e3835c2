r"""What the statistic of a search sees of samples: of texts how rare their tokens are, hashed pairs and fluency; of images
layout, texture, colour and fluency.

Fluency is how well the frozen network itself predicts half of the tokens from the other half,

    fluency_j(x) = mean_{i in half j} log p(x_i | x at the other half),     j = 0, 1

which few-step samples lack first. Tempering raises it and lowers variety, which the other features see. The halves are every
second token, of an image the two colours of a chessboard. With uniform noise tokens of no meaning stand in the place of masks.

Of pictures with pixels in [0, 1] and discrete cosine transform c, over the root of their number:

    layout     the five lowest coefficients but for the mixed one, and their squares
    texture    log(e + mean of c^2) over each of four octaves of frequency, from the finest; e is the rounding to 256 levels
    colour     mean of red - green and of red + green - 2 blue; 0 where there are no colours

None of it is fitted: it is the same for every model, seed and number of processes. It is this library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from discrete_schedulers.denoisers import Denoiser
from discrete_schedulers.sampling import RowLogits
from discrete_schedulers.training.marginal import ngram_features
from discrete_schedulers.training.objectives import token_nats

PRIOR_ROWS = 16  # of random tokens, over which the law of a token with uniform noise is averaged
LOWEST = ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0))  # cosines (row, column) of the layout
OCTAVES = 4
LARGEST = 64  # pixels of a side that features look at; larger pictures are averaged down to them
IMAGE_FEATURES = 2 * len(LOWEST) + OCTAVES + 2 + 5


class Features(Protocol):
    """Tokens (B, L), and where a model has them the classes (B,) that they are of, to features (B, F), float64."""

    def __call__(self, x: Tensor, classes: Tensor | None = None) -> Tensor: ...


def row_sums(rows: RowLogits, values: Tensor) -> Tensor:
    """Values (R,) at the chosen positions, summed over each row of the batch, (B,)."""
    return (
        torch.zeros(rows.positions.shape, dtype=values.dtype, device=values.device)
        .masked_scatter(rows.positions, values)
        .sum(1)
    )


def without(denoiser: Denoiser, x: Tensor, hidden: Tensor) -> Tensor:
    """Tokens (B, L) with noise at hidden positions, bool (B, L): masks, or the same random tokens in every row."""
    if denoiser.mask_token_id is not None:
        return x.masked_fill(hidden, denoiser.mask_token_id)
    noise = torch.randint(denoiser.vocab_size, x.shape[1:], generator=torch.Generator().manual_seed(0))
    return torch.where(hidden, noise.to(x.device), x)


@torch.no_grad()
def fluency(
    denoiser: Denoiser, x: Tensor, batch_size: int = 64, width: int | None = None, classes: Tensor | None = None
) -> Tensor:
    """fluency_0 and fluency_1 of each sample, (B, 2), float64, in nats per token; see the head of the file.

    Args:
        denoiser (`Denoiser`): The frozen network.
        x (`torch.Tensor` of shape `(B, L)`): Samples, L >= 2.
        batch_size (`int`, defaults to 64): Rows in one call of the network.
        width (`int`, *optional*): Tokens in a row of an image.
        classes (`torch.Tensor` of shape `(B,)`, *optional*): What the network is told of each sample.
    """
    place = torch.arange(x.shape[1], device=x.device)
    half = (place if width is None else place // width + place % width) % 2
    found = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        told = {} if classes is None else {"class_labels": classes[part]}
        means = []
        for j in (0, 1):
            hidden = (half == j).expand(x[part].shape)
            rows = denoiser(without(denoiser, x[part], hidden), 0.5, hidden, **told)
            nats = token_nats(rows, x[part][hidden], denoiser.mask_token_id).clamp(max=-math.log(1e-9))
            means.append(-row_sums(rows, nats) / (half == j).sum())
        found.append(torch.stack(means, dim=1))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.float64, device=x.device)


def fluencies(values: Tensor) -> Tensor:
    """Both fluencies (B, 2), their squares and product, (B, 5)."""
    a, b = values.unbind(1)
    return torch.stack([a, b, a * a, b * b, a * b], dim=1)


@torch.no_grad()
def token_prior(denoiser: Denoiser, length: int, device: torch.device | str = "cpu") -> list[float]:
    """Log-probabilities of the V tokens where nothing is known, the mean law of all positions: `token_prior` of
    [`LearnedScheduler`]. One call of the network.

    Args:
        denoiser (`Denoiser`): The frozen network. With uniform noise it is asked for some rows of random tokens.
        length (`int`): Positions L.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the network is.

    Returns:
        `list[float]`: Four decimals; never below log(1e-9), nor above it for the mask.
    """
    mask = denoiser.mask_token_id
    if mask is None:
        drawn = torch.Generator().manual_seed(0)
        nothing = torch.randint(denoiser.vocab_size, (PRIOR_ROWS, length), generator=drawn).to(device)
    else:
        nothing = torch.full((1, length), mask, device=device)
    rows = denoiser(nothing, 1.0, torch.ones_like(nothing, dtype=torch.bool))
    law = rows.logits.new_zeros(rows.logits.shape[-1], dtype=torch.float64)
    for _, some in rows.chunks():
        wide = some.double()
        if mask is not None:
            wide[:, mask] = -torch.inf
        law += wide.softmax(-1).sum(0)
    return [round(value, 4) for value in (law / nothing.numel()).clamp(min=1e-9).log().tolist()]


def rarity(prior: list[float], buckets: int) -> Tensor:
    """Which of so many buckets of equal probability each token is in, from the commonest to the rarest, int64 (V,).

    Args:
        prior (`list[float]`): From `token_prior`.
        buckets (`int`): How many.
    """
    law = torch.tensor(prior, dtype=torch.float64).softmax(0)
    order = law.argsort(descending=True, stable=True)
    centre = law[order].cumsum(0) - law[order] / 2
    return torch.empty_like(order).scatter(0, order, (centre * buckets).long().clamp(max=buckets - 1))


def text_features(denoiser: Denoiser, prior: list[float], buckets: int, batch_size: int = 64) -> Features:
    """How many tokens of a sample are common and how many rare, hashed shares of pairs, fluencies, their squares and product:
    2 buckets + 5.

    Sharper samples are more fluent and lack rare tokens: the statistic has to see both.

    Args:
        denoiser (`Denoiser`): The frozen network.
        prior (`list[float]`): From `token_prior`.
        buckets (`int`): Of tokens by `rarity`, and as many of pairs.
        batch_size (`int`, defaults to 64): Sequences in one call of the network.
    """
    bucket = rarity(prior, buckets)

    def features(x: Tensor, classes: Tensor | None = None) -> Tensor:
        rare = torch.zeros(len(x), buckets, dtype=torch.float64, device=x.device)
        each = torch.full(x.shape, x.shape[1] ** -0.5, dtype=torch.float64, device=x.device)
        rare.scatter_add_(1, bucket.to(x.device)[x], each)
        pairs = ngram_features(x, 2, buckets)[:, buckets:]
        return torch.cat([rare, pairs, fluencies(fluency(denoiser, x, batch_size, classes=classes))], dim=1)

    return features


def image_features(
    denoiser: Denoiser, decode: Callable[[Tensor], Tensor], width: int, batch_size: int = 64
) -> Features:
    """Layout, texture, colour and fluencies of images, their squares and product: `IMAGE_FEATURES`.

    Args:
        denoiser (`Denoiser`): The frozen network.
        decode (`Callable`): Tokens (B, L) to pixels (B, C, H, W) in [0, 1].
        width (`int`): Tokens in a row of an image.
        batch_size (`int`, defaults to 64): Images in one call of the network and of the decoder.
    """

    def features(x: Tensor, classes: Tensor | None = None) -> Tensor:
        seen = [picture_features(decode(part)) for part in x.split(batch_size)] if len(x) else []
        empty = torch.empty(0, IMAGE_FEATURES - 5, dtype=torch.float64, device=x.device)
        return torch.cat(
            [torch.cat([empty, *seen]), fluencies(fluency(denoiser, x, batch_size, width, classes))], dim=1
        )

    return features


def picture_features(pixels: Tensor) -> Tensor:
    """Layout, texture and colour of pictures, see the head of the file.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`): In [0, 1], sides of 3 or more.

    Returns:
        `torch.Tensor` of shape `(B, IMAGE_FEATURES - 5)`: float64.
    """
    pixels = adaptive_avg_pool2d(pixels.double(), (min(pixels.shape[-2], LARGEST), min(pixels.shape[-1], LARGEST)))
    grey = pixels.mean(1)
    height, width = grey.shape[1:]
    cosines = cosine_basis(height, grey.device) @ grey @ cosine_basis(width, grey.device).T / math.sqrt(height * width)
    lowest = torch.stack([cosines[:, row, column] for row, column in LOWEST], dim=1)
    rows, columns = (torch.arange(side, device=grey.device) / side for side in (height, width))
    frequency = torch.maximum(rows[:, None], columns[None])  # of the finest 1
    texture = []
    for octave in range(OCTAVES):
        within = (frequency < 2.0**-octave) & (frequency >= 2.0 ** -(octave + 1))
        energy = cosines[:, within].square().sum(1) * height * width / max(int(within.sum()), 1)
        texture.append((energy + 1 / (12 * 255**2)).log())
    colour = torch.zeros(len(grey), 2, dtype=torch.float64, device=grey.device)
    if pixels.shape[1] == 3:
        red, green, blue = pixels.mean((2, 3)).unbind(1)
        colour = torch.stack([red - green, red + green - 2 * blue], dim=1)
    return torch.cat([lowest, lowest.square(), torch.stack(texture, dim=1), colour], dim=1)


def cosine_basis(size: int, device: torch.device) -> Tensor:
    """The orthonormal discrete cosine transform (type II) of `size` numbers, float64 (frequencies, places)."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    basis = (math.pi / size * place[:, None] * (place[None] + 0.5)).cos() * math.sqrt(2 / size)
    basis[0] = math.sqrt(1 / size)
    return basis
