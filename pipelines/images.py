"""Pictures and tokens: what a decoder makes of ids and its encoder of pixels, and which tokens a painted mask leaves alone."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from diffusers import VQModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

PICTURES = tuple(kind for kind in get_args(PipelineImageInput) if isinstance(kind, type))  # PIL's, arrays, tensors
PROCESSOR = VaeImageProcessor(do_normalize=False, vae_scale_factor=1)


def pixels_per_token(decoder: Any) -> int:
    """Height and width of what one token decodes to."""
    if isinstance(decoder, VQModel):
        return 2 ** (len(decoder.config.block_out_channels) - 1)
    return decoder.config.patch_size


def check_pictures(name: str, pictures: Any, allowed: str) -> None:
    """Raises `ValueError` if this is no picture, or not one picture or more in a list."""
    each = pictures if isinstance(pictures, list) else [pictures]
    wrong = [repr(one) for one in each if not isinstance(one, PICTURES)]
    if wrong or not each:
        raise ValueError(f"`{name}` has {', '.join(wrong) or 'no entries'}; {allowed}")


def pixels_of(image: PipelineImageInput, height: int, width: int) -> Tensor:
    """Pictures as pixels in [0, 1].

    Args:
        image (`PIL.Image`, `np.ndarray`, `torch.Tensor` or a list): Pictures; arrays (P, H, W, C) and tensors (P, C, H, W) with
            values in [0, 1].
        height (`int`): Pixels they are brought to, and
        width (`int`): those in the other direction.

    Returns:
        `torch.Tensor` of shape `(P, C, height, width)`: float32.

    Raises:
        ValueError: If these are no pictures, or values lie outside [0, 1], as in arrays of bytes.
    """
    allowed = "allowed are PIL pictures, arrays (P, H, W, C) and tensors (P, C, H, W), or a list of them, at least one"
    check_pictures("image", image, allowed)
    try:
        pixels = PROCESSOR.preprocess(image, height=height, width=width).float()
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"`image` could not be read ({error}); {allowed}") from error
    if pixels.numel() and not (float(pixels.min()) >= 0 and float(pixels.max()) <= 1):
        raise ValueError(f"`image` has values from {pixels.min():g} to {pixels.max():g}; allowed are numbers in [0, 1]")
    return pixels


def tokens_to_paint(mask_image: PipelineImageInput, height: int, width: int) -> Tensor:
    """Which tokens have a pixel that is to be painted.

    Args:
        mask_image (`PIL.Image`, `np.ndarray`, `torch.Tensor` or a list): Masks, (H, W), (P, H, W) or (P, 1, H, W), of any size:
            white (0.5 and more; in arrays of integers, anything but 0) is painted.
        height (`int`): Rows of tokens.
        width (`int`): Columns of tokens.

    Returns:
        `torch.Tensor` of shape `(P, height, width)`: Bool.

    Raises:
        ValueError: If these are no masks, or a mask has colours or NaN.
    """
    check_pictures(
        "mask_image", mask_image, "allowed are PIL pictures, arrays and tensors, or a list of them, at least one"
    )
    masks = mask_image if isinstance(mask_image, list) else [mask_image]
    painted = []
    for mask in masks:
        if isinstance(mask, np.ndarray | Tensor):
            sheet = torch.as_tensor(mask)
            if sheet.isnan().any():
                raise ValueError(
                    f"`mask_image` has NaN at {int(sheet.isnan().sum())} of {sheet.numel()} pixels; allowed: [0, 1]"
                )
            sheet = sheet >= 0.5 if sheet.is_floating_point() else sheet != 0
        else:
            sheet = torch.from_numpy(np.array(mask.convert("L"))) >= 128
        if sheet.dim() == 2:
            sheet = sheet[None]
        if sheet.dim() == 4 and sheet.shape[1] == 1:
            sheet = sheet[:, 0]
        if sheet.dim() != 3:
            raise ValueError(f"`mask_image` has shape {tuple(sheet.shape)}; allowed: (H, W), (P, H, W), (P, 1, H, W)")
        # each token covers its share of the mask, and a pixel that two tokens share counts for both
        painted.append(torch.nn.functional.adaptive_max_pool2d(sheet.float(), (height, width)) > 0)
    return torch.cat(painted)


@apply_forward_hook  # brings in the weights of a decoder that is offloaded
def encode(decoder: Any, pixels: Tensor, is_signed: bool) -> Tensor:
    """Ids (P, h, w) of pixels (P, C, H, W) in [0, 1]; with `is_signed` the decoder's own range is [-1, 1]."""
    pixels = (2 * pixels - 1 if is_signed else pixels).to(decoder.dtype)
    if not isinstance(decoder, VQModel):
        return decoder.encode(pixels)
    latents = decoder.encode(pixels).latents
    ids = decoder.quantize(latents)[2][2]
    return ids.view(len(latents), *latents.shape[-2:])


@apply_forward_hook
def decode(decoder: Any, ids: Tensor, is_signed: bool) -> Tensor:
    """Pixels (P, C, H, W) in [0, 1], float32, of ids (P, h, w).

    Raises:
        ValueError: If an id has no code, as a mask that a scheduler left over.
    """
    if not isinstance(decoder, VQModel):
        pixels = decoder.decode(ids)
    else:
        count, config = decoder.config.num_vq_embeddings, decoder.config
        if ids.numel() and int(ids.max()) >= count:
            raise ValueError(
                f"{int((ids >= count).sum())} of {ids.numel()} tokens have no code (ids up to {ids.max()}, codes up to "
                f"{count - 1}): the scheduler has left masks, or the model is not one of this decoder"
            )
        upcast = decoder.dtype == torch.float16 and config.force_upcast
        if upcast:
            decoder.float()  # as the checkpoint asks for: its activations overflow in float16
        if config.lookup_from_codebook:
            shape = (*ids.shape, config.vq_embed_dim or config.latent_channels)
            pixels = decoder.decode(ids, force_not_quantize=True, shape=shape).sample
        else:
            codes = decoder.quantize.embedding(ids).permute(0, 3, 1, 2)  # (P, c, h, w)
            pixels = decoder.decode(codes, force_not_quantize=True).sample
        if upcast:
            decoder.half()
    pixels = pixels.float()
    return ((pixels + 1) / 2 if is_signed else pixels).clamp(0, 1)


def pictures(pixels: Tensor, output_type: str) -> Any:
    """Pixels (P, C, H, W) in [0, 1] as `"pil"`, `"np"` (P, H, W, C) or `"pt"`."""
    return PROCESSOR.postprocess(pixels, output_type, do_denormalize=[False] * len(pixels))
