"""PatchCodebook against patches cut out one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import seeded
from torch import Tensor

from discrete_schedulers import PatchCodebook

K, C, P = 7, 3, 2


def codebook() -> PatchCodebook:
    codes = PatchCodebook(K, P, C)
    codes.codebook.copy_(torch.rand(K, C, P, P, generator=seeded()))
    return codes


def patch(images: Tensor, row: int, column: int) -> Tensor:
    return images[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]


def test_decode_puts_patches_where_their_ids_are() -> None:
    codes, ids = codebook(), torch.randint(K, (4, 3, 5), generator=seeded())
    images = codes.decode(ids)
    assert images.shape == (4, C, 3 * P, 5 * P)
    for row in range(3):
        for column in range(5):
            assert torch.equal(patch(images, row, column), codes.codebook[ids[:, row, column]])
    assert torch.equal(codes.encode(images), ids)


def test_encode_finds_the_nearest_patch() -> None:
    codes, images = codebook(), torch.rand(4, C, 3 * P, 5 * P, generator=seeded(1))
    ids = codes.encode(images)
    assert (ids.shape, ids.dtype) == ((4, 3, 5), torch.int64)
    assert len(ids.unique()) == K  # all codes are in use: the comparison sees them all
    for row in range(3):
        for column in range(5):
            difference = patch(images, row, column)[:, None] - codes.codebook[None]  # (B, K, C, p, p)
            assert torch.equal(ids[:, row, column], difference.square().sum((2, 3, 4)).argmin(1))
    assert torch.equal(codes.encode(codes.decode(ids)), ids)
    assert torch.equal(codes.encode(images[:1]), ids[:1])


def test_half_precision_codes_are_still_found() -> None:
    codes, ids = codebook().half(), torch.arange(K).view(1, 1, K)
    assert codes.decode(ids).dtype == torch.float16
    assert torch.equal(codes.encode(codes.decode(ids)), ids)


def test_save_and_load(tmp_path: Path) -> None:
    codes = codebook()
    codes.save_pretrained(tmp_path)
    loaded = PatchCodebook.from_pretrained(tmp_path)
    assert torch.equal(loaded.codebook, codes.codebook)
    assert (loaded.config.num_codes, loaded.config.patch_size, loaded.config.num_channels) == (K, P, C)


@pytest.mark.parametrize("shape", [(1, C, 5, 4), (1, C, 4, 5), (1, C + 1, 4, 4), (C, 4, 4)])
def test_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"`images` has shape .*; allowed is \(B, 3, H, W\) with H and W multiples of 2"
    ):
        codebook().encode(torch.zeros(shape))


@pytest.mark.parametrize("ids", [torch.full((1, 2, 2), K), torch.full((1, 2, 2), -1), torch.zeros(2, 2).long()])
def test_ids_are_refused(ids: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`ids` has shape .*; allowed is \(B, h, w\) with values from 0 to 6"):
        codebook().decode(ids)
