r"""Image models of the Hub: what a repository holds, and how it becomes a network, a decoder and their facts.

    aMUSEd           diffusers' layout with model_index.json: UVit2DModel, VQModel, CLIP, all of diffusers and transformers
    Meissonic        the same layout, with a network of this library
    Halton-MaskGIT   one `.pth` for each network, with optimizer state; codes are those of LlamaGen's VQ-16

LlamaGen's VQ-16 is a VQModel of diffusers with other key names: its codes are divided by their length once and for all, and
since the nearest of codes of one length does not depend on the length of what is looked up, encoding is the same too.
Sources: `amused/amused-256`, `MeissonFlow/Meissonic`, `llvictorll/Halton-MaskGIT`, `FoundationVision/LlamaGen`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import UVit2DModel, VQModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from discrete_schedulers.models.halton import HaltonMaskGITModel
from discrete_schedulers.models.loading import first_file, read_config
from discrete_schedulers.models.meissonic import MeissonicTransformerModel

HALTON_REPOSITORY = "llvictorll/Halton-MaskGIT"
HALTON_FILES = (
    *(f"ImageNet_256_{size}.pth" for size in ("tiny", "small", "base")),
    *(f"ImageNet_384_{size}.pth" for size in ("small", "base", "large")),
)
HALTON_HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}  # by width: the files do not say
LLAMAGEN = ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt")


class ImageParts(NamedTuple):
    """What a pipeline is made of.

    Args:
        model (`torch.nn.Module`): The network.
        decoder (`VQModel`): Between pixels and codes.
        facts (`dict`): Arguments of [`NetworkDenoiser`].
        signed_pixels (`bool`): Whether the decoder's pixels lie in [-1, 1].
        tokenizer (`CLIPTokenizer`, *optional*): For prompts.
        text_encoder (`CLIPTextModelWithProjection`, *optional*): For prompts.
    """

    model: Any
    decoder: Any
    facts: dict[str, Any]
    signed_pixels: bool
    tokenizer: Any = None
    text_encoder: Any = None


def text_to_image_class(source: str, index: Mapping[str, Any], hub: Mapping[str, Any]) -> type | None:
    """The network of a repository in diffusers' layout, `None` where it is not one of these.

    Args:
        source (`str`): Folder or repository id.
        index (`dict`): Its model_index.json.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.
    """
    if index.get("_class_name") == "AmusedPipeline":
        return UVit2DModel
    config_file = first_file(source, ("transformer/config.json",), hub) if "transformer" in index else None
    config = {} if config_file is None else read_config(config_file)
    # diffusers has another class of this name
    if config.get("_class_name") == "Transformer2DModel" and {"num_single_layers", "codebook_size"} <= config.keys():
        return MeissonicTransformerModel
    return None


def load_text_to_image(
    source: str, network_class: type, dtype: torch.dtype | None, variant: str | None, hub: Mapping[str, Any]
) -> ImageParts:
    """aMUSEd or Meissonic: components in diffusers' layout.

    Args:
        source (`str`): Folder or repository id.
        network_class (`type`): From `text_to_image_class`.
        dtype (`torch.dtype`, *optional*): Of the weights; `None`: float32.
        variant (`str`, *optional*): Of the weight files, such as `"fp16"`.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.
    """
    classes: dict[str, Any] = {"transformer": network_class, "vqvae": VQModel}
    classes |= {"text_encoder": CLIPTextModelWithProjection}
    parts: dict[str, Any] = {}
    for folder, kind in classes.items():
        arguments = {"subfolder": folder, "dtype": dtype or torch.float32, "variant": variant, **hub}
        parts[folder] = kind.from_pretrained(source, **arguments).eval()
    config = parts["transformer"].config
    found = first_file(source, ("scheduler/scheduler_config.json",), hub)
    mask = None if found is None else read_config(found).get("mask_token_id")
    facts = {
        "vocab_size": config.vocab_size,
        "mask_token_id": config.vocab_size - 1 if mask is None else mask,
        "grid_input": True,
        "head": "mlm_layer",  # two convolutions of single positions
        "codebook_size": config.codebook_size,
    }
    if network_class is UVit2DModel:
        facts["grid_shape"] = [config.sample_size] * 2
    else:  # 1024 pixels where the blocks run on half the grid, else 512
        facts |= {"grid_shape": [64, 64] if config.downsample else [32, 32], "time_input": "steps_left"}
    tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **hub)
    return ImageParts(parts["transformer"], parts["vqvae"], facts, False, tokenizer, parts["text_encoder"])


def load_halton(
    source: str, weight_name: str | None, decoder: Any, dtype: torch.dtype | None, hub: Mapping[str, Any]
) -> ImageParts:
    """Halton-MaskGIT: a `.pth` of the repository, and LlamaGen's decoder.

    Args:
        source (`str`): Folder or repository id.
        weight_name (`str`): Name of the file.
        decoder (`VQModel`, `str` or `Path`, *optional*): A decoder, or the folder, file or repository of `vq_ds16_c2i.pt`;
            default: LlamaGen's.
        dtype (`torch.dtype`, *optional*): Of the weights; `None`: as in the files.
        hub (`dict`): Arguments of `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: If no file is named, there is no such file, or it is not one of this network.
    """
    if weight_name is None:
        raise ValueError(f"`weight_name` is required for {source!r}; published: {', '.join(HALTON_FILES)}")
    path = first_file(source, (weight_name,), hub)
    if path is None:
        raise ValueError(f"{source!r} has no file {weight_name!r}; published: {', '.join(HALTON_FILES)}")
    network = halton_network(state_of(path, "model_state_dict", dtype), path)
    if decoder is None or isinstance(decoder, str | Path):
        place = LLAMAGEN[0] if decoder is None else str(decoder)
        weights = Path(place) if Path(place).is_file() else None
        rest = {name: value for name, value in hub.items() if name != "revision"}  # of the network
        weights = weights or first_file(place, (LLAMAGEN[1],), rest)
        if weights is None:
            raise ValueError(f"`decoder` {place!r} has no file {LLAMAGEN[1]}")
        decoder = llamagen_decoder(state_of(weights, "model", dtype), weights)
    size = network.config.grid_size
    facts = {
        "vocab_size": network.config.vocab_size,
        "mask_token_id": network.config.vocab_size - 1,
        "grid_shape": [size, size],
        "max_length": size * size,
        "split_head": True,
        "codebook_size": network.config.vocab_size - 1,
    }
    return ImageParts(network, decoder, facts, signed_pixels=True)


def state_of(path: Path, name: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The table of tensors under a name of a training checkpoint, in this dtype, without the prefixes of wrappers.

    Raises:
        ValueError: If the file is damaged, holds more than tensors and plain values, or has no such table.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which is not read: a pickle can run code ({error})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and download it again") from error
    state = checkpoint.get(name) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} has no table of tensors {name!r}")
    return {re.sub(r"(module\.|_orig_mod\.)", "", key): value.to(dtype or value.dtype) for key, value in state.items()}


def fitted(network: Any, state: Mapping[str, Tensor], path: Path) -> Any:
    """The network with these weights.

    Raises:
        ValueError: If keys are missing or left over, or shapes differ.
    """
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    return network.eval()


def halton_network(state: Mapping[str, Tensor], path: Path) -> HaltonMaskGITModel:
    """The network of a Halton-MaskGIT file; its sizes are those of the tensors."""
    needed = ("tok_emb.weight", "pos_emb.weight", "cls_emb.weight", "transformer.layers.0.ff.w1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{path} is not of Halton-MaskGIT: it lacks {', '.join(missing)}")
    (vocab_size, width), inner = state[needed[0]].shape, len(state[needed[3]])
    heads = HALTON_HEADS.get(width)
    if heads is None:
        raise ValueError(f"{path} has width {width}; known are {', '.join(map(str, HALTON_HEADS))}")
    numbers = [int(key.split(".")[2]) for key in state if key.startswith("transformer.layers.")]
    with init_empty_weights():
        network = HaltonMaskGITModel(
            vocab_size=vocab_size,
            hidden_size=width,
            num_layers=max(numbers) + 1,
            num_heads=heads,
            intermediate_size=inner,
            grid_size=round(len(state[needed[1]]) ** 0.5),
            num_classes=len(state[needed[2]]) - 1,
            num_registers=len(state["reg_tokens.weight"]) if "reg_tokens.weight" in state else 0,
        )
    head = state.get("head.weight")
    if head is None or not torch.equal(head, state["tok_emb.weight"]):
        raise ValueError(f"{path} has a head that is not its token table: it is not of Halton-MaskGIT")
    return fitted(network, {key: value for key, value in state.items() if key != "head.weight"}, path)


# LlamaGen's keys -> those of diffusers' VQModel, all applied in this order. The decoder's blocks come in the order in which
# they are run, in both; the last encoder block and the first decoder block have attention.
LLAMAGEN_KEYS = (
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"^((?:en|de)coder\.\w+_blocks\.\d+)\.res\.", r"\1.resnets."),
    (r"^((?:en|de)coder\.\w+_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def llamagen_decoder(state: Mapping[str, Tensor], path: Path) -> VQModel:
    """LlamaGen's VQ-16 as a VQModel; its sizes are those of the tensors."""
    renamed = {}
    for published, tensor in state.items():
        key = published
        for pattern, replacement in LLAMAGEN_KEYS:
            key = re.sub(pattern, replacement, key)
        if ".attentions." in key and key.endswith(".weight") and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]  # a convolution of one pixel is a linear map
        renamed[key] = tensor
    renamed.pop("quantize.codebook_used", None)  # a statistic of training
    levels = sum(bool(re.fullmatch(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", key)) for key in renamed)
    if not levels or "quantize.embedding.weight" not in renamed:
        raise ValueError(f"{path} is not LlamaGen's image tokenizer")
    table = renamed["quantize.embedding.weight"]
    renamed["quantize.embedding.weight"] = torch.nn.functional.normalize(table.float(), dim=-1).to(table.dtype)
    codes, code_width = table.shape
    with init_empty_weights():
        decoder = VQModel(
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            block_out_channels=[len(renamed[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)],
            layers_per_block=2,
            latent_channels=renamed["quant_conv.weight"].shape[1],
            num_vq_embeddings=codes,
            vq_embed_dim=code_width,
            lookup_from_codebook=True,
        )
    return fitted(decoder, renamed, path)
